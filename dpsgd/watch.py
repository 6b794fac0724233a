"""
A watch over the ranks of a run: one that dies or hangs ends all of them, with a sentence.

Each rank tells a small store, in a thread of its own, that it lives and how far it has come, and
reads what its neighbour in the ring tells: (rank+1) mod W. The first that finds a fault writes the
verdict down, and all leave with it. Nobody's clock but one's own is trusted: a neighbour is dead
when what it tells has not changed for ``timeout_s``.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol

EXIT_CODE = 70  # EX_SOFTWARE


class Store(Protocol):
    """Strings by key, seen by all ranks: torch's TCPStore, or JAX's coordination service."""

    def set(self, key: str, value: str) -> None:
        """Write, over an older value too."""

    def get(self, key: str) -> str | None:
        """Read without waiting; None where nothing was written."""

    def delete(self, key: str) -> None:
        """Remove, if it is there."""


def leave(sentence: str) -> None:
    """Say why and end the process at once, whatever its main thread waits for."""
    print(sentence, file=sys.stderr, flush=True)
    # What was printed before is let out, unless the main thread hangs in printing.
    flushed = threading.Thread(target=print, kwargs={"end": "", "flush": True}, daemon=True)
    flushed.start()
    flushed.join(1)
    os._exit(EXIT_CODE)


def _named(error: BaseException) -> str:
    # A message may hold something of the data, unless its class says that it does not.
    name = type(error).__name__
    return f"{name}: {error}" if getattr(error, "public", False) else name


class Watch:
    """
    Started with :meth:`start`, ended with :meth:`stop`.

    Args:
        rank: of this process.
        world: number of ranks.
        store: a connection that no other thread waits on.
        timeout_s: without a sign of life for so long a rank is given up. So it is without progress
            while others wait, but not before three times what its longest physical batch took; that
            of the first one, which compiled, counts until there is a second.
        first_timeout_s: the same for progress until this rank's first physical batch is through,
            which compiles.
        leave: called with the sentence; it does not return.
        clock: seconds.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store,
        *,
        timeout_s: float = 40.0,
        first_timeout_s: float = 600.0,
        leave: Callable[[str], None] = leave,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank, self.world, self.store = rank, world, store
        self._leave, self._clock = leave, clock
        self.timeout_s, self.first_timeout_s = timeout_s, first_timeout_s
        self.interval_s = min(1.0, timeout_s / 10)
        self._state: dict[str, Any] = {
            "beat": 0,
            "progress": 0,
            "arrived": 0,  # collectives that this rank has come to, all of a run's in one order
            "at": "update 0",  # what they belong to
            "patience_s": first_timeout_s,  # how long it may go without progress
            "trouble": "",  # an error in a collective: another rank's fault, if it has one
            "end": "",
        }
        self._batches = 0
        self._began: float | None = None  # when the physical batch that is under way did
        self._patience_s = timeout_s  # once the first batch is through
        self._since: float | None = None  # when this rank began to wait in a collective
        self._last_round = clock()
        self._seen: dict[str, tuple[Any, float]] = {}
        self._stopped, self._ended = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to tell and to read."""
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._rounds, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """
        End, or tell of the ``error`` that ends this rank.

        Rank 0, which may hold the store, waits for the others, ``timeout_s`` at most.
        """
        if self._stopped.is_set():
            return
        self._stopped.set()  # the rounds; the guard still sees to it that the store answers
        self._last_round = self._clock()
        with contextlib.suppress(Exception):
            self._state["end"] = "ended" if error is None else f"failed ({_named(error)})"
            self._tell()
            until = time.monotonic() + self.timeout_s
            while self.rank == 0 and time.monotonic() < until:
                others = [self._read(r) for r in range(1, self.world)]
                if all(other and other["end"] for other in others):
                    break
                if self.verdict():
                    time.sleep(3 * self.interval_s)  # the others have yet to read it
                    break
                self._last_round = self._clock()
                time.sleep(self.interval_s / 4)
        self._ended.set()
        for thread in self._threads:  # one in the store when Python ends would abort the process
            thread.join(2 * self.interval_s)

    def progress(self) -> None:
        """Called before each physical batch: a rank without progress is taken to hang."""
        self._moved()
        if self._batches:
            self._state["patience_s"] = self._patience_s
        self._batches += 1
        self._began = self._clock()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Around work that others may have to wait for, ``first_timeout_s`` at most."""
        before = self._state["patience_s"]
        self._state["patience_s"] = max(before, self.first_timeout_s)
        self._moved()
        try:
            yield
        finally:
            self._moved()
            self._state["patience_s"] = before

    @contextlib.contextmanager
    def waiting(self, at: int | str) -> Iterator[None]:
        """Around what all must come to, of update number ``at`` or named so, until it is done."""
        self._moved()
        self._state["arrived"] += 1
        self._state["at"] = at if isinstance(at, str) else f"update {at}"
        self._since = self._clock()
        try:
            yield
        except Exception as error:
            # A lost connection names nobody: the watch finds who it was, and ends this process.
            traceback.print_exc()
            self._state["trouble"] = _named(error)
            self._stopped.wait(2 * self.timeout_s)
            raise
        finally:
            self._since = None
        self._moved()
        if self._batches:  # a rank whose shares were empty so far has yet to compile
            self._state["patience_s"] = self._patience_s

    def _moved(self) -> None:
        if self._began is not None:  # a physical batch is through
            longest = self.timeout_s if self._batches == 2 else self._patience_s
            self._patience_s, self._began = max(longest, 3 * (self._clock() - self._began)), None
        self._state["progress"] += 1

    def verdict(self) -> str | None:
        """What ended the run, if anything did."""
        return self.store.get("watch/verdict")

    def _tell(self) -> None:
        self._state["beat"] += 1
        self.store.set(f"watch/{self.rank}", json.dumps(self._state))

    def _read(self, rank: int) -> dict[str, Any] | None:
        text = self.store.get(f"watch/{rank}")
        return None if text is None else json.loads(text)

    def round(self) -> str | None:
        """Tell, read and judge, once; what is wrong, if anything is."""
        try:
            self._tell()
            found = self.verdict()
            if not found and (found := self._judge(self._clock())):
                self.store.set("watch/verdict", found)
        except Exception as error:
            return f"the store of the ranks is gone ({type(error).__name__}): so is its holder"
        self._last_round = self._clock()
        return found

    def overdue(self) -> str | None:
        """What is wrong, if the store itself does not answer any more."""
        limit = self.timeout_s + 5 * self.interval_s
        if self._clock() - self._last_round < limit:
            return None
        return (
            f"the store of the ranks has not answered for {limit:.0f} s: the process that holds it "
            "(rank 0 or the launcher) hangs, or the network is gone"
        )

    def _rounds(self) -> None:
        while not self._stopped.wait(self.interval_s):
            found = self.round()
            if found and not self._stopped.is_set():
                # Rank 0 may hold the store, and the others have yet to read.
                if self.rank == 0 and self._stopped.wait(3 * self.interval_s):
                    return None  # the main thread ends, and says why itself
                return self._leave(f"rank {self.rank} of {self.world} ends: {found}")
        return None

    def _guard(self) -> None:
        while not self._ended.wait(self.interval_s):
            if found := self.overdue():
                return self._leave(f"rank {self.rank} of {self.world} ends: {found}")
        return None

    def _unchanged(self, what: str, value: Any, now: float) -> float:
        # Seconds since ``value`` was another one, by this rank's clock.
        if what not in self._seen or self._seen[what][0] != value:
            self._seen[what] = value, now
        return now - self._seen[what][1]

    def _judge(self, now: float) -> str | None:
        # What is wrong with the neighbour, or with all.
        other = (self.rank + 1) % self.world
        state = self._read(other)
        silent_s = self._unchanged("beat", state and state["beat"], now)
        since = self._since  # of the main thread
        arrived, at = self._state["arrived"], self._state["at"]
        waited_s = 0.0 if since is None else now - since
        if state is None:
            if silent_s < 3 * self.timeout_s:  # imports take their time
                return None
            return f"rank {other} has never started to work"
        if state["end"].startswith("failed"):
            return f"rank {other} {state['end']} after arriving at {state['at']}"
        if state["end"]:
            if waited_s < self.timeout_s or state["arrived"] >= arrived:
                return None
            return f"rank {other} ended after {state['at']}, but {at} needs it"
        if silent_s > self.timeout_s:
            return (
                f"rank {other} has given no sign of life for {silent_s:.0f} s: its process is "
                "dead or stopped, or its host cannot be reached"
            )
        troubled_s = self._unchanged("trouble", state["trouble"], now)
        if state["trouble"] and troubled_s > 1.1 * self.timeout_s:  # later than silence is told
            return f"rank {other} failed ({state['trouble']}) in {state['at']}"
        idle_s = self._unchanged("progress", state["progress"], now)
        patience_s = state["patience_s"]
        if waited_s > self.timeout_s and idle_s > patience_s and state["arrived"] < arrived:
            return (
                f"rank {other} hangs: no progress for {idle_s:.0f} s, while {at} waits for it "
                f"(it has come to {state['at']})"
            )
        # Since the last one has come: how long this rank has waited for it does not count.
        together = waited_s > 0.2 * self.timeout_s and self._all_arrived(arrived)
        stuck_s = self._unchanged("together", together and arrived, now)
        if together and stuck_s > self._patience_s:
            return (
                f"all ranks have arrived at {at}, but its all-reduce has not ended in "
                f"{stuck_s:.0f} s: look at the network between them"
            )
        return None

    def _all_arrived(self, arrived: int) -> bool:
        states = map(self._read, range(self.world))  # no further than to the first that has not
        return all(state is not None and state["arrived"] >= arrived for state in states)
