"""Weight standardisation."""
import jax
import jax.numpy as jnp
from dataclasses import dataclass

@dataclass(frozen=True)
class Standardized:
    """A convolution whose kernel is standardised."""
    epsilon: float = 1e-6

    def transform(self, kernel):
        wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        axes = tuple(range(kernel.ndim - 1))
        mean, variance = wide.mean(axes), wide.var(axes)
        return ((wide - mean) * jax.lax.rsqrt(variance + self.epsilon)).astype(kernel.dtype)

    def __call__(self, x, kernel, *args, **kwargs):
        return jax.lax.conv_general_dilated(x, self.transform(kernel), *args, **kwargs)
