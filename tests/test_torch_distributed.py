"""Many torch ranks over gloo against one: sums, noise, collectives, agreement; Opacus' traps."""

import launch
import numpy as np
import pytest
import ranks_torch
import torch
from scipy import stats

from dpsgd.ranks import Ranks
from dpsgd.torch.distributed import noise_share
from dpsgd.torch.noise import SLICE, Noise

LEVEL = 1e-5  # of each χ² test; the noise of some is fresh in every run
WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]
CHECKS = ("sums", "noise", "agreement", "opacus_traps")
SIZE = 9994  # parameters of the CNN


@pytest.fixture(scope="module", params=WORLDS)
def found(request, tmp_path_factory):
    """What all ranks of one launch found, by check."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = launch.results("ranks_torch.py", request.param, folder, *CHECKS)
    return {check: [rank[check] for rank in ranks] for check in CHECKS}


def test_many_ranks_end_where_one_does(found):
    for name, result in found["sums"][0].items():
        assert result["off"] < (1e-5 if name.endswith("float32") else 1e-12), name


def test_one_all_reduce_per_logical_batch(found):
    sums = found["sums"]
    world, updates = len(sums), len(ranks_torch.SIZES)
    trips = sum(-(-size // (world * ranks_torch.P)) for size in ranks_torch.SIZES)
    for rank in sums:
        assert rank.pop("every")["calls"] == ["allreduce_"] * trips
        for name, result in rank.items():
            assert result["calls"] == ["allreduce_"] * updates, name


def test_all_ranks_hold_the_same_bits(found):
    for name in found["sums"][0]:
        assert len({rank[name].get("bits") for rank in found["sums"]}) == 1, name


@pytest.fixture(scope="module", params=[pytest.param(w, marks=pytest.mark.slow) for w in (2, 4)])
def sharded(request, tmp_path_factory):
    """What all ranks found of sharded parameters."""
    folder = tmp_path_factory.mktemp("sharded")
    ranks = launch.results("ranks_torch.py", request.param, folder, "sharded")
    return [rank["sharded"] for rank in ranks]


def chi2_p_value(mean_square):
    tail = stats.chi2(SIZE)
    return 2 * min(tail.sf(mean_square * SIZE), tail.cdf(mean_square * SIZE))


def test_the_noise_of_all_ranks_is_that_of_one(found):
    """σ²C² in sum, for both placements, with uneven and empty shares; planted mistakes differ."""
    for name, mean_square in found["noise"][0].items():
        planted = name.startswith("planted")
        assert (chi2_p_value(mean_square) < LEVEL) == planted, (name, mean_square)


def test_a_rank_that_differs_is_named_with_its_matter_on_every_rank(found):
    world = len(found["agreement"])
    for rank in found["agreement"]:
        assert rank.pop("nothing") == ""
        for matter, told in rank.items():
            assert told.startswith(f"rank {world - 1} differs from rank 0 in {matter.split()[0]}: ")


def test_opacus_own_sampler_shares_positions_and_drops_empty_draws(found):
    """Why its rows are driven by our draws."""
    ranks = found["opacus_traps"]
    assert all(rank["positions"] == ranks[0]["positions"] for rank in ranks), "all draw alike"
    yielded = [rank["yielded"] for rank in ranks]
    assert max(yielded) < 200, "an empty draw is not a step"
    assert len(set(yielded)) > 1, "so ranks drift apart"


def noise_of(seed, rank, step, size):
    flat = torch.zeros(size)
    Noise(flat.device, seed, rank).add(flat, 1.0, 1.0, step)
    return flat.numpy()


@pytest.mark.parametrize("size", [4000, 3 * SLICE])  # one stream; three
def test_noise_is_a_function_of_key_rank_and_step(size):
    base = noise_of(3, 0, 1, size)
    np.testing.assert_array_equal(base, noise_of(3, 0, 1, size))
    others = [noise_of(*key, size) for key in ((4, 0, 1), (3, 1, 1), (3, 0, 2), (None, 0, 1))]
    others.append(np.roll(base, size // 3))
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / np.sqrt(size)
    assert abs(np.mean(np.square(base)) - 1) < 5 * np.sqrt(2 / size)
    # One run of steps: the same generator objects, moved from step to step, come back.
    noise, flat = Noise(torch.device("cpu"), 3), torch.zeros(size)
    noise.add(torch.zeros(size), 1.0, 1.0, 2)
    noise.add(flat, 1.0, 1.0, 1)
    np.testing.assert_array_equal(base, flat.numpy())


@pytest.mark.parametrize("placement", ["split", "rank0"])
@pytest.mark.parametrize("world", [1, 2, 3, 80])
def test_the_shares_of_the_noise_add_up(placement, world):
    shares = [noise_share(placement, Ranks(rank=r, world=world)) for r in range(world)]
    assert np.square(shares).sum() == pytest.approx(1, rel=1e-12)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="split or rank0"):
        ranks_torch.build("torch-vmap", None, noise_placement="rank1")
    with pytest.raises(ValueError, match="'once' per logical batch"):
        ranks_torch.build("torch-vmap", None, sync="every")
    with pytest.raises(ValueError, match="'once' or 'every'"):
        ranks_torch.build("torch-sgd", None, sync="never")


def test_sharded_parameters_end_where_whole_ones_do(sharded):
    """FSDP2: with uneven and empty shares, and a bad example on one rank."""
    world = len(sharded)
    for name in ("sgd", "bad", "adam"):
        results = [rank[name] for rank in sharded]
        assert results[0]["off"] < (1e-3 if name == "adam" else 1e-4)
        assert len({r["bits"] for r in results}) == 1
        assert sum(r["owned"] for r in results) == pytest.approx(1)
        assert max(r["owned"] for r in results) < 1.2 / world
        units, calls = results[0]["units"], results[0]["calls"]
        assert units > 1
        updates, trips = 3, sum(-(-size // (world * ranks_torch.P)) for size in (21, 3, 0))
        assert calls.count("_reduce_scatter_base_") == units * updates
        # Blocks are gathered in both directions, the rest once for each draw that is not empty.
        assert calls.count("_allgather_base_") == (units - 1) * 2 * trips + 2
        assert {*calls} == {"_reduce_scatter_base_", "_allgather_base_"}


def test_each_coordinate_of_a_sharded_sum_gets_its_noise_once(sharded):
    size, mean_square = sharded[0]["size"], sharded[0]["mean square"]
    bound = 5 * np.sqrt(2 / (3 * size))
    assert abs(mean_square - 1) < bound
    assert abs(mean_square * len(sharded) - 1) > bound, "noise per rank must be seen"
