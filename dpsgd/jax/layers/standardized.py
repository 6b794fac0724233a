"""
Weight-standardised convolutions (arXiv:1903.10520): the kernel is ŵ = (w-μ)/s, s = √(var+ε).

With K weights per output channel and δ = ∂ŵ/s, which is a plain convolution's gradient at g/s,

∂w = δ - mean(δ) - ŵ·mean(δ⊙ŵ),    ‖∂w‖² = ‖δ‖² - Σ_p [(Σδ)²/K + ⟨δ, ŵ⟩² (2/K - ‖ŵ‖²/K²)]

over channels p. Where δ is not built, Σδ = Σ_t g_t·Σ_k a_tk of the unfolded input a, and
⟨δ, ŵ⟩ = Σ_t g_t·y_t, both over s. So no gradient of an example goes back through ŵ; their sum does.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd.jax.layers.base import Found
from dpsgd.jax.layers.conv import Conv


@dataclasses.dataclass(frozen=True)
class Standardized:
    """``nnx.Conv(..., use_bias=False, conv_general_dilated=Standardized(epsilon))``."""

    epsilon: float = 1e-6

    def moments(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """ŵ [..., p] and 1/s [p], in float32 or better."""
        kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        axes = tuple(range(kernel.ndim - 1))
        scale = jax.lax.rsqrt(kernel.var(axes) + self.epsilon)
        return (kernel - kernel.mean(axes)) * scale, scale

    def __call__(self, x: jax.Array, kernel: jax.Array, *args, **options) -> jax.Array:
        """XLA's convolution with the standardised kernel."""
        kernel = self.moments(kernel)[0].astype(kernel.dtype)
        return jax.lax.conv_general_dilated(x, kernel, *args, **options)


class StandardizedConv(Conv):
    """``nnx.Conv`` whose convolution is :class:`Standardized`."""

    need_outputs = ("gram",)

    def __init__(self, module: nnx.Conv, trained: list[str]) -> None:
        super().__init__(module, trained)
        function: Any = module.conv_general_dilated
        self.moments = function.moments
        self.size = math.prod(self.shape[:-1])

    @classmethod
    def takes(cls, module: nnx.Conv) -> bool:
        """Without a bias, which y would hold."""
        function = module.conv_general_dilated
        known = isinstance(function, Standardized) and module.bias is None
        return known and cls.plain(module)

    def found(self, x: jax.Array, g: jax.Array, way: str, *more: jax.Array, held: bool) -> Found:
        """As of the plain convolution at g/s; what ‖δ‖² is to be lessened by is ``squared``."""
        weight, *y = more
        kernel, scale = self.moments(weight)
        g = g * scale.astype(g.dtype)
        found = super().found(x, g, way, *more, held=held)
        if way == "none":
            return found
        if y:
            positions = g.reshape(-1, g.shape[-1])
            sums = self._summed_gradient(x, g)
            along = (positions * y[0].reshape(positions.shape)).sum(0, dtype=scale.dtype)
        else:
            rows = found["weight"] if way == "keep" else self.gradient(x, g)
            rows = rows.astype(scale.dtype).reshape(-1, g.shape[-1])
            sums, along = rows.sum(0), (rows * kernel.reshape(rows.shape)).sum(0)
        lengths = jnp.square(kernel).reshape(-1, g.shape[-1]).sum(0)
        less = jnp.square(sums) / self.size
        less += jnp.square(along) * (2 / self.size - lengths / self.size**2)
        return found | {"squared": found.get("squared", 0.0) - less.sum()}

    def _summed_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        # Σ of the gradient over the weights of each channel [p], from the inputs' sums.
        inputs, outputs = self.matrices(x, g)
        wide = jnp.promote_types(g.dtype, jnp.float32)
        sums = inputs.sum(-1, dtype=wide)
        return jnp.einsum("nt,ntp->np", sums, outputs, preferred_element_type=wide).reshape(-1)

    def pulled(self, weight: jax.Array, total: jax.Array) -> jax.Array:
        """Σ δ as Σ ∂w."""
        kernel, axes = self.moments(weight)[0], tuple(range(weight.ndim - 1))
        return total - total.mean(axes) - kernel * (total * kernel).mean(axes)
