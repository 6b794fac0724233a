"""ε against published accountants, σ from ε, and what is refused."""

import math

import pytest

from dpsgd.privacy import PrivacyConfig, epsilon, noise_multiplier

POINTS = [(0.01, 1.0, 1000, 1.82824), (0.5, 4.0, 400, 13.48104)]


@pytest.mark.parametrize(("q", "sigma", "steps", "want"), POINTS)
def test_reference_points(q, sigma, steps, want):
    got = epsilon(sample_rate=q, noise_multiplier=sigma, steps=steps, delta=1e-5)
    assert got == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("q", "sigma", "steps", "want"), POINTS)
def test_agrees_with_opacus_prv(q, sigma, steps, want):
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    prv.history = [(sigma, q, steps)]
    assert prv.get_epsilon(delta=1e-5, eps_error=0.001) == pytest.approx(want, abs=0.002)


def test_replace_one_costs_more_and_rdp_is_looser():
    point = {"sample_rate": 0.01, "noise_multiplier": 1.0, "steps": 1000, "delta": 1e-5}
    assert epsilon(**point, neighbours="replace_one") == pytest.approx(2.843, abs=1e-3)
    assert epsilon(**point, accountant="rdp") == pytest.approx(2.1014, abs=1e-4)


def test_sigma_for_epsilon_is_enough_and_not_wasteful():
    point = {"sample_rate": 0.2, "steps": 20, "delta": 1e-5}
    sigma = noise_multiplier(2.0, **point)
    assert epsilon(noise_multiplier=sigma, **point) <= 2.0
    assert epsilon(noise_multiplier=sigma - 2e-3, **point) > 2.0


def test_no_noise_is_no_privacy():
    assert math.isinf(epsilon(sample_rate=0.1, noise_multiplier=0.0, steps=1, delta=1e-5))


GOOD = {
    "num_examples": 1000,
    "sample_rate": 0.1,
    "noise_multiplier": 1.0,
    "clip_norm": 1.0,
    "steps": 10,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_examples", 0),
        ("sample_rate", 0.0),
        ("sample_rate", 1.1),
        ("noise_multiplier", -1.0),
        ("clip_norm", 0.0),
        ("clip_norm", math.nan),
        ("steps", 0),
        ("delta", 0.0),
        ("delta", 1.0),
        ("neighbours", "zero"),
    ],
)
def test_bad_input_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        PrivacyConfig(**GOOD | {name: value})


def test_a_large_delta_warns():
    with pytest.warns(UserWarning, match="not below 1/N"):
        PrivacyConfig(**GOOD | {"delta": 1e-3})


def test_a_rate_so_low_that_delta_covers_it_needs_no_search():
    assert 0 < noise_multiplier(1.0, sample_rate=1e-7, steps=5, delta=1e-5) < 1


def test_epsilon_must_be_positive_and_reachable():
    with pytest.raises(ValueError, match="epsilon is 0"):
        noise_multiplier(0, sample_rate=0.1, steps=1, delta=1e-5)
    with pytest.raises(ValueError, match="out of reach"):
        noise_multiplier(1e-6, sample_rate=0.1, steps=1000, delta=1e-5)


def test_expected_batch_size_is_q_times_n():
    assert PrivacyConfig(**GOOD).expected_batch_size == pytest.approx(100)
