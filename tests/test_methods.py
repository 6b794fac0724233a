"""Every method of both frameworks against the oracle, and what each promises at the edges."""

import functools
import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients

from dpsgd import METHODS, PrivacyConfig, models, poisson_batches, reference

P = 4
ALL = list(METHODS)
PRIVATE = [m.name for m in METHODS.values() if m.private]
OURS = [name for name in PRIVATE if METHODS[name].ours]
TOLERANCE = 3e-6  # float32 sums of a few small gradients, relative to their scale


def privacy(clip_norm=1.0, sigma=0.0, **changes):
    values = {"num_examples": 1000, "sample_rate": 0.01, "steps": 10} | changes
    return PrivacyConfig(noise_multiplier=sigma, clip_norm=clip_norm, **values)


def batch(spec, seed, rows=P):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, *spec.input_shape), np.float32)
    return inputs, rng.integers(0, spec.num_classes, rows)


def build(name, spec, config, *, learning_rate=1.0, seed=7, physical_batch_size=P, loss=None):
    framework = importlib.import_module(f"dpsgd.{METHODS[name].framework}.models")
    model = framework.build(spec, seed=1)
    return METHODS[name].build(
        model,
        framework.optimizer(model, "sgd", learning_rate),
        config,
        loss=loss or framework.cross_entropy,
        physical_batch_size=physical_batch_size,
        seed=seed,
    )


@functools.cache
def _built(name, model, clip_norm):
    return build(name, models.get(model), privacy(clip_norm))


def built(name, model, clip_norm):
    """Clipping changes no state, so one step, and its compilation, serves many examples."""
    if METHODS[name].framework == "torch":
        return _built(name, model, clip_norm)
    step = _built(name, model, 1.0)
    step.privacy = privacy(clip_norm)  # an argument of what is compiled
    return step


def oracle(spec, inputs, targets, mask, clip_norm, *, extra=0.0):
    rows = per_example_gradients(spec, inputs, targets, seed=1)
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
    step = built(name, model, clip_norm)
    placed = step.put(inputs, targets, mask)
    extra = 1e-6 if "opacus" in name else 0.0
    want, lengths = oracle(spec, inputs, targets, mask, clip_norm, extra=extra)
    bounded = np.minimum(lengths, clip_norm).sum()
    assert_close(step.clipped_sum(*placed), want, scale=max(bounded, 1e-3))
    np.testing.assert_allclose(step.norms(*placed), lengths, rtol=1e-4, atol=1e-6)


def test_the_comparison_rejects_an_unclipped_layer():
    spec, mask = models.get("digits-cnn"), np.ones(P, bool)
    inputs, targets = batch(spec, 0)
    step, loose = (build(name, spec, privacy(0.1)) for name in ("torch-vmap", "torch-sgd"))
    placed = step.put(inputs, targets, mask)
    got = step.clipped_sum(*placed)
    got["linear.bias"] = loose.clipped_sum(*placed)["linear.bias"]
    want, lengths = oracle(spec, inputs, targets, mask, 0.1)
    with pytest.raises(AssertionError):
        assert_close(got, want, scale=np.minimum(lengths, 0.1).sum())


@pytest.mark.parametrize("other", [n for n in OURS if n != "torch-vmap"])
@given(mask=st.lists(st.booleans(), min_size=P, max_size=P), seed=st.integers(0, 99))
def test_methods_and_frameworks_agree(other, mask, seed):
    spec = models.get("vit-test")
    one, two = (built(name, "vit-test", 1.0) for name in ("torch-vmap", other))
    arrays = (*batch(spec, seed), np.array(mask))
    assert_close(one.clipped_sum(*one.put(*arrays)), two.clipped_sum(*two.put(*arrays)), scale=P)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [0, 1, P - 1, P, P + 1])
def test_one_logical_batch_of_any_size(name, size):
    """Also division by L, the sum over physical batches, and that an empty draw does nothing."""
    spec, config, clip = models.get("digits-cnn"), privacy(), 1.0
    inputs, targets = batch(spec, 6, rows=2 * P)
    step = build(name, spec, config)
    before = step.parameters()
    for start in range(0, size, P):
        mask = np.arange(start, start + P) < size
        rows = slice(start, start + P)
        step.accumulate(*step.put(inputs[rows], targets[rows], mask))
    step.update()
    after = step.parameters()
    clip = clip if METHODS[name].private else 1e9
    want, _ = oracle(spec, inputs, targets, np.arange(2 * P) < size, clip)
    for n in before:
        moved = before[n] - want[n] / config.expected_batch_size
        np.testing.assert_allclose(after[n], moved, atol=2e-6)


@pytest.mark.parametrize("name", ["torch-sgd", "jax-sgd", *OURS])
def test_padding_may_hold_nan(name):
    spec, mask = models.get("digits-cnn"), np.array([True, False, True, False])
    inputs, targets = batch(spec, 3)
    step = built(name, "digits-cnn", 1.0)
    zeros = np.where(mask[:, None, None, None], inputs, 0)
    want = step.clipped_sum(*step.put(zeros, targets, mask))
    inputs[~mask] = np.nan
    got = step.clipped_sum(*step.put(inputs, targets, mask))
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])


def spiked(name):
    """A loss 1e30 times larger where a pixel is huge: finite gradients, infinite squared norm."""
    if METHODS[name].framework == "torch":
        import torch as xp

        from dpsgd.torch.models import cross_entropy
    else:
        import jax.numpy as xp

        from dpsgd.jax.models import cross_entropy

    def loss(model, inputs, targets):
        huge = (inputs > 1e3).reshape(len(inputs), -1).any(1)
        return cross_entropy(model, inputs, targets) * xp.where(huge, 1e30, 1.0)

    return loss


@pytest.mark.parametrize("bad", [np.nan, np.inf, "overflow"])
@pytest.mark.parametrize("name", OURS)
def test_a_non_finite_example_contributes_nothing(name, bad):
    spec = models.get("digits-cnn")
    inputs, targets = batch(spec, 4)
    step = build(name, spec, privacy(), loss=spiked(name))
    without = step.clipped_sum(*step.put(inputs, targets, np.array([True, True, True, False])))
    if bad == "overflow":
        inputs[3, 0, 0, 0] = 2e3
    else:
        inputs[3] = bad
    got = step.clipped_sum(*step.put(inputs, targets, np.ones(P, bool)))
    assert_close(got, without, scale=P)
    assert any(np.abs(v).max() > 0 for v in got.values())


@pytest.mark.parametrize("name", [n for n in PRIVATE if not METHODS[n].ours])
def test_peers_still_deviate_as_their_rows_say(name):
    spec = models.get("digits-cnn")
    inputs, targets = batch(spec, 4)
    step = built(name, "digits-cnn", 1.0)
    clean = step.clipped_sum(*step.put(inputs, targets, np.array([True, True, True, False])))
    inputs[3] = np.nan
    got = step.clipped_sum(*step.put(inputs, targets, np.ones(P, bool)))
    if name == "jax-privacy":  # all elements are NaN here, so all are zeroed
        assert_close(got, clean, scale=P)
    else:
        assert any(np.isnan(v).any() for v in got.values())


def test_jax_privacy_still_zeroes_elements_not_examples():
    import jax.numpy as jnp
    from jax_privacy import clipping

    half = {"a": jnp.array([jnp.nan]), "b": jnp.array([0.5])}
    clipped, _ = clipping.clip_pytree(half, 1.0)
    assert clipped["a"][0] == 0
    assert clipped["b"][0] == 0.5, "the finite rest of a bad example still enters"


@pytest.mark.parametrize("name", [n for n in PRIVATE if "opacus" in n])
def test_opacus_still_adds_1e6_to_the_norm(name):
    spec, clip_norm = models.get("digits-cnn"), 1e-5
    inputs, targets = batch(spec, 0)
    step, mask = build(name, spec, privacy(clip_norm)), np.ones(P, bool)
    got = step.clipped_sum(*step.put(inputs, targets, mask))
    exact, lengths = oracle(spec, inputs, targets, mask, clip_norm)
    its, _ = oracle(spec, inputs, targets, mask, clip_norm, extra=1e-6)
    size = np.sqrt(sum((v**2).sum() for v in exact.values()))
    off = np.sqrt(sum(((got[n] - its[n]) ** 2).sum() for n in got)) / size
    apart = np.sqrt(sum(((exact[n] - its[n]) ** 2).sum() for n in got)) / size
    assert off < 1e-5
    assert apart > 1e-8, f"norms {lengths} tell the formulas apart"


def noise_std(step, batches):
    before = step.parameters()
    for placed in batches:
        step.accumulate(*placed)
    step.update()
    after = step.parameters()
    moved = np.concatenate([(before[n] - after[n]).ravel() for n in before])
    return np.sqrt(np.mean(moved.astype(np.float64) ** 2))


@pytest.mark.parametrize("name", PRIVATE)
def test_noise_is_drawn_once_per_logical_batch(name):
    spec, config = models.get("digits-cnn"), privacy(clip_norm=1e-3, sigma=2000.0)
    step = build(name, spec, config)
    want = config.noise_multiplier * config.clip_norm / config.expected_batch_size
    bound = 5 / np.sqrt(2 * 9994)  # five standard errors of a std over the CNN's 9,994 parameters
    masks = [np.arange(P) < k for k in (P, 1, 0)]
    for physical in (0, 1, 3):
        got = noise_std(step, [step.put(*batch(spec, 5), m) for m in masks[:physical]])
        assert abs(got / want - 1) < bound
        assert abs(1.05 * got / want - 1) > bound, "a wrong σ of 5 % must be seen"
        assert abs(np.sqrt(2) * got / want - 1) > bound, "noise per physical batch must be seen"


def test_seeds_make_noise_and_their_absence_makes_it_fresh():
    spec, config = models.get("digits-cnn"), privacy(sigma=1.0)
    for name in ("torch-vmap", "jax-masked"):
        after = []
        for seed in (1, 1, 2, None, None):
            step = build(name, spec, config, seed=seed)
            step.update()
            after.append(step.parameters()["linear.weight"])
        assert (after[0] == after[1]).all()
        assert len({a.tobytes() for a in after}) == 4


@pytest.mark.parametrize("name", PRIVATE)
def test_twenty_noiseless_steps_end_where_the_oracle_ends(name):
    """The same seed, weights and draws: all methods meet at the same parameters."""
    spec, config = models.get("digits-cnn"), privacy(num_examples=40, sample_rate=0.15, steps=20)
    inputs, targets = batch(spec, 8, rows=40)
    finals = []
    for method in ("torch-vmap", name):
        step = build(method, spec, config, learning_rate=0.5)
        for logical in poisson_batches(40, 0.15, P, 20, seed=3):
            for part in logical:
                step.accumulate(*step.put(inputs[part.indices], targets[part.indices], part.mask))
            step.update()
        finals.append(step.parameters())
    for n in finals[0]:
        np.testing.assert_allclose(finals[1][n], finals[0][n], atol=1e-4)


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if m.framework == "jax" and m.static_shapes]
)
def test_static_shapes_compile_once_whatever_is_drawn(name):
    spec = models.get("digits-cnn")
    inputs, targets = batch(spec, 9, rows=50)
    step = build(name, spec, privacy(1.0, 1.0))
    before, sizes = step.compiles(), set()
    for logical in poisson_batches(50, 0.1, P, 200, seed=1):
        sizes.add(logical.size)
        for part in logical:
            step.accumulate(*step.put(inputs[part.indices], targets[part.indices], part.mask))
        step.update()
    assert len(sizes) > 8
    assert 0 in sizes
    assert step.compiles() - before == 2 + METHODS[name].private, "accumulate, update, noise"


@pytest.mark.parametrize("name", ["jax-bookkeeping", "jax-privacy"])
def test_another_configuration_needs_no_other_compilation(name):
    spec, mask = models.get("digits-cnn"), np.ones(P, bool)
    inputs, targets = batch(spec, 0)
    step, counts = build(name, spec, privacy(1.0, sigma=1.0)), []
    placed = step.put(inputs, targets, mask)
    for config in (privacy(1.0, 1.0), privacy(1e-3, 1e4), privacy(0.5, 2.0, sample_rate=0.1)):
        step.privacy = config
        before = step.parameters()
        step.accumulate(*placed)
        step.update()
        after = step.parameters()
        counts.append(step.compiles())
        want = config.noise_multiplier * config.clip_norm / config.expected_batch_size
        moved = np.concatenate([(after[n] - before[n]).ravel() for n in before])
        assert abs(moved.std() / want - 1) < 0.1
    assert counts[0] == counts[-1]


def test_naive_jax_compiles_for_each_new_size():
    spec = models.get("digits-cnn")
    step = build("jax-vmap", spec, privacy())
    before = step.compiles()
    for size in (1, 2, 3, 2, 1):
        step.accumulate(*step.put(*batch(spec, 0, rows=size), np.ones(size, bool)))
    assert step.compiles() - before == 3


@pytest.mark.parametrize("name", ["torch-sgd", "torch-opacus", *OURS])
def test_refuses_batchnorm_and_frozen_models(name):
    if METHODS[name].framework == "torch":
        from torch import nn, optim

        mixed, frozen = nn.Sequential(nn.BatchNorm1d(2)), nn.Linear(2, 2).requires_grad_(False)
        optimizer = optim.SGD(mixed.parameters(), lr=1.0)
    else:
        import optax
        from flax import nnx

        optimizer = optax.sgd(1.0)
        mixed = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
        frozen = nnx.Sequential(nnx.relu)
    options = {"loss": None, "physical_batch_size": P}
    with pytest.raises(ValueError, match=r"0' is a BatchNorm.*GroupNorm"):
        METHODS[name].build(mixed, optimizer, privacy(), **options)
    with pytest.raises(ValueError, match="no trainable parameter"):
        METHODS[name].build(frozen, optimizer, privacy(), **options)


@pytest.mark.parametrize("name", ["torch-vmap", "jax-masked"])
def test_refuses_bad_options(name):
    spec = models.get("digits-cnn")
    with pytest.raises(ValueError, match="at least 1"):
        build(name, spec, privacy(), physical_batch_size=0)
    framework = importlib.import_module(f"dpsgd.{METHODS[name].framework}.models")
    model = framework.build(spec)
    with pytest.raises(ValueError, match="adam, sgd"):
        framework.optimizer(model, "adamm", 1.0)
    optimizer = framework.optimizer(model, "sgd", 1.0)
    with pytest.raises(ValueError, match="fp32, tf32, bf16"):
        METHODS[name].build(
            model, optimizer, privacy(), loss=None, physical_batch_size=P, precision="fp8"
        )
