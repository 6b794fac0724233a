"""The law of a Poisson draw, with planted wrong samplers that the same tests reject."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpsgd.sampling import LogicalBatch, draw, poisson_batches

N, Q, DRAWS = 50, 0.2, 4000
LEVEL = 1e-4  # of each test; seeds are fixed, so a pass stays a pass


def inclusions(sampler, seed=0):
    """Bool [DRAWS, N]: who was drawn when."""
    rng, table = np.random.default_rng(seed), np.zeros((DRAWS, N), bool)
    for row in table:
        row[sampler(rng)] = True
    return table


def law_p_values(table):
    """p-values of the four ways in which a sampler can fail to be Poisson."""
    n = len(table)
    sizes = table.sum(1)
    variance = N * Q * (1 - Q)
    lagged = (table[1:].astype(float) - Q) * (table[:-1] - Q)
    left, right = table[:, ::2], table[:, 1::2]
    pairs = (left & right).sum()
    chance = Q * Q
    return {
        "mean": 2 * stats.norm.sf(abs(sizes.mean() - N * Q) / np.sqrt(variance / n)),
        "variance": min(
            1,
            2
            * min(
                stats.chi2.sf(sizes.var() * n / variance, n - 1),
                stats.chi2.cdf(sizes.var() * n / variance, n - 1),
            ),
        ),
        "example": stats.chi2.sf(((table.sum(0) - n * Q) ** 2 / (n * Q * (1 - Q))).sum(), N),
        "pairs": stats.binomtest(int(pairs), left.size, chance).pvalue,
        "lag": 2 * stats.norm.sf(abs(lagged.mean()) * np.sqrt(lagged.size) / (Q * (1 - Q))),
    }


def poisson(rng):
    return draw(rng, N, Q)


def shuffled(rng):
    return rng.permutation(N)[: int(N * Q)]


def biased(rng):
    return np.flatnonzero(rng.random(N) < Q * np.linspace(0.8, 1.2, N))


def neighbours_together(rng):
    return np.flatnonzero(np.repeat(rng.random(N // 2) < Q, 2))


class Stuck:
    """Draws each batch twice: what a sampler that is seeded anew now and then does."""

    def __init__(self):
        self.calls, self.last = 0, None

    def __call__(self, rng):
        if self.calls % 2 == 0:
            self.last = draw(rng, N, Q)
        self.calls += 1
        return self.last


def shared_seed(rng):
    half = draw(rng, N // 2, Q)  # two ranks with one seed take the same positions
    return np.concatenate([half, half + N // 2])


def test_draws_follow_the_poisson_law():
    assert min(law_p_values(inclusions(poisson)).values()) > LEVEL


@pytest.mark.parametrize(
    ("wrong", "seen_by"),
    [
        (shuffled, "variance"),
        (shared_seed, "variance"),
        (biased, "example"),
        (neighbours_together, "pairs"),
        (Stuck(), "lag"),
    ],
)
def test_wrong_samplers_are_rejected(wrong, seen_by):
    assert law_p_values(inclusions(wrong))[seen_by] < LEVEL


def rate_p_value(sizes, population, rate):
    return stats.poisson.sf(sizes.sum() - 1, len(sizes) * population * rate)


def test_a_tiny_rate_is_not_rounded_to_a_grid():
    rng, population, rate = np.random.default_rng(0), 10**9, 1e-8
    sizes = np.array([len(draw(rng, population, rate)) for _ in range(500)])
    assert rate_p_value(sizes, population, rate) > LEVEL
    grid = np.ceil(rate * 2**24) / 2**24
    rounded = np.array([len(draw(rng, population, grid)) for _ in range(500)])
    assert rate_p_value(rounded, population, rate) < LEVEL


@given(size=st.sampled_from([0, 1, 3, 4, 5, 8, 9]), padded=st.booleans())
def test_physical_batches_hold_the_draw_exactly_once(size, padded):
    logical = LogicalBatch(indices=np.arange(size) + 7, physical_batch_size=4, padded=padded)
    physical = list(logical)
    assert len(physical) == len(logical) == -(-size // 4)
    kept = [i for b in physical for i in b.indices[b.mask]]
    assert kept == list(range(7, 7 + size))
    assert all(len(b.indices) == len(b.mask) <= 4 for b in physical)
    if padded:
        assert all(len(b.mask) == 4 for b in physical)


def test_indices_are_distinct_and_in_range():
    for logical in poisson_batches(30, 0.9, 8, 50, seed=1):
        assert len(set(logical.indices)) == logical.size
        assert logical.size == 0 or 0 <= logical.indices.min() <= logical.indices.max() < 30


def test_unseeded_draws_differ_and_seeded_ones_do_not():
    def first(seed):
        return list(next(poisson_batches(10**6, 1e-3, 8, 1, seed=seed)).indices)

    assert first(3) == first(3)
    assert first(None) != first(None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0.1, 4, 1), "num_examples is 0"),
        ((10, 0.0, 4, 1), "sample_rate is 0.0"),
        ((10, 1.5, 4, 1), "sample_rate is 1.5"),
        ((10, float("nan"), 4, 1), "sample_rate is nan"),
        ((10, 0.1, 0, 1), "physical_batch_size is 0"),
        ((10, 0.1, 4, 0), "steps is 0"),
    ],
)
def test_bad_input_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        poisson_batches(*arguments)
