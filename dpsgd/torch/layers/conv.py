"""
Convolutions: products of the unfolded input (one row of patches per position) and dL/dy.

Where unfolding costs more than the product, the convolution's own weight gradient serves. Nor does
the Gram matrix of patches need them: with A = xᵀx, the Gram matrix of the padded image's positions,
(XXᵀ)_tu = Σ_o A_{t+o, u+o} over the kernel's offsets o. For a kernel of 3×3 at stride 1 that takes
a ninth of the FLOPs.
"""

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd import cost
from dpsgd.torch.layers.base import Product, Seen, wide

_backward = torch.ops.aten.convolution_backward.default


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

    def images(self, seen: Seen) -> tuple[Tensor, tuple[int, ...]]:
        """The input in the dtype of ``g`` and the padding that is left to do."""
        x, padding = seen.x.to(seen.g.dtype), self.module.padding
        if padding == "valid":
            return x, (0,) * self.dims
        if padding != "same":
            return x, tuple(padding)
        sizes = zip(self.module.kernel_size, self.module.dilation, strict=True)
        total = [d * (k - 1) for k, d in sizes]
        if all(t % 2 == 0 for t in total):
            return x, tuple(t // 2 for t in total)
        around = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        return F.pad(x, around), (0,) * self.dims

    def _pointwise(self, padding: tuple[int, ...]) -> bool:
        return {*self.module.kernel_size} == {1} and {*padding} == {0}

    def _geometry(self, padding: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """(kernel, stride, dilation, padding) in two dimensions."""
        module = self.module
        found = module.kernel_size, module.stride, module.dilation, padding
        if self.dims == 1:
            return tuple((n, *f) for n, f in zip((1, 1, 1, 0), found, strict=True))
        return found

    def sizes(self, seen: Seen) -> tuple[int, int, int]:
        """(T, d, p)."""
        weight, g = self.module.weight, seen.g
        positions = g.numel() // (seen.examples * g.shape[1])
        return positions, weight[0].numel(), len(weight) // self.groups

    def layer(self, seen: Seen) -> cost.Layer:
        """Its sizes; the input is held as an image, not as patches."""
        layer = super().layer(seen)
        if "weight" not in self.trained:
            return layer
        gram, patches = self._shifted_cost(seen)
        return dataclasses.replace(
            layer,
            stored=seen.x.numel() // (seen.examples * self.groups),
            gram_inputs=math.ceil(min(gram, patches) / layer.positions**2),
        )

    def _shifted_cost(self, seen: Seen) -> tuple[float, float]:
        """Multiplications for XXᵀ of one example and group: by shifted sums, by patches."""
        x, padding = self.images(seen)
        positions, inputs, _ = self.sizes(seen)
        patches = positions**2 * inputs
        if len(x) != seen.examples or self._pointwise(padding):
            return math.inf, patches
        sides = zip(x.shape[2:], padding, strict=True)
        whole = math.prod(side + 2 * pad for side, pad in sides)
        count = math.prod(self.module.kernel_size)
        # An addition moves two numbers, which takes as long as several multiplications.
        return whole**2 * (inputs // count) + 8 * count * positions**2, patches

    def _windows(self, seen: Seen) -> tuple[Tensor, list[tuple[slice, slice]]]:
        """The padded image [P·groups, c, h, w], and what each offset of the kernel sees of it."""
        x, padding = self.images(seen)
        space = seen.g.shape[2:]
        if self.dims == 1:
            x, space = x.unsqueeze(-2), (1, *space)
        kernel, stride, dilation, padding = self._geometry(padding)
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        x = x.reshape(-1, x.shape[1] // self.groups, *x.shape[2:])
        axes = [
            [slice(o * d, o * d + (n - 1) * step + 1, step) for o in range(size)]
            for size, n, step, d in zip(kernel, space, stride, dilation, strict=True)
        ]
        return x, list(itertools.product(*axes))

    def _pairs(self, seen: Seen) -> Tensor:
        """XXᵀ [P·groups, T, T], without the patches."""
        x, windows = self._windows(seen)
        flat = x.flatten(2).to(wide(x))
        every = torch.bmm(flat.mT, flat).view(-1, *x.shape[2:], *x.shape[2:])
        total = sum(every[:, i, j, i, j] for i, j in windows)
        return total.reshape(len(x), -1, math.isqrt(total[0].numel()))

    def _outputs(self, seen: Seen) -> Tensor:
        """Gᵀ [images·groups, p, T]."""
        width = len(self.module.weight) // self.groups
        return seen.g.reshape(len(seen.g) * self.groups, width, -1)

    def gram(self, seen: Seen) -> Tensor:
        """⟨XXᵀ, GGᵀ⟩ [P], by whichever takes fewer multiplications."""
        shifted, patches = self._shifted_cost(seen)
        if shifted >= patches:
            return super().gram(seen)
        outputs = self._outputs(seen).to(wide(seen.g))
        squares = (self._pairs(seen) * torch.bmm(outputs.mT, outputs)).sum((1, 2))
        return squares.view(seen.examples, -1).sum(1).clamp(min=0)

    def matrices(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(X [P·groups, T, d], G [P·groups, T, p])."""
        g, examples = seen.g, seen.examples
        x, padding = self.images(seen)
        pointwise = self._pointwise(padding)
        kernel, stride, dilation, padding = self._geometry(padding)
        if self.dims == 1:
            x, g = x.unsqueeze(-2), g.unsqueeze(-2)
        if pointwise:
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

    def weights(self, seen: Seen) -> Tensor:
        """[P, *weight.shape]; one by one on a CPU, where unfolding takes longest."""
        module, examples = self.module, seen.examples
        x, padding = self.images(seen)
        apart = module.kernel_size == module.stride  # patches that do not overlap
        if x.is_cuda or apart or self._pointwise(padding):
            return super().weights(seen)
        each = len(x) // examples
        rows = [
            self._batch(x[i : i + each], seen.g[i : i + each], padding)
            for i in range(0, len(x), each)
        ]
        return torch.stack(rows)

    def _batch(self, x: Tensor, g: Tensor, padding: tuple[int, ...]) -> Tensor:
        module, none = self.module, [0] * self.dims
        sizes = module.stride, padding, module.dilation
        weight = module.weight.detach().to(g.dtype)
        arguments = (g, x, weight, None, *sizes, False, none, module.groups)
        return _backward(*arguments, (False, True, False))[1]

    def bias(self, g: Tensor, examples: int) -> Tensor:
        """[P, p]."""
        return g.flatten(2).sum(2).view(examples, -1, g.shape[1]).sum(1)

    def add_product(self, seen: Seen, view: Tensor) -> None:
        """The convolution's own weight gradient."""
        x, padding = self.images(seen)
        view.add_(self.pulled("weight", self._batch(x, seen.g, padding).to(view.dtype)))
