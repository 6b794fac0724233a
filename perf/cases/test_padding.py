"""Static shapes for random draws: what recompiling, padding and loops cost, on the same draws."""

import itertools

import pytest

from dpsgd import poisson_batches
from perf.protocol import NUM_EXAMPLES, SEED

DRAWS = 5
WAYS = ("static", "dynamic", "multiple", "recompile")  # the first is what the others must give


@pytest.mark.parametrize("way", WAYS)
def test_padding(way, measure_padding):
    from perf.padding import L, P

    draws = poisson_batches(NUM_EXAMPLES, L / NUM_EXAMPLES, P, DRAWS, seed=SEED)
    measure_padding(way, [logical.size for logical in itertools.islice(draws, DRAWS)])
