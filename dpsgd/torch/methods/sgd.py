"""
Plain SGD: the baseline every torch method is compared with. No clipping, no noise.

g = (1/L) · Σ_{i∈B} g_i

Over ranks it sums once per logical batch, as the private methods do, or with ``sync="every"`` at
each physical batch, as DistributedDataParallel does without ``no_sync`` (arXiv:2406.17298's way;
there the sum overlaps with the backward pass, here it follows it). All ranks then need the same
number of physical batches: ``logical.share(rank, world, even=True)``.
"""

import torch

from dpsgd.torch.step import TorchStep


class SGD(TorchStep):
    """One forward and one backward per physical batch; ``.grad`` accumulates in place."""

    private = False

    def __init__(self, *args, sync: str = "once", **options) -> None:
        super().__init__(*args, sync=sync, **options)
        self._total_loss = self.compiled(self._total)
        self._every = sync == "every" and self.ranks.world > 1
        self._summed = torch.zeros_like(self.flat) if self._every else self.flat

    def _check_sync(self, sync: str) -> None:
        if sync not in ("once", "every"):
            raise ValueError(f"sync is {sync!r}; use 'once' or 'every'")

    def _total(self, inputs, targets, mask):
        losses = self.losses(inputs, targets, mask)
        return torch.where(mask, losses, torch.zeros_like(losses)).sum()

    def _accumulate(self, inputs, targets, mask) -> None:
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view
        self._total_loss(inputs, targets, mask).backward()
        if self._every:
            with torch.no_grad():
                self.reduce(self.done + 1, self.params)
                self._summed += self.flat
                self.flat.zero_()

    def _reduce(self) -> None:
        if not self._every:
            super()._reduce()
            return
        self.flat.copy_(self._summed).div_(self.privacy.expected_batch_size)
        self._summed.zero_()

    def norms(self, inputs, targets, mask):
        """Not there: the gradients of single examples are never formed."""
        raise NotImplementedError("plain SGD has no per-example norms: ask a private method")
