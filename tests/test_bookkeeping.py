"""Book-keeping on models as people write them, against one example at a time in float64."""

import copy
import functools
import itertools
import warnings

import hf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

from dpsgd import METHODS, PrivacyConfig, cost, reference
from dpsgd.torch.layers import rule_for
from dpsgd.torch.layers.base import Seen, scale_rows
from dpsgd.torch.layers.conv import Conv

P = 4


def privacy(clip_norm):
    return PrivacyConfig(
        num_examples=1000, sample_rate=0.01, noise_multiplier=0.0, clip_norm=clip_norm, steps=10
    )


def build(model, loss=hf.loss, clip_norm=1.0, method="torch-bookkeeping", **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return METHODS[method].build(
        model, optimizer, privacy(clip_norm), loss=loss, physical_batch_size=P, **options
    )


def gradients(model, inputs, targets, loss=hf.loss, dtype=torch.float64):
    """One gradient per example, in float64 or under bf16 autocast."""
    model = copy.deepcopy(model)
    if dtype == torch.float64:
        model.double()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def one(array, i):
        part = torch.as_tensor(array[i : i + 1])
        return part.to(next(model.parameters()).dtype) if part.is_floating_point() else part

    for i in range(len(targets)):
        x, y = tree_map(lambda a, i=i: one(a, i), (inputs, targets))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(model, x, y)[0]
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        yield {
            n: np.zeros(p.shape) if g is None else g.numpy()
            for (n, p), g in zip(named.items(), found, strict=True)
        }


def assert_right(step, model, inputs, targets, mask, loss=hf.loss, tolerance=1e-5, **dtype):
    """Norms and clipped sum, C being such that some examples are clipped and some are not."""
    rows = list(gradients(model, inputs, targets, loss, **dtype))
    lengths = np.array([reference.norm(row) for row in rows])
    step.privacy = privacy(float(np.median(lengths)))
    want = reference.clipped_sum(rows, mask, step.privacy.clip_norm)
    placed = step.put(inputs, targets, mask)
    np.testing.assert_allclose(step.norms(*placed), lengths * mask, rtol=tolerance, atol=1e-7)
    got = step.clipped_sum(*placed)
    assert got.keys() == want.keys()
    scale = max(np.minimum(lengths, step.privacy.clip_norm)[mask].sum(), 1e-6)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=tolerance * scale)


OURS = ["torch-bookkeeping", "torch-ghost"]


@functools.cache
def prepared(name, method="torch-bookkeeping"):
    model = hf.build(name)
    step = build(model, method=method)
    inputs, targets = hf.batch(name, P)
    step.norms(*step.put(inputs, targets, np.ones(P, bool)))
    return model, step, dict(step.ways)


@pytest.mark.parametrize("name", hf.BUILD)
@settings(max_examples=6)
@given(
    way=st.sampled_from([None, *cost.WAYS]),
    mask=st.lists(st.booleans(), min_size=P, max_size=P),
    seed=st.integers(0, 99),
)
def test_models_of_hugging_face(name, way, mask, seed):
    model, step, ways = prepared(name)
    step.ways = {
        choice.layer.name: way if way in choice.layer.ways else ways[choice.layer.name]
        for choice in step.plan
    }
    assert_right(step, model, *hf.batch(name, P, seed), np.array(mask))


@pytest.mark.parametrize("name", hf.BUILD)
def test_ghost_on_models_of_hugging_face(name):
    model, step, _ = prepared(name, "torch-ghost")
    assert_right(step, model, *hf.batch(name, P, 3), np.array([True, False, True, True]))


@pytest.fixture
def captured(monkeypatch):
    """torch.compile captures the graph, and generates no code for it, which takes longest."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize(
    ("name", "method", "generated"),
    [
        ("vit", OURS[0], False),
        # Capturing a graph depends on the model; generating code for it, hardly.
        *(
            pytest.param(name, method, name == "vit", marks=pytest.mark.slow)
            for name, method in itertools.product(hf.BUILD, OURS)
        ),
    ],
)
def test_compiled_in_one_graph(name, method, generated, request):
    if not generated:
        request.getfixturevalue("captured")
    model = hf.build(name)
    step = build(model, method=method, compile=True)
    before = step.compiles()
    inputs, targets = hf.batch(name, P)
    for mask in ([True, True, False, True], [False] * P):
        placed = step.put(inputs, targets, np.array(mask))
        got = step.clipped_sum(*placed)
        step.compile = False
        want = step.clipped_sum(*placed)
        step.compile = True
        for n in want:
            np.testing.assert_allclose(got[n], want[n], atol=1e-5)
    assert step.compiles() - before == 1


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("name", ["vit", "bit", "bert"])
def test_bf16(name, method):
    model = hf.build(name)
    step = build(model, method=method, precision="bf16")
    same = {"tolerance": 1e-2, "dtype": torch.bfloat16}
    assert_right(step, model, *hf.batch(name, P), np.ones(P, bool), **same)


@settings(max_examples=20)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 3, 16, 65])] * 3),
    layer=st.sampled_from([nn.Linear, lambda d, p: nn.Conv1d(d, p, 1)]),
    way=st.sampled_from(cost.WAYS),
)
def test_norms_of_bf16_gradients_are_accumulated_in_float32(sizes, layer, way):
    positions, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(0)
    module = layer(inputs, outputs)
    channels_last = isinstance(module, nn.Linear)

    def make(size):
        shape = (P, positions, size) if channels_last else (P, size, positions)
        return 10 * torch.randn(shape, generator=generator).bfloat16()

    seen = Seen(x=make(inputs), g=make(outputs), examples=P)
    rule = rule_for("layer", module, ["weight"])
    got = rule.kept(seen)[1][0] if way == "keep" else rule.squared(seen, way)
    if way == "gram":  # never rounds the gradient
        equation = "ntd,ntp->npd" if channels_last else "ndt,npt->npd"
        rows = torch.einsum(equation, seen.x.double(), seen.g.double())
    else:
        rows = rule.gradients(seen)[0].double()
    want = rows.flatten(1).square().sum(1)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.sqrt().numpy(), want.sqrt().numpy(), rtol=1e-3)


def test_nothing_of_hugging_face_falls_back():
    for name in hf.BUILD:
        kinds = {type(rule).__name__ for rule in prepared(name)[1].recorder.rules}
        assert "Other" not in kinds, name


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_gradient_checkpointing(name, method):
    model = hf.build(name)
    model.train()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_right(build(model, method=method), model, *hf.batch(name, P), np.ones(P, bool))


@pytest.mark.parametrize("method", OURS)
def test_frozen_parts_stay_out(method):
    model = hf.build("distilbert")
    for p in model.distilbert.embeddings.parameters():
        p.requires_grad_(False)
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and not n.endswith("q_lin.bias"))
    step = build(model, method=method)
    assert_right(step, model, *hf.batch("distilbert", P), np.ones(P, bool))
    assert not model.distilbert.embeddings.word_embeddings.weight.requires_grad
    assert model.classifier.weight.requires_grad


@pytest.mark.parametrize("method", OURS)
def test_lora(method):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(hf.build("bert"), config)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p)
    step = build(model.eval(), method=method)
    assert_right(step, model, *hf.batch("bert", P), np.ones(P, bool))


# Layers


def each(model, inputs, targets):
    return model(inputs).flatten(1).square().mul(torch.arange(1, 4)[:1]).sum(1)


class Twice(nn.Module):
    """One layer used twice, and one on windows moved into the leading axis."""

    def __init__(self):
        super().__init__()
        self.shared, self.windows = nn.Linear(6, 6), nn.Linear(3, 2)

    def forward(self, x):
        x = self.shared(torch.tanh(self.shared(x)))
        return self.windows(x.reshape(-1, 3)).reshape(len(x), -1)


class Scaled(nn.Module):
    """A layer that no rule knows, bare parameters beside children, and a buffer."""

    class Own(nn.Module):  # noqa: D106
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1))

        def forward(self, x):
            return torch.sin(x * self.a) + self.b

    def __init__(self):
        super().__init__()
        self.own, self.linear = self.Own(), nn.Linear(6, 6)
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(6))
        self.register_buffer("order", torch.arange(5, -1, -1))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.linear(self.own(x)) * self.scale.exp()[self.order]


class Tied(nn.Module):
    """A table that is the embedding and ``heads`` output layers."""

    def __init__(self, calls=1, heads=1, bias=False):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.heads = nn.ModuleList(nn.Linear(3, 5, bias=bias) for _ in range(heads))
        for head in self.heads:
            head.weight = self.table.weight
        self.calls = calls

    def forward(self, x):
        ids = x.detach().abs().mul(10).long() % 5
        x = sum(self.table(torch.roll(ids, n, 1)) for n in range(self.calls))
        return sum(torch.sin(head(x)) for head in self.heads)


class Crossed(nn.Module):
    """A parameter that a layer owns, and that is also used bare, elsewhere."""

    def __init__(self):
        super().__init__()
        self.linear, self.shift = nn.Linear(6, 6), nn.Parameter(torch.randn(6))
        self.linear.bias = self.shift

    def forward(self, x):
        return torch.tanh(self.linear(x)) + self.shift


class Unused(nn.Module):
    """A table tied to a head that is never called."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.table(x.detach().abs().mul(10).long() % 5)


class Rooted(nn.Module):
    """The gradient of its input is not finite; those of its parameters are."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x.clamp(min=0).sqrt())


class Written(nn.Module):
    """Writes into what its layers gave."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = torch.relu_(self.norm(self.first(x)))
        y = self.last(x)
        y += x
        return y


LAYERS = {
    "twice": (Twice, (6,)),
    "tied": (Tied, (4,)),
    "tied, a head with bias": (lambda: Tied(bias=True), (4,)),
    "tied, two lookups": (lambda: Tied(calls=2), (4,)),
    "tied, two heads": (lambda: Tied(heads=2), (4,)),
    "bare and of a layer": (Crossed, (6,)),
    "written into": (Written, (2, 5, 5)),
    "tied, a head unused": (Unused, (4,)),
    "an infinite gradient of the input": (Rooted, (6,)),
    "scaled": (Scaled, (3, 6)),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4, bias=False)), (2, 6)),
    "no affine": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4, False)), (6,)),
    "rms": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 3, bias=False)), (2, 6)),
    "4-D linear": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 6)),
    "dilated": (lambda: nn.Conv2d(3, 4, (3, 2), padding="same", dilation=2), (3, 6, 6)),
    "even kernel": (lambda: nn.Conv2d(3, 4, 2, padding="same", bias=False), (3, 5, 5)),
    "3x3": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 5, 5)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "1-D": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "1-D same": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (3, 9)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), (2, 6, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", cost.WAYS)
@pytest.mark.parametrize("method", OURS)
def test_layers(layer, way, method):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model, rng = make(), np.random.default_rng(0)
    step, mask = build(model, each, method=method), np.array([True, True, False, True])
    inputs, targets = rng.standard_normal((P, *shape), np.float32), np.zeros(P, np.int64)
    step.norms(*step.put(inputs, targets, mask))
    step.ways = {c.layer.name: way if way in c.layer.ways else c.way for c in step.plan}
    assert_right(step, model, inputs, targets, mask, each)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", ["3x3", "strided", "dilated", "even kernel", "1-D", "depthwise"])
def test_pairs_of_patches_without_patches(layer):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    rule, x = Conv("", module := make(), ["weight"]), torch.randn(P, *shape)
    seen = Seen(x=x, g=torch.randn_like(module(x)), examples=P)
    patches, outputs = rule.matrices(seen)
    assert torch.allclose(rule._pairs(seen), patches @ patches.mT, atol=1e-5)
    assert torch.equal(rule._outputs(seen).mT, outputs)


def test_a_small_image_with_many_channels_gets_the_gram_way():
    conv = nn.Conv2d(64, 64, 3, padding=1)
    step = build(nn.Sequential(conv, nn.Flatten()), each)
    step.norms(*step.put(np.ones((P, 64, 8, 8), np.float32), np.zeros(P, int), np.ones(P, bool)))
    layer = step.plan[0].layer
    assert step.plan[0].way == "gram"
    assert layer.stored == 64 * 64
    assert layer.gram_inputs < layer.inputs == 576


def test_the_plan_names_the_fallback():
    step = build(Scaled(), each)
    step.norms(*step.put(np.ones((P, 3, 6), np.float32), np.zeros(P, int), np.ones(P, bool)))
    line = next(line for line in step.explain().splitlines() if line.startswith("own "))
    assert "no rule" in line
    assert "keep" in line


def test_one_example_at_a_time_and_short_batches():
    model = hf.build("vit")
    inputs, targets = hf.batch("vit", 3)
    for rows in (1, 3):
        step = build(model)
        assert_right(step, model, inputs[:rows], targets[:rows], np.ones(rows, bool))


def test_a_budget_makes_the_plan_smaller_or_says_what_it_needs():
    model, shape = nn.Linear(256, 256), (P, 96, 256)
    arrays = np.ones(shape, np.float32), np.zeros(P, int), np.ones(P, bool)
    placed = build(model, each).put(*arrays)

    def held(**options):
        step = build(model, each, **options)
        step.norms(*placed)
        return sum(c.layer.held(c.way) for c in step.plan)

    free = held()
    assert held(memory_budget_bytes=free - 1) < free
    with pytest.raises(ValueError, match="the smallest plan holds"):
        held(memory_budget_bytes=10)


def test_the_plan_can_be_measured():
    step = build(hf.build("bit"), measure=True)
    inputs, targets = hf.batch("bit", P)
    assert_right(step, step.model, inputs, targets, np.ones(P, bool))
    assert "as measured" in step.explain()


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize(("compiled", "number"), [(False, 0), (False, 1), (True, 0)])
def test_a_bad_example_contributes_nothing(method, compiled, number, captured):
    model = hf.build("vit")
    inputs, targets = hf.batch("vit", P)
    bad, everything, others = inputs.copy(), np.ones(P, bool), np.arange(P) != number
    bad[number] = np.float32(1e30)  # finite, but nothing of its gradient is
    want = build(model, method=method)
    want = want.clipped_sum(*want.put(inputs, targets, others))
    step = build(model, method=method, compile=compiled)
    got = step.clipped_sum(*step.put(bad, targets, everything))  # in the very first batch
    for n in want:
        np.testing.assert_allclose(got[n], want[n], atol=1e-6)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))  # then no example is good
    got = step.clipped_sum(*step.put(inputs, targets, everything))
    assert not any(g.any() for g in got.values())


@pytest.mark.parametrize("method", OURS)
def test_a_batch_without_a_good_example_is_no_end(method):
    model = hf.build("vit")
    step, mask = build(model, method=method), np.ones(P, bool)
    inputs, targets = hf.batch("vit", P)
    placed = step.put(np.full_like(inputs, np.nan), targets, mask)
    assert not any(g.any() for g in step.clipped_sum(*placed).values())
    assert np.isnan(step.norms(*placed)).all()
    assert_right(step, model, inputs, targets, mask)


class Standardised(nn.Module):
    """NaN for an example of zeros, as attention to no token is."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))


@pytest.mark.parametrize("method", ["torch-sgd", "torch-vmap", *OURS])
@pytest.mark.parametrize("mask", [[True, False, True, False], [False, True, True, True]])
def test_padding_does_no_harm_where_zeros_are_nan(method, mask):
    torch.manual_seed(0)
    model, mask = Standardised(), np.array(mask)
    inputs = np.random.default_rng(0).standard_normal((P, 6), np.float32)
    targets, step = np.zeros(P, np.int64), build(model, each, method=method, clip_norm=1e3)
    if method != "torch-sgd":
        assert_right(step, model, inputs, targets, mask, each)
    bound = step.privacy.clip_norm if step.private else 1e9
    rows = list(gradients(model, inputs, targets, each))
    want = reference.clipped_sum(rows, mask, bound)
    inputs[~mask] = 0
    got = step.clipped_sum(*step.put(inputs, targets, mask))
    for n in want:
        np.testing.assert_allclose(got[n], want[n], atol=1e-5)


def squared_error(model, inputs, targets):
    return (model(inputs)[:, 0] - targets).square()


@pytest.mark.parametrize("method", ["torch-sgd", "torch-vmap", *OURS])
def test_targets_of_padding_may_be_nan(method):
    torch.manual_seed(0)
    step = build(nn.Linear(6, 1), squared_error, method=method)
    rng, mask = np.random.default_rng(0), np.array([False, True, True, False])
    inputs, targets = (rng.standard_normal(s, np.float32) for s in ((P, 6), P))
    want = step.clipped_sum(*step.put(inputs, targets, mask))
    targets[~mask] = np.nan
    got = step.clipped_sum(*step.put(inputs, targets, mask))
    for n in want:
        np.testing.assert_array_equal(got[n], want[n])
    assert any(g.any() for g in got.values())


def test_a_factor_is_not_rounded_up_to_bf16():
    factors = torch.linspace(0.1, 1, 50)
    g = torch.full((50, 2), 1.0).bfloat16() * 3
    scaled = scale_rows(g, factors)
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled[:, 0], (3 * factors).bfloat16())
    rounded_first = 3 * factors.bfloat16()
    assert not torch.equal(scaled[:, 0], rounded_first)


@pytest.mark.parametrize("method", OURS)
def test_a_compiled_step_heeds_another_configuration(method, captured):
    model, (inputs, targets) = hf.build("vit"), hf.batch("vit", P)
    step = build(model, method=method, compile=True, clip_norm=1e3)
    placed = step.put(inputs, targets, np.ones(P, bool))
    step.clipped_sum(*placed)
    step.privacy = PrivacyConfig(
        num_examples=1000, sample_rate=0.01, noise_multiplier=1e6, clip_norm=1e-3, steps=10
    )
    rows = list(gradients(model, inputs, targets))
    want = reference.clipped_sum(rows, np.ones(P, bool), 1e-3)
    for n, got in step.clipped_sum(*placed).items():
        np.testing.assert_allclose(got, want[n], atol=1e-7)
    before = step.parameters()
    step.update()
    moved = np.concatenate([(p - before[n]).ravel() for n, p in step.parameters().items()])
    assert moved.std() == pytest.approx(1e6 * 1e-3 / 10, rel=0.1)


class Coincident(nn.Module):
    """Expands a parameter to an axis that happens to be as long as the batch."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(6, 6), nn.Parameter(torch.randn(1, 6))

    def forward(self, x):
        rows = self.table.expand(P, -1)
        return self.linear(x) + rows.cumsum(0)[-1]


def test_a_coincidence_of_sizes_is_refused_and_never_wrong():
    step = build(Coincident(), each)
    inputs = np.random.default_rng(0).standard_normal((P, 6), np.float32)
    with pytest.raises(ValueError, match="'table'"):
        step.clipped_sum(*step.put(inputs, np.zeros(P, int), np.ones(P, bool)))
    short = step.put(inputs[:3], np.zeros(3, int), np.ones(3, bool))
    step.clipped_sum(*short)


# What cannot be clipped


class Changing(nn.Module):
    """Calls ``more`` as often as it is told."""

    def __init__(self, times):
        super().__init__()
        self.linear, self.more, self.times = nn.Linear(6, 6), nn.Linear(6, 6), times

    def forward(self, x):
        x = self.linear(x)
        for _ in range(self.times):
            x = torch.tanh(self.more(x))
        return x


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize(("first", "later"), [(0, 1), (1, 2), (1, 0), (2, 1), (2, 3)])
def test_a_layer_that_was_not_planned_for_never_escapes_the_norm(method, first, later):
    torch.manual_seed(0)
    model, mask = Changing(first), np.ones(P, bool)
    inputs, targets = np.random.default_rng(0).standard_normal((P, 6), np.float32), np.zeros(P, int)
    step = build(model, each, method=method)
    step.norms(*step.put(inputs, targets, mask))
    model.times = later
    if later > max(first, 1) == 1 or first == 0:
        with pytest.raises(ValueError, match=rf"'more' is called {later} times here"):
            step.clipped_sum(*step.put(inputs, targets, mask))
    else:
        assert_right(step, model, inputs, targets, mask, each)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x - x.mean(0))


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


class Direct(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x @ self.linear.weight


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (Mixing, (6,), "mixes examples"),
        (SequenceFirst, (5, 6), "'linear.*mixes examples"),
        (SequenceFirst, (3, 6), "'linear' gives .* first axis"),
        (Direct, (6,), "'linear.weight' is used in a way"),
    ],
)
def test_what_cannot_be_told_apart_is_named(model, shape, words):
    step = build(model(), each)
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((P, *shape), np.float32)
    with pytest.raises(ValueError, match=words):
        step.norms(*step.put(inputs, np.zeros(P, int), np.ones(P, bool)))


def test_a_loss_that_mixes_examples_is_refused():
    def mean(model, inputs, targets):
        return each(model, inputs - inputs.mean(0), targets)

    step = build(nn.Linear(6, 3), mean)
    inputs = np.random.default_rng(0).standard_normal((P, 6), np.float32)
    with pytest.raises(ValueError, match="the loss mixes examples"):
        step.norms(*step.put(inputs, np.zeros(P, int), np.ones(P, bool)))


# The cost of each way


def test_the_fastest_way_follows_from_the_sizes():
    def way(**sizes):
        layer = cost.Layer(name="x", kind="Linear", examples=8, **sizes)
        return cost.plan([layer])[0].way

    assert way(positions=1, inputs=768, outputs=768) == "gram"
    assert way(positions=16, inputs=768, outputs=3072) == "gram"
    assert way(positions=196, inputs=192, outputs=768) == "keep"
    assert way(positions=4096, inputs=27, outputs=64) == "keep"


def test_flops_and_bytes():
    layer = cost.Layer(name="x", kind="Linear", examples=2, positions=3, inputs=5, outputs=7)
    assert layer.flops("keep") == 2 * 2 * 3 * 5 * 7 + 4 * 2 * 5 * 7
    assert layer.flops("gram") == 2 * 2 * 9 * 12 + 2 * 2 * 3 * 5 * 7
    assert layer.flops("rebuild") == 2 * 2 * 2 * 3 * 5 * 7
    assert layer.held("keep") == 2 * 5 * 7 * 4
    assert layer.held("gram") == layer.held("rebuild") == 2 * 3 * 12 * 4
