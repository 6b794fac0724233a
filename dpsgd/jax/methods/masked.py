"""
Masked DP-SGD (arXiv:2406.17298 §3): vmap(grad) at one static P, masked rows contribute 0.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)    g: [P, ...] per parameter, c: [P]
"""

import jax
import jax.numpy as jnp

from dpsgd.jax.step import JaxStep, select_rows


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
        squared = sum(
            jnp.square(g).reshape(len(mask), -1).sum(1) for g in jax.tree.leaves(gradients)
        )
        finite = jnp.isfinite(squared)
        keep = mask & finite
        # Almost never entered. A plain select would copy every gradient before the product below.
        _, gradients = jax.lax.while_loop(
            lambda state: state[0],
            lambda state: (jnp.zeros_like(state[0]), select_rows(finite, state[1])),
            (~finite.all(), gradients),
        )
        norms = jnp.sqrt(jnp.where(keep, squared, 0))
        factors = jnp.where(keep, jnp.minimum(1, clip_norm / norms), 0)
        total = jax.tree.map(lambda g: jnp.tensordot(factors, g, axes=1), gradients)
        return total, jnp.sqrt(jnp.where(mask, squared, 0))
