"""The oracle, by hand."""

import numpy as np
import pytest

from dpsgd import reference


def test_clips_over_all_parameters_together():
    row = {"a": np.array([3.0]), "b": np.array([4.0])}
    total = reference.clipped_sum([row, row], [True, False], 1.0)
    np.testing.assert_allclose([total["a"][0], total["b"][0]], [0.6, 0.8])


@pytest.mark.parametrize(
    ("length", "want"), [(0.0, 1.0), (0.5, 1.0), (4.0, 0.25), (1e25, 0.0), (np.nan, 0.0)]
)
def test_clip_factor(length, want):
    assert reference.clip_factor(length, 1.0) == want


def test_masked_and_non_finite_rows_contribute_nothing():
    rows = [{"a": np.array([np.nan])}, {"a": np.array([0.5])}, {"a": np.array([np.inf])}]
    np.testing.assert_array_equal(reference.clipped_sum(rows, [False, True, True], 1.0)["a"], [0.5])


def test_update_direction_adds_noise_of_std_sigma_c_over_l():
    total = {"a": np.full(200_000, 3.0)}
    got = reference.update_direction(
        total,
        clip_norm=2.0,
        noise_multiplier=1.5,
        expected_batch_size=10.0,
        rng=np.random.default_rng(0),
    )["a"]
    assert got.mean() == pytest.approx(0.3, abs=5 * 0.3 / np.sqrt(200_000))
    assert got.std() == pytest.approx(0.3, rel=5 / np.sqrt(400_000))
