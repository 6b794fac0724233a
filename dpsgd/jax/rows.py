"""Rows of a batch, one for each example: chosen, normed, clipped and summed."""

from typing import Any

import jax
import jax.numpy as jnp


def beside(values: jax.Array, a: jax.Array) -> jax.Array:
    """``values`` [P] in the shape [P, 1, …] that meets the rows of ``a``."""
    return values.reshape(-1, *[1] * (a.ndim - 1))


def select_rows(mask: jax.Array, tree: Any) -> Any:
    """Zero the masked rows of every array of ``tree`` by select, so that a NaN there is gone."""
    return jax.tree.map(lambda a: jnp.where(beside(mask, a), a, jnp.zeros_like(a)), tree)


def fill_rows(mask: jax.Array, tree: Any) -> Any:
    """
    The first unmasked row in place of every masked one, by select; zeros if all are masked.

    Where one backward pass sums over the batch, a row of zeros may give NaN, and 0 · NaN spreads.
    """

    def filled(a):
        row = jnp.where(mask.any(), a[jnp.argmax(mask)], jnp.zeros_like(a[0]))
        return jnp.where(beside(mask, a), a, row)

    return jax.tree.map(filled, tree)


def clean_rows(good: jax.Array, tree: Any) -> Any:
    """:func:`select_rows` if a row is not good, which is rare: a select would copy ``tree``."""
    _, tree = jax.lax.while_loop(
        lambda state: state[0],
        lambda state: (jnp.zeros_like(state[0]), select_rows(good, state[1])),
        (~good.all(), tree),
    )
    return tree


def clip_factors(
    squared: jax.Array, clip_norm: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """
    What ‖g‖² [P] says of each example.

    Returns:
        min(1, C/‖g‖), 0 for masked rows and where ‖g‖² is not finite in float32; ‖g‖, 0 for masked
        rows; whether ‖g‖² is finite. Each [P].
    """
    good = jnp.isfinite(squared.astype(jnp.float32))
    keep = mask & good
    norms = jnp.sqrt(jnp.where(keep, squared, 0))
    factors = jnp.where(keep, jnp.minimum(1, clip_norm / norms), 0)
    return factors, jnp.sqrt(jnp.where(mask, squared, 0)), good


def squared(a: jax.Array) -> jax.Array:
    """Σ a², accumulated in float32 or better."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.square(a.astype(wide)).sum()


def square_rows(a: jax.Array) -> jax.Array:
    """Squared norms of the rows [P], accumulated in float32 or better."""
    return jax.vmap(squared)(a)


def weighted_rows(factors: jax.Array, rows: jax.Array) -> jax.Array:
    """Σ_p factors_p · rows_p. As a product: XLA's sum over a leading axis is slow on CPUs."""
    wide = jnp.promote_types(rows.dtype, factors.dtype)
    return jnp.tensordot(factors, rows, axes=1, preferred_element_type=wide)
