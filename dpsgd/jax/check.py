"""
Whether the loss of one example depends on another one: the model is run twice on three rows.

ℓ_1(x_1, x_1, x_1) = ℓ_1(x', x_1, x')

The private methods differentiate batches of one example, so that nothing can leak from one gradient
to another; but a model that mixes examples is then trained on an objective that nobody wrote down.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

TOLERANCE = 1e-4  # relative; the shapes are the same, so that rounding hardly differs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(loss, graph, params, others, inputs, targets, mask):
    """ℓ of (x_1, x_1, x_1) and of (x', x_1, x'), [3] each; compiled once for a model and shape."""
    first = jnp.argmax(mask)

    def rows(a, changed):
        row = a[first]
        if jnp.issubdtype(a.dtype, jnp.floating):  # no shift or scale, which a norm layer removes
            wave = jnp.cos(jnp.arange(row.size)).reshape(row.shape)
            other = (row + (1 + jnp.abs(row).max()) * wave).astype(row.dtype)
        else:
            other = jnp.zeros_like(row)
        return jnp.stack([other, row, other] if changed else [row, row, row])

    def one(changed):
        batch = jax.tree.map(lambda a: rows(a, changed), (inputs, targets))
        return loss(nnx.merge(graph, params, others, copy=True), *batch)

    return one(False), one(True)


def examples_apart(
    loss: Callable, graph: Any, params: Any, others: Any, inputs: Any, targets: Any, mask: Any
) -> None:
    """
    Refuse a loss that mixes examples, as seen by the first unmasked row of a physical batch.

    ``graph``, ``params`` and ``others`` are ``nnx.split`` of the model.

    Raises:
        ValueError: the loss is no vector of P numbers, or an example's depends on others.
    """
    same, changed = _losses(loss, graph, params, others, inputs, targets, mask)
    if same.shape != (3,):
        raise ValueError(
            f"the loss of 3 examples has shape {same.shape}; return one loss per example, [3], and "
            "neither their mean nor their sum"
        )
    want, got = float(same[1]), float(changed[1])
    if np.isfinite(want) and not abs(got - want) <= TOLERANCE * max(1.0, abs(want)):
        raise ValueError(
            "the loss mixes examples: that of one changes with what the others are "
            f"({want:.6g}, then {got:.6g}), so no per-example gradient exists: look for a mean or "
            "a normalisation over the batch axis"
        )
