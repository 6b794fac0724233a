"""
Convolutions: products of the unfolded input (one row of patches per position) and dL/dy.

Where unfolding costs more than the product, the convolution's own weight gradient serves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.torch.layers.base import Buffer, Product, Seen, dot_channels, tracing, wide

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

    def sizes(self, seen: Seen) -> tuple[int, int, int]:
        """(T, d, p)."""
        weight, g = self.module.weight, seen.g
        positions = g.numel() // (seen.examples * g.shape[1])
        return positions, weight[0].numel(), len(weight) // self.groups

    def matrices(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(X [P·groups, T, d], G [P·groups, T, p])."""
        module, g, examples = self.module, seen.g, seen.examples
        x, padding = self.images(seen)
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        if self.dims == 1:
            x, g = x.unsqueeze(-2), g.unsqueeze(-2)
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
            padding = (0, *padding)
        if self._pointwise(padding):
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

    def weights(self, seen: Seen, buffer: Buffer) -> Tensor:
        """[P, *weight.shape]; one by one on a CPU, where unfolding takes longest."""
        module, examples = self.module, seen.examples
        x, padding = self.images(seen)
        apart = module.kernel_size == module.stride  # patches that do not overlap
        if x.is_cuda or apart or self._pointwise(padding):
            return super().weights(seen, buffer)
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


class StandardizedConv(Conv):
    """
    BiT's convolution, whose weight is standardised in each forward: ŵ = (w-μ)/s per output channel.

    With K weights per channel, ∂w = (∂ŵ - mean(∂ŵ) - ŵ·mean(∂ŵ⊙ŵ))/s. So ‖∂w‖² is, over channels,
    Σ (‖∂ŵ‖² - (Σ∂ŵ)²/K - ⟨∂ŵ, ŵ⟩² (2/K - ‖ŵ‖²/K²)) / s², where ⟨∂ŵ, ŵ⟩ = Σ_t g·y needs neither:
    no gradient of an example is ever taken back through the standardisation.
    """

    needs_output = True

    def start(self) -> None:
        """The weight [p, K], its mean, 1/s and ‖ŵ‖², all but the first [p]."""
        with torch.no_grad():
            flat = self.module.weight.detach().flatten(1)
            variance, mean = self._variance(flat)
            scale = (variance + self.module.eps).rsqrt()
            self.moments = flat, mean, scale, flat.shape[1] * variance * scale.square()

    @staticmethod
    def _variance(flat: Tensor) -> tuple[Tensor, Tensor]:
        # torch's var_mean takes thirty times longer on a CPU; it is needed where the mean is large.
        if flat.device.type == "cpu" and not tracing():
            mean = flat.mean(1)
            square = torch.linalg.vector_norm(flat, dim=1).square() / flat.shape[1]
            variance = square - mean.square()
            if bool((variance > 0.5 * square).all()):
                return variance, mean
        return torch.var_mean(flat, dim=1, correction=0)

    def images(self, seen: Seen) -> tuple[Tensor, tuple[int, ...]]:
        """As of the plain convolution, after the module's own padding."""
        if self.module.pad is not None:
            x = self.module.pad(seen.x)
            seen = Seen(x=x, g=seen.g, examples=seen.examples)
        return super().images(seen)

    def pulled(self, own: str, rows: Tensor) -> Tensor:
        """Gradient […, p, …] of ŵ to that of w: the backward pass of a batch norm over channels."""
        if own != "weight":
            return rows
        flat, mean, scale, _ = self.moments
        each = rows.numel() // flat.numel()
        shape = (1, each * len(flat), flat.shape[1])
        return torch.ops.aten.native_batch_norm_backward(
            rows.reshape(shape).to(flat.dtype),
            flat.repeat(each, 1).view(shape) if each > 1 else flat.view(shape),
            None,
            None,
            None,
            mean.repeat(each),
            scale.repeat(each),
            True,
            self.module.eps,
            (True, False, False),
        )[0].view_as(rows)

    def _less(self, sums: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        # What ‖∂ŵ‖² is lessened by [P, p], given Σ∂ŵ [P, p]; and 1/s².
        flat, _, scale, lengths = self.moments
        size, y = flat.shape[1], seen.y
        assert y is not None
        if self.module.bias is not None:
            y = y - self.module.bias.detach().view(-1, 1, 1)
        along = dot_channels(seen.g, y)[0].to(sums.dtype).view(seen.examples, -1, len(flat)).sum(1)
        less = sums.square() / size + along.square() * (2 / size - lengths / size**2)
        return less, scale.square()

    def square_weights(self, rows: Tensor, seen: Seen) -> Tensor:
        """Squared norms [P] of the gradients of w, from those of ŵ."""
        flat = rows.flatten(2)
        squares = torch.linalg.vector_norm(flat, dim=2, dtype=wide(rows)).square()
        less, scale = self._less(flat.sum(2, dtype=wide(rows)), seen)
        return ((squares - less) * scale).sum(1).clamp(min=0)

    def gram(self, inputs: Tensor, outputs: Tensor, seen: Seen) -> Tensor:
        """‖∂w‖² in closed form: nothing of the size of the weight is built for an example."""
        sums = torch.bmm(outputs.mT, inputs.sum(2, keepdim=True)).view(seen.examples, -1)
        less, scale = self._less(sums.to(wide(sums)), seen)
        each = scale.sqrt().to(outputs.dtype).view(self.groups, 1, -1)
        scaled = (outputs.unflatten(0, (-1, self.groups)) * each).flatten(0, 1)
        return (super().gram(inputs, scaled, seen) - (less * scale).sum(1)).clamp(min=0)
