"""
Join the processes of a JAX run: ``jax.distributed``, started by torchrun, SLURM's srun or by hand.

One process for each GPU, or one that drives several. JAX's coordination service, in the process of
rank 0, also holds what the ranks tell each other (:mod:`dpsgd.watch`).
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace

import jax
from jax._src import distributed as service  # the store has no public name

from dpsgd.ranks import Ranks
from dpsgd.watch import Watch


class CoordinationStore:
    """JAX's coordination service as the ranks know it: strings, and reads that do not wait."""

    def __init__(self) -> None:
        self._client = service.global_state.client

    def set(self, key: str, value: str) -> None:
        """Write, over an older value too."""
        self._client.key_value_set(f"dpsgd/{key}", value, allow_overwrite=True)

    def get(self, key: str) -> str | None:
        """Read, or None."""
        try:
            return self._client.key_value_try_get(f"dpsgd/{key}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def delete(self, key: str) -> None:
        """Remove."""
        self._client.key_value_delete(f"dpsgd/{key}")


def connect(*, device: str | None = None, timeout_s: float = 40.0) -> Ranks:
    """
    Join the other processes, and watch over them; alone, rank 0 of 1.

    To be called before anything else of JAX.

    Args:
        device: ``cpu`` keeps JAX off the GPUs.
        timeout_s: a rank without a sign of life for so long ends the run on all ranks.

    Raises:
        RuntimeError: not all ranks came, or JAX was used before.
    """
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    ranks = Ranks.from_env()
    if ranks.world == 1:
        return ranks
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.distributed.initialize(
        coordinator_address(os.environ),
        ranks.world,
        ranks.rank,
        local_device_ids(ranks, os.environ),
        initialization_timeout=int(3 * timeout_s),
        heartbeat_timeout_seconds=int(timeout_s) + 15,  # the watch says more, and is earlier
        shutdown_timeout_seconds=int(timeout_s) + 15,
    )
    store = CoordinationStore()
    watch = Watch(ranks.rank, ranks.world, store, timeout_s=timeout_s)
    watch.start()
    return replace(ranks, store=store, watch=watch)


def disconnect(ranks: Ranks, error: BaseException | None = None) -> None:
    """Leave, or tell the others of the ``error`` that ends this rank."""
    if ranks.watch:
        ranks.watch.stop(error)
    if ranks.world > 1 and error is None:
        with contextlib.suppress(RuntimeError):  # others have ended, and the service with them
            jax.distributed.shutdown()


def coordinator_address(environ: Mapping[str, str]) -> str | None:
    """
    Where rank 0 listens; None leaves it to JAX, which knows SLURM and ``JAX_COORDINATOR_ADDRESS``.

    torchrun's own store may hold MASTER_PORT: the next one is taken then.
    """
    if "JAX_COORDINATOR_ADDRESS" in environ or "MASTER_ADDR" not in environ:
        return None
    taken = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{environ['MASTER_ADDR']}:{int(environ.get('MASTER_PORT', 29500)) + taken}"


def local_device_ids(ranks: Ranks, environ: Mapping[str, str]) -> list[int] | None:
    """The GPU of this process; None, all it can see, where it is alone on its host or given one."""
    processes = environ.get("LOCAL_WORLD_SIZE") or environ.get("SLURM_NTASKS_PER_NODE")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if processes == "1" or (visible is not None and "," not in visible):
        return None
    return [ranks.local_rank]
