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
from typing import Any

import numpy as np

from dpsgd.ranks import Ranks, digest

PLACEMENTS = ("round-robin", "shard")


@dataclass(frozen=True, kw_only=True)
class PhysicalBatch:
    """``indices`` int64 [P] and ``mask`` bool [P]; padding has mask False and repeats index 0."""

    indices: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LogicalBatch:
    """
    One Poisson draw: ``indices`` int64 [B]; iterating gives its physical batches, none if empty.

    With ``padded`` False the last physical batch is as short as the draw makes it. ``trips`` is the
    least number of physical batches: those beyond the draw are fully masked. ``drawn`` is a digest
    of the global draw that this is a rank's share of; 0 where there is none to compare.
    """

    indices: np.ndarray
    physical_batch_size: int
    padded: bool = True
    trips: int = 0
    drawn: int = 0

    @property
    def size(self) -> int:
        """B, the number of examples drawn. A secret: show it to nobody."""
        return len(self.indices)

    def share(self, rank: int, world: int, *, even: bool = False) -> "LogicalBatch":
        """
        What ``rank`` of ``world`` works on: every ``world``-th example of the one global draw.

        All ranks must have drawn with one seed. Their sizes, so their numbers of physical batches,
        differ by at most 1; a share may be empty. With ``even`` the numbers of physical batches are
        the same: where a rank's draw has ended, the last one is fully masked. A rank's share can be
        dealt again, to its devices.
        """
        longest = math.ceil(self.size / world)
        trips = math.ceil(longest / self.physical_batch_size) if even else 0
        return replace(
            self,
            indices=self.indices[rank::world],
            trips=max(trips, math.ceil(self.trips / world)),
            drawn=self.drawn or digest(self.indices),
        )

    def __len__(self) -> int:
        return max(self.trips, math.ceil(self.size / self.physical_batch_size))

    def __iter__(self) -> Iterator[PhysicalBatch]:
        width = self.physical_batch_size
        for start in range(0, len(self) * width, width):
            real = self.indices[start : start + width]
            padding = width - len(real) if self.padded or not len(real) else 0
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


def check_arguments(
    num_examples: int, sample_rate: float, physical_batch_size: int, steps: int
) -> None:
    """
    Raise what :func:`poisson_batches` would, before anything is drawn.

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


def poisson_batches(
    num_examples: int,
    sample_rate: float,
    physical_batch_size: int,
    steps: int,
    *,
    seed: int | np.random.SeedSequence | None = None,
    padded: bool = True,
    done: int = 0,
) -> Iterator[LogicalBatch]:
    """
    ``steps`` independent logical batches, the first ``done`` of which are left out.

    Args:
        num_examples: N ≥ 1.
        sample_rate: q in (0, 1].
        physical_batch_size: P ≥ 1.
        steps: T ≥ 1.
        seed: None seeds from the operating system, as privacy needs; a number is for tests.
        padded: pad the last physical batch to P.
        done: a run that goes on from there, with its seed, sees the draws it would have seen.

    Raises:
        ValueError: an argument is out of range.
    """
    check_arguments(num_examples, sample_rate, physical_batch_size, steps)
    draws = _draws(num_examples, sample_rate, physical_batch_size, steps, seed, padded)
    return itertools.islice(draws, done, None)


def _draws(num_examples, sample_rate, physical_batch_size, steps, seed, padded):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield LogicalBatch(
            indices=draw(rng, num_examples, sample_rate),
            physical_batch_size=physical_batch_size,
            padded=padded,
        )


def rank_batches(
    num_examples: int,
    sample_rate: float,
    physical_batch_size: int,
    steps: int,
    *,
    ranks: Ranks,
    seed: int,
    placement: str = "round-robin",
    even: bool = False,
    padded: bool = True,
    done: int = 0,
) -> Iterator[LogicalBatch]:
    """
    What one rank works on, in each of ``steps`` logical batches.

    Args, beyond those of :func:`poisson_batches`:
        ranks: which rank of how many.
        seed: the key that all ranks share; see :meth:`Ranks.shared_key`.
        placement: ``round-robin`` deals one global draw. With ``shard`` each rank draws from its
            own contiguous part of the data, with a stream of its own: the same law, but the sizes
            of the ranks' draws differ, and all wait for the largest.
        even: give all ranks the same number of physical batches, by fully masked ones.

    Guarantees: every example is in the union of the ranks' draws independently with probability q.

    Raises:
        ValueError: an argument is out of range.
    """
    rest: dict[str, Any] = {"padded": padded, "done": done}
    rate, width, world = sample_rate, physical_batch_size, ranks.world
    if placement == "round-robin":
        draws = poisson_batches(num_examples, rate, width, steps, seed=seed, **rest)
        return (logical.share(ranks.rank, world, even=even) for logical in draws)
    if placement != "shard":
        raise ValueError(f"placement is {placement!r}; use {' or '.join(PLACEMENTS)}")
    if num_examples < world:
        raise ValueError(f"{num_examples} examples make no shard for each of {world} ranks")
    bounds = [num_examples * r // world for r in range(world + 1)]
    keys = np.random.SeedSequence(seed).spawn(world)  # a key per rank: shared, all draw alike
    parts = [
        poisson_batches(bounds[r + 1] - bounds[r], rate, width, steps, seed=keys[r], **rest)
        for r in (range(world) if even else [ranks.rank])  # all, only where all lengths are needed
    ]
    first = bounds[ranks.rank]
    return (_shard(drawn, first, ranks.rank, even) for drawn in zip(*parts, strict=True))


def _shard(drawn: tuple[LogicalBatch, ...], first: int, rank: int, even: bool) -> LogicalBatch:
    own = drawn[rank if even else 0]
    return replace(own, indices=own.indices + first, trips=even * max(map(len, drawn)))
