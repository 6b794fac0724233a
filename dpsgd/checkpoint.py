"""
Go on with a run that was interrupted, and charge what may have been released.

A folder holds three kinds of file, each written whole or not at all:

``checkpoint.npz``  model, optimizer state, steps done, the public configuration
``keys``, ``keys.1``, …  one for each rank, mode 0600: the sampling key and that rank's noise key
``ledger``  a line for each step that was begun, before its update: which keys, which step

Draw and noise of a step are functions of the keys and its number. With the keys, the steps after
the checkpoint are repeated, with the same draws and the same noise: nothing new is released, and
each is charged once. Without them fresh keys are drawn, and the steps of the ledger that are run
again are charged again; so it is where the training data are others than those of the keys.

Guarantees: a noise key meets one sequence of sums only. A sum depends on the parameters, which are
in the checkpoint; on the configuration, and a run with another one is refused; on the training
data, of which the keys hold a digest; and on the code, which nobody compares: go on with the same
versions. A repeated sum is the same up to the order in which the device adds.
"""

import contextlib
import io
import json
import os
import secrets
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpsgd.methods import Step
from dpsgd.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The secrets of one rank: ``sampling`` is shared by all ranks, ``noise`` is its own."""

    sampling: int = field(repr=False)
    noise: int = field(repr=False)
    number: int = 0  # how many keys this run had before
    shares: int = 1  # devices whose noise adds up to that of one
    data: int = field(default=0, repr=False)  # digest of what they were used with

    @classmethod
    def fresh(cls, ranks: Ranks, seed: int | None = None, number: int = 0) -> "Keys":
        """From the operating system; or from ``seed``, which whoever knows it can repeat."""
        if seed is None:
            sampling, noise = ranks.shared_key(), secrets.randbits(128)
        else:
            children = np.random.SeedSequence(seed, spawn_key=(number,)).spawn(2)
            words = [child.generate_state(4, np.uint32).tobytes() for child in children]
            sampling, noise = (int.from_bytes(word, "little") for word in words)
        return cls(sampling=sampling, noise=noise, number=number, shares=ranks.world)


class Folder:
    """
    The files of one run.

    Args:
        path: made if it is not there.
        ranks: every rank keeps its own keys; rank 0 keeps the rest.
        config: the public configuration, as JSON knows it.
        resume: go on with what is there; nothing there is a new run.

    Raises:
        ValueError: there is a run already, or one with another configuration, or one that not all
            ranks see.
    """

    def __init__(
        self, path: str | Path, ranks: Ranks, config: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.path, self.ranks = Path(path), ranks
        self.config = json.loads(json.dumps(config))
        self._keys = self.path / (f"keys.{ranks.rank}" if ranks.rank else "keys")
        self._model, self._ledger = self.path / "checkpoint.npz", self.path / "ledger"
        self.path.mkdir(parents=True, exist_ok=True)
        self.done, self._number = 0, 0
        text = self._ledger.read_text() if self._ledger.exists() else ""
        self._begun = {*text.splitlines()}  # a last line that was cut off counts as a step
        self.seeded = False  # whether any of the run's keys came from a seed
        self._state: dict[str, np.ndarray] | None = None
        if self._model.exists():
            self._load(resume)
        self._compare()

    def _load(self, resume: bool) -> None:
        if not resume:
            raise ValueError(f"{self.path} holds a run already: resume it, or take another folder")
        try:
            with np.load(self._model, allow_pickle=False) as saved:
                self._state = dict(saved)
            public = json.loads(str(self._state.pop("public")))
        except (zipfile.BadZipFile, EOFError, ValueError, KeyError) as error:
            raise ValueError(
                f"{self._model} is damaged, or not of dpsgd ({type(error).__name__}): put it back "
                "whole, or take another folder"
            ) from error
        self.done, self.seeded = public["done"], public.get("seeded", False)
        self._check(public["config"])
        if self.charged < public["charged"]:
            raise ValueError(f"{self._ledger} lacks steps that were begun: put it back whole")

    def _compare(self) -> None:
        # Before anything is written: a rank that sees no checkpoint would have all keys replaced.
        mine = -1 if self._state is None else self.done
        seen = [int(done) for done in self.ranks.exchange("checkpoint", str(mine))]
        if blind := [str(rank) for rank, done in enumerate(seen) if done < max(seen)]:
            raise ValueError(
                f"rank {', '.join(blind)} does not see the {self._model} that others see: the "
                "folder must be one that all ranks share"
            )

    def _check(self, before: dict[str, Any]) -> None:
        for name, value in self.config.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{self.path} was begun with {name}={before.get(name)!r}, not {value!r}: "
                    "resume with the same options"
                )

    def keys(self, seed: int | None, shares: int | None = None, data: int = 0) -> Keys:
        """
        Those of the run, if every rank still has its own; otherwise fresh ones on all ranks.

        The number of devices may change, but with it do the shares of the noise: fresh ones, too.
        So may the data, whose sums must not meet the noise of the others' sums.

        Args:
            seed: what fresh keys come from in a repeatable run; None is the operating system.
            shares: devices that the noise is split over; None: one for each rank.
            data: a digest of the training data, to be kept with the keys and nowhere else.
        """
        shares = shares or self.ranks.world
        last = max((int(line[:4]) for line in self._begun if line[:4].isdigit()), default=-1)
        mine = self._read_keys() if self._state is not None else None
        known = mine and mine.number >= last and (mine.shares, mine.data) == (shares, data)
        answers = self.ranks.exchange("keys", str(mine.number) if mine and known else "")
        if mine is None or len({*answers}) > 1 or not answers[0]:
            mine = replace(Keys.fresh(self.ranks, seed, last + 1), shares=shares, data=data)
            self.seeded |= seed is not None
            _write(self._keys, json.dumps(asdict(mine)).encode())
        self._number = mine.number
        if self.ranks.rank == 0 and self._ledger.exists():
            text = self._ledger.read_text()  # a last line that was cut off counts as a step
            _write(self._ledger, (text + "\n" * (not text.endswith("\n"))).encode())
        return mine

    def restore(self, step: Step) -> None:
        """Bring ``step`` to where the checkpoint left it; save a new run's beginning."""
        if self._state is not None:
            step.restore(self._state, self.done)
            self._state = None
        else:
            self.save(step)

    def begin(self, number: int) -> None:
        """Before the update of step ``number``: it may be released from now on."""
        line = f"{self._number:04d} {number:08d}"
        if self.ranks.rank == 0:
            with self._ledger.open("ab") as file:
                file.write(f"{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        self._begun.add(line)

    def save(self, step: Step) -> None:
        """The state after the step's last update."""
        if self.ranks.rank:
            return
        public = {"done": step.done, "charged": self.charged, "config": self.config}
        public["seeded"] = self.seeded
        with self.ranks.busy():
            file = io.BytesIO()
            arrays: dict[str, Any] = {"public": np.array(json.dumps(public)), **step.state()}
            np.savez(file, **arrays)
            _write(self._model, file.getbuffer())

    @property
    def charged(self) -> int:
        """Steps that were begun, each with every key that it was begun with."""
        return len(self._begun)

    def _read_keys(self) -> Keys | None:
        try:
            return Keys(**json.loads(self._keys.read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # or damaged: as good as lost
            return None


def _write(path: Path, data: bytes | memoryview) -> None:
    # Whole or not at all; mkstemp's files are for their owner alone (0600).
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
