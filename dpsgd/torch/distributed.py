"""
Many ranks on torch.distributed: one sum,
g = (1/L) Σ_r ( Σ_{i∈B_r} c_i g_i + n_r ).

Every rank sums its share of the global draw without any traffic. ``update`` adds the rank's noise,
then one all-reduce sums the flat buffer [n + 4W]: n gradients, and each rank's digests of what all
must agree on. A rank whose share is empty joins with its noise. Launch with torchrun; NCCL on CUDA,
gloo on a CPU. No DistributedDataParallel: its all-reduce per backward pass is not needed, and its
Join does not help a rank that is empty once.

Guarantees: with noise placement ``split`` each rank adds N(0, σ²C²/W), with ``rank0`` rank 0 adds
N(0, σ²C²): the sum has σ²C² in both, whatever shares are empty. No two ranks share a noise key.
The ranks trust each other: under ``split`` one that knows the sum and its own noise sees a sum with
σ²C²(W-1)/W of noise, and with ``rank0`` rank 0 sees one without.
"""

import datetime
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd.ranks import FACTS, Agreement, Ranks, digest
from dpsgd.watch import Watch

NOISE_PLACEMENTS = ("split", "rank0")
_RUNS = itertools.count()


class TextStore:
    """A torch store as the ranks know it: strings, and reads that do not wait."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def set(self, key: str, value: str) -> None:
        """Write."""
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        """Read, or None."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def delete(self, key: str) -> None:
        """Remove."""
        self._store.delete_key(key)


def best_device(device: str | None = None) -> str:
    """
    ``device``, or CUDA if it is there, or the CPU.

    Raises:
        ValueError: CUDA is asked for, and is not there.
    """
    there = torch.cuda.is_available()
    device = device or ("cuda" if there else "cpu")
    if device.startswith("cuda") and not there:
        raise ValueError(
            "torch finds no CUDA device here: install a CUDA build of it, or use --device cpu"
        )
    return device


def connect(*, device: str | None = None, timeout_s: float = 40.0) -> Ranks:
    """
    Join the other processes that torchrun started, and watch over them; alone, rank 0 of 1.

    Args:
        device: ``cuda`` or ``cpu``; None takes CUDA if it is there.
        timeout_s: a rank without a sign of life for so long ends the run on all ranks.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is missing, or the CUDA device that is asked for.
        torch.distributed.DistError: not all ranks came.
    """
    ranks = Ranks.from_env()
    if ranks.world == 1:
        return ranks
    cuda = best_device(device).startswith("cuda")
    if cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    patience = datetime.timedelta(seconds=3 * timeout_s)
    store, _, _ = next(
        dist.rendezvous("env://", rank=ranks.rank, world_size=ranks.world, timeout=patience)
    )
    # torchrun's store outlives a run: another one in these processes must not read this one's.
    store = dist.PrefixStore(f"run{next(_RUNS)}", store)
    watch = Watch(ranks.rank, ranks.world, TextStore(store.clone()), timeout_s=timeout_s)
    watch.start()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=datetime.timedelta(seconds=2 * watch.first_timeout_s),  # the watch is earlier
    )
    return replace(ranks, store=TextStore(store), watch=watch)


def disconnect(ranks: Ranks, error: BaseException | None = None) -> None:
    """Leave, or tell the others of the ``error`` that ends this rank."""
    if ranks.watch:
        ranks.watch.stop(error)
    if ranks.world > 1 and dist.is_initialized() and error is None:
        dist.destroy_process_group()  # after an error it could wait for the others


def noise_share(placement: str, ranks: Ranks) -> float:
    """
    Noise std of this rank as a fraction of σC; the squares of all ranks sum to 1.

    Raises:
        ValueError: there is no such placement.
    """
    if placement not in NOISE_PLACEMENTS:
        raise ValueError(f"noise_placement is {placement!r}; use {' or '.join(NOISE_PLACEMENTS)}")
    if placement == "split":
        return ranks.world**-0.5
    return float(ranks.rank == 0)


class Reducer:
    """
    Sums a flat buffer over the ranks, and checks that they agree.

    Attributes:
        buffer: [n + 4W] (n alone for a single rank).
        flat: its first n elements, which the caller fills.
    """

    def __init__(self, ranks: Ranks, numel: int, like: Tensor, config: Iterable) -> None:
        self.ranks = ranks
        self.agreement = Agreement(ranks=ranks)
        self.agreement.declare(config=digest(*config))
        slots = len(FACTS) * ranks.world if ranks.world > 1 else 0
        self.buffer = torch.zeros(numel + slots, dtype=like.dtype, device=like.device)
        self.flat, self._tail = self.buffer.split([numel, slots])

    def __call__(self, step: int, params: Sequence[Tensor]) -> None:
        """
        Sum ``flat`` over the ranks, in place; one all-reduce.

        Raises:
            Disagreement: ranks differ in step, draw, configuration or ``params``.
        """
        if self.ranks.world == 1:
            return
        if step != self.agreement.facts.get("step"):  # they stay the same until the next update
            self.agreement.declare(parameters=fingerprint(params))
        self.agreement.declare(step=step)
        with self.ranks.waiting(step):
            self._tail.copy_(torch.from_numpy(self.agreement.slots()))
            dist.all_reduce(self.buffer)
            summed = self._tail.cpu()
        self.agreement.check(summed.numpy())


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """24 bits of the tensors' bits, summed where they lie: equal for equal parameters."""
    bits = [t.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64) for t in tensors]
    return digest(torch.stack(bits).tolist())
