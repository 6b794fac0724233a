"""
Opacus' ghost clipping (arXiv:2110.05679): norms by one backward, the clipped sum by a second.

Driven through its public API; see :mod:`dpsgd.torch.methods.opacus` for the clip factor.
"""

from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

from dpsgd.torch.methods.opacus import Opacus


class OpacusGhost(Opacus):
    """Never holds P gradients of a linear or embedding layer."""

    wrapper = GradSampleModuleFastGradientClipping
    wrapped_optimizer = DPOptimizerFastGradientClipping

    def _wrapper_options(self) -> dict:
        return {"max_grad_norm": self.privacy.clip_norm, "use_ghost_clipping": True}

    def _backward(self, losses) -> None:
        DPTensorFastGradientClipping(
            self.module, self.dp_optimizer, losses, loss_reduction="sum"
        ).backward()

    def _norms(self):
        return self.module.get_norm_sample()
