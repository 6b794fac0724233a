"""
The rules of a model against plain autograd, in a run in which only the first example has a loss.

Its gradient has to be that of autograd, and nothing may come back to the other examples.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpsgd.torch.layers.base import Seen, fold
from dpsgd.torch.record import Run
from dpsgd.torch.step import fill_rows

EXAMPLES = 5  # few dimensions of a model are of this size
_MIXED = (
    "mixes examples: the loss of one depends on the input of another, so no per-example gradient "
    "exists"
)


def run(
    step: Any, inputs: Any, targets: Tensor, mask: Tensor, examples: int = EXAMPLES
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
    few = min(examples, EXAMPLES)
    good = [n for n in range(count) if tried([n], few) is not None]
    return tried(good) if good else None


def _run(step: Any, inputs: Any, targets: Tensor) -> Run | None:
    # None: a gradient is not finite.
    examples = len(targets)
    floats = [t for t in tree_leaves(inputs) if t.is_floating_point()]
    floats = [t.detach().requires_grad_() for t in floats]
    left = list(floats)
    inputs = tree_map(lambda t: left.pop(0) if t.is_floating_point() else t, inputs)
    everything = torch.ones(examples, dtype=torch.bool, device=targets.device)
    try:
        with step.recorder.recording(examples, frozen=False) as recorded:
            loss = step._losses(inputs, targets, everything)[0]
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
    for g in found[len(numbers) :]:
        if g is not None and g[1:].numel() and g[1:].abs().max() > 1e-6 * g[0].abs().max():
            raise ValueError(f"the loss {_MIXED}")
    with torch.no_grad():
        _compare(step, recorded, wanted)
    return recorded


def _compare(step: Any, recorded: Run, exact: list[Tensor]) -> None:
    got: dict[int, Tensor] = {}

    def take(name, first, others):
        if others.numel() and others.abs().max() > 1e-6 * first.abs().max():
            raise ValueError(f"{name!r} {_MIXED}")
        number = step._index[name]
        got[number] = got.get(number, 0) + first

    for use in recorded.uses:
        seen = use.seen
        x, g = fold(seen.x, recorded.examples), fold(seen.g, recorded.examples)
        y = None if seen.y is None else fold(seen.y, recorded.examples)[0]
        found = use.rule.gradients(Seen(x=x[0], g=g[0], y=y, examples=1))
        for name, row in zip(use.rule.names, found, strict=True):
            take(name, row[0], g[1:])
    for meeting in recorded.meetings:
        with torch.enable_grad():
            found = meeting.gradients()
        take(meeting.name, found[0], found[1:])
    # Two ways of rounding one gradient: bf16 and tf32 leave few digits.
    loose = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}[step.precision]
    length = torch.stack([want.norm() for want in exact]).norm()
    for number, want in enumerate(exact):
        off = (got.get(number, torch.zeros_like(want)) - want).norm()
        if not off <= loose * want.norm() + loose / 100 * length:
            raise ValueError(
                f"parameter {step.names[number]!r} is used in a way that is not understood "
                f"(its gradient is off by {float(off / length):.1e} of the whole): freeze it, "
                "or use torch-vmap"
            )
