"""
Plain SGD: the baseline every JAX method is compared with. No clipping, no noise.

g = (1/L) · Σ_{i∈B} g_i
"""

import jax
import jax.numpy as jnp

from dpsgd.jax.rows import fill_rows
from dpsgd.jax.step import JaxStep


class SGD(JaxStep):
    """One jitted gradient of the masked, summed loss per physical batch."""

    private = False

    def _sum_and_norms(self, params, clip_norm, inputs, targets, mask):
        def total(params):
            losses = self.objective(params, *fill_rows(mask, (inputs, targets)))
            return jnp.where(mask, losses, 0).sum()

        return jax.grad(total)(params), None

    def norms(self, inputs, targets, mask):
        """Not there: the gradients of single examples are never formed."""
        raise NotImplementedError("plain SGD has no per-example norms: ask a private method")
