"""
Exact Poisson subsampling in O(qN), cut into padded physical batches of one static shape.

A Poisson draw is its size, B ~ Binomial(N, q), then a uniform subset of that size. A logical batch
is cut into ceil(B/P) physical batches; overflow opens another one and nothing is ever truncated,
since truncation costs privacy.

Guarantees: every example is in a draw independently with probability q (a float64, not rounded to
a 2⁻²⁴ grid). Draws come from NumPy's PCG64 seeded by the operating system; PCG64 is not
cryptographic, so an adversary who could observe its state is outside the guarantee. The seed is a
secret.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class PhysicalBatch:
    """``indices`` int64 [P] and ``mask`` bool [P]; padding has mask False and repeats index 0."""

    indices: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LogicalBatch:
    """
    One Poisson draw: ``indices`` int64 [B]; iterating gives its physical batches, none if empty.

    With ``padded`` False the last physical batch is as short as the draw makes it.
    """

    indices: np.ndarray
    physical_batch_size: int
    padded: bool = True

    @property
    def size(self) -> int:
        """B, the number of examples drawn. A secret: show it to nobody."""
        return len(self.indices)

    def share(self, rank: int, world: int) -> "LogicalBatch":
        """
        What ``rank`` of ``world`` works on: every ``world``-th example of the one global draw.

        All ranks must have drawn with one seed. Their sizes, so their numbers of physical batches,
        differ by at most 1; a share may be empty.
        """
        return replace(self, indices=self.indices[rank::world])

    def __len__(self) -> int:
        return math.ceil(self.size / self.physical_batch_size)

    def __iter__(self) -> Iterator[PhysicalBatch]:
        width = self.physical_batch_size
        for start in range(0, self.size, width):
            real = self.indices[start : start + width]
            padding = width - len(real) if self.padded else 0
            yield PhysicalBatch(
                indices=np.concatenate([real, np.zeros(padding, np.int64)]),
                mask=np.arange(len(real) + padding) < len(real),
            )


def side_by_side(shares: Sequence[LogicalBatch]) -> Iterator[PhysicalBatch]:
    """
    Physical batches [len(shares) · P] of the devices that one process drives; padded ones only.

    A device whose share has ended gets a fully masked batch until the longest one ends.
    """
    width = shares[0].physical_batch_size
    empty = PhysicalBatch(indices=np.zeros(width, np.int64), mask=np.zeros(width, bool))
    for parts in itertools.zip_longest(*shares, fillvalue=empty):
        yield PhysicalBatch(
            indices=np.concatenate([part.indices for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
        )


def draw(rng: np.random.Generator, num_examples: int, sample_rate: float) -> np.ndarray:
    """One Poisson draw: distinct indices in [0, N), int64 [B], in random order; O(qN) time."""
    size = rng.binomial(num_examples, sample_rate)
    return rng.choice(num_examples, size, replace=False)


def poisson_batches(
    num_examples: int,
    sample_rate: float,
    physical_batch_size: int,
    steps: int,
    *,
    seed: int | np.random.SeedSequence | None = None,
    padded: bool = True,
) -> Iterator[LogicalBatch]:
    """
    ``steps`` independent logical batches.

    Args:
        num_examples: N ≥ 1.
        sample_rate: q in (0, 1].
        physical_batch_size: P ≥ 1.
        steps: T ≥ 1.
        seed: None seeds from the operating system, as privacy needs; a number is for tests.
        padded: pad the last physical batch to P.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value in (
        ("num_examples", num_examples),
        ("physical_batch_size", physical_batch_size),
        ("steps", steps),
    ):
        if not value >= 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate is {sample_rate}; it must lie in (0, 1]")
    return _draws(num_examples, sample_rate, physical_batch_size, steps, seed, padded)


def _draws(num_examples, sample_rate, physical_batch_size, steps, seed, padded):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield LogicalBatch(
            indices=draw(rng, num_examples, sample_rate),
            physical_batch_size=physical_batch_size,
            padded=padded,
        )
