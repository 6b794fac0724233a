"""Norm layers, y = x̂·scale + bias over the last axis: their gradients are Σ_T x̂·g and Σ_T g."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd import cost
from dpsgd.jax.layers.base import Rule, column_sums, default


class Norm(Rule):
    """``nnx.LayerNorm``, ``RMSNorm``, ``GroupNorm``; x̂ is what the layer gives without weights."""

    ways = ("keep",)
    weight = "scale"

    def __init__(self, module: Any, trained: list[str]) -> None:
        super().__init__(module, trained)
        self.by_rows = getattr(module, "reduction_axes", None) in (-1, (-1,))
        self.normalized = nnx.clone(module)
        for name in ("scale", "bias"):
            if hasattr(module, name):
                setattr(self.normalized, name, nnx.data(None))

    @classmethod
    def takes(cls, module: Any) -> bool:
        """With a scale of the last axis, and statistics of its own example alone."""
        last = getattr(module, "feature_axes", -1) in (-1, (-1,))
        return last and module.scale is not None and default(module, axis_name=None)

    @staticmethod
    def shape_of(module: Any) -> tuple[int, ...]:
        """[d]."""
        return module.scale.get_value().shape[-1:]  # it may be one of a stack

    def output(self, layer: Callable, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Of a matrix, where that is the same: XLA's sums are slow beside an axis of length 1."""
        if not self.by_rows:
            return layer(x, *args, **kwargs)
        return layer(x.reshape(-1, x.shape[-1]), *args, **kwargs).reshape(x.shape)

    def _along(self, x: jax.Array, g: jax.Array) -> jax.Array:
        # x̂·g [T, d], in float32 or better.
        wide = jnp.promote_types(g.dtype, jnp.float32)
        along = self.output(self.normalized, x).astype(wide) * g.astype(wide)
        return along.reshape(-1, g.shape[-1])

    def gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """[d]."""
        return column_sums(self._along(x, g))

    def weighted(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """One sum over all examples."""
        return jax.vmap(self._along)(x, g).sum((0, 1))

    def layer(
        self, name: str, kind: str, examples: int, stacked: int, x: Any, g: Any
    ) -> cost.Layer:
        """Scale and bias as one row."""
        return cost.Layer(
            name=name,
            kind=kind,
            examples=examples,
            outputs=len(self.trained) * g.shape[-1],
            groups=stacked,
            itemsize=g.dtype.itemsize,
            ways=self.ways,
        )
