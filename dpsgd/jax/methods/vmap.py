"""
The naive JAX row of arXiv:2406.17298 §3: the drawn examples as they come, no padding.

Every new size is a new shape, and a new compilation: the reason for the masked row.
"""

from typing import Any

import jax
import numpy as np

from dpsgd.jax.methods.masked import Masked


class Vmap(Masked):
    """Masked rows are dropped before the jitted function sees the batch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.place.world > 1:
            raise ValueError("jax-vmap takes sizes as they are drawn: give it one device")

    def accumulate(self, inputs, targets, mask) -> None:
        """Add the clipped gradients of the unmasked examples; compiles for each new size."""
        real = np.flatnonzero(np.asarray(mask))
        if len(real) < len(mask):
            inputs, targets, mask = jax.tree.map(lambda a: a[real], (inputs, targets, mask))
        if len(real):
            super().accumulate(inputs, targets, mask)
