"""A rank that dies, stops, hangs, fails, ends early or disagrees ends the run everywhere."""

import contextlib
import subprocess
import sys
import threading
import time
from unittest import mock

import launch
import pytest

from dpsgd.ranks import Agreement, Disagreement, Ranks, digest
from dpsgd.watch import EXIT_CODE, Watch


class Memory(dict):
    """A store in memory, which can break."""

    broken = False

    def set(self, key, value):
        if self.broken:
            raise ConnectionError
        self[key] = value

    def delete(self, key):
        self.pop(key, None)


class Trio:
    """Three ranks after their first update, and a clock that the test moves."""

    def __init__(self):
        self.now, self.store, self.gone, self.open = 0.0, Memory(), set(), []
        self.watches = [
            Watch(r, 3, self.store, timeout_s=10, first_timeout_s=60, clock=lambda: self.now)
            for r in range(3)
        ]
        for watch in self.watches:
            watch.progress()
            with watch.waiting(1):
                pass

    def arrive(self, *ranks, at=2):
        """Be in the collective of update 2, or where it is said, from now on."""
        for rank in ranks:
            self.open.append(self.watches[rank].waiting(at))
            self.open[-1].__enter__()

    def after(self, seconds, working=()):
        """What all that are left say, when the first says something."""
        for _ in range(seconds):
            self.now += 1
            for rank in working:
                self.watches[rank].progress()
            left = [r for r in range(3) if r not in self.gone]
            said = {r: self.watches[r].round() for r in left}
            if any(said.values()):
                return {r: said[r] or self.watches[r].round() for r in left}
        return {}


class Slow(Memory):
    """A store that keeps every thread but the main one for a while."""

    def __init__(self):
        self.entered = threading.Event()

    def set(self, key, value):
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            time.sleep(0.3)
        super().set(key, value)


def test_no_thread_is_in_the_store_when_the_run_has_ended():
    """Python would end it there, and C++ the process with it."""
    before = threading.active_count()
    watch = Watch(0, 1, store := Slow(), timeout_s=5)
    watch.start()
    assert store.entered.wait(60)
    watch.stop()
    assert threading.active_count() == before


@pytest.fixture
def trio():
    return Trio()


def test_ranks_that_only_compute_are_left_alone(trio):
    assert not trio.after(500)


def test_who_waits_does_not_end_while_the_others_work(trio):
    trio.arrive(0, 2)
    assert not trio.after(500, working=(1,))


def test_busy_ranks_are_given_time(trio):
    trio.arrive(0, 2)
    with trio.watches[1].busy():
        assert not trio.after(50)
    assert "rank 1 hangs" in trio.after(20)[0]


def test_slow_batches_are_given_three_times_their_seconds(trio):
    """One rank's share may take a physical batch more than those of the others."""
    slow = trio.watches[1]
    slow.progress()
    assert not trio.after(25)
    trio.arrive(0, 2)
    slow.progress()  # after 25 s
    assert not trio.after(74)
    assert "rank 1 hangs: no progress for 76 s, while update 2 waits for it" in trio.after(5)[0]


def test_what_the_first_batch_compiled_counts_until_the_second_is_through():
    now, found = [0.0], []
    watch = Watch(0, 2, Memory(), timeout_s=10.0, clock=lambda: now[0])
    for seconds in (100, 4, 5, 1):
        watch.progress()
        now[0] += seconds
        found.append(watch._state["patience_s"])
    assert found == [watch.first_timeout_s, 300, 12, 15]


def test_the_evaluation_is_waited_for_as_an_update_is(trio):
    trio.arrive(1, 2, at="the evaluation")
    for _ in range(3):
        with trio.watches[0].busy():
            assert not trio.after(55)
    with trio.watches[0].busy():
        said = trio.after(65)
    assert "rank 0 hangs: no progress for 61 s, while the evaluation waits for it" in said[2]


@pytest.mark.parametrize("victim", range(3))
def test_one_that_hangs_is_named_by_all(trio, victim):
    trio.arrive(*{0, 1, 2} - {victim})
    said = trio.after(15)
    assert len(said) == 3
    for words in said.values():
        assert f"rank {victim} hangs: no progress for 11 s, while update 2 waits for it" in words


@pytest.mark.parametrize(("batches", "limit_s"), [(0, 60), (1, 60), (2, 10)])
def test_a_rank_may_take_long_until_its_first_batch_is_through(trio, batches, limit_s):
    """In whichever update that batch comes: a rank's first shares may be empty."""
    late = trio.watches[1] = Watch(
        1, 3, trio.store, timeout_s=10, first_timeout_s=60, clock=lambda: trio.now
    )
    with late.waiting(1):
        pass
    trio.arrive(0, 2)
    for _ in range(batches):
        late.progress()
    assert not trio.after(limit_s)
    assert "rank 1 hangs: no progress for" in trio.after(5)[0]


@pytest.mark.parametrize("victim", range(3))
def test_one_that_is_silent_is_named_by_all(trio, victim):
    assert not trio.after(3)
    trio.gone = {victim}
    said = trio.after(15)
    assert len(said) == 2
    assert all(f"rank {victim} has given no sign of life for" in words for words in said.values())


def test_one_that_fails_is_named_by_all_and_keeps_its_message(trio):
    trio.watches[1].stop(ZeroDivisionError("a secret"))
    trio.gone = {1}
    for words in trio.after(1).values():
        assert words == "rank 1 failed (ZeroDivisionError) after arriving at update 1"


def test_a_disagreement_is_told_in_full(trio):
    trio.watches[1].stop(Disagreement("rank 2 differs"))
    trio.gone = {1}
    assert "failed (Disagreement: rank 2 differs)" in trio.after(1)[0]


def test_one_that_fails_in_a_collective_is_named_if_nobody_else_is_at_fault(trio, capsys):
    trio.arrive(0, 2)
    threading.Thread(target=_fail_in_a_collective, args=(trio.watches[1],), daemon=True).start()
    while not trio.watches[1]._state["trouble"]:
        time.sleep(0.01)
    assert trio.after(15)[2] == "rank 1 failed (RuntimeError) in update 2"
    assert "out of memory" in capsys.readouterr().err
    trio.watches[1]._stopped.set()


def test_one_that_is_silent_is_named_before_those_that_lost_their_connection(trio):
    trio.after(1)
    trio.arrive(0)
    trio.gone = {2}
    threading.Thread(target=_fail_in_a_collective, args=(trio.watches[1],), daemon=True).start()
    while not trio.watches[1]._state["trouble"]:
        time.sleep(0.01)
    assert all("rank 2 has given no sign" in words for words in trio.after(15).values())
    trio.watches[1]._stopped.set()


def _fail_in_a_collective(watch):
    with contextlib.suppress(RuntimeError), watch.waiting(2):
        raise RuntimeError("out of memory")


def test_a_rank_that_hangs_between_two_collectives_of_one_update_is_named(trio):
    """Where each physical batch is reduced, or parameters are gathered for it."""
    trio.arrive(0, 1, 2)
    for rank in range(3):
        trio.open[rank].__exit__(None, None, None)
    trio.arrive(0, 2)
    assert "rank 1 hangs: no progress for 11 s, while update 2 waits for it" in trio.after(15)[0]


def test_one_that_ends_early_is_named(trio):
    trio.arrive(0)
    trio.watches[1].stop()
    trio.gone = {1}
    assert trio.after(15)[0] == "rank 1 ended after update 1, but update 2 needs it"


def test_a_network_that_hangs_is_told_from_a_rank_that_does(trio):
    trio.arrive(0, 1, 2)
    assert "all ranks have arrived at update 2, but its all-reduce" in trio.after(15)[0]


def test_a_network_has_its_time_from_when_the_last_rank_has_arrived(trio):
    trio.arrive(0, 2)
    assert not trio.after(30, working=(1,))
    trio.arrive(1)
    assert not trio.after(10)
    assert "all ranks have arrived at update 2, but its all-reduce" in trio.after(5)[0]


def test_a_rank_that_never_came_is_named(trio):
    trio.gone = {1, 2}
    assert "rank 1 has never started" in trio.after(40)[0]


def test_a_lost_store_ends_the_rank(trio):
    trio.store.broken = True
    assert "is gone (ConnectionError)" in trio.after(1)[2]


def test_a_store_that_hangs_ends_the_rank(trio):
    trio.after(1)
    trio.now += 14
    assert trio.watches[1].overdue() is None
    trio.now += 2
    assert "has not answered for 15 s" in trio.watches[1].overdue()


def test_all_ends_well(trio):
    trio.after(1)
    for rank in (2, 1):
        trio.watches[rank].stop()
        trio.gone.add(rank)
        assert not trio.after(50)
    trio.watches[0].stop()


def test_a_store_that_hangs_cannot_hold_a_rank_that_ends():
    left, hangs = threading.Event(), threading.Event()

    class Hanging(Memory):
        def set(self, key, value):
            hangs.wait(60)

    watch = Watch(1, 2, Hanging(), timeout_s=0.2, leave=lambda sentence: left.set())
    threading.Thread(target=watch._guard, daemon=True).start()
    end = threading.Thread(target=watch.stop, daemon=True)
    end.start()
    assert left.wait(60)
    hangs.set()
    end.join(60)


def test_threads_tell_and_leave():
    """The same with real time: rank 1 is never there."""
    left = threading.Event()
    watch = Watch(0, 2, Memory(), timeout_s=0.2, leave=lambda sentence: left.set())
    watch.start()
    assert left.wait(60)
    watch.stop()


def test_a_rank_that_ends_by_itself_is_not_ended_by_its_watch():
    """Rank 0 stays for the others to read; meanwhile its main thread has something to say."""
    left = []
    watch = Watch(0, 2, store := Memory(), timeout_s=0.2, leave=left.append)
    store.set("watch/verdict", "rank 1 hangs")
    answers = {"wait.side_effect": [False, True], "is_set.return_value": False}
    watch._stopped = mock.Mock(**answers)
    watch._rounds()
    assert not left


def test_what_was_printed_before_is_not_lost():
    code = "from dpsgd.watch import leave; print('said', end=''); leave('why')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=launch.TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_CODE, "said", "why\n")


# Processes, over gloo

FAULTS = {
    ("dies", 1): "rank 1 has given no sign of life",
    ("stops", 0): "the store of the ranks has not answered",
    ("hangs", 1): "rank 1 hangs: no progress",
    ("hangs sharded", 1): "rank 1 hangs: no progress",
    ("raises", 2): "rank 2 failed (ZeroDivisionError) after arriving at update 2",
    ("ends", 1): "rank 1 ended after update 2, but update 3 needs it",
    ("differs", 2): "rank 2 differs from rank 0 in draw",
}
SLOW = [("hangs sharded", 1), ("stops", 0), ("ends", 1), ("raises", 2)]


@pytest.mark.parametrize(
    ("kind", "victim"),
    [pytest.param(*f, marks=pytest.mark.slow) if f in SLOW else f for f in FAULTS],
)
def test_a_fault_ends_all_ranks_with_its_sentence(kind, victim, tmp_path):
    processes = launch.start("ranks_fault.py", 3, tmp_path, kind, str(victim))
    others = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        codes = [process.wait(170) for process in others]
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
