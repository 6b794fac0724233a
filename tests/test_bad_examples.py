"""What contributes nothing (bad examples, padding), and what cannot be clipped and is refused."""

import hf
import numpy as np
import pytest
import torch
from torch import nn
from torch_steps import OURS, P, assert_right, build, each, gradients

from dpsgd import reference
from dpsgd.torch.layers.base import scale_rows


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


LOSSES = {
    "mean": lambda losses: losses.mean(),
    "column": lambda losses: losses[:, None],
    "positions": lambda losses: losses[:, None].expand(-1, 3),
}


@pytest.mark.parametrize("method", ["torch-sgd", "torch-vmap", "torch-opacus", *OURS])
@pytest.mark.parametrize("shape", LOSSES)
def test_a_loss_that_is_not_one_number_for_each_example_is_refused(method, shape):
    def loss(model, inputs, targets):
        return LOSSES[shape](each(model, inputs, targets))

    step = build(nn.Linear(6, 3), loss, method=method)
    inputs = np.random.default_rng(0).standard_normal((P, 6), np.float32)
    with pytest.raises(ValueError, match="one loss per example"):
        step.accumulate(*step.put(inputs, np.zeros(P, int), np.ones(P, bool)))


@pytest.mark.parametrize("method", ["torch-sgd", *OURS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_that_cannot_hold_a_sum_are_refused(method, dtype):
    with pytest.raises(ValueError, match=r"rounded away.*model\.float"):
        build(nn.Linear(6, 3).to(dtype), each, method=method)


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


class Zeroed(nn.Module):
    """Uses a layer's weight without calling the layer, and its gradient is zero at first."""

    def __init__(self):
        super().__init__()
        self.linear, self.beside = nn.Linear(6, 6), nn.Linear(6, 6)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.linear(x) + self.alpha * nn.functional.linear(x, self.beside.weight)


class FirstCopy(nn.Module):
    """One example's copy of what all of them share."""

    def __init__(self, bare):
        super().__init__()
        self.linear, self.more = nn.Linear(6, 6), nn.Linear(6, 6)
        self.table, self.bare = nn.Parameter(torch.randn(1, 6)), bare

    def forward(self, x):
        rows = self.table.expand(len(x), -1) if self.bare else self.more(torch.ones(1, 6))
        return self.linear(x) + rows[0]


class Modulated(nn.Module):
    """A layer without a rule that gets two tensors of examples."""

    def __init__(self):
        super().__init__()
        self.own = nn.Bilinear(6, 6, 3)

    def forward(self, x):
        return self.own(x, x.flip(1))


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (Zeroed, (6,), "'beside.weight' is used in a way"),
        (lambda: FirstCopy(True), (6,), "'table' mixes examples"),
        (lambda: FirstCopy(False), (6,), "'more.weight' mixes examples"),
        (Modulated, (6,), "'own' .*more than one tensor"),
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


MIXED = {
    "all": lambda x: x - x.mean(0),
    "the first": lambda x: x - x[:1],
    "those before": lambda x: x.cumsum(0),
    "those after": lambda x: x.flip(0).cumsum(0).flip(0),
}


@pytest.mark.parametrize("others", MIXED)
@pytest.mark.parametrize("what", ["inputs", "ids", "targets"])
def test_a_loss_that_mixes_examples_is_refused(others, what):
    def loss(model, inputs, targets):
        if what == "targets":
            return (model(inputs)[:, 0] - MIXED[others](targets)).square()
        if what == "ids":  # through which no gradient goes
            inputs = MIXED[others](inputs.float()).abs().long() % 5
            return each(model, inputs, targets)
        return each(model, MIXED[others](inputs), targets)

    rng = np.random.default_rng(0)
    inputs, targets = (rng.standard_normal(s).astype(np.float32) for s in ((P, 6), P))
    model = nn.Embedding(5, 3) if what == "ids" else nn.Linear(6, 3)
    if what == "ids":
        inputs = np.arange(6 * P).reshape(P, 6) * 7 % 5
    step = build(model, loss)
    with pytest.raises(ValueError, match="the loss mixes examples"):
        step.norms(*step.put(inputs, targets, np.ones(P, bool)))


class Distilled(nn.Module):
    """Gives two outputs while it is trained, and one else."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return (self.one(x), self.two(x)) if self.training else self.one(x)


def test_a_model_that_gives_more_while_it_is_trained_is_trained():
    def loss(model, inputs, targets):
        one, two = model(inputs)
        return (one.square() + two.sin()).sum(1)

    torch.manual_seed(0)
    model = Distilled().train()
    inputs = np.random.default_rng(0).standard_normal((P, 6), np.float32)
    assert_right(build(model, loss), model, inputs, np.zeros(P, int), np.ones(P, bool), loss)


def test_a_loss_that_draws_for_itself_is_not_taken_to_mix():
    rng = np.random.default_rng(0)

    def loss(model, inputs, targets):
        return each(model, inputs, targets) * (1 + rng.random())

    step = build(nn.Linear(6, 3), loss)
    inputs = rng.standard_normal((P, 6), np.float32)
    assert (step.norms(*step.put(inputs, np.zeros(P, int), np.ones(P, bool))) > 0).all()


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x)) + nn.functional.dropout(x, 0.5)[:, :3]


@pytest.mark.parametrize("method", OURS)
def test_dropout_is_no_mixing(method):
    torch.manual_seed(0)
    step = build(Dropping().train(), each, method=method)
    placed = step.put(np.ones((P, 6), np.float32), np.zeros(P, int), np.ones(P, bool))
    first, second = step.norms(*placed), step.norms(*placed)
    assert (first != second).any()
    assert all(module.training for module in step.model.modules())
