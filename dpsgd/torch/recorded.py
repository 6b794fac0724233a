"""
What the methods for unmodified models share: the plan, its check, bad examples, compilation.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)

A method gives ``_squares`` and ``_add``. If an example's squared norm is not finite, nothing is
added, and the physical batch is run again with that example masked: its values never enter a sum.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpsgd import cost
from dpsgd.torch import check
from dpsgd.torch.layers import Embedding, Linear
from dpsgd.torch.layers.base import wide
from dpsgd.torch.measure import seconds
from dpsgd.torch.record import Recorder, Run, Use
from dpsgd.torch.step import TorchStep


class Recorded(TorchStep):
    """
    Exact flat clipping of unmodified models, one physical batch in one recorded run.

    Args, beyond those of every method:
        memory_budget_bytes: what the plan may hold until the clip factors are known.
        measure: time every way of every layer once, at the first batch, and plan by that.

    Raises:
        ValueError: at the first batch, a layer whose gradients cannot be told apart by example.
    """

    norms_only = False  # hold nothing in the first backward pass; there is a second one

    def __init__(
        self, model, optimizer, privacy, *, memory_budget_bytes=None, measure=False, **options
    ) -> None:
        super().__init__(
            model, optimizer, privacy, memory_budget_bytes=memory_budget_bytes, **options
        )
        self.memory_budget_bytes, self.measure = memory_budget_bytes, measure
        self.recorder = Recorder(model)
        index = {id(p): n for n, p in enumerate(self.params)}
        self._index = {name: index[id(p)] for name, p in self.recorder.params.items()}
        self.plan: list[cost.Choice] = []  # made at the first batch
        self.ways: dict[str, str] = {}
        self._sizes: set[int] = set()
        self._graphs: dict[tuple, Any] = {}

    def explain(self) -> str:
        """The plan, one line for each layer; empty before the first batch."""
        return cost.show(self.plan)

    def _accumulate(self, inputs, targets, mask) -> None:
        if not self._ready(inputs, targets, mask):
            return  # no example has a finite gradient
        for _ in range(2):
            attempt = self._compiled_attempt if self.compile else self._attempt
            finite = attempt(inputs, targets, mask)
            if finite is None:
                return
            mask = mask & finite  # a rare bad example: once more without it

    def norms(self, inputs, targets, mask):
        """Per-example gradient norms [P]; masked rows are 0."""
        if not self._ready(inputs, targets, mask):
            return torch.where(mask, torch.nan, 0.0).cpu().numpy()
        with self._normed(inputs, targets, mask) as (_, _, squares):
            found = torch.where(mask, squares, torch.zeros_like(squares)).sqrt()
        return found.cpu().numpy()

    # One physical batch

    @contextlib.contextmanager
    def _normed(self, inputs, targets, mask) -> Iterator[tuple[Run, Tensor, Tensor]]:
        """The run up to the norms: what was recorded, the losses [P], the squared norms [P]."""
        with self.recorder.recording(
            len(mask), self.ways, frozen=not self.norms_only, norms_only=self.norms_only
        ) as run:
            losses = self.losses(inputs, targets, mask)
            self._check_calls(run.uses)
            total = torch.where(mask, losses, torch.zeros_like(losses)).sum()
            run.backward(total, again=self.norms_only)
            with torch.no_grad():
                squares = self._squares(run).clamp(min=0)
            yield run, losses, squares

    def _check_calls(self, uses: list[Use]) -> None:
        # What was not planned for would be in the sum, but not in the norm.
        calls = Counter(use.rule.name for use in uses)
        pairs = [name for name, way in self.ways.items() if way == "tied"]
        for name in [*calls, *pairs]:
            way = self.ways.get(name)
            if way is None or (way != "together" and calls[name] != 1):
                raise ValueError(
                    f"layer {name!r} is called {calls[name]} times here, and was not so in the "
                    "first batch, by which the plan was made: call the same layers for each batch"
                )

    def _ready(self, inputs, targets, mask) -> bool:
        # Plan at the first batch; check every number of examples where that can matter. False if
        # nothing can be told, as no unmasked example has a finite gradient.
        if not self.plan:
            if (run := check.run(self, inputs, targets, mask)) is None:
                return False
            self._make_plan(run)
        if self.recorder.bare and len(mask) not in self._sizes:
            if check.run(self, inputs, targets, mask, len(mask)) is None:
                return False
            self._sizes.add(len(mask))
        return True

    def _attempt(self, inputs, targets, mask) -> Tensor | None:
        """Add the batch; or, where a squared norm is not finite, say which are."""
        with self._normed(inputs, targets, mask) as (run, losses, squares):
            finite = squares.isfinite()
            if not bool(finite.all()):
                return finite
            factors = self._factors(squares, mask, self.privacy.clip_norm)
            self._add(run, losses, factors, self.views)
        return None

    def _factors(self, squares: Tensor, mask: Tensor, clip_norm: float | Tensor) -> Tensor:
        # ‖g‖ = 0 gives C/0 = inf, clamped to 1.
        factors = (clip_norm / squares.sqrt()).clamp(max=1)
        return torch.where(mask, factors, torch.zeros_like(factors))

    def _squares(self, run: Run) -> Tensor:
        """Squared norms [P], float32; those of closed forms may round to just below 0."""
        raise NotImplementedError

    def _add(self, run: Run, losses: Tensor, factors: Tensor, into: list[Tensor]) -> None:
        """Add Σ_p factors_p · g_p to ``into``, in place."""
        raise NotImplementedError

    def _shared(self, run: Run) -> dict[int, Tensor]:
        """{number: [P, *shape]} of the parameters that meet the batch in several places."""
        found: dict[int, Tensor] = {}
        rows = [(meeting.name, meeting.gradients()) for meeting in run.meetings]
        for use in run.uses:
            if use.way == "together":
                rows += zip(use.rule.names, use.found, strict=True)
        for name, each in rows:
            number = self._index[name]
            found[number] = found[number] + each if number in found else each
        return found

    def _tied(self, run: Run) -> list[Tensor]:
        """Squared norms [P] of tables that are used as an embedding and as a linear layer."""
        tied: dict[int, list[Use]] = {}
        for use in run.uses:
            if use.way == "tied":
                tied.setdefault(self._index[use.rule.names[0]], []).append(use)
        found = []
        for uses in tied.values():
            found += [use.rule.squared(use.seen, "gram") for use in uses]
            pair: list[Any] = sorted(uses, key=lambda use: not isinstance(use.rule, Embedding))
            table, head = pair
            found.append(table.rule.crossed(table.seen, *head.rule.matrices(head.seen)))
        return found

    # Compiled: the whole batch, both passes and the sums, is one graph of ATen operations

    def _compiled_attempt(self, inputs, targets, mask) -> Tensor | None:
        # C is an argument, too: another configuration needs no other graph.
        clip_norm = torch.full(
            (), self.privacy.clip_norm, dtype=wide(self.flat), device=mask.device
        )
        leaves, tree = tree_flatten((inputs, targets, mask, clip_norm))
        key = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        named = {f"model.{n}": p for n, p in self.model.named_parameters()}
        named |= {f"model.{n}": b for n, b in self.model.named_buffers()}
        if key not in self._graphs:
            whole = _Whole(self)

            def batch(named, *leaves):
                if not self.norms_only:
                    named = {name: t.detach() for name, t in named.items()}
                return functional_call(whole, named, tree_unflatten(leaves, tree))

            # Hugging Face looks at values (is any token masked?) unless it is being compiled.
            with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
                graph = make_fx(batch)(named, *leaves)
            self._graphs[key] = self.compiled(_reshaped(graph))
        with torch.no_grad():
            squares, *sums = self._graphs[key](named, *leaves)
            finite = squares.isfinite()
            if not bool(finite.all()):
                return finite
            torch._foreach_add_(self.views, sums)
        return None

    def _traced(self, inputs, targets, mask, clip_norm) -> list[Tensor]:
        with self._normed(inputs, targets, mask) as (run, losses, squares):
            sums = [torch.zeros_like(p) for p in self.params]
            self._add(run, losses, self._factors(squares, mask, clip_norm), sums)
        return [squares, *sums]

    # The plan

    def _make_plan(self, run: Run) -> None:
        """Plan by the sizes that a run of a few examples had."""
        uses: dict[str, list[Use]] = {}
        for use in run.uses:
            uses.setdefault(use.rule.name, []).append(use)
        layers: list[cost.Layer] = []
        times: dict[tuple[str, str], float] = {}
        for name, calls in uses.items():
            layer = calls[0].rule.layer(calls[0].seen)
            ways = self._allowed(name, uses, layer.ways)
            size = self.physical_batch_size
            layers.append(dataclasses.replace(layer, name=name, examples=size, ways=ways))
            if self.measure and len(ways) > 1:
                times |= seconds(layers[-1], calls[0].rule, calls[0].seen)
        for name, module, _ in self.recorder.bare:
            layers.append(
                cost.Layer(
                    name=name,
                    kind=f"{type(module).__name__} (parameter)",
                    examples=self.physical_batch_size,
                    outputs=self.params[self._index[name]].numel(),
                    itemsize=self.params[0].element_size(),
                    ways=("together",),
                )
            )
        self.plan = self._planned(layers, times)
        self.ways = {choice.layer.name: choice.way for choice in self.plan}

    def _planned(self, layers: list[cost.Layer], times: dict) -> list[cost.Choice]:
        return cost.plan(
            layers,
            seconds=times,
            memory_budget_bytes=self.memory_budget_bytes,
            balance=cost.balance(self.device.type),
        )

    def _allowed(
        self, name: str, uses: dict[str, list[Use]], ways: tuple[str, ...]
    ) -> tuple[str, ...]:
        # Gradients of one parameter add up before they are normed.
        numbers = {self._index[own] for own in uses[name][0].rule.names}
        sharing = [
            rule
            for rule in self.recorder.rules
            if rule.name in uses and numbers.intersection(self._index[own] for own in rule.names)
        ]
        bare = any(self._index[own] in numbers for own, _, _ in self.recorder.bare)
        once = not bare and all(len(uses[rule.name]) == 1 for rule in sharing)
        if once and len(sharing) == 1:
            return ways
        pair = len(sharing) == 2 and {type(rule) for rule in sharing} == {Embedding, Linear}
        alone = all(len(rule.names) == 1 for rule in sharing)  # a head without bias
        return ("tied",) if once and pair and alone else ("together",)


def _reshaped(graph: GraphModule) -> GraphModule:
    # The compiler assumes other strides than a traced kernel gives, where a view may not exist.
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph


class _Whole(nn.Module):
    """The batch as a module, so that its parameters can be given as arguments."""

    def __init__(self, step: Recorded) -> None:
        super().__init__()
        self.model, self.step = step.model, step

    def forward(self, inputs, targets, mask, clip_norm) -> list[Tensor]:
        """Squared norms [P] and the sums."""
        return self.step._traced(inputs, targets, mask, clip_norm)
