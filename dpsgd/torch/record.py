"""
One run of an unmodified model that hands out, for each use of each trained layer, x and dL/dy.

Hooks pass each layer's output through :class:`Tap`, whose backward pass sees x and g = dL/dy and
turns them into what is asked for: the cotangents of zeros that were given beside. So one backward
pass gives everything, no weight gradient is computed, and nothing is retained that is not needed.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.torch.layers import Rule, rule_for
from dpsgd.torch.layers.base import Product, Seen, wide
from dpsgd.torch.layers.other import Other
from dpsgd.torch.shared import Meeting

CHECKED = 5  # examples in the check of the first batch: few dimensions of a model are of this size


class Tap(torch.autograd.Function):
    """The identity on y; its backward pass gives the zeros beside y what ``made(g, x, y)`` does."""

    @staticmethod
    def forward(ctx, y, x, made, needs_output, *zeros):
        """``y``, unchanged; a copy where the model may write into it."""
        ctx.made = made
        ctx.save_for_backward(*((x, y) if needs_output else (x,)))
        return y.clone() if made.setting.copies else y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        """``g`` goes on, unchanged."""
        made = ctx.made
        # In a second backward pass nobody asks for the zeros.
        found = made(g, *ctx.saved_tensors) if made.wanted else [None] * made.number
        return g, None, None, None, *found


@dataclass(kw_only=True)
class Setting:
    """What the uses of one run share."""

    examples: int
    norms_only: bool = False
    copies: bool = False  # of outputs, for a model that writes into them
    done: bool = False  # after the first backward pass


class Use:
    """One call of one layer: what is held of it, and what came back to its zeros."""

    def __init__(self, rule: Rule, way: str, setting: Setting) -> None:
        self.rule, self.way, self.setting = rule, way, setting
        self.zeros: list[Tensor] = []
        self.found: list[Tensor] = []
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    @property
    def number(self) -> int:
        """How many zeros it has."""
        return len(self.zeros)

    @property
    def holds(self) -> bool:
        """Whether x and g stay until the clip factors are known."""
        if self.way in ("keep", "together"):
            return False
        return self.way == "tied" or not self.setting.norms_only

    @property
    def wanted(self) -> bool:
        """Whether the first backward pass is running."""
        return not self.setting.done

    @property
    def seen(self) -> Seen:
        """x, g and y, where they are held."""
        assert self.x is not None
        return Seen(x=self.x, g=self.found[0], y=self.y, examples=self.setting.examples)

    def make_zeros(self, y: Tensor) -> list[Tensor]:
        """Norms in float32: autograd casts what comes back to the dtype of the zeros."""
        examples, rule = self.setting.examples, self.rule
        squares = ((examples,), wide(y))
        if self.holds:
            found = [(tuple(y.shape), y.dtype)]
        elif self.way in ("keep", "together"):
            dtype = y.dtype if isinstance(rule, Product) else wide(y)
            params = [getattr(rule.module, name).shape for name in rule.trained]
            found = [((examples, *shape), dtype) for shape in params]
            found += [squares] * len(found) if self.way == "keep" else []
        else:
            found = [squares]
        return [
            y.new_zeros((), dtype=dtype).expand(shape).requires_grad_() for shape, dtype in found
        ]

    def __call__(self, g: Tensor, x: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """What goes back to the zeros."""
        seen = Seen(x=x, g=g, y=y, examples=self.setting.examples)
        if self.way == "keep":
            rows, squares = self.rule.kept(seen)
            return [*rows, *squares]
        if self.way == "together":
            return self.rule.gradients(seen)
        return [g] if self.holds else [self.rule.squared(seen, self.way)]


class Run:
    """One recorded forward and backward pass."""

    def __init__(self, setting: Setting, ways: dict[str, str], meetings: list[Meeting]) -> None:
        self.setting, self.ways, self.meetings = setting, ways, meetings
        self.examples = setting.examples
        self.uses: list[Use] = []
        self.shared: dict[int, Tensor] = {}  # gradients [P, *shape] from several places
        self.open = True  # closed before the backward pass: checkpointing calls the layers again

    def tapped(self, rule: Rule, x: Tensor, y: Tensor) -> Tensor:
        """``y`` with its tap."""
        use = Use(rule, self.ways.get(rule.name, "hold"), self.setting)
        use.zeros = use.make_zeros(y)
        if self.open:
            if use.holds:
                use.x, use.y = x.detach(), y.detach() if rule.needs_output else None
            self.uses.append(use)
        return Tap.apply(y, x.detach(), use, rule.needs_output, *use.zeros)

    def backward(
        self, total: Tensor, more: list[Tensor] | None = None, *, again: bool = False
    ) -> list[Tensor | None]:
        """Run it, ``again`` later; fill every use and return the gradients of ``more``."""
        self.open = False
        zeros = [z for use in self.uses for z in use.zeros]
        copies = [zero for meeting in self.meetings for _, zero in meeting.copies]
        wanted = [*zeros, *copies, *(more or [])]
        found: list[Tensor | None] = list(
            torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=bool(more) or again)
        )
        self.setting.done = True
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
        self.copies = False  # whether the model writes into outputs of layers (``x += …``)
        self._run: Run | None = None
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
            self._watch(rule)

    def _watch(self, rule: Rule) -> None:
        hook = self._hook(rule)
        given: list[Tensor] = []
        if rule.inner is None:
            rule.module.register_forward_hook(hook, with_kwargs=True)
            return

        def before(module, args):
            given[:] = args

        def within(module, args):
            taken = tuple(given)
            given.clear()
            return hook(module, taken, {}, args[0])

        rule.module.register_forward_pre_hook(before)
        getattr(rule.module, rule.inner).register_forward_pre_hook(within)

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
                _check_others(rule, given, run)
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
        self,
        examples: int,
        ways: dict[str, str] | None = None,
        *,
        frozen: bool = True,
        norms_only: bool = False,
    ) -> Iterator[Run]:
        """
        Within it, calls of the model are recorded.

        Args:
            examples: P.
            ways: {layer: way}; ``keep`` and ``together`` (used more than once) give gradients, the
                others hold x and g.
            frozen: compute no weight gradients.
            norms_only: squared norms come back in place of g; only what is ``tied`` is held.
        """
        own: list[Any] = [p for p in self.params.values() if frozen]
        # Not the parameter of the start: functional_call puts others in its place.
        values = [module._parameters[attribute] for _, module, attribute in self.bare]
        meetings = [
            Meeting(name, value, examples)
            for (name, _, _), value in zip(self.bare, values, strict=True)
        ]
        setting = Setting(examples=examples, norms_only=norms_only, copies=self.copies)
        self._run = Run(setting, ways or {}, meetings)
        for meeting, (_, module, attribute) in zip(meetings, self.bare, strict=True):
            del module._parameters[attribute]
            setattr(module, attribute, meeting.start)
        for p in own:
            p.requires_grad_(False)
        for rule in self.rules:
            rule.start()
        try:
            yield self._run
        finally:
            self._run = None
            for p in own:
                p.requires_grad_(True)
            for (_, module, attribute), value in zip(self.bare, values, strict=True):
                delattr(module, attribute)
                module._parameters[attribute] = value


def _check_others(rule: Other, given: list[Any], run: Run) -> None:
    # In the check of the first batch, whose number of examples is hardly another size.
    rows = given[0].shape[:1]
    apart = run.examples == CHECKED and not run.ways and rows and rows[0] % CHECKED == 0
    if apart and any(isinstance(t, Tensor) and t.shape[:1] == rows for t in given[1:]):
        raise ValueError(
            f"layer {rule.name!r} ({type(rule.module).__name__}), for which there is no rule, gets "
            "more than one tensor that holds the examples: freeze it, or use torch-vmap"
        )


def _no_layer(module: nn.Module) -> bool:
    # Its parameters are used beside those of its children, or without any input.
    inside = any(True for child in module.children() for _ in child.parameters())
    return inside or not inspect.signature(module.forward).parameters
