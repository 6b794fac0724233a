"""Norm layers: the weight's gradient is Σ g·x̂, the bias' Σ g; x̂ is computed again from x."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.torch.layers.base import Rule, fold


class _Scaled(Rule):
    """y = x̂·weight + bias."""

    def normalized(self, x: Tensor) -> Tensor:
        """x̂."""
        raise NotImplementedError

    def reduced(self, t: Tensor, examples: int) -> Tensor:
        """Sum over everything but the example and the parameter's own axes."""
        own = getattr(self.module, self.trained[0]).ndim
        return fold(t, examples).flatten(1, -own - 1).sum(1)

    def gradients(self, x: Tensor, g: Tensor, examples: int) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        return [
            self.reduced(g * self.normalized(x).to(g.dtype) if name == "weight" else g, examples)
            for name in self.trained
        ]


class LayerNorm(_Scaled):
    """``nn.LayerNorm``."""

    def normalized(self, x: Tensor) -> Tensor:
        """x̂."""
        return F.layer_norm(x, self.module.normalized_shape, eps=self.module.eps)


class RMSNorm(_Scaled):
    """``nn.RMSNorm``."""

    def normalized(self, x: Tensor) -> Tensor:
        """x̂."""
        return F.rms_norm(x, self.module.normalized_shape, eps=self.module.eps)


class LlamaRMSNorm(_Scaled):
    """Hugging Face's RMSNorm of Llama and its kin, over the last axis."""

    def normalized(self, x: Tensor) -> Tensor:
        """x̂."""
        return F.rms_norm(x, x.shape[-1:], eps=self.module.variance_epsilon)


class EitherLayerNorm(LayerNorm):
    """ConvNeXt's LayerNorm, with channels last or first."""

    def gradients(self, x: Tensor, g: Tensor, examples: int) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        if self.module.data_format == "channels_first":
            x, g = x.movedim(1, -1), g.movedim(1, -1)
        return super().gradients(x, g, examples)


class GroupNorm(_Scaled):
    """``nn.GroupNorm``: channels on axis 1."""

    def normalized(self, x: Tensor) -> Tensor:
        """x̂."""
        return F.group_norm(x, self.module.num_groups, eps=self.module.eps)

    def reduced(self, t: Tensor, examples: int) -> Tensor:
        """[P, C]."""
        channels = t.flatten(2).sum(2) if t.ndim > 2 else t
        return channels.view(examples, -1, t.shape[1]).sum(1)


class ActivatedGroupNorm(GroupNorm):
    """BiT's GroupNorm with its activation: g is first taken back through that."""

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """The activation has no parameter of its own."""
        return not list(module.activation.parameters())

    def gradients(self, x: Tensor, g: Tensor, examples: int) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        if isinstance(self.module.activation, nn.Identity):
            return super().gradients(x, g, examples)
        with torch.enable_grad():
            module = self.module
            normal = F.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
            normal = normal.detach().requires_grad_()
            (g,) = torch.autograd.grad(module.activation(normal), normal, g)
        return super().gradients(x, g, examples)
