"""
Book-keeping (arXiv:2210.00038), planned layer by layer: one backward pass, no ``.grad`` of weights.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)

Each layer's norm and weighted sum are computed in the way that ``dpsgd.cost`` finds to be the
fastest within the memory budget.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpsgd import cost
from dpsgd.torch.layers import Embedding, Linear
from dpsgd.torch.layers.base import add_rows, fold, square_rows
from dpsgd.torch.record import Recorder, Run, Use
from dpsgd.torch.step import TorchStep, select_rows

Kept = dict[int, tuple[Tensor, Tensor]]
_MIXED = (
    "mixes examples: the loss of one depends on the input of another, so no per-example gradient "
    "exists"
)


class Bookkeeping(TorchStep):
    """
    Exact flat clipping for unmodified models, at about the cost of SGD.

    Raises:
        ValueError: at the first batch, a layer whose gradients cannot be told apart by example.
    """

    def __init__(self, model, optimizer, privacy, *, memory_budget_bytes=None, **options) -> None:
        super().__init__(
            model, optimizer, privacy, memory_budget_bytes=memory_budget_bytes, **options
        )
        self.memory_budget_bytes = memory_budget_bytes
        self.recorder = Recorder(model)
        index = {id(p): n for n, p in enumerate(self.params)}
        self._index = {name: index[id(p)] for name, p in self.recorder.params.items()}
        self.plan: list[cost.Choice] = []  # made at the first batch
        self.ways: dict[str, str] = {}

    def explain(self) -> str:
        """The plan, one line for each layer; empty before the first batch."""
        return cost.show(self.plan)

    def accumulate(self, inputs, targets, mask) -> None:
        """Add the clipped gradients of the unmasked examples."""
        run = self._record(inputs, targets, mask)
        with torch.no_grad():
            kept, held = self._sorted(run)
            squares = self._squares(run, kept, held)
            finite = squares.float().isfinite()
            keep = mask & finite
            norms = torch.where(keep, squares, torch.zeros_like(squares)).sqrt()
            factors = torch.where(
                keep, (self.privacy.clip_norm / norms).clamp(max=1), torch.zeros_like(norms)
            )
            self._add(run, kept, held, factors, finite)

    def norms(self, inputs, targets, mask):
        """Per-example gradient norms [P]; masked rows are 0."""
        run = self._record(inputs, targets, mask)
        with torch.no_grad():
            squares = self._squares(run, *self._sorted(run))
        return torch.where(mask, squares, torch.zeros_like(squares)).sqrt().cpu().numpy()

    def _losses(self, inputs, targets, mask):
        with self.autocast():
            return self.loss(self.model, select_rows(mask, inputs), targets)

    def _record(self, inputs, targets, mask) -> Run:
        if not self.plan:
            self._make_plan(inputs, targets, mask)
        with self.recorder.recording(len(mask), self.ways) as run:
            losses = self._losses(inputs, targets, mask)
            run.backward(torch.where(mask, losses, torch.zeros_like(losses)).sum())
        return run

    def _sorted(self, run: Run) -> tuple[Kept, list[Use]]:
        # Per-example gradients, summed over all uses of a parameter, with their squared norms; and
        # what is held as x and g.
        kept: Kept = {}

        def keep(name: str, rows: Tensor, squares: Tensor | None = None) -> None:
            number = self._index[name]
            if number in kept:
                rows, squares = kept[number][0] + rows, None
            kept[number] = rows, square_rows(rows) if squares is None else squares

        for use in run.uses:
            if use.way == "keep":
                names, number = use.rule.names, len(use.rule.names)
                for name, *found in zip(names, use.found[:number], use.found[number:], strict=True):
                    keep(name, *found)
        for meeting in run.meetings:
            keep(meeting.name, meeting.gradients())
        return kept, [use for use in run.uses if use.way != "keep"]

    def _squares(self, run: Run, kept: Kept, held: list[Use]) -> Tensor:
        found = [squares for _, squares in kept.values()]
        for use in held:
            found.append(use.rule.squared(use.x, use.found[0], run.examples, use.way))
        for table, head in self._tied(held):
            matrices = head.rule.matrices(head.x, head.found[0], run.examples)
            found.append(table.rule.crossed(table.x, table.found[0], *matrices, run.examples))
        return torch.stack(found).sum(0)

    def _tied(self, held: list[Use]) -> Iterator[tuple[Use, Use]]:
        tables = {self._index[u.rule.names[0]]: u for u in held if isinstance(u.rule, Embedding)}
        for use in held:
            table = tables.get(self._index[use.rule.names[0]])
            if table and use is not table:
                yield table, use

    def _add(self, run, kept, held, factors, finite) -> None:
        clean = bool(finite.all())
        for number, (rows, _) in kept.items():
            add_rows(self.views[number], rows if clean else select_rows(finite, rows), factors)
        for use in held:
            x, g = use.x, use.found[0]
            if not clean:
                rows = finite.repeat_interleave(len(g) // run.examples)
                x, g = (select_rows(rows, t) for t in (x, g))
            into = [self.views[self._index[name]] for name in use.rule.names]
            use.rule.add(x, g, run.examples, factors, into)

    def _make_plan(self, inputs, targets, mask) -> None:
        """Run the first batch once with plain autograd beside, to check the rules and to plan."""
        inputs = select_rows(mask, inputs)
        if len(mask) == 1:
            inputs, targets = tree_map(lambda t: t.expand(2, *t.shape[1:]), (inputs, targets))
        examples = len(targets)
        floats = [t for t in tree_leaves(inputs) if t.is_floating_point()]
        floats = [t.detach().requires_grad_() for t in floats]
        inputs = tree_map(lambda t: floats.pop(0) if t.is_floating_point() else t, inputs)
        floats = [t for t in tree_leaves(inputs) if t.is_floating_point()]
        everything = torch.ones(examples, dtype=torch.bool, device=mask.device)
        with self.recorder.recording(examples, frozen=False) as run:
            loss = self._losses(inputs, targets, everything)[0]
            leaves = {self._index[m.name]: m.leaf for m in run.meetings}
            params = [leaves.get(n, p) for n, p in enumerate(self.params)]
            wanted = run.backward(loss, [*params, *floats])
        for g in wanted[len(self.params) :]:
            if g is not None and g[1:].abs().max() > 1e-6 * g[0].abs().max():
                raise ValueError(f"the loss {_MIXED}")
        self._check(run, wanted[: len(self.params)])
        uses: dict[str, list] = {}
        for use in run.uses:
            uses.setdefault(use.rule.name, []).append(use)
        layers = []
        for name, calls in uses.items():
            layer = calls[0].rule.layer(calls[0].x, calls[0].found[0], examples)
            ways = self._allowed(calls, layer.ways)
            layer = dataclasses.replace(layer, ways=ways)
            layers.append(dataclasses.replace(layer, name=name, examples=self.physical_batch_size))
        self.plan = cost.plan(
            layers,
            memory_budget_bytes=self.memory_budget_bytes,
            balance=cost.BALANCE[self.device.type],
        )
        self.ways = {choice.layer.name: choice.way for choice in self.plan}

    def _allowed(self, calls: list[Use], ways: tuple[str, ...]) -> tuple[str, ...]:
        # Gradients of one parameter add up before they are normed.
        rule = calls[0].rule
        places = [n for n, i in self._index.items() if i == self._index[rule.names[0]]]
        if len(calls) == len(places) == 1:
            return ways
        kinds = {type(r) for r in self.recorder.rules if {*r.names} & {*places}}
        if len(calls) == 1 and kinds == {Embedding, Linear} and len(rule.names) == 1:
            return tuple(way for way in ways if way != "keep")  # they have a cross term
        return ("keep",)

    def _check(self, run: Run, wanted: list[Tensor | None]) -> None:
        # Only the first example has a loss: nothing may come back to the others' rows.
        got: dict[int, Tensor] = {}

        def take(name, first, others):
            if others.numel() and others.abs().max() > 1e-6 * first.abs().max():
                raise ValueError(f"{name!r} {_MIXED}")
            number = self._index[name]
            got[number] = got.get(number, 0) + first

        for use in run.uses:
            x, g = use.x, fold(use.found[0], run.examples)
            x = fold(x, run.examples)[0]
            rows = use.rule.gradients(x, g[0], 1)
            for name, row in zip(use.rule.names, rows, strict=True):
                take(name, row[0], g[1:])
        for meeting in run.meetings:
            rows = meeting.gradients()
            take(meeting.name, rows[0], rows[1:])
        wanted = [
            torch.zeros_like(p) if w is None else w
            for p, w in zip(self.params, wanted, strict=True)
        ]
        length = torch.stack([want.norm() for want in wanted]).norm()
        for number, want in enumerate(wanted):
            off = (got.get(number, torch.zeros_like(want)) - want).norm()
            if not off <= 1e-3 * want.norm() + 1e-5 * length:
                raise ValueError(
                    f"parameter {self.names[number]!r} is used in a way that is not understood "
                    f"(its gradient is off by {float(off / length):.1e} of the whole): freeze it, "
                    "or use torch-vmap"
                )
