"""A rank that dies, stops, hangs, fails, ends early or disagrees ends the run everywhere."""

import threading
import time

import launch
import pytest

from dpsgd.ranks import Agreement, Disagreement, Ranks, digest
from dpsgd.watch import EXIT_CODE, Watch


class Memory(dict):
    """A store in memory, which can be made to hang or to break."""

    broken = hanging = False

    def _pass(self):
        if self.broken:
            raise ConnectionError
        while self.hanging:
            time.sleep(0.01)

    def set(self, key, value):
        self._pass()
        self[key] = value

    def get(self, key, default=None):
        self._pass()
        return super().get(key, default)

    def delete(self, key):
        self.pop(key, None)


class Watched:
    """A rank in threads: what its watch said, instead of ending the process."""

    def __init__(self, rank, world, store, **options):
        self.said, self.left = [], threading.Event()
        times = {"timeout_s": 0.5, "first_timeout_s": 2.0} | options
        self.watch = Watch(rank, world, store, leave=self._leave, **times)
        self.watch.start()

    def _leave(self, sentence):
        self.said.append(sentence)
        self.left.set()

    def arrive(self, step):
        """Be in the collective of ``step`` from now on."""
        self.watch.waiting(step).__enter__()

    def word(self):
        assert self.left.wait(20), "nothing was found"
        return self.said[0]


@pytest.fixture
def trio():
    store = Memory()
    ranks = [Watched(r, 3, store) for r in range(3)]
    for rank in ranks:
        with rank.watch.waiting(1):
            pass
    yield ranks
    store.hanging = False
    for rank in ranks:
        rank.watch._stopped.set()


def test_quiet_ranks_are_left_alone(trio):
    for _ in range(15):
        time.sleep(0.1)
        for rank in trio:
            rank.watch.progress()
    assert not any(rank.said for rank in trio)


def test_who_waits_does_not_end_while_the_others_work(trio):
    trio[0].arrive(2)
    for _ in range(15):
        time.sleep(0.1)
        trio[1].watch.progress()
        trio[2].watch.progress()
    assert not any(rank.said for rank in trio)


def test_busy_ranks_are_given_time(trio):
    for rank in (0, 2):
        trio[rank].arrive(2)
    with trio[1].watch.busy():
        time.sleep(1.2)
        assert not any(rank.said for rank in trio)
    assert "rank 1 hangs" in trio[0].word()


def test_one_that_hangs_is_named_by_all(trio):
    for rank in (0, 2):
        trio[rank].arrive(2)
    for rank in trio:
        assert "rank 1 hangs: no progress" in rank.word()
        assert "while update 2 waits for it (it has come to update 1)" in rank.word()


def test_one_that_is_silent_is_named_by_all(trio):
    trio[1].watch._stopped.set()
    for rank in (0, 2):
        assert "rank 1 has given no sign of life for" in trio[rank].word()


def test_one_that_fails_is_named_by_all(trio):
    trio[1].watch.stop(ZeroDivisionError("a secret"))
    for rank in (0, 2):
        assert "rank 1 failed (ZeroDivisionError) after arriving at update 1" in trio[rank].word()
        assert "secret" not in trio[rank].word()


def test_one_that_ends_early_is_named(trio):
    trio[0].arrive(2)
    trio[1].watch.stop()
    assert "rank 1 ended after update 1, but update 2 needs it" in trio[0].word()


def test_a_network_that_hangs_is_told_from_a_rank_that_does(trio):
    for rank in trio:
        rank.arrive(2)
    for rank in trio:
        assert "all ranks have arrived at update 2, but its all-reduce" in rank.word()


def test_a_rank_that_never_came_is_named():
    watched = Watched(0, 2, Memory(), timeout_s=0.2)
    assert "rank 1 has never started to work" in watched.word()


@pytest.mark.parametrize(
    ("state", "words"), [("broken", "is gone (ConnectionError)"), ("hanging", "has not answered")]
)
def test_a_lost_store_ends_the_rank(state, words):
    store = Memory()
    watched = Watched(1, 2, store)
    setattr(store, state, True)
    assert words in watched.word()
    store.hanging = False


def test_all_ends_well(trio):
    for rank in (2, 1, 0):
        trio[rank].watch.stop()
    time.sleep(0.3)
    assert not any(rank.said for rank in trio)


# Processes, over gloo

FAULTS = {
    ("dies", 1): "rank 1 has given no sign of life",
    ("stops", 0): "the store of the ranks has not answered",
    ("hangs", 1): "rank 1 hangs: no progress",
    ("raises", 2): "rank 2 failed (ZeroDivisionError) after arriving at update 2",
    ("ends", 1): "rank 1 ended after update 2, but update 3 needs it",
    ("differs", 2): "rank 2 differs from rank 0 in draw",
}
SLOW = [("stops", 0), ("ends", 1), ("raises", 2)]


@pytest.mark.parametrize(
    ("kind", "victim"),
    [pytest.param(*f, marks=pytest.mark.slow) if f in SLOW else f for f in FAULTS],
)
def test_a_fault_ends_all_ranks_with_its_sentence(kind, victim, tmp_path):
    processes = launch.start("ranks_fault.py", 3, tmp_path, kind, str(victim))
    others = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        codes = [process.wait(60) for process in others]
    finally:
        _, said = launch.finish([p for p in processes if p.kill() or True], tmp_path)
    said = [text for rank, text in enumerate(said) if rank != victim]
    words = FAULTS[kind, victim]
    assert all(words in text for text in said), said
    assert set(codes) <= ({1, EXIT_CODE} if kind == "differs" else {EXIT_CODE})
    assert "a secret" not in "".join(said)


# Who the ranks are, and whether they agree


def test_ranks_of_torchrun_of_slurm_and_alone():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert Ranks.from_env(torchrun) == Ranks(rank=3, world=4, local_rank=1)
    assert Ranks.from_env(slurm) == Ranks(rank=5, world=8, local_rank=1)
    assert Ranks.from_env(torchrun | slurm).rank == 3
    assert Ranks.from_env({}) == Ranks(rank=0, world=1, local_rank=0)
    # The batch script of a job of 8 tasks, or an srun of one in it, is not rank 0 of 8.
    assert Ranks.from_env({**slurm, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).world == 1
    with pytest.raises(ValueError, match="RANK is 4 and WORLD_SIZE 4"):
        Ranks.from_env(torchrun | {"RANK": "4"})


def agreements(world):
    return [Agreement(ranks=Ranks(rank=r, world=world)) for r in range(world)]


def test_digests_are_exact_in_float32():
    for n in range(200):
        found = digest("config", n)
        assert 0 <= found < 2**24
    all_ranks = agreements(3)
    for one in all_ranks:
        one.declare(draw=2**24 - 1, step=7)
    all_ranks[0].check(sum(one.slots() for one in all_ranks))


def test_the_majority_is_right():
    all_ranks = agreements(4)
    for rank, one in enumerate(all_ranks):
        one.declare(step=1, parameters=5 + (rank == 0))
    with pytest.raises(Disagreement, match="rank 0 differs from rank 1 in parameters"):
        all_ranks[2].check(sum(one.slots() for one in all_ranks))
