"""The padding study: four ways to shape a draw, one sum, and the compilations each pays."""

import numpy as np
import pytest

from perf import padding, protocol

SIZES = [20, 33, 0]


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padding, "P", 8)
        patch.setattr(padding, "CAP", 4)  # 32 examples: one of the draws overflows
        yield


def ways(sizes):
    return {way: padding.Study(way, sizes, "cpu") for way in padding.WAYS}


def test_all_ways_give_the_same_sum_and_none_cuts_a_draw_off():
    found, compiled = {}, {}
    for way, study in ways(SIZES).items():
        before = study.step.compiles()
        found[way] = [study.clipped_sum(draw) for draw in range(len(SIZES))]
        compiled[way] = study.step.compiles() - before
        if way == "dynamic":
            assert [len(placed) for placed in study.draws] == [1, 2, 0]
            cut = study.step.clipped_sum(*study.draws[1][0])
    for way in padding.WAYS:
        for got, want in zip(found[way], found["static"], strict=True):
            for name in want:
                np.testing.assert_allclose(got[name], want[name], atol=2e-5)
    whole = found["static"][1]
    assert max(np.abs(cut[n] - whole[n]).max() for n in whole) > 1e-3, "a cut draw would be seen"
    assert compiled == {"static": 1, "dynamic": 1, "multiple": 2, "recompile": 2}


def test_padding_is_counted_from_the_rows_that_are_computed():
    shares = [1 - sum(SIZES) / sum(padding.slots(way, n) for n in SIZES) for way in padding.WAYS]
    assert shares == pytest.approx([1 - 53 / 64] * 3 + [0])
    for way in padding.WAYS:
        for size in (0, 1, 8, 9, 32, 33, 100):
            assert sum(padding.calls(way, size)) >= padding.slots(way, size) >= size


def test_one_draw_in_thousands_overflows_the_array_of_the_loop():
    chance = 1 / 10_000
    draws = np.random.default_rng(0).binomial(
        protocol.NUM_EXAMPLES, padding.L / protocol.NUM_EXAMPLES, 100_000
    )
    assert 0 < (draws > 6 * 16).mean() < 3 * chance
