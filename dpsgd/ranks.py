"""
The ranks of a distributed run, without any framework: who they are, and that they agree.

One global draw is dealt to the ranks (:meth:`dpsgd.LogicalBatch.share`); each sums its clipped
gradients; ``update`` adds all sums in one collective. The same buffer carries, for each rank, a few
24-bit digests of what all must agree on, so that every rank can name the one that does not.
"""

import contextlib
import hashlib
import importlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpsgd.watch import Store, Watch

FACTS = ("step", "draw", "config", "parameters")  # what ranks must agree on, one slot each


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """
    One process among all of a run.

    Attributes:
        rank: in [0, W).
        world: W.
        local_rank: on its host; the number of its device.
        store: strings that all ranks see; None for a single process.
        watch: ends the run if a rank fails; None where nobody watches.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Store | None = field(default=None, repr=False, compare=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "Ranks":
        """
        As torchrun or SLURM's srun say; without them, rank 0 of 1.

        Raises:
            ValueError: the environment contradicts itself.
        """
        names: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "RANK" not in environ:
            count = "SLURM_STEP_NUM_TASKS"  # of this srun; SLURM_NTASKS is that of the job
            names = (
                "SLURM_PROCID",
                count if count in environ else "SLURM_NTASKS",
                "SLURM_LOCALID",
            )
        if names[0] not in environ or names[1] not in environ:
            return cls()
        rank, world, local = (int(environ.get(name, 0)) for name in names)
        if not 0 <= rank < world:
            raise ValueError(f"{names[0]} is {rank} and {names[1]} {world}: unset or mend them")
        return cls(rank=rank, world=world, local_rank=local)

    def waiting(self, at: int | str) -> contextlib.AbstractContextManager:
        """Around what all ranks must come to: the collective of update ``at``, or named so."""
        return self.watch.waiting(at) if self.watch else contextlib.nullcontext()

    def busy(self) -> contextlib.AbstractContextManager:
        """Around long work of this rank that others may have to wait for."""
        return self.watch.busy() if self.watch else contextlib.nullcontext()

    def progress(self) -> None:
        """Before each physical batch."""
        if self.watch:
            self.watch.progress()

    def exchange(self, name: str, value: str, timeout_s: float = 60.0) -> list[str]:
        """
        What each rank gave under ``name``, which is used once; for the time outside of the steps.

        Raises:
            TimeoutError: ranks, named, gave nothing.
        """
        if self.world == 1:
            return [value]
        assert self.store is not None, "several ranks need the store that connect() makes"
        self.store.set(f"{name}/{self.rank}", value)
        until, pause_s = time.monotonic() + timeout_s, 0.01
        found: dict[int, str] = {}
        while True:
            missing = [rank for rank in range(self.world) if rank not in found]
            for rank in missing:
                if (given := self.store.get(f"{name}/{rank}")) is not None:
                    found[rank] = given
            if len(found) == self.world:
                return [found[rank] for rank in range(self.world)]
            if time.monotonic() > until:
                ranks = ", ".join(str(rank) for rank in missing if rank not in found)
                raise TimeoutError(f"no word on {name!r} from rank {ranks} in {timeout_s:.0f} s")
            time.sleep(pause_s)
            pause_s = min(0.5, 1.5 * pause_s)  # long waits must not keep the store busy

    def shared_key(self) -> int:
        """128 fresh bits of rank 0's operating system, the same on all ranks. A secret."""
        mine = secrets.token_hex(16) if self.rank == 0 else ""
        key = self.exchange("sampling key", mine)[0]
        self.exchange("sampling key is known", "")
        if self.store is not None and self.rank == 0:
            self.store.delete("sampling key/0")
        return int(key, 16)


@contextlib.contextmanager
def joined(framework: str, device: str | None = None, timeout_s: float = 40.0) -> Iterator[Ranks]:
    """
    The ranks of this launch, while it lasts; what ends one of them early is told to the others.

    ``dpsgd.<framework>.distributed`` has ``connect`` and ``disconnect(ranks, error)``.
    """
    if Ranks.from_env().world == 1:
        yield Ranks()
        return
    distributed = importlib.import_module(f"dpsgd.{framework}.distributed")
    ranks = distributed.connect(device=device, timeout_s=timeout_s)
    try:
        yield ranks
    except BaseException as error:
        distributed.disconnect(ranks, error)
        raise
    distributed.disconnect(ranks)


def digest(*parts: Any) -> int:
    """24 bits of BLAKE2b, which float32 holds exactly; arrays by their bytes, all else by repr."""
    total = hashlib.blake2b(digest_size=3)
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return int.from_bytes(total.digest(), "little")


class Disagreement(RuntimeError):
    """Ranks do not agree on what they compute; the message names one and the matter."""

    public = True  # the message holds nothing of the data


@dataclass(kw_only=True)
class Agreement:
    """
    What this rank holds to be true of the step, to be summed as slots [W·F] with the gradients.

    A fact that was not declared is 0, which agrees with 0 only.
    """

    ranks: Ranks
    facts: dict[str, int] = field(default_factory=dict)

    def declare(self, **facts: int) -> None:
        """Digests of facts named in :data:`FACTS`, until they are declared anew."""
        assert facts.keys() <= set(FACTS), f"{[*facts]} not in {FACTS}"
        self.facts |= facts

    def slots(self) -> np.ndarray:
        """float32 [W·F]: this rank's facts at its own places, 0 elsewhere."""
        table = np.zeros((self.ranks.world, len(FACTS)), np.float32)
        table[self.ranks.rank] = [self.facts.get(name, 0) % 2**24 for name in FACTS]
        return table.ravel()

    def check(self, summed: np.ndarray) -> None:
        """
        Compare all ranks' facts, from the sum [W·F] of their slots.

        Raises:
            Disagreement: on every rank, with the same words.
        """
        table = np.asarray(summed).reshape(self.ranks.world, len(FACTS))
        # The config first: other parameters or draws would follow from it.
        for name in ("config", "step", "draw", "parameters"):
            values = table[:, FACTS.index(name)].tolist()
            common = Counter(values).most_common(1)[0][0]  # of two ranks, that of the first
            if odd := [rank for rank, value in enumerate(values) if value != common]:
                others = values.index(common)
                raise Disagreement(
                    f"rank {', '.join(map(str, odd))} differs from rank {others} in {name}: "
                    f"{_CAUSES[name]}"
                )


_CAUSES = {
    "config": "start every rank with the same options",
    "step": "a rank has skipped or repeated an update; each takes part in every one, empty or not",
    "draw": "all ranks must draw with one sampling key",
    "parameters": "all ranks must start from the same weights and apply the same updates",
}
