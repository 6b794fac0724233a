"""
The rules of a model against plain autograd, in a run in which only one example has a loss.

Its gradient has to be that of autograd, and nothing may come back to the other examples. It stands
in the middle of the batch, so that what is made of those before it shows as well as of those after.
What no gradient shows (ids, targets) is seen by its loss: it must not change with the others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpsgd.torch.layers.base import Seen, fold
from dpsgd.torch.record import CHECKED, Run
from dpsgd.torch.step import fill_rows

_LOOSE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}  # two ways of rounding one value
_MIXED = (
    "mixes examples: the loss of one depends on the input of another, so no per-example gradient "
    "exists"
)


def run(
    step: Any, inputs: Any, targets: Tensor, mask: Tensor, examples: int = CHECKED
) -> Run | None:
    """
    The recorded run of ``examples`` rows of the batch, repeated where there are fewer.

    Bad examples, whose gradients are not finite, are left out; None if there are no others.

    Raises:
        ValueError: a parameter's gradient is another than that of plain autograd, or reaches an
            example without a loss; the message names it.
    """
    inputs, targets = fill_rows(mask, (inputs, targets))
    count = len(mask)

    def tried(rows: list[int], wanted: int = examples) -> Run | None:
        picked = [rows[n % len(rows)] for n in range(wanted)]
        return _run(step, *tree_map(lambda t: t[picked], (inputs, targets)))

    if (found := tried([*range(count)])) is not None:
        return found
    few = min(examples, CHECKED)
    good = [n for n in range(count) if tried([n], few) is not None]
    return tried(good) if good else None


def _run(step: Any, inputs: Any, targets: Tensor) -> Run | None:
    # None: a gradient is not finite.
    examples = len(targets)
    own, everything = examples // 2, torch.ones(examples, dtype=torch.bool, device=targets.device)
    floats = [t for t in tree_leaves(inputs) if t.is_floating_point()]
    floats = [t.detach().requires_grad_() for t in floats]
    left = list(floats)
    inputs = tree_map(lambda t: left.pop(0) if t.is_floating_point() else t, inputs)
    try:
        with step.recorder.recording(examples, frozen=False) as recorded:
            loss = step.losses(inputs, targets, everything)[own]
            leaves = [m.leaf for m in recorded.meetings]  # a parameter may be in layers, too
            numbers = [*range(len(step.params)), *(step._index[m.name] for m in recorded.meetings)]
            found = recorded.backward(loss, [*step.params, *leaves, *floats])
    except RuntimeError as error:
        if "modified inplace" not in str(error) or step.recorder.copies:
            raise
        step.recorder.copies = True
        return _run(step, inputs, targets)
    wanted = [torch.zeros_like(p) for p in step.params]
    with torch.no_grad():
        for number, g in zip(numbers, found, strict=False):
            if g is not None:
                wanted[number] += g
        length = torch.stack([w.norm() for w in wanted]).norm()
    if not (loss.isfinite() and length.isfinite()):
        return None
    if any(_spread(g, own) for g in found[len(numbers) :] if g is not None):
        raise ValueError(f"the loss {_MIXED}")
    _check_alone(step, inputs, targets, own)
    reached = {number for number, g in zip(numbers, found, strict=False) if g is not None}
    with torch.no_grad():
        _compare(step, recorded, wanted, reached, own)
    return recorded


def _spread(g: Tensor, own: int) -> bool:
    """Whether a gradient [P, …] of the loss of example ``own`` is not of it alone."""
    others = torch.cat([g[:own], g[own + 1 :]])
    return bool(others.numel() and others.abs().max() > 1e-6 * g[own].abs().max())


def _check_alone(step: Any, inputs: Any, targets: Tensor, own: int) -> None:
    """Refuse a loss of example ``own`` that is another among others than among its likes."""
    likes, others = [own] * len(targets), [*range(len(targets))]
    everything = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    training = [module for module in step.model.modules() if module.training]

    def loss(rows: list[int]) -> float:
        picked = tree_map(lambda t: t[rows], (inputs, targets))
        with torch.random.fork_rng([step.device] if step.device.type == "cuda" else []):
            torch.manual_seed(0)  # dropout is no mixing
            return float(step.losses(*picked, everything)[own])

    def close(one: float, two: float) -> bool:
        return abs(one - two) <= _LOOSE[step.precision] / 10 * max(1.0, abs(one))

    try:
        for modules in ([], training):  # as it is; then without dropout, which a kernel may reorder
            for module in modules:
                module.training = False
            with torch.no_grad():
                want, got = loss(likes), loss(others)
                if close(want, got) or not close(want, loss(likes)):  # what is random shows nothing
                    return
    finally:
        for module in training:
            module.training = True
    raise ValueError(f"the loss {_MIXED} ({want:.6g} among its likes, {got:.6g} among others)")


def _compare(step: Any, recorded: Run, exact: list[Tensor], reached: set[int], own: int) -> None:
    got: dict[int, Tensor] = {}

    def take(name, row, g):
        if _spread(g, own):
            raise ValueError(f"{name!r} {_MIXED}")
        number = step._index[name]
        got[number] = got.get(number, 0) + row

    for use in recorded.uses:
        seen = use.seen
        x, g = fold(seen.x, recorded.examples), fold(seen.g, recorded.examples)
        y = None if seen.y is None else fold(seen.y, recorded.examples)[own]
        found = use.rule.gradients(Seen(x=x[own], g=g[own], y=y, examples=1))
        for name, row in zip(use.rule.names, found, strict=True):
            take(name, row[0], g)
    for meeting in recorded.meetings:
        with torch.enable_grad():
            found = meeting.gradients()
        take(meeting.name, found[own], found)
    loose = _LOOSE[step.precision]
    length = torch.stack([want.norm() for want in exact]).norm()
    for number, want in enumerate(exact):
        off = (got.get(number, torch.zeros_like(want)) - want).norm()
        unseen = number in reached and number not in got  # its gradient may not stay zero
        if unseen or not off <= loose * want.norm() + loose / 100 * length:
            raise ValueError(
                f"parameter {step.names[number]!r} is used in a way that is not understood "
                f"(its gradient is off by {float(off / length):.1e} of the whole): freeze it, "
                "or use torch-vmap"
            )
