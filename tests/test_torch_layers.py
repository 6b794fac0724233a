"""Every rule in every way, on single layers and small models, and the plan that chooses the way."""

import dataclasses

import hf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_steps import OURS, P, assert_right, build, each

from dpsgd import cost
from dpsgd.torch.layers import other, rule_for
from dpsgd.torch.layers.base import Seen
from dpsgd.torch.layers.conv import Conv


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


class Tabled(nn.Module):
    """A layer without a rule that gets what all examples share, as long as the batch by chance."""

    class Own(nn.Module):  # noqa: D106
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(6))

        def forward(self, x, table):
            return torch.sin(x * self.a) + table

    def __init__(self):
        super().__init__()
        self.own, self.linear = self.Own(), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.register_buffer("table", torch.randn(P, 6))

    def forward(self, x):
        x = self.own(x, self.table) + self.own(self.table[None], self.table[None])
        return self.linear(x) * self.scale


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


class Idle(nn.Module):
    """Calls a layer whose output the loss does not see."""

    def __init__(self):
        super().__init__()
        self.linear, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        self.idle(x)
        return self.linear(x)


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
    "called in vain": (Idle, (6,)),
    "written into": (Written, (2, 5, 5)),
    "tied, a head unused": (Unused, (4,)),
    "an infinite gradient of the input": (Rooted, (6,)),
    "scaled": (Scaled, (3, 6)),
    "without a rule, with a table": (Tabled, (P, 6)),
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
    bare = {c.layer.name: c.layer.held(c.way) for c in step.plan if "(parameter)" in c.layer.kind}
    assert bare == {"token": P * 6 * 4, "scale": P * 6 * 4}


@pytest.mark.parametrize("method", OURS)
def test_a_fallback_that_failed_once_is_there_again(method, monkeypatch):
    model = Scaled()
    step, mask = build(model, each, method=method), np.ones(P, bool)
    inputs = np.random.default_rng(0).standard_normal((P, 3, 6), np.float32)
    placed = step.put(inputs, np.zeros(P, int), mask)
    step.norms(*placed)

    def full(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(other, "vmap", full)
        with pytest.raises(RuntimeError, match="out of memory") as error:
            step.norms(*placed)
    assert "'own'" in error.value.__notes__[0]
    assert_right(step, model, inputs, np.zeros(P, int), mask, each)


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


@pytest.mark.parametrize("method", OURS)
def test_a_layer_called_in_vain_compiles(method, captured):
    torch.manual_seed(0)
    step = build(Idle(), each, method=method, compile=True)
    inputs = np.random.default_rng(0).standard_normal((P, 6), np.float32)
    placed = step.put(inputs, np.zeros(P, int), np.ones(P, bool))
    got = step.clipped_sum(*placed)
    step.compile = False
    want = step.clipped_sum(*placed)
    assert not got["idle.weight"].any()
    for n in want:
        np.testing.assert_allclose(got[n], want[n], atol=1e-6)


# The plan


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
    more = dataclasses.replace(layer, beside=3)
    assert more.held("gram") - layer.held("gram") == 2 * 3 * 4
    assert more.held("keep") == layer.held("keep")
