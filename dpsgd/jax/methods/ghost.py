"""
Ghost clipping (arXiv:2110.05679): norms by one backward pass, the clipped sum by a second.

s = ∇ Σ_p c_p ℓ_p,   c_p = min(1, C/‖g_p‖)

No gradient of a rule's layer outlives its norm: least memory, more time. One jitted function.
"""

import jax
import jax.numpy as jnp

from dpsgd.jax.record import Tapped
from dpsgd.jax.recorded import Recorded
from dpsgd.jax.rows import clip_factors, fill_rows, select_rows


class Ghost(Recorded):
    """Exact flat clipping for unmodified ``flax.nnx`` models, in the memory of SGD."""

    def allowed(self, ways):
        """Only norms of what is dropped at once."""
        return tuple(way for way in ways if way != "keep") or ways

    def _sum_and_norms(self, params, clip_norm, inputs, targets, mask):
        uses = self.uses(inputs, targets)
        tied = {u.path for u in uses for other in uses if u.path == other.path and u is not other}
        told = [use.told(self.ways[use.name], held=use.path in tied) for use in uses]
        inputs = select_rows(mask, inputs)
        _, _, squared = self.norm_pass(Tapped(self._parts, told), params, inputs, targets)
        factors, norms, good = clip_factors(squared, clip_norm, mask)
        # A bad example's gradient times 0 may be NaN: a good one with weight 0 stands in for it.
        inputs, targets = fill_rows(good, (inputs, targets))
        total = self.weighted_pass(params, inputs, targets, factors)
        return jax.tree.map(lambda a: jnp.where(good.any(), a, 0), total), norms
