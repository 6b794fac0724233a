"""
One run of an unmodified model that hands out, for each use of each trained layer, x and dL/dy.

Hooks pass each layer's output through :class:`Tap`, whose backward pass sees x and g = dL/dy and
turns them into what is asked for: the cotangents of zeros that were given beside. So one backward
pass gives everything, no weight gradient is computed, and nothing is retained that is not needed.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.torch.layers import Rule, rule_for
from dpsgd.torch.layers.other import Other
from dpsgd.torch.shared import Meeting


class Tap(torch.autograd.Function):
    """The identity on y; its backward pass gives the zeros beside y what ``made(x, g)`` returns."""

    @staticmethod
    def forward(ctx, y, x, made, *zeros):
        """``y``, unchanged."""
        ctx.made = made
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        """``g`` goes on, unchanged."""
        return g, None, None, *ctx.made(*ctx.saved_tensors, g)


class Use:
    """One call of one layer: ``x`` [P·k, …] where it is held, and what came back to its zeros."""

    def __init__(self, rule: Rule, way: str, x: Tensor | None, zeros: list[Tensor]) -> None:
        self.rule, self.way, self.x, self.zeros = rule, way, x, zeros
        self.found: list[Tensor] = []


class Run:
    """One recorded forward and backward pass."""

    def __init__(
        self, examples: int, ways: dict[str, str], meetings: list[Meeting], buffers: dict
    ) -> None:
        self.examples, self.ways, self.meetings = examples, ways, meetings
        self.buffers = buffers  # memory that lives from run to run: new pages cost a write each
        self.uses: list[Use] = []
        self.open = True  # closed before the backward pass: checkpointing calls the layers again

    def tapped(self, rule: Rule, x: Tensor, y: Tensor) -> Tensor:
        """``y`` with its tap."""
        way = self.ways.get(rule.name, "hold")
        if way == "keep":
            shapes = [(self.examples, *getattr(rule.module, n).shape) for n in rule.trained]
            shapes += [(self.examples,)] * len(shapes)
            key = (rule.name, len(self.uses))

            def buffer(shape, dtype):
                whole = (*key, shape, dtype)
                if whole not in self.buffers:
                    self.buffers[whole] = y.new_empty(shape, dtype=dtype)
                return self.buffers[whole]

            def made(x, g):
                rows, squares = rule.kept(x, g, self.examples, buffer)
                return *rows, *squares
        elif way == "norm":
            shapes = [(self.examples,)]

            def made(x, g):
                return [rule.squared(x, g, self.examples, "gram")]
        else:
            shapes = [y.shape]

            def made(x, g):
                return [g]

        zeros = [y.new_zeros(()).expand(shape).requires_grad_() for shape in shapes]
        if self.open:
            held = x.detach() if way != "keep" else None
            self.uses.append(Use(rule, way, held, zeros))
        return Tap.apply(y, x.detach(), made, *zeros)

    def backward(self, total: Tensor, more: list[Tensor] | None = None) -> list[Tensor | None]:
        """Run it; fills every use, and returns the gradients of ``more``."""
        self.open = False
        zeros = [z for use in self.uses for z in use.zeros]
        copies = [zero for meeting in self.meetings for _, zero in meeting.copies]
        wanted = [*zeros, *copies, *(more or [])]
        found: list[Tensor | None] = list(
            torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=bool(more))
        )
        for use in self.uses:
            use.found = [
                torch.zeros_like(z) if g is None else g
                for z, g in zip(use.zeros, found, strict=False)
            ]
            del found[: len(use.zeros)]
        for meeting in self.meetings:
            number = len(meeting.copies)
            meeting.found, found = found[:number], found[number:]
        return found


class Recorder:
    """
    Finds the rule of every trained parameter of a model, and records runs of it.

    Raises:
        ValueError: a trained parameter whose layer cannot be recorded; the message names it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rules: list[Rule] = []
        self.bare: list[tuple[str, nn.Module, str]] = []  # (whole name, its module, its own name)
        self.params: dict[
            str, nn.Parameter
        ] = {}  # whole name of each place: a tied one has several
        self._run: Run | None = None
        self._buffers: dict[tuple, Tensor] = {}
        for name, module in model.named_modules():
            own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
            if not own:
                continue
            dotted = f"{name}." if name else ""
            self.params |= {dotted + n: getattr(module, n) for n in own}
            rule = rule_for(name, module, own)
            if isinstance(rule, Other) and _no_layer(module):
                self.bare += [(dotted + n, module, n) for n in own]
                continue
            self.rules.append(rule)
            module.register_forward_hook(self._hook(rule), with_kwargs=True)

    def _hook(self, rule: Rule):
        def hook(module, args, kwargs, y):
            run = self._run
            if run is None or (isinstance(rule, Other) and rule.busy):
                return None
            given = [*args, *kwargs.values()]
            if not given or not isinstance(given[0], Tensor) or not isinstance(y, Tensor):
                raise ValueError(
                    f"layer {rule.name!r} ({type(module).__name__}) does not map one tensor to "
                    "one: freeze it, or wrap its parameters in layers that do"
                )
            x = given[0]
            if isinstance(rule, Other):
                rule.more, rule.named = args[1:], dict(list(kwargs.items())[0 if args else 1 :])
            if y.shape[0] == 1 < run.examples:  # once for the whole batch, as position ids are
                x, y = (t.expand(run.examples, *t.shape[1:]) for t in (x, y))
            if y.shape[0] % run.examples:
                raise ValueError(
                    f"layer {rule.name!r} gives {tuple(y.shape)} for {run.examples} examples: its "
                    "first axis must hold the examples"
                )
            return run.tapped(rule, x, y)

        return hook

    @contextmanager
    def recording(
        self, examples: int, ways: dict[str, str] | None = None, *, frozen: bool = True
    ) -> Iterator[Run]:
        """
        Within it, calls of the model are recorded.

        Args:
            examples: P.
            ways: {layer: ``keep``, ``norm``, anything else holds x and g}.
            frozen: compute no weight gradients.
        """
        own: list[Any] = [p for p in self.params.values() if frozen]
        meetings = [Meeting(name, self.params[name], examples) for name, _, _ in self.bare]
        self._run = Run(examples, ways or {}, meetings, self._buffers)
        for meeting, (_, module, attribute) in zip(meetings, self.bare, strict=True):
            del module._parameters[attribute]
            setattr(module, attribute, meeting.start)
        for p in own:
            p.requires_grad_(False)
        try:
            yield self._run
        finally:
            self._run = None
            for p in own:
                p.requires_grad_(True)
            for name, module, attribute in self.bare:
                delattr(module, attribute)
                module._parameters[attribute] = self.params[name]


def _no_layer(module: nn.Module) -> bool:
    # Its parameters are used beside those of its children, or without any input.
    inside = any(True for child in module.children() for _ in child.parameters())
    return inside or not inspect.signature(module.forward).parameters
