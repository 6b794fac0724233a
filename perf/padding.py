"""
Four ways to give Poisson draws of every size B to a compiler that wants one shape.

- ``recompile``: the draw as it is; each new B is a new shape.
- ``multiple``: padded to the next multiple of P; each new number of multiples is a new shape.
- ``dynamic``: one array of ``CAP`` physical batches, and a loop whose trip count is an argument; a
  larger draw goes on in a further array, as cutting it off would be another mechanism.
- ``static``: physical batches of P rows, the loop on the host: what ``jax-masked`` is given.

The gradients are those of ``jax-masked`` in all four, so that only the shapes differ.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd import PrivacyConfig, models
from dpsgd.jax import models as zoo
from dpsgd.jax.methods.masked import Masked
from perf.protocol import LEARNING_RATE, NUM_EXAMPLES, SEED

MODEL, P, L = "digits-cnn", 16, 64
CAP = 6  # physical batches, L + 4√L examples: one draw in some 10,000 is larger
WAYS = ("static", "dynamic", "multiple", "recompile")


class Dynamic(Masked):
    """Masked, in a loop over the physical batches that hold a real example."""

    def _accumulated(self, params, total, clip_norm, inputs, targets, mask):
        rows, add = self.physical_batch_size, super()._accumulated
        last = jnp.where(mask, jnp.arange(1, len(mask) + 1), 0).max()

        def body(k, total):
            batch = jax.tree.map(
                lambda a: jax.lax.dynamic_slice_in_dim(a, k * rows, rows), (inputs, targets, mask)
            )
            return add(params, total, clip_norm, *batch)

        return jax.lax.fori_loop(0, (last + rows - 1) // rows, body, total)


def calls(way: str, size: int) -> list[int]:
    """Rows of each call of ``accumulate`` for a draw of ``size`` examples."""
    if way == "recompile":
        return [size] if size else []
    rows = {"multiple": math.ceil(size / P) * P, "dynamic": CAP * P, "static": P}[way]
    return [rows] * math.ceil(size / rows) if size else []


def slots(way: str, size: int) -> int:
    """Rows that are computed for it, padding included."""
    return size if way == "recompile" else math.ceil(size / P) * P


class Study:
    """One way on draws of the given sizes, all arrays on the device already."""

    def __init__(self, way: str, sizes: list[int], device: str) -> None:
        self.sizes = sizes
        spec, kind = models.get(MODEL), Dynamic if way == "dynamic" else Masked
        model = zoo.build(spec, device=device)
        privacy = PrivacyConfig(
            num_examples=NUM_EXAMPLES,
            sample_rate=L / NUM_EXAMPLES,
            noise_multiplier=1.0,
            clip_norm=1.0,
            steps=1000,
        )
        self.step: Any = kind(
            model,
            zoo.optimizer(model, "adam", LEARNING_RATE),
            privacy,
            loss=zoo.cross_entropy,
            physical_batch_size=P,
            seed=SEED,
        )
        used = sum(slots(way, size) for size in sizes)
        self.padding_fraction = 1 - sum(sizes) / used if used else 0.0
        self.draws = [self._placed(way, size, spec) for size in sizes]

    def _placed(self, way, size, spec):
        rng, left, placed = np.random.default_rng(SEED), size, []
        for rows in calls(way, size):
            real = min(left, rows)
            left -= real
            inputs = np.zeros((rows, *spec.input_shape), np.float32)
            targets = np.zeros(rows, np.int64)
            for n in range(real):  # example by example, so that all ways have the same ones
                inputs[n] = rng.standard_normal(spec.input_shape, np.float32)
                targets[n] = rng.integers(spec.num_classes)
            placed.append(self.step.put(inputs, targets, np.arange(rows) < real))
        return placed

    def clipped_sum(self, draw: int) -> dict[str, np.ndarray]:
        """Of one whole draw."""
        parts = [self.step.clipped_sum(*placed) for placed in self.draws[draw]]
        return {n: sum(part[n] for part in parts) for n in self.step.parameters()}

    def run(self) -> None:
        """One training step on each draw."""
        for placed in self.draws:
            for part in placed:
                self.step.accumulate(*part)
            self.step.update()
        self.step.synchronize()
