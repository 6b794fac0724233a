"""
Book-keeping (arXiv:2210.00038), planned layer by layer: one backward pass, no ``.grad`` of weights.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)

Each layer's norm and weighted sum are computed in the way that ``dpsgd.cost`` finds to be the
fastest within the memory budget.
"""

import torch
from torch import Tensor

from dpsgd.torch.layers.base import add_rows, square_rows
from dpsgd.torch.record import Run
from dpsgd.torch.recorded import Recorded


class Bookkeeping(Recorded):
    """Exact flat clipping for unmodified models, at about the cost of SGD."""

    def _squares(self, run: Run) -> Tensor:
        run.shared = self._shared(run)
        found = [square_rows(rows) for rows in run.shared.values()]
        for use in run.uses:
            if use.way == "keep":
                found += use.found[len(use.rule.trained) :]
            elif use.way in ("gram", "rebuild"):
                found.append(use.rule.squared(use.seen, use.way))
        return torch.stack(found + self._tied(run)).sum(0)

    @torch.no_grad()
    def _add(self, run: Run, losses: Tensor, factors: Tensor, into: list[Tensor]) -> None:
        for number, rows in run.shared.items():
            add_rows(into[number], rows, factors)
        for use in run.uses:
            views = [into[self._index[name]] for name in use.rule.names]
            if use.way == "keep":
                for own, rows, view in zip(use.rule.trained, use.found, views, strict=False):
                    use.rule.add_kept(own, rows, factors, view)
            elif use.way != "together":
                use.rule.add(use.seen, factors, views)
