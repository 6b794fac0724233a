"""Norm layers: the weight's gradient is Σ g·x̂, the bias' Σ g; x̂ is computed again from x."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.torch.layers.base import Rule, Seen, dot_channels, fold, wide


class _Scaled(Rule):
    """y = x̂·weight + bias."""

    def normalized(self, x: Tensor) -> Tensor:
        """x̂."""
        raise NotImplementedError

    def gradients(self, seen: Seen) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        own = getattr(self.module, self.trained[0]).ndim
        g = seen.g

        def reduced(t):
            return fold(t, seen.examples).flatten(1, -own - 1).sum(1)

        return [
            reduced(g * self.normalized(seen.x).to(g.dtype) if name == "weight" else g)
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

    def gradients(self, seen: Seen) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        if self.module.data_format == "channels_first":
            x, g = seen.x.movedim(1, -1), seen.g.movedim(1, -1)
            seen = Seen(x=x, g=g, examples=seen.examples)
        return super().gradients(seen)


class GroupNorm(Rule):
    """``nn.GroupNorm``: channels on axis 1."""

    def gradients(self, seen: Seen) -> list[Tensor]:
        """One [P, C] for each trained parameter."""
        x, g = seen.x.to(wide(seen.g)).contiguous(), seen.g
        rows, channels, groups = len(x), x.shape[1], self.module.num_groups
        _, mean, scale = torch.native_group_norm(
            x, None, None, rows, channels, x[0, 0].numel(), groups, self.module.eps
        )
        found = dot_channels(g, x, mean, scale)
        own = dict(zip(("weight", "bias"), found, strict=True))
        return [own[name].view(seen.examples, -1, channels).sum(1) for name in self.trained]


class ActivatedGroupNorm(GroupNorm):
    """BiT's GroupNorm with its activation: dL/dy is taken before that."""

    inner = "activation"

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """The activation has no parameter of its own."""
        return not list(module.activation.parameters())
