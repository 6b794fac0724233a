"""Book-keeping and ghost clipping in JAX, on nnx modules as people write them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dpsgd import METHODS, PrivacyConfig, cost, reference
from dpsgd.jax import weights
from dpsgd.jax.layers import RULES, Lookup, StandardizedConv
from dpsgd.jax.layers.norm import Norm
from dpsgd.jax.layers.standardized import Standardized
from dpsgd.jax.rows import square_rows

P = 4
MASK = np.array([True, True, False, True])


def each(model, inputs, targets):
    y = model(inputs).reshape(len(inputs), -1)
    return jnp.square(y) @ (1 + jnp.arange(y.shape[1], dtype=y.dtype) % 3)


def privacy(clip_norm):
    return PrivacyConfig(
        num_examples=1000, sample_rate=0.01, noise_multiplier=0.0, clip_norm=clip_norm, steps=10
    )


def build(model, method="jax-bookkeeping", clip_norm=1.0, ways=None, **options):
    options = {"loss": each, "physical_batch_size": P, "seed": 0} | options
    step = METHODS[method].build(model, optax.sgd(1.0), privacy(clip_norm), **options)
    if ways:
        step.allowed = lambda allowed: (ways,) if ways in allowed else allowed
    return step


@functools.cache
def reference_of(kind, name):
    """The model of a table below, its inputs, and one float64 gradient per example."""
    model, shape = (LAYERS if kind == "layer" else MODELS)[name][:2]
    model, inputs = model(nnx.Rngs(0)), batch(shape)
    return model, inputs, gradients(model, inputs, np.zeros(P, np.int32))


def gradients(model, inputs, targets, wrt=nnx.Param, loss=each):
    """One float64 gradient per example, by plain autodiff of a batch of one."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            (*nnx.split(model, wrt, ...)[1:], jnp.asarray(inputs)),
        )
        params, others, inputs = wide
        graph = nnx.split(model, wrt, ...)[0]

        @jax.jit
        def gradient(params, x, y):
            def of(params):
                return loss(nnx.merge(graph, params, others, copy=True), x[None], y[None])[0]

            return jax.grad(of)(params)

        return [weights.dump(gradient(params, *one)) for one in zip(inputs, targets, strict=True)]


def assert_right(
    model, inputs, rows=None, *, method="jax-bookkeeping", loss=each, wrt=nnx.Param, **options
):
    """The clipped sum, C being such that some examples are clipped; returns the step."""
    targets = np.zeros(P, np.int32)
    rows = rows or gradients(model, inputs, targets, wrt, loss)
    lengths = np.array([reference.norm(row) for row in rows])
    clip_norm = float(np.median(lengths[MASK]))
    want = reference.clipped_sum(rows, MASK, clip_norm)
    step = build(model, method, clip_norm, wrt=wrt, loss=loss, **options)
    placed = jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(MASK)
    got = step.clipped_sum(*placed)
    assert got.keys() == want.keys()
    scale = max(np.minimum(lengths, clip_norm)[MASK].sum(), 1e-6)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5 * scale, err_msg=name)
    return step, placed, lengths


def ruled(step):
    return {c.layer.name for c in step.plan if "autodiff" not in c.layer.kind}


# Layers, in every way


def of(kind, *args, **options):
    return lambda rngs: kind(*args, **options, rngs=rngs)


# An ε that counts: ‖ŵ‖² is then far from the number of weights.
STANDARDIZED = {"use_bias": False, "conv_general_dilated": Standardized(epsilon=0.05)}
LAYERS = {
    "linear": (of(nnx.Linear, 6, 4), (5, 6)),
    "4-D linear": (of(nnx.Linear, 4, 3, use_bias=False), (2, 3, 4)),
    "general": (of(nnx.LinearGeneral, (2, 3), (2, 2), axis=(-3, -1)), (2, 4, 3)),
    "strided": (of(nnx.Conv, 4, 6, (3, 2), 2, padding=1, feature_group_count=2), (7, 6, 4)),
    "dilated": (of(nnx.Conv, 3, 4, (3, 2), kernel_dilation=2), (6, 6, 3)),
    "patches": (of(nnx.Conv, 3, 4, (2, 3), strides=(2, 3), padding="VALID"), (5, 6, 3)),
    "depthwise": (of(nnx.Conv, 4, 8, (3, 3), feature_group_count=4), (4, 5, 4)),
    "reflect": (of(nnx.Conv, 2, 3, (3, 3), padding="REFLECT", use_bias=False), (5, 5, 2)),
    "standardized": (
        of(nnx.Conv, 4, 6, (3, 2), 2, padding=1, feature_group_count=2, **STANDARDIZED),
        (7, 6, 4),
    ),
    "1-D causal": (of(nnx.Conv, 4, 6, 3, padding="CAUSAL", kernel_dilation=2), (9, 4)),
    "1-D circular": (of(nnx.Conv, 4, 6, (4,), strides=(2,), padding="CIRCULAR"), (9, 4)),
}


@pytest.mark.parametrize("way", [*cost.WAYS, "ghost"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, way):
    method, way = ("jax-ghost", None) if way == "ghost" else ("jax-bookkeeping", way)
    step, *_ = assert_right(*reference_of("layer", layer), method=method, ways=way)
    assert ruled(step) == {"model"}
    if method == "jax-bookkeeping":
        assert {c.way for c in step.plan} == {way}


# Models


class Bare(nnx.Module):
    """Parameters that no layer owns, and norm layers of three kinds."""

    def __init__(self, rngs):
        self.token = nnx.Param(rngs.normal((1, 6)))
        self.scale = nnx.Param(rngs.normal((6,)))
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.norms = nnx.List(
            [nnx.LayerNorm(6, rngs=rngs), nnx.RMSNorm(6, rngs=rngs), nnx.GroupNorm(6, 2, rngs=rngs)]
        )

    def __call__(self, x):
        x = jnp.concatenate([jnp.broadcast_to(self.token[...], (len(x), 1, 6)), x], 1)
        for norm in self.norms:
            x = jnp.tanh(norm(self.linear(x) if norm is self.norms[1] else x + 0.1))
        return x * jnp.exp(self.scale[...])


class Twice(nnx.Module):
    """One layer used twice, and one that shares its weight with another."""

    def __init__(self, rngs):
        self.shared, self.last = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.one, self.two = (nnx.Linear(6, 6, use_bias=False, rngs=rngs) for _ in range(2))
        self.two.kernel = self.one.kernel

    def __call__(self, x):
        x = self.shared(jnp.tanh(self.shared(x)))
        return self.last(jnp.tanh(self.two(jnp.tanh(self.one(x)))))


class Tied(nnx.Module):
    """A table that is looked up and attended; ids may repeat and count from the end."""

    def __init__(self, rngs):
        self.embed, self.linear = nnx.Embed(7, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, ids):
        return jnp.tanh(self.embed.attend(jnp.tanh(self.linear(self.embed(ids)))))


class Doubled(nnx.Linear):
    """A subclass that computes something else."""

    def __call__(self, x):
        return super().__call__(2 * x) ** 2


class Odd(nnx.Module):
    """A subclass, a weight used beside its layer, a layer under the user's vmap, one in a cond."""

    def __init__(self, rngs):
        self.own, self.beside = Doubled(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.mapped, self.either = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.beside(jnp.tanh(self.own(x))) @ self.beside.kernel[...].T
        x = jnp.tanh(jax.vmap(self.mapped, 1, 1)(x))
        other = nnx.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: m(2 * x), self.either, x)
        return self.last(jnp.tanh(other))


class Attention(nnx.Module):
    """Attention with normalised queries, and a LoRA around a linear layer."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, normalize_qk=True, decode=False, rngs=rngs)
        linear = nnx.Linear(6, 6, rngs=rngs)
        self.lora = nnx.LoRA(6, 2, 6, base_module=linear, rngs=rngs)
        self.lora.lora_b[...] = rngs.normal((2, 6))

    def __call__(self, x):
        return self.lora(x + self.attention(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.one = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 8, rngs=rngs)
        self.two = nnx.Linear(8, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.two(jnp.tanh(self.one(self.norm(x))))


class Stack(nnx.Module):
    """Three stacked blocks under scan, remat or both; one more layer used in each iteration."""

    def __init__(self, rngs, scan=True, remat=True):
        self.scan, self.remat = scan, remat
        self.shared, self.last = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        if scan:
            make = nnx.vmap(Block, in_axes=0, out_axes=0)
            self.blocks = make(rngs.fork(split=3))
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        def one(x, block):
            return block(x)

        body = nnx.remat(one) if self.remat else one
        if not self.scan:
            for block in self.blocks:
                x = body(x, block)
            return self.last(self.shared(x))

        def iteration(x, shared, block):
            return jnp.tanh(shared(body(x, block)))

        axes = nnx.StateAxes({nnx.Param: 0, ...: None})
        scan = nnx.scan(iteration, in_axes=(nnx.Carry, None, axes), out_axes=nnx.Carry)
        return self.last(scan(x, self.shared, self.blocks))


class Positions(nnx.Module):
    """Layers that see no input: a table of positions, and a linear layer of a constant."""

    def __init__(self, rngs):
        self.table, self.linear = nnx.Embed(5, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        constant = self.linear(jnp.ones((1, 1, 6)))
        return self.last(jnp.tanh(x + self.table(jnp.arange(x.shape[1])[None]) + constant))


class HalfNorms(nnx.Module):
    """Statistics of half the channels, which the rule does not know; norm layers without a part."""

    def __init__(self, rngs):
        self.masked, self.unscaled, self.unbiased = (
            nnx.LayerNorm(6, use_scale=scale, use_bias=bias, rngs=rngs)
            for scale, bias in ((True, True), (False, True), (True, False))
        )

    def __call__(self, x):
        x = jnp.tanh(self.masked(x, mask=jnp.arange(6) < 3))
        return self.unbiased(jnp.tanh(self.unscaled(x)) + x)


MODELS = {  # (model, input shape, what rules take)
    "bare": (Bare, (3, 6), {"linear", "norms.0", "norms.1", "norms.2"}),
    "norms": (HalfNorms, (3, 6), {"unbiased"}),
    "twice": (Twice, (2, 6), {"last"}),
    "positions": (Positions, (3, 6), {"table", "linear", "last"}),
    "tied": (Tied, (5,), {"embed", "embed.attend", "linear"}),
    "odd": (Odd, (2, 6), {"last"}),
    "attention": (
        Attention,
        (3, 6),
        {f"attention.{n}" for n in ("query", "key", "value", "out", "query_ln", "key_ln")}
        | {"lora.base_module"},
    ),
    "scan": (
        functools.partial(Stack, remat=False),
        (2, 6),
        {"blocks.norm", "blocks.one", "blocks.two", "last"},
    ),
    "scan, remat": (Stack, (2, 6), {"blocks.norm", "blocks.one", "blocks.two", "last"}),
    "remat": (
        functools.partial(Stack, scan=False),
        (2, 6),
        {f"blocks.{n}.{o}" for n in (0, 1) for o in ("norm", "one", "two")} | {"shared", "last"},
    ),
}


def batch(shape):
    rng = np.random.default_rng(0)
    if len(shape) == 1:
        return rng.integers(-7, 7, (P, *shape)).astype(np.int32)
    return rng.standard_normal((P, *shape), np.float32)


@pytest.mark.parametrize("method", ["jax-bookkeeping", "jax-ghost"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, method):
    step, placed, lengths = assert_right(*reference_of("model", name), method=method)
    assert ruled(step) == MODELS[name][2], "everything else is left to autodiff"
    if name in ("tied", "scan, remat"):  # norms are a compilation of their own
        np.testing.assert_allclose(step.norms(*placed), lengths * MASK, rtol=1e-5)


@pytest.mark.parametrize("way", ["keep", "rebuild"])
def test_stacked_layers_in_the_other_ways(way):
    step, *_ = assert_right(*reference_of("model", "scan, remat"), ways=way)
    assert way in step.ways.values()


@pytest.mark.parametrize(
    ("wrt", "trained"),
    [
        (nnx.LoRAParam, {"lora.lora_a", "lora.lora_b"}),
        (nnx.PathContains("bias"), 5),
        (
            nnx.All(nnx.Param, nnx.PathContains("out")),
            {"attention.out.weight", "attention.out.bias"},
        ),
    ],
)
def test_frozen_parts_stay_out(wrt, trained):
    model = Attention(nnx.Rngs(0))
    step, *_ = assert_right(model, batch((3, 6)), wrt=wrt)
    names = set(step.parameters())
    assert names == trained or len(names) == trained
    before = nnx.to_flat_state(nnx.state(step.model, nnx.Not(wrt)))
    step.update()
    after = dict(nnx.to_flat_state(nnx.state(step.model, nnx.Not(wrt))))
    for path, variable in before:
        if isinstance(variable, nnx.Param):
            np.testing.assert_array_equal(variable[...], after[path][...])


def test_the_plan_names_what_is_left_to_autodiff():
    step = build(Odd(nnx.Rngs(0)))
    step.uses(batch((2, 6)), np.zeros(P, np.int32))
    lines = {line.split()[0]: line for line in step.explain().splitlines()}
    assert "Doubled (autodiff)" in lines["own"]
    assert "autodiff" not in lines["last"]


def test_a_missing_cross_term_is_seen(monkeypatch):
    monkeypatch.setattr(Lookup, "crossed", lambda self, x, g, h, logits: jnp.zeros(()))
    with pytest.raises(AssertionError, match=r"embedding|weight"):
        assert_right(*reference_of("model", "tied"))


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("pulled", lambda self, weight, total: total),
        ("_summed_gradient", lambda self, x, g: jnp.zeros(6)),
    ],
)
def test_a_wrong_standardisation_is_seen(monkeypatch, what, wrong):
    monkeypatch.setattr(StandardizedConv, what, wrong)
    with pytest.raises(AssertionError, match="weight"):
        assert_right(*reference_of("layer", "standardized"), ways="gram")


@pytest.mark.parametrize(
    "wrong", [lambda self, x, g: x * g, lambda self, x, g: self.normalized(x**3) * g]
)
def test_a_wrong_norm_layer_is_seen(monkeypatch, wrong):
    def along(self, x, g):
        return wrong(self, x, g).reshape(-1, g.shape[-1])

    monkeypatch.setattr(Norm, "_along", along)
    for name in ("bare", "norms"):
        with pytest.raises(AssertionError, match="Not equal"):
            assert_right(*reference_of("model", name))


@pytest.mark.parametrize("way", cost.WAYS)
def test_norms_are_float32_where_the_layers_are_bfloat16(way):
    model, inputs = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), np.ones((P, 512, 4), np.float32)
    inputs *= np.arange(1, P + 1, dtype=np.float32)[:, None, None]
    targets = np.zeros(P, np.int32)
    lengths = [reference.norm(row) for row in gradients(model, inputs, targets)]
    step = build(model, precision="bf16", ways=way)
    placed = jnp.asarray(inputs), jnp.asarray(targets), jnp.ones(P, bool)
    np.testing.assert_allclose(step.norms(*placed), lengths, rtol=0.02)
    sums = step.clipped_sum(*placed)
    assert {a.dtype for a in sums.values()} == {np.dtype(np.float32)}
    assert reference.norm(sums) <= P * 1.02


@pytest.mark.parametrize("way", cost.WAYS)
@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(1, 64, 256), (96, 256, 64)])
def test_norms_of_bf16_gradients_are_accumulated_in_float32(way, positions, inputs, outputs):
    module, rng = nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    rule = RULES[nnx.Linear]["__call__"][0](module, ["kernel"])
    x, g = (
        jnp.asarray(10 * rng.standard_normal((positions, n)), jnp.bfloat16)
        for n in (inputs, outputs)
    )
    found = rule.found(x, g, way, held=False)
    got = square_rows(found["weight"][None])[0] if way == "keep" else found["squared"]
    wide = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)  # gram never rounds it
    rows = wide if way == "gram" else np.asarray(rule.gradient(x, g), np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.sqrt(got), np.sqrt(np.square(rows).sum()), rtol=1e-3)


@pytest.mark.parametrize("name", ["tied", "scan, remat"])
def test_tuned_sgd_is_sgd(name):
    model, inputs, _ = reference_of("model", name)
    placed = jnp.asarray(inputs), jnp.zeros(P, jnp.int32), jnp.asarray(MASK)
    plain, tuned = (build(model, m).clipped_sum(*placed) for m in ("jax-sgd", "jax-sgd-tuned"))
    scale = max(np.abs(a).max() for a in plain.values())
    for n in plain:
        np.testing.assert_allclose(tuned[n], plain[n], atol=1e-5 * scale)


class Standardised(nnx.Module):
    """NaN for an example of zeros."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.linear((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True))


@pytest.mark.parametrize("method", ["jax-sgd", "jax-sgd-tuned", "jax-masked", "jax-bookkeeping"])
def test_padding_does_no_harm_where_zeros_are_nan(method):
    model, inputs, targets = Standardised(nnx.Rngs(0)), batch((6,)), np.zeros(P, np.int32)
    rows = gradients(model, inputs, targets)
    want = reference.clipped_sum(rows, MASK, 1e9)
    inputs = np.where(MASK[:, None], inputs, 0).astype(np.float32)
    step = build(model, method, 1e9)
    got = step.clipped_sum(*map(jnp.asarray, (inputs, targets, MASK)))
    for n in want:
        np.testing.assert_allclose(got[n], want[n], atol=1e-5)


def test_a_budget_makes_the_plan_smaller_or_says_what_it_needs():
    def held(**options):
        step = build(nnx.Linear(256, 256, rngs=nnx.Rngs(0)), **options)
        step.uses(jnp.ones((P, 96, 256)), jnp.zeros(P, int))
        return sum(c.layer.held(c.way) for c in step.plan)

    free = held()
    assert held(memory_budget_bytes=free - 1) < free
    with pytest.raises(ValueError, match="the smallest plan holds"):
        held(memory_budget_bytes=10)


@pytest.mark.parametrize("method", ["jax-sgd", "jax-bookkeeping"])
def test_parameters_that_cannot_hold_a_sum_are_refused(method):
    model = nnx.Linear(3, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"bfloat16, .*rounded away.*param_dtype"):
        build(model, method)


def test_what_has_no_gradient_is_named():
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    model.steps = nnx.Param(jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"'steps' is int32.*leave it out of wrt"):
        build(model)


def test_active_dropout_is_refused_by_name():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    with pytest.raises(ValueError, match=r"'layers.1' has active dropout.*model.eval"):
        build(model)
    model.eval()
    assert build(model) is not None


class Centred(nnx.Module):
    """Subtracts the mean over the batch, or over each example's own positions."""

    def __init__(self, rngs, axis):
        self.linear, self.axis = nnx.Linear(6, 3, rngs=rngs), axis

    def __call__(self, x):
        return self.linear(x - x.mean(self.axis, keepdims=True))


def mean_loss(model, inputs, targets):
    return each(model, inputs, targets).mean()


def relative_loss(model, inputs, targets):
    losses = each(model, inputs, targets)
    return losses / losses.sum()


def loss_beside_the_first(model, inputs, targets):
    losses = each(model, inputs, targets)
    return losses / losses[0]


@pytest.mark.parametrize(
    ("method", "axis", "loss", "words"),
    [
        ("jax-bookkeeping", 1, loss_beside_the_first, "mixes examples"),
        ("jax-bookkeeping", 0, each, "mixes examples"),
        ("jax-masked", 0, each, "mixes examples"),
        ("jax-ghost", 1, relative_loss, "mixes examples"),
        ("jax-masked", 1, mean_loss, r"has shape \(\); return one loss per example"),
    ],
)
def test_what_mixes_examples_is_refused_at_the_first_batch(method, axis, loss, words):
    step = build(Centred(nnx.Rngs(0), axis), method, loss=loss)
    given = jnp.asarray(batch((2, 6))), jnp.zeros(P, jnp.int32), jnp.asarray(MASK)
    with pytest.raises(ValueError, match=words):
        step.accumulate(*given)


def test_a_mean_over_the_positions_of_one_example_is_no_mixing():
    step = build(Centred(nnx.Rngs(0), 1), "jax-masked")
    step.accumulate(jnp.asarray(batch((2, 6))), jnp.zeros(P, jnp.int32), jnp.asarray(MASK))


def test_one_real_example_is_enough_to_see_that_ids_are_mixed():
    class Mixed(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 3, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            return x / x.sum(0, keepdims=True)

    step = build(Mixed(nnx.Rngs(0)), "jax-masked")
    ids = jnp.full((P, 5), 4, jnp.int32)
    with pytest.raises(ValueError, match="mixes examples"):
        step.accumulate(ids, jnp.zeros(P, jnp.int32), jnp.arange(P) == 2)
