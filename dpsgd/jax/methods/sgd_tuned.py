"""
SGD as fast as it can be written here: the baseline that leaves no slowdown below 1.

g = (1/L) · Σ_{i∈B} g_i

The taps of the private methods, seen by the whole batch at once: each weight gradient and each
product behind it is written out, with operands laid out as the backend likes them.
"""

import jax
import jax.numpy as jnp

from dpsgd.jax.record import Tapped
from dpsgd.jax.recorded import Recorded, replaced
from dpsgd.jax.rows import fill_rows


class SGDTuned(Recorded):
    """What a rule takes by its products, the rest by autodiff."""

    private = False

    def _sum_and_norms(self, params, clip_norm, inputs, targets, mask):
        uses = [use.told("keep", held=False) for use in self.uses(inputs, targets)]
        tapped = Tapped(self._parts, uses)
        inputs, targets = fill_rows(mask, (inputs, targets))
        leaves, numbers = jax.tree.leaves(params), self.others(uses)

        def total(own, taps):
            values = replaced(leaves, numbers, own)
            losses = tapped.losses(values, taps, self._rest, inputs, targets)
            return jnp.where(mask, losses, 0).sum()

        own, found = jax.grad(total, argnums=(0, 1))([leaves[n] for n in numbers], tapped.zeros())
        sums = self.added(params, uses, lambda use, taps, what: taps[what], found)
        return self.tree_of(dict(zip(numbers, own, strict=True)), sums), None

    def norms(self, inputs, targets, mask):
        """Not there: the gradients of single examples are never formed."""
        raise NotImplementedError("plain SGD has no per-example norms: ask a private method")
