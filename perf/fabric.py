"""
What the ranks of a measurement need of each other: a barrier, a gathering, a bare all-reduce.

``worker(framework, device)`` connects and gives one of these; outside of the timed steps only.
"""

import time
from typing import Any

import numpy as np


class Torch:
    """
    Over ``torch.distributed``: NCCL on GPUs, gloo on CPUs.

    Raises:
        RuntimeError: this build of torch does not see the device.
    """

    shards = 1

    def __init__(self, device: str) -> None:
        import torch
        import torch.distributed

        from dpsgd.torch import distributed

        _need("torch", device, device == "cpu" or torch.cuda.is_available())
        self.torch, self.device, self._distributed = torch, device, distributed
        self.ranks = distributed.connect(device=device)
        if device == "cpu":
            torch.set_num_threads(1)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather([0.0])

    def gather(self, values: list[float]) -> np.ndarray:
        """[ranks, n] on every rank."""
        mine = self.torch.tensor(values, dtype=self.torch.float64, device=self.device)
        if not self.torch.distributed.is_initialized():
            return mine.cpu().numpy()[None]
        found = [self.torch.empty_like(mine) for _ in range(self.ranks.world)]
        self.torch.distributed.all_gather(found, mine)
        return np.stack([one.cpu().numpy() for one in found])

    def all_reduce_s(self, size_bytes: int, rounds: int = 7) -> list[float]:
        """Seconds of each all-reduce of as many bytes of float32, all ranks arriving together."""
        buffer = self.torch.zeros(max(1, size_bytes // 4), device=self.device)

        def reduce():
            if self.torch.distributed.is_initialized():
                self.torch.distributed.all_reduce(buffer)
            if self.device == "cuda":
                self.torch.cuda.synchronize()

        return _timed(reduce, self.barrier, rounds)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the others, or tell them of the ``error`` that ends this rank."""
        self._distributed.disconnect(self.ranks, error)


class Jax:
    """
    Over the devices of all JAX processes.

    Raises:
        RuntimeError: this build of JAX does not see the device.
    """

    def __init__(self, device: str) -> None:
        from dpsgd.jax import distributed

        self._distributed, self.ranks = distributed, distributed.connect(device=device)
        import jax

        self.jax, self.shards = jax, jax.local_device_count()
        _need("jax", device, (jax.default_backend() == "gpu") == (device == "cuda"))

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("perf")

    def gather(self, values: list[float]) -> np.ndarray:
        """[processes, n] on every process."""
        if self.jax.process_count() == 1:
            return np.array(values)[None]
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(np.array(values, np.float32)))

    def all_reduce_s(self, size_bytes: int, rounds: int = 7) -> list[float]:
        """Seconds of each all-reduce of as many bytes of float32 from every device."""
        jax: Any = self.jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.array(jax.devices()), ("ranks",))
        split = NamedSharding(mesh, PartitionSpec("ranks"))
        shape = (jax.device_count(), max(1, size_bytes // 4))
        row = np.zeros((1, shape[1]), np.float32)
        whole = jax.make_array_from_callback(shape, split, lambda _: row)

        @jax.jit
        def total(rows):
            return jax.shard_map(
                lambda one: jax.lax.psum(one[0], "ranks"),
                mesh=mesh,
                in_specs=PartitionSpec("ranks"),
                out_specs=PartitionSpec(),
            )(rows)

        return _timed(lambda: jax.block_until_ready(total(whole)), self.barrier, rounds)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the others, or tell them of the ``error`` that ends this rank."""
        self._distributed.disconnect(self.ranks, error)


def _need(framework: str, device: str, there: bool) -> None:
    if not there:
        raise RuntimeError(
            f"{framework} does not see the device {device!r}: install its build for that device"
        )


def _timed(reduce, barrier, rounds: int) -> list[float]:
    found = []
    for number in range(rounds + 2):  # the first ones connect, and compile
        barrier()
        start = time.perf_counter()
        reduce()
        if number >= 2:
            found.append(time.perf_counter() - start)
    return found


def connect(framework: str, device: str) -> Torch | Jax:
    """Join the other ranks."""
    return Torch(device) if framework == "torch" else Jax(device)
