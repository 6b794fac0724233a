"""DP-SGD over devices and processes in JAX: the same result as on one, one sum per update."""

import math
import re

import numpy as np
import pytest
from launch import finish, results, start
from scipy import stats

from dpsgd.sampling import LogicalBatch, side_by_side

LIMITS = {"float64": 1e-12, "float32": 1e-5}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    return results("ranks_jax.py", 1, folder, "devices", "sharded", "noises", "poisson")[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes with two devices each."""
    folder = tmp_path_factory.mktemp("pair")
    return results("ranks_jax.py", 2, folder, "processes", "joint_noises", "disagree", "poisson")


def assert_same(name, found):
    limit = LIMITS["float32" if "float32" in name else "float64"]
    assert found["distance"] < limit, name
    assert found["alike"], name
    assert found["compiles"] == 2, name


def assert_collectives(found, accumulate, update):
    assert (found["accumulate"], found["update"]) == (accumulate, update)


def assert_cut(found, shards):
    assert 1 / shards <= found["held"] < 1.6 / shards, "small parameters are padded"
    assert set(found["accumulate"]) == {"all-gather", "reduce-scatter"}


def test_devices_of_one_process_give_the_result_of_one_device(alone):
    assert len(alone["devices"]) == 7
    for name, found in alone["devices"].items():
        assert_same(name, found)
        if name == "every":
            assert_collectives(found, ["all-reduce"], [])
        else:
            assert_collectives(found, [], ["all-reduce"])


def test_two_processes_give_the_result_of_one_device(pair):
    for name in pair[0]["processes"]:
        ours = [found["processes"][name] for found in pair]
        for found in ours:
            assert_same(name, found)
            assert found["world"] == 4
            if "cut" in name:
                assert_cut(found, 4)
                assert found["update"] == ["all-reduce"] * 2  # digests: over both axes
            elif name == "every":
                assert_collectives(found, ["all-reduce"], ["all-reduce"])  # of the digests
            else:
                assert_collectives(found, [], ["all-reduce"])
        assert ours[0]["total"] == ours[1]["total"]


def test_a_cut_model_gives_the_result_of_one_device(alone):
    for shards, found in alone["sharded"].items():
        assert_same("float64", found)
        assert_cut(found, int(shards))
        assert found["update"] == ["all-reduce"]


def test_many_draws_compile_nothing_new(alone, pair):
    for found in (alone, *pair):
        assert {0, 1, 2} < set(found["poisson"]["sizes"])
        assert found["poisson"]["compiles"] == 3, "accumulate, noise, update"


def plausible(found):
    """Whether the numbers are N(0, σ²C²), two-sided χ² at 1e-6, and two updates independent."""
    count = found["numbers"]
    low, high = (stats.chi2.ppf(p, count) / count for p in (5e-7, 1 - 5e-7))
    return bool(low < found["square"] < high and abs(found["product"]) < 5 / np.sqrt(count))


def test_the_noise_is_that_of_one_device_whichever_ranks_are_empty(alone):
    mistakes = {"one key", "too little", "too little, 2 shards"}
    for name, found in alone["noises"].items():
        assert plausible(found) == (name not in mistakes), name


def test_the_noise_of_two_processes_is_that_of_one_device(pair):
    ours, theirs = (found["joint_noises"] for found in pair)
    assert ours == theirs, "ranks hold different parameters"
    for name, found in ours.items():
        assert plausible(found) == ("local ranks" not in name), name


@pytest.mark.parametrize("matter", ["draw", "config", "parameters", "step"])
def test_a_rank_that_disagrees_is_named_by_all(pair, matter):
    for found in pair:
        assert f"rank 1 differs from rank 0 in {matter}" in found["disagree"][matter]


def test_ranks_that_agree_go_on(pair):
    assert all(found["disagree"]["nothing"] == "agreed" for found in pair)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "survivor", "words"),
    [
        ("dies", 0, "rank 1 has given no sign of life"),
        ("hangs", 0, "rank 1 hangs"),
        ("sharded_hangs", 0, "rank 1 hangs"),
        ("first_dies", 1, "rank 0|leader|coordination service"),
    ],
)
def test_a_rank_that_fails_is_named_and_ends_the_run(tmp_path, check, survivor, words):
    codes, errors = finish(start("ranks_jax.py", 2, tmp_path, check), tmp_path, timeout_s=60)
    assert all(codes), "every rank ends, and none well"
    assert re.search(words, errors[survivor])


def test_a_share_is_dealt_again_to_the_devices_of_a_process():
    for size in range(30):
        whole = LogicalBatch(indices=np.arange(size), physical_batch_size=3)
        parts, trips = [], set()
        for rank in range(2):
            mine = whole.share(rank, 2, even=True)
            own = [mine.share(d, 3) for d in range(3)]
            batches = list(side_by_side(own))
            trips.add(len(batches))
            parts += [i for b in batches for i in b.indices[b.mask]]
            assert {share.drawn for share in own} == {whole.share(0, 2).drawn}
        assert sorted(parts) == list(range(size))
        assert trips == {math.ceil(math.ceil(math.ceil(size / 2) / 3) / 3)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["jax-bookkeeping", "jax-sgd"])
def test_training_over_devices_and_processes_ends_at_the_same_parameters(tmp_path, method):
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    both.mkdir()
    (one,) = results("ranks_jax.py", 1, alone, "trains", method, "0", "sgd", "0.5")
    two = results("ranks_jax.py", 2, both, "trains", method, "0", "sgd", "0.5")
    assert [run.pop("shards") for run in (one, *two)] == [4, 2, 2]
    accuracy = one.pop("accuracy")
    assert two[0].pop("accuracy") == accuracy
    assert np.isnan(two[1].pop("accuracy"))
    assert two[0] == two[1], "ranks differ"
    for name, want in one.items():
        np.testing.assert_allclose(two[0][name], want, atol=1e-5)


@pytest.mark.slow
def test_processes_resume_after_one_has_died(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    line = "ranks_jax.py", 2
    want = results(*line, whole, "trains", "jax-bookkeeping", "1", "adam", "0.01")
    died = start(*line, broken, "trains", "jax-bookkeeping", "1", "adam", "0.01", KILL="1:4")
    codes, _ = finish(died, broken, timeout_s=170)
    assert all(codes)
    assert not (broken / "0.json").exists()
    got = results(*line, broken, "trains", "jax-bookkeeping", "1", "adam", "0.01")
    assert got[0] == want[0]
    files = {"checkpoint.npz", "keys", "keys.1", "ledger"}
    assert {p.name for p in (broken / "run").iterdir()} == files
