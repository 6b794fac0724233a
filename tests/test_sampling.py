"""The law of a Poisson draw, with planted wrong samplers that the same tests reject."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpsgd.ranks import Ranks
from dpsgd.sampling import LogicalBatch, draw, poisson_batches, rank_batches

N, Q, DRAWS = 50, 0.2, 4000
LEVEL = 1e-4  # of each test; seeds are fixed, so a pass stays a pass


def inclusions(sampler, seed=0):
    """Bool [DRAWS, N]: who was drawn when."""
    rng, table = np.random.default_rng(seed), np.zeros((DRAWS, N), bool)
    for row in table:
        row[sampler(rng)] = True
    return table


def law_p_values(table):
    """p-values of the ways in which a sampler can fail to be Poisson."""
    n = len(table)
    sizes = table.sum(1)
    variance = N * Q * (1 - Q)
    lagged = (table[1:].astype(float) - Q) * (table[:-1] - Q)
    left, right = table[:, ::2], table[:, 1::2]
    pairs = (left & right).sum()
    chance = Q * Q
    # The same positions of two shards: what ranks with one seed would draw together.
    apart = (table[:, : N // 2] & table[:, N // 2 :]).sum()
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
        "shards": stats.binomtest(int(apart), left.size, chance).pvalue,
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
        (shared_seed, "shards"),
        (biased, "example"),
        (neighbours_together, "pairs"),
        (Stuck(), "lag"),
    ],
)
def test_wrong_samplers_are_rejected(wrong, seen_by):
    assert law_p_values(inclusions(wrong))[seen_by] < LEVEL


class Dealt:
    """The union of what all ranks draw."""

    def __init__(self, placement, world):
        each = [
            rank_batches(N, Q, 4, DRAWS, ranks=ranks, seed=5, placement=placement)
            for ranks in (Ranks(rank=r, world=world) for r in range(world))
        ]
        self.steps = zip(*each, strict=True)

    def __call__(self, rng):
        indices = np.concatenate([logical.indices for logical in next(self.steps)])
        assert len(set(indices)) == len(indices), "an example is on one rank"
        return indices


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("placement", ["round-robin", "shard"])
def test_the_draws_of_all_ranks_together_follow_the_poisson_law(placement, world):
    assert min(law_p_values(inclusions(Dealt(placement, world))).values()) > LEVEL


def test_a_key_for_all_shards_is_rejected(monkeypatch):
    spawn = np.random.SeedSequence.spawn

    class Alike(np.random.SeedSequence):
        def spawn(self, n):
            return [spawn(self, 1)[0]] * n if self.n_children_spawned == 0 else spawn(self, n)

    monkeypatch.setattr(np.random, "SeedSequence", Alike)
    p_values = law_p_values(inclusions(Dealt("shard", 2)))
    assert p_values["variance"] < LEVEL
    assert p_values["shards"] < LEVEL


@given(
    world=st.sampled_from([1, 2, 3, 7]),
    placement=st.sampled_from(["round-robin", "shard"]),
    padded=st.booleans(),
)
def test_even_shares_have_the_same_number_of_physical_batches(world, placement, padded):
    options = {"seed": 2, "placement": placement, "even": True, "padded": padded}
    each = [
        rank_batches(30, 0.1, 2, 20, ranks=Ranks(rank=r, world=world), **options)
        for r in range(world)
    ]
    plain = rank_batches(30, 0.1, 2, 20, ranks=Ranks(world=world), seed=2, placement=placement)
    for shares, first in zip(zip(*each, strict=True), plain, strict=True):
        assert len({len(list(share)) for share in shares}) == len({len(s) for s in shares}) == 1
        assert max(-(-share.size // 2) for share in shares) == len(shares[0])
        kept = [i for b in shares[0] for i in b.indices[b.mask]]
        assert kept == list(shares[0].indices) == list(first.indices)


@pytest.mark.parametrize("placement", ["round-robin", "shard"])
def test_a_run_that_goes_on_sees_the_draws_it_would_have_seen(placement):
    def draws(done):
        options = {"ranks": Ranks(rank=1, world=2), "seed": 3, "placement": placement}
        return [b.indices.tolist() for b in rank_batches(100, 0.2, 8, 6, done=done, **options)]

    assert draws(4) == draws(0)[4:]


def test_a_share_knows_the_draw_that_it_is_part_of():
    one, two = (next(poisson_batches(100, 0.2, 8, 1, seed=s)) for s in (1, 2))
    digests = [logical.share(r, 2).drawn for logical in (one, two) for r in range(2)]
    assert digests[0] == digests[1] != digests[2] == digests[3]


@pytest.mark.parametrize(
    ("placement", "words"), [("hash", "round-robin or shard"), ("shard", "no")]
)
def test_bad_placements_are_refused(placement, words):
    with pytest.raises(ValueError, match=words):
        rank_batches(1, 0.5, 8, 1, ranks=Ranks(world=2), seed=1, placement=placement)


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
