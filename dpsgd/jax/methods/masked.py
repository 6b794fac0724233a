"""
Masked DP-SGD (arXiv:2406.17298 §3): vmap(grad) at one static P, masked rows contribute 0.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)    g: [P, ...] per parameter, c: [P]
"""

import jax

from dpsgd.jax.rows import clean_rows, clip_factors, select_rows, square_rows, weighted_rows
from dpsgd.jax.step import JaxStep


class Masked(JaxStep):
    """Compiles once whatever is drawn; holds P gradients at once where XLA cannot fuse."""

    def _gradient(self, params, inputs, target):
        """The gradient of one example, which has no batch axis."""

        def loss(params):
            batch = jax.tree.map(lambda a: a[None], inputs)
            return self.objective(params, batch, target[None])[0]

        return jax.grad(loss)(params)

    def _gradients(self, params, inputs, targets):
        """One gradient per example, each leaf [P, ...]."""
        return jax.vmap(self._gradient, (None, 0, 0))(params, inputs, targets)

    def _sum_and_norms(self, params, clip_norm, inputs, targets, mask):
        gradients = self._gradients(params, select_rows(mask, inputs), targets)
        squared = sum(square_rows(g) for g in jax.tree.leaves(gradients))
        factors, norms, good = clip_factors(squared, clip_norm, mask)
        gradients = clean_rows(good, gradients)
        return jax.tree.map(lambda g: weighted_rows(factors, g), gradients), norms
