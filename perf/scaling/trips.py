"""
How many physical batches the ranks run for one logical batch, and the slowest of them.

The logical batch is B ~ Binomial(N, q), P examples go through a rank at once.

- ``round-robin``: one global draw dealt to W ranks, B_w = ⌊B/W⌋ or one more. The slowest rank runs
  ⌈⌈B/W⌉/P⌉ = ⌈B/(WP)⌉ physical batches.
- ``shard``: each rank draws from its own N/W examples. The B_w are independent, so that
  E[max_w ⌈B_w/P⌉] = Σ_{k≥0} (1 − Π_w F_w(kP)), F_w the distribution function of Binomial(N/W, q).

Both are exact sums, not values at the mean: ⌈·⌉ and max make them differ.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

PLACEMENTS = ("round-robin", "shard")
TAIL_SD = 12  # beyond it a Binomial has less mass than float64 resolves


@dataclass(frozen=True, kw_only=True)
class Trips:
    """
    Expected physical batches of one logical batch, a count.

    Attributes:
        mean: of a rank.
        slowest: of the rank that has most.
    """

    mean: float
    slowest: float


@cache
def trips(
    num_examples: int, sample_rate: float, world: int, physical_batch: int, placement: str
) -> Trips:
    """
    The expected trip counts; with P=1 they count examples, so that ``slowest`` is E[max_w B_w].

    Args:
        num_examples: N of the whole training set.
        sample_rate: q.
        world: W, the ranks.
        physical_batch: P.
        placement: ``round-robin`` or ``shard``.

    Raises:
        ValueError: an unknown placement, or a size that makes no sense.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; use {' or '.join(PLACEMENTS)}")
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"the sample rate is {sample_rate:g}: L must lie between 0 and N")
    if not 1 <= world <= num_examples or physical_batch < 1:
        raise ValueError(f"W={world}, P={physical_batch}: use 1 ≤ W ≤ N={num_examples} and P ≥ 1")
    if placement == "shard":
        return _shard(num_examples, sample_rate, world, physical_batch)
    return _round_robin(num_examples, sample_rate, world, physical_batch)


def _largest(num_examples: int, sample_rate: float) -> int:
    mean = num_examples * sample_rate
    spread = TAIL_SD * np.sqrt(mean * (1 - sample_rate)) + TAIL_SD
    return min(num_examples, int(mean + spread))


def _round_robin(num_examples: int, sample_rate: float, world: int, physical: int) -> Trips:
    from scipy.stats import binom

    high = _largest(num_examples, sample_rate)
    low = max(0, int(2 * num_examples * sample_rate) - high)
    drawn = np.arange(low, high + 1)
    mass = binom.pmf(drawn, num_examples, sample_rate)
    share, more = drawn // world, drawn % world
    mean = (more * -(-(share + 1) // physical) + (world - more) * -(-share // physical)) / world
    return Trips(mean=float(mass @ mean), slowest=float(mass @ -(-drawn // (world * physical))))


def _shard(num_examples: int, sample_rate: float, world: int, physical: int) -> Trips:
    from scipy.stats import binom

    size, larger = divmod(num_examples, world)  # ``larger`` ranks hold one example more
    done = np.arange(0, _largest(size + 1, sample_rate) + physical, physical)
    small, large = (binom.cdf(done, n, sample_rate) for n in (size, size + 1))
    return Trips(
        mean=float(np.sum(1 - ((world - larger) * small + larger * large) / world)),
        slowest=float(np.sum(1 - small ** (world - larger) * large**larger)),
    )
