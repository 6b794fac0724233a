"""BiT's convolution, whose weight is standardised in each forward."""

import dataclasses

import torch
from torch import Tensor

from dpsgd import cost
from dpsgd.torch.layers.base import Seen, dot_channels, tracing, wide
from dpsgd.torch.layers.conv import Conv


class StandardizedConv(Conv):
    """
    BiT's convolution, whose weight is standardised in each forward: ŵ = (w-μ)/s per output channel.

    With K weights per channel, ∂w = (∂ŵ - mean(∂ŵ) - ŵ·mean(∂ŵ⊙ŵ))/s. So ‖∂w‖² is, over channels,
    Σ (‖∂ŵ‖² - (Σ∂ŵ)²/K - ⟨∂ŵ, ŵ⟩² (2/K - ‖ŵ‖²/K²)) / s², where ⟨∂ŵ, ŵ⟩ = Σ_t g·y needs neither:
    no gradient of an example is ever taken back through the standardisation.
    """

    needs_output = True

    def layer(self, seen: Seen) -> cost.Layer:
        """Its sizes; y is held, too."""
        beside = seen.g.numel() // (seen.examples * self.groups)
        return dataclasses.replace(super().layer(seen), beside=beside)

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

    def gram(self, seen: Seen) -> Tensor:
        """‖∂w‖² in closed form: nothing of the size of the weight is built for an example."""
        x, windows = self._windows(seen)
        rows = x.sum(1, dtype=wide(x))
        ones = sum(rows[:, i, j] for i, j in windows).flatten(1)  # X·1: the sum of each patch
        sums = torch.bmm(self._outputs(seen).to(ones.dtype), ones.unsqueeze(2))
        sums = sums.view(seen.examples, -1, len(self.module.weight)).sum(1)
        less, scale = self._less(sums, seen)
        g = seen.g * scale.sqrt().to(seen.g.dtype).view(-1, 1, 1)
        scaled = Seen(x=seen.x, g=g, y=seen.y, examples=seen.examples)
        return (super().gram(scaled) - (less * scale).sum(1)).clamp(min=0)
