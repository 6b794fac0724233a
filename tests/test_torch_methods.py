"""Every torch method against the oracle, and what each promises at the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients

from dpsgd import METHODS, PrivacyConfig, methods, models, reference
from dpsgd.torch import models as torch_models

P = 4
PRIVATE = [m.name for m in METHODS.values() if m.framework == "torch" and m.private]
OURS = [name for name in PRIVATE if METHODS[name].ours]
TOLERANCE = 2e-6  # float32 sums of a few small gradients, relative to C·P


def privacy(clip_norm=1.0, sigma=0.0, **changes):
    values = {"num_examples": 1000, "sample_rate": 0.01, "steps": 10} | changes
    return PrivacyConfig(noise_multiplier=sigma, clip_norm=clip_norm, **values)


def batch(spec, seed, rows=P):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, *spec.input_shape), np.float32)
    return inputs, rng.integers(0, spec.num_classes, rows)


def build(name, spec, config, *, learning_rate=1.0, **options):
    model = torch_models.build(spec, seed=1)
    optimizer = torch_models.optimizer(model, "sgd", learning_rate)
    options = {"loss": torch_models.cross_entropy, "physical_batch_size": P, "seed": 7} | options
    return METHODS[name].build(model, optimizer, config, **options)


def oracle(spec, inputs, targets, mask, clip_norm, *, extra=0.0):
    model = torch_models.build(spec, seed=1)
    rows = per_example_gradients(model, inputs, targets)
    lengths = [reference.norm(r) for r in rows]
    if extra:  # Opacus' own formula, min(1, C/(‖g‖+extra))
        total = {n: np.zeros(g.shape) for n, g in rows[0].items()}
        for row, length, real in zip(rows, lengths, mask, strict=True):
            for n, g in row.items():
                total[n] += real * min(1, clip_norm / (length + extra)) * g
        return total, np.where(mask, lengths, 0)
    return reference.clipped_sum(rows, mask, clip_norm), np.where(mask, lengths, 0)


def assert_close(got, want, scale):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize("model", ["digits-cnn", "vit-test"])
@given(
    mask=st.lists(st.booleans(), min_size=P, max_size=P),
    clip_norm=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_clipped_sum_and_norms_match_the_oracle(name, model, mask, clip_norm, seed):
    spec, mask = models.get(model), np.array(mask)
    inputs, targets = batch(spec, seed)
    step = build(name, spec, privacy(clip_norm))
    placed = step.put(inputs, targets, mask)
    extra = 0.0 if METHODS[name].ours else 1e-6
    want, lengths = oracle(spec, inputs, targets, mask, clip_norm, extra=extra)
    assert_close(step.clipped_sum(*placed), want, scale=P * max(1.0, lengths.max()))
    np.testing.assert_allclose(step.norms(*placed), lengths, rtol=1e-4, atol=1e-6)


def test_the_comparison_rejects_an_unclipped_layer():
    spec, mask = models.get("digits-cnn"), np.ones(P, bool)
    inputs, targets = batch(spec, 0)
    step = build("torch-vmap", spec, privacy(0.1))
    got = step.clipped_sum(*step.put(inputs, targets, mask))
    loose = build("torch-sgd", spec, privacy(0.1))
    got["linear.weight"] = loose.clipped_sum(*loose.put(inputs, targets, mask))["linear.weight"]
    want, lengths = oracle(spec, inputs, targets, mask, 0.1)
    with pytest.raises(AssertionError):
        assert_close(got, want, scale=P * lengths.max())


@pytest.mark.parametrize("name", ["torch-sgd", *OURS])
def test_padding_may_hold_nan(name):
    spec, mask = models.get("digits-cnn"), np.array([True, False, True, False])
    inputs, targets = batch(spec, 3)
    step = build(name, spec, privacy())
    want = step.clipped_sum(
        *step.put(np.where(mask[:, None, None, None], inputs, 0), targets, mask)
    )
    inputs[~mask] = np.nan
    got = step.clipped_sum(*step.put(inputs, targets, mask))
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("name", OURS)
def test_a_non_finite_example_contributes_nothing(name, bad):
    spec = models.get("digits-cnn")
    inputs, targets = batch(spec, 4)
    step = build(name, spec, privacy())
    without = step.clipped_sum(*step.put(inputs, targets, np.array([True, True, True, False])))
    if bad == 1e38:  # a finite gradient whose squared norm overflows float32
        step.loss = lambda m, x, y: (
            torch_models.cross_entropy(m, x[:, :1], y) * torch.where(x[:, 0, 0, 0] > 1e3, 1e30, 1.0)
        )
        inputs[3, 0, 0, 0] = 2e3
    else:
        inputs[3] = bad
    got = step.clipped_sum(*step.put(inputs, targets, np.ones(P, bool)))
    assert_close(got, without, scale=P)


@pytest.mark.parametrize("name", [n for n in PRIVATE if not METHODS[n].ours])
def test_peers_still_spread_a_nan(name):
    spec = models.get("digits-cnn")
    inputs, targets = batch(spec, 4)
    inputs[3] = np.nan
    step = build(name, spec, privacy())
    got = step.clipped_sum(*step.put(inputs, targets, np.ones(P, bool)))
    assert any(np.isnan(v).any() for v in got.values())


def noise_std(step, batches):
    before = step.parameters()
    for placed in batches:
        step.accumulate(*placed)
    step.update()
    after = step.parameters()
    moved = np.concatenate([(before[n] - after[n]).ravel() for n in before])
    return np.sqrt(np.mean(moved**2))


@pytest.mark.parametrize("physical", [0, 1, 3])
@pytest.mark.parametrize("name", PRIVATE)
def test_noise_is_drawn_once_per_logical_batch(name, physical):
    spec, config = models.get("digits-cnn"), privacy(clip_norm=1e-3, sigma=2000.0)
    step = build(name, spec, config)
    masks = [np.arange(P) < k for k in (P, 1, 0)][:physical]
    got = noise_std(step, [step.put(*batch(spec, 5), m) for m in masks])
    want = config.noise_multiplier * config.clip_norm / config.expected_batch_size
    bound = 5 / np.sqrt(2 * 9994)  # five standard errors of a std over the CNN's 9,994 parameters
    assert abs(got / want - 1) < bound
    assert abs(1.05 * got / want - 1) > bound, "a wrong σ of 5 % must be seen"
    assert abs(np.sqrt(2) * got / want - 1) > bound, "noise per physical batch must be seen"


@pytest.mark.parametrize("name", PRIVATE)
def test_update_divides_by_the_expected_batch_size(name):
    spec, config = models.get("digits-cnn"), privacy()
    step = build(name, spec, config)
    placed = step.put(*batch(spec, 6), np.array([True, True, True, False]))
    want, before = step.clipped_sum(*placed), step.parameters()
    step.accumulate(*placed)
    step.accumulate(*placed)
    step.update()
    after = step.parameters()
    for n in want:
        moved = before[n] - 2 * want[n] / config.expected_batch_size
        np.testing.assert_allclose(after[n], moved, atol=1e-6)


@pytest.mark.parametrize("name", ["torch-sgd", *OURS])
def test_refuses_batchnorm_and_frozen_models(name):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    options = {"loss": torch_models.cross_entropy, "physical_batch_size": P}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="'1' is a BatchNorm1d.*GroupNorm"):
        methods.get(name).build(model, optimizer, privacy(), **options)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        methods.get(name).build(frozen, optimizer, privacy(), **options)
