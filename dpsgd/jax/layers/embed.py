"""
``nnx.Embed``, which looks rows up, and serves as the last layer of a tied model by ``attend``.

The gradient of the lookup is g, row by row, at the ids; never one dense table per example.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd.jax.layers.base import Rule, default
from dpsgd.jax.layers.linear import Linear


class Lookup(Rule):
    """``embed(ids)``: embedding [V, d]."""

    ways = ("gram",)
    weight = "embedding"

    @classmethod
    def takes(cls, module: nnx.Embed) -> bool:
        """Ids that float32 holds exactly."""
        return default(module) and module.num_embeddings < 2**24

    @staticmethod
    def shape_of(module: nnx.Embed) -> tuple[int, ...]:
        """[V, d]."""
        return module.num_embeddings, module.features

    def ids(self, x: jax.Array) -> jax.Array:
        """Ids as float32, with negative ones counted from the end as ``jnp.take`` does."""
        x = jnp.where(x < 0, x + self.shape[0], x)
        return (x if self.shape[0] > 1 else jnp.zeros_like(x)).astype(jnp.float32)

    def matrices(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(ids [1, T, 1], G [1, T, d])."""
        return x.reshape(1, -1, 1), g.reshape(1, -1, g.shape[-1])

    def squared(self, x: jax.Array, g: jax.Array, way: str) -> jax.Array:
        """Σ_{t,s} [id_t = id_s] ⟨g_t, g_s⟩."""
        g = g.reshape(-1, g.shape[-1]).astype(jnp.promote_types(g.dtype, jnp.float32))
        ids = self.ids(x).reshape(-1)
        same = (ids[:, None] == ids[None]).astype(g.dtype)
        return jnp.maximum((same @ g * g).sum(), 0)

    def crossed(self, x: jax.Array, g: jax.Array, h: jax.Array, logits: jax.Array) -> jax.Array:
        """
        2⟨this gradient, that of ``attend``⟩ = 2 Σ_{t,s} G_s[id_t] ⟨h_s, g_t⟩.

        ``h`` [S, d] is what ``attend`` got, ``logits`` [S, V] what came back to its output: G.
        """
        wide = jnp.promote_types(g.dtype, jnp.float32)
        ids, g = x.reshape(-1).astype(jnp.int32), g.reshape(-1, g.shape[-1])
        h, logits = h.reshape(-1, h.shape[-1]), logits.reshape(-1, logits.shape[-1])
        products = jnp.einsum("sd,td->st", h, g, preferred_element_type=wide)
        return 2 * (logits[:, ids] * products).sum()

    def gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """The dense table, by one scatter."""
        g = g.reshape(-1, g.shape[-1]).astype(jnp.promote_types(g.dtype, jnp.float32))
        return jnp.zeros(self.shape, g.dtype).at[self.ids(x).reshape(-1).astype(jnp.int32)].add(g)

    def weighted(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """One scatter over all examples."""
        return self.gradient(x, g)


class Attend(Linear):
    """``embed.attend(h)`` = h Eᵀ: the table as a linear layer without bias."""

    weight = "embedding"
    pulls = False

    def __init__(self, module: Any, trained: list[str]) -> None:
        Rule.__init__(self, module, trained)

    @classmethod
    def takes(cls, module: Any) -> bool:
        """As for the lookup, which has the same table."""
        return Lookup.takes(module)

    @staticmethod
    def shape_of(module: Any) -> tuple[int, ...]:
        """[V, d]."""
        return Lookup.shape_of(module)

    def sides(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """G and X: the table is [V, d]."""
        return super().sides(x, g)[::-1]
