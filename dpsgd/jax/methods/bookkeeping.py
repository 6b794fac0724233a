"""
Book-keeping (arXiv:2210.00038), planned layer by layer: one forward and one backward pass.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)

Each layer's norm and weighted sum are computed in the way that ``dpsgd.cost`` finds to be the
fastest within the memory budget; what no rule takes is kept, by autodiff under vmap.
"""

import jax
import jax.numpy as jnp

from dpsgd.jax.layers.base import weighted_rows
from dpsgd.jax.record import Tapped
from dpsgd.jax.recorded import Recorded
from dpsgd.jax.step import select_rows


class Bookkeeping(Recorded):
    """
    Exact flat clipping for unmodified ``flax.nnx`` models, at about the cost of SGD.

    Raises:
        ValueError: at the first batch, a memory budget that no plan fits.
    """

    budgeted = True

    def _sum_and_norms(self, params, clip_norm, inputs, targets, mask):
        uses = [u.told(self.ways[u.name], held=True) for u in self.uses(inputs, targets)]
        rows, found, squared = self.norm_pass(
            Tapped(self._parts, uses), params, select_rows(mask, inputs), targets
        )
        factors, norms = self.factors(squared, clip_norm, mask)
        good = jnp.isfinite(squared.astype(jnp.float32))
        rows, found = _cleaned(rows, found, good)
        own = {n: weighted_rows(factors, r) for n, r in rows.items()}
        return self.tree_of(own, self.summed(params, uses, found, factors, good)), norms


def _cleaned(rows, found, good):
    # Almost never entered. A plain select would copy every gradient before the products.
    kept = [{w: a for w, a in taps.items() if w in ("weight", "bias")} for taps in found]
    _, (rows, kept) = jax.lax.while_loop(
        lambda state: state[0],
        lambda state: (jnp.zeros_like(state[0]), select_rows(good, state[1])),
        (~good.all(), (rows, kept)),
    )
    return rows, [taps | own for taps, own in zip(found, kept, strict=True)]
