"""
Parameters that no layer owns: class tokens, position embeddings, layer scales, bias tables.

Such a parameter is used as it is, or after some operations, until it meets the batch: it is added
to it, expanded to it, or given beside it. There, and only there, it gets one copy per example,
whose gradients are those of the examples.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


class Meeting:
    """All copies that one parameter got in one run of ``examples`` examples."""

    def __init__(self, name: str, parameter: Tensor, examples: int) -> None:
        self.name, self.examples = name, examples
        self.leaf = parameter.detach().requires_grad_()
        self.copies: list[tuple[Tensor, Tensor]] = []  # (what was copied, the zeros added to it)
        self.found: list[Tensor | None] = []  # what came back to the zeros

    @property
    def start(self) -> "Shared":
        """The parameter, for the model to use."""
        return Shared.of(self.leaf, self)

    def gradients(self) -> Tensor:
        """[P, *shape], from what came back to the copies."""
        total = self.leaf.new_zeros(self.examples, *self.leaf.shape)
        for (made, _), g in zip(self.copies, self.found, strict=True):
            if g is None:
                continue
            if made is self.leaf:
                total += g
            else:  # through the operations between the parameter and the batch
                pulled = torch.autograd.grad(
                    made, self.leaf, g, is_grads_batched=True, retain_graph=True
                )
                total += pulled[0]
        return total

    def copy(self, made: Tensor, rows: int, dims: int) -> Tensor:
        """``made`` with a leading axis of ``rows``, one copy per example, and ``dims`` axes."""
        zeros = torch.zeros_like(made).expand(self.examples, *made.shape).requires_grad_()
        self.copies.append((made, zeros))
        copies = zeros + made
        own = made.shape[1:] if made.ndim == dims else made.shape  # its first axis was of length 1
        copies = copies.view(self.examples, *[1] * (dims - 1 - len(own)), *own)
        return copies.repeat_interleave(rows // self.examples, 0)


class Shared(Tensor):
    """A parameter, or what was made of it, before it has met the batch."""

    meeting: Meeting
    plain: Tensor  # the same without this class: a graph that is recorded knows only that one

    @classmethod
    def of(cls, value: Tensor, meeting: Meeting) -> "Shared":
        """``value`` on its way to the batch."""
        shared = value.as_subclass(cls)
        shared.meeting, shared.plain = meeting, value
        return shared

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Compute; where the result has the batch's axis, compute with copies instead."""
        leaves, _ = tree_flatten((args, kwargs or {}))
        shared = {id(a): a for a in leaves if isinstance(a, Shared)}
        plain = [a for a in leaves if isinstance(a, Tensor) and id(a) not in shared]

        def call(replaced: dict[int, Tensor]) -> Any:
            args_, kwargs_ = tree_map(lambda a: replaced.get(id(a), a), (args, kwargs or {}))
            return func(*args_, **kwargs_)

        with torch._C.DisableTorchFunctionSubclass():
            bare = {key: a.plain for key, a in shared.items()}
            result = call(bare)
            if not isinstance(result, Tensor):
                return result
            meeting = next(iter(shared.values())).meeting
            if not any(_meets(result, a, plain, meeting.examples) for a in bare.values()):
                return Shared.of(result, meeting)
            # Rank and rows of the copies are those of what they meet, else of the result.
            like = max(plain, key=lambda a: a.ndim, default=result)
            copied = {
                key: a.meeting.copy(a.plain, like.shape[0], like.ndim) for key, a in shared.items()
            }
            return call(copied)


def _meets(result: Tensor, made: Tensor, plain: list[Tensor], examples: int) -> bool:
    if result.ndim == 0:
        return False
    rows = result.shape[0]
    single = made.ndim == result.ndim and made.shape[0] == 1
    if not plain:  # expanded or repeated
        return single and rows == examples > 1
    gained = single or result.ndim > made.ndim
    return gained and any(a.is_floating_point() and a.ndim and a.shape[0] == rows for a in plain)
