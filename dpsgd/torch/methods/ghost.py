"""
Ghost clipping (arXiv:2110.05679): norms by one backward pass, the clipped sum by a second.

s = Σ_p c_p g_p = ∂/∂θ Σ_p c_p ℓ_p,   c_p = min(1, C/‖g_p‖)

The first pass computes no weight gradient and holds nothing: each layer's squared norms are taken
as soon as its dL/dy is there. The second is that of SGD on the weighted loss.
"""

import dataclasses

import torch
from torch import Tensor

from dpsgd import cost
from dpsgd.torch.layers.base import add_rows, square_rows, tracing
from dpsgd.torch.record import Run
from dpsgd.torch.recorded import Recorded


class Ghost(Recorded):
    """The least memory: that of SGD, and the norms."""

    norms_only = True

    def _planned(self, layers: list[cost.Layer], times: dict) -> list[cost.Choice]:
        def without_keep(layer):
            ways = tuple(way for way in layer.ways if way != "keep") or ("rebuild",)
            return dataclasses.replace(layer, ways=ways, norms_only=True)

        return cost.plan([without_keep(layer) for layer in layers], seconds=times)

    def _squares(self, run: Run) -> Tensor:
        run.shared = self._shared(run)
        found = [square_rows(rows) for rows in run.shared.values()]
        found += [use.found[0] for use in run.uses if use.way in ("gram", "rebuild")]
        return torch.stack(found + self._tied(run)).sum(0)

    def _add(self, run: Run, losses: Tensor, factors: Tensor, into: list[Tensor]) -> None:
        named = dict(self.model.named_parameters())  # without those that the meetings stand for
        normed = {self._index[name] for use in run.uses for name in use.rule.names}
        live = [
            (named[self.names[n]], into[n]) for n in sorted(normed - set(run.shared))
        ]  # nothing else: what is in no norm must not be in the sum
        for number, rows in run.shared.items():
            add_rows(into[number], rows, factors)
        run.shared.clear()
        if not live:
            return
        weighted = losses.to(factors.dtype) * factors  # rounding must not raise a factor
        total = torch.where(factors > 0, weighted, torch.zeros_like(weighted)).sum()
        params = [p for p, _ in live]
        if tracing():
            found = torch.autograd.grad(total, params, allow_unused=True)
            for (_, view), g in zip(live, found, strict=True):
                if g is not None:
                    view.add_(g)
        else:
            for p, view in live:
                p.grad = view
            total.backward(inputs=params)
