"""
Plain SGD: the baseline every torch method is compared with. No clipping, no noise.

g = (1/L) · Σ_{i∈B} g_i
"""

import torch

from dpsgd.torch.step import TorchStep, select_rows


class SGD(TorchStep):
    """One forward and one backward per physical batch; ``.grad`` accumulates in place."""

    private = False

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._total_loss = self.compiled(self._total)

    def _total(self, inputs, targets, mask):
        with self.autocast():
            losses = self.loss(self.model, select_rows(mask, inputs), targets)
        return torch.where(mask, losses, torch.zeros_like(losses)).sum()

    def accumulate(self, inputs, targets, mask) -> None:
        """Add the gradients of the unmasked examples."""
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view
        self._total_loss(inputs, targets, mask).backward()

    def norms(self, inputs, targets, mask):
        """Not there: the gradients of single examples are never formed."""
        raise NotImplementedError("plain SGD has no per-example norms: ask a private method")
