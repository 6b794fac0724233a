"""Linear layers: y = x W + b, over the last axis or over several."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd.jax.layers.base import Rule, column_sums, default, transposed


class Linear(Rule):
    """``nnx.Linear``: kernel [d, p]."""

    pulls = True
    turned = False  # whether gradients are formed as [p, d]

    def __init__(self, module: nnx.Linear, trained: list[str]) -> None:
        super().__init__(module, trained)
        self.precision = module.precision
        self.turned = self.shape[0] > self.shape[1]  # XLA's products on CPUs like wide rows

    @classmethod
    def takes(cls, module: nnx.Linear) -> bool:
        """With XLA's own product."""
        return default(module, dot_general=jax.lax.dot_general)

    @staticmethod
    def shape_of(module: nnx.Linear) -> tuple[int, ...]:
        """[d, p]."""
        return module.in_features, module.out_features

    def matrices(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(X [1, T, d], G [1, T, p])."""
        return x.reshape(1, -1, x.shape[-1]).astype(g.dtype), g.reshape(1, -1, g.shape[-1])

    def sides(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """X and G, or G and X for gradients [p, d]."""
        inputs, outputs = self.matrices(x, g)
        return (outputs, inputs) if self.turned else (inputs, outputs)

    def shaped(self, product: jax.Array) -> jax.Array:
        """[d, p] or [p, d]."""
        return product[0]

    def pulled(self, weight: jax.Array, total: jax.Array) -> jax.Array:
        """[d, p]."""
        return total.T if self.turned else total

    def pull(self, weight: jax.Array, g: jax.Array) -> jax.Array:
        """G Wᵀ."""
        return jnp.matmul(g, transposed(weight).astype(g.dtype), precision=self.precision)


class LinearGeneral(Rule):
    """``nnx.LinearGeneral``: several axes in, several out; kernel [*in, *out]."""

    def __init__(self, module: nnx.LinearGeneral, trained: list[str]) -> None:
        super().__init__(module, trained)
        self.axis, self.inside, self.outside = module.axis, module.in_features, module.out_features

    @classmethod
    def takes(cls, module: nnx.LinearGeneral) -> bool:
        """With XLA's own product, and no axis that has its own weights."""
        own = module.dot_general in (None, jax.lax.dot_general)
        return own and default(module, dot_general_cls=None) and not module.batch_axis

    @staticmethod
    def shape_of(module: nnx.LinearGeneral) -> tuple[int, ...]:
        """[*in, *out]."""
        return *module.in_features, *module.out_features

    def matrices(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(X [1, T, d], G [1, T, p])."""
        x = jnp.moveaxis(x, self.axis, range(-len(self.axis), 0)).astype(g.dtype)
        return (
            x.reshape(1, -1, math.prod(self.inside)),
            g.reshape(1, -1, math.prod(self.outside)),
        )

    def bias(self, g: jax.Array) -> jax.Array:
        """[*out]."""
        return column_sums(g.reshape(-1, math.prod(self.outside))).reshape(self.outside)
