"""Convolutions as products: the input is unfolded into one row of patches per position."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.torch.layers.base import Product


class Conv(Product):
    """``nn.Conv1d`` and ``nn.Conv2d``, any stride, padding, dilation and groups."""

    def __init__(self, name: str, module: nn.Module, trained: list[str]) -> None:
        super().__init__(name, module, trained)
        self.groups = module.groups
        self.dims = module.weight.ndim - 2

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Zero padding only."""
        return module.padding_mode == "zeros"

    def _both(self, value) -> tuple[int, int]:
        return tuple(value) if self.dims == 2 else (1, *value)

    def matrices(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """(X [P·groups, T, d], G [P·groups, T, p])."""
        module, (x, g) = self.module, (t.to(g.dtype) for t in (x, g))
        if self.dims == 1:
            x, g = x.unsqueeze(-2), g.unsqueeze(-2)
        kernel, stride = self._both(module.kernel_size), self._both(module.stride)
        dilation = self._both(module.dilation)
        x, padding = self._padded(x, kernel, dilation)
        if kernel == (1, 1) and padding == (0, 0):
            patches = x[..., :: stride[0], :: stride[1]].flatten(2)
        else:
            patches = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
        size = examples * self.groups
        if len(x) != examples:  # several images per example: their positions side by side
            patches = patches.view(examples, -1, *patches.shape[1:]).transpose(1, 2).flatten(2)
            g = g.reshape(examples, -1, *g.shape[1:]).transpose(1, 2)
        return (
            patches.reshape(size, -1, patches.shape[-1]).mT,
            g.reshape(size, g.shape[1] // self.groups, -1).mT,
        )

    def _padded(self, x, kernel, dilation):
        padding = self.module.padding
        if padding == "valid":
            return x, (0, 0)
        if padding != "same":
            return x, self._both(padding) if self.dims == 2 else (0, *padding)
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if all(t % 2 == 0 for t in total):
            return x, (total[0] // 2, total[1] // 2)
        (top, left) = (t // 2 for t in total)
        return F.pad(x, (left, total[1] - left, top, total[0] - top)), (0, 0)

    def bias(self, g: Tensor, examples: int) -> Tensor:
        """[P, p]."""
        return g.flatten(2).sum(2).view(examples, -1, g.shape[1]).sum(1)


class StandardizedConv(Conv):
    """
    BiT's convolution, whose weight is standardised in each forward: ŵ = (w-μ)/s per output channel.

    With K weights per channel, ∂w = (∂ŵ - mean(∂ŵ) - ŵ·mean(∂ŵ⊙ŵ))/s.
    """

    def _standardized(self) -> tuple[Tensor, Tensor]:
        flat = self.module.weight.detach().flatten(1)
        variance, mean = torch.var_mean(flat, dim=1, keepdim=True, correction=0)
        scale = (variance + self.module.eps).rsqrt()
        return (flat - mean) * scale, scale

    def matrices(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """As of the plain convolution, after the module's own padding."""
        if self.module.pad is not None:
            x = self.module.pad(x)
        return super().matrices(x, g, examples)

    def pulled(self, weight: Tensor) -> Tensor:
        """Gradient […, p, …] of ŵ to that of w."""
        standard, scale = self._standardized()
        flat = weight.flatten(-3)
        along = (flat * standard).mean(-1, keepdim=True)
        return ((flat - flat.mean(-1, keepdim=True) - standard * along) * scale).view_as(weight)

    def gram(self, inputs: Tensor, outputs: Tensor, x, g, examples: int) -> Tensor:
        """‖∂w‖² in closed form: nothing of the size of the weight is built for an example."""
        standard, scale = self._standardized()
        size = standard.shape[1]
        wide = torch.promote_types(inputs.dtype, torch.float32)
        outputs = outputs * scale.view(self.groups, 1, -1).repeat(examples, 1, 1).to(outputs.dtype)
        pairs = torch.bmm(inputs, inputs.mT).to(wide) * torch.bmm(outputs, outputs.mT).to(wide)
        weight = standard.view(self.groups, -1, size).mT.repeat(examples, 1, 1).to(inputs.dtype)
        made = torch.bmm(inputs, weight)  # the layer's output before the bias
        summed = (outputs * inputs.sum(2, keepdim=True)).sum(1, dtype=wide)
        along = (outputs * made).sum(1, dtype=wide)
        squares = standard.square().sum(1).view(self.groups, -1).repeat(examples, 1)
        less = summed.square() / size + along.square() * (2 / size - squares / size**2)
        total = pairs.view(examples, -1).sum(1) - less.view(examples, -1).sum(1)
        return total.clamp(min=0)
