"""
Book-keeping (arXiv:2210.00038), planned layer by layer: one forward and one backward pass.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)

Each layer's norm and weighted sum are computed in the way that ``dpsgd.cost`` finds to be the
fastest within the memory budget; what no rule takes is kept, by autodiff under vmap.
"""

from dpsgd.jax.record import Tapped
from dpsgd.jax.recorded import Recorded
from dpsgd.jax.rows import clean_rows, clip_factors, select_rows, weighted_rows


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
        factors, norms, good = clip_factors(squared, clip_norm, mask)
        kept = [{w: a for w, a in taps.items() if w in ("weight", "bias")} for taps in found]
        rows, kept = clean_rows(good, (rows, kept))
        found = [taps | own for taps, own in zip(found, kept, strict=True)]
        own = {n: weighted_rows(factors, r) for n, r in rows.items()}
        return self.tree_of(own, self.summed(params, uses, found, factors, good)), norms
