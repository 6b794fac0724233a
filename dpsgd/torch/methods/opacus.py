"""
Opacus with hooks (arXiv:2109.12298), driven through its public API.

Each physical batch is a skipped step of its DPOptimizer, as in its BatchMemoryManager. Masked
examples are dropped, and an empty physical batch skipped, outside of Opacus.
Its clip factor is C/(‖g‖+1e-6), capped at 1.
"""

import warnings

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch.utils._pytree import tree_map

from dpsgd.torch.noise import Noise
from dpsgd.torch.step import TorchStep, check_losses


class Opacus(TorchStep):
    """The hooks of GradSampleModule; holds P gradients at once."""

    wrapper, wrapped_optimizer = GradSampleModule, DPOptimizer

    def __init__(self, model, optimizer, privacy, **options) -> None:
        super().__init__(model, optimizer, privacy, **options)
        if self.compile:
            raise ValueError("every Opacus hook breaks torch.compile's graph: run it eager")
        self.module = self.wrapper(model, loss_reduction="sum", **self._wrapper_options())
        self.noise = Noise(self.device, options.get("seed"), self.ranks.rank, streams=1)
        self.dp_optimizer = self.wrapped_optimizer(
            optimizer,
            # Its rank's part, from its rank's generator.
            noise_multiplier=self.noise_share * privacy.noise_multiplier,
            max_grad_norm=privacy.clip_norm,
            expected_batch_size=privacy.expected_batch_size,
            loss_reduction="sum",
            generator=self.noise.generators[0],
        )

    def _wrapper_options(self) -> dict:
        return {}

    def _losses(self, inputs, targets, mask):
        inputs, targets = tree_map(lambda t: t[mask], (inputs, targets))
        with self.autocast():
            losses = self.loss(self.module, inputs, targets)
        return check_losses(losses, len(targets))

    def _backward(self, losses) -> None:
        losses.sum().backward()

    def _accumulate(self, inputs, targets, mask) -> None:
        if not mask.any():
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Opacus' and torch's notes on backward hooks
            self._backward(self._losses(inputs, targets, mask))
            self.dp_optimizer.signal_skip_step(True)
            self.dp_optimizer.step()
            self.dp_optimizer.zero_grad()

    def update(self) -> None:
        """Opacus' noise once, sum over the ranks, divide by L, the optimizer, clear."""
        self.done += 1
        self.noise.at(self.done)
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p)
        self.dp_optimizer.add_noise()
        if self.ranks.world > 1:
            torch._foreach_copy_(self.views, [p.grad for p in self.params])
            self._reduce()
            for p, view in zip(self.params, self.views, strict=True):
                p.grad = view
        for p in self.params:
            p.grad.div_(self.privacy.expected_batch_size)
        self.dp_optimizer.original_optimizer.step()
        self._clear()

    def clipped_sum(self, inputs, targets, mask) -> dict[str, np.ndarray]:
        """Clipped sum of one physical batch; the running sum is left as it was."""
        saved = [p.summed_grad for p in self.params]
        self._clear()
        self.accumulate(inputs, targets, mask)
        sums = [
            torch.zeros_like(p) if p.summed_grad is None else p.summed_grad for p in self.params
        ]
        result = self._numpy([s.view_as(p) for s, p in zip(sums, self.params, strict=True)])
        self._clear()
        for p, s in zip(self.params, saved, strict=True):
            p.summed_grad = s
        return result

    def norms(self, inputs, targets, mask) -> np.ndarray:
        """Per-example gradient norms [P]; masked rows are 0."""
        result = np.zeros(len(mask), np.float32)
        if mask.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._losses(inputs, targets, mask).sum().backward()
            result[mask.cpu().numpy()] = self._norms().detach().cpu().numpy()
            self.module.zero_grad(set_to_none=True)
            for p in self.params:
                p.grad_sample = None
        return result

    def _norms(self):
        squares = [g.flatten(1).square().sum(1) for g in self.dp_optimizer.grad_samples]
        return torch.stack(squares).sum(0).sqrt()

    def _clear(self) -> None:
        for p in self.params:
            p.grad = p.grad_sample = p.summed_grad = None
