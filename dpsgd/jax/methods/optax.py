"""
Optax's public per-example clip, accumulated over physical batches, noise once.

``optax.contrib.differentially_private_aggregate`` clips, noises and divides in one call, so that
two physical batches would be noised twice; its clip, ``per_example_global_norm_clip``, is public.
"""

import jax
import jax.numpy as jnp
import optax

from dpsgd.jax.methods.masked import Masked
from dpsgd.jax.rows import select_rows, square_rows


class Optax(Masked):
    """Masked rows become zero gradients outside of Optax."""

    def _sum_and_norms(self, params, clip_norm, inputs, targets, mask):
        gradients = self._gradients(params, select_rows(mask, inputs), targets)
        gradients = select_rows(mask, gradients)
        leaves, tree = jax.tree.flatten(gradients)
        total, _ = optax.per_example_global_norm_clip(leaves, clip_norm)
        squared = sum(square_rows(g) for g in leaves)
        return jax.tree.unflatten(tree, total), jnp.sqrt(squared)
