"""
Per-example gradients by torch.func: vmap(grad), clip, weighted sum.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)    g: [P, ...] per parameter, c: [P]
"""

import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from dpsgd.torch.step import TorchStep, check_losses, fill_rows


class Vmap(TorchStep):
    """Exact for every model that torch.func can differentiate; holds P gradients at once."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._sum_and_norms = self.compiled(self._clip)

    def _gradient(self, params, inputs, target):
        def objective(params):
            def bound(*args, **kwargs):
                return functional_call(self.model, params, args, kwargs)

            with self.autocast():
                one = tree_map(lambda t: t[None], inputs)
                return check_losses(self.loss(bound, one, target[None]), 1)[0]

        return grad(objective)(params)

    def _clip(self, params, inputs, targets, mask):
        per_example = vmap(self._gradient, in_dims=(None, 0, 0), randomness="different")(
            params, *fill_rows(mask, (inputs, targets))
        )
        rows = [per_example[name].flatten(1) for name in self.names]
        squared = sum(r.square().sum(1) for r in rows)
        keep = mask & squared.float().isfinite()
        norms = torch.where(keep, squared, torch.zeros_like(squared)).sqrt()
        factors = torch.where(
            keep, (self.privacy.clip_norm / norms).clamp(max=1), torch.zeros_like(norms)
        )
        sums = [factors @ torch.where(keep[:, None], r, torch.zeros_like(r)) for r in rows]
        return sums, torch.where(mask, squared.sqrt(), torch.zeros_like(squared))

    def _accumulate(self, inputs, targets, mask) -> None:
        sums, _ = self._run(inputs, targets, mask)
        with torch.no_grad():
            for view, s in zip(self.views, sums, strict=True):
                view.add_(s.view_as(view))

    def norms(self, inputs, targets, mask):
        """Per-example gradient norms [P]; masked rows are 0."""
        return self._run(inputs, targets, mask)[1].cpu().numpy()

    def _run(self, inputs, targets, mask):
        params = {n: p.detach() for n, p in zip(self.names, self.params, strict=True)}
        # The fused attention kernels have no batching rule: vmap would run them one by one.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                return self._sum_and_norms(params, inputs, targets, mask)
            except RuntimeError as error:
                if "data-dependent control flow" not in str(error):
                    raise
                raise ValueError(
                    "the model branches on the values of its inputs (Hugging Face text models do, "
                    "on the attention mask), which vmap cannot: use torch-bookkeeping"
                ) from error
