"""
Where a step runs: what it asks of a place, and the simplest one, a single device.

:mod:`dpsgd.jax.mesh` has the place of many devices with one model each, :mod:`dpsgd.jax.sharded`
that of a model cut into parts.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from dpsgd.ranks import Ranks

if TYPE_CHECKING:
    from dpsgd.jax.mesh import ManyDevices

AXIS = "data"


@dataclass(frozen=True)
class Kind:
    """Where an argument lies; with ``own``, a device sees it without its leading axis."""

    spec: Any  # a PartitionSpec, or a tree of them
    own: bool = False


SHARED = Kind(PartitionSpec())  # the same on every device
ROWS = Kind(PartitionSpec(AXIS))  # [D·P, ...], cut along the leading axis
OWN = Kind(PartitionSpec(AXIS), own=True)  # [D, ...], one entry for each device


def noise_key(seed: int | None, device_rank: int = 0) -> jax.Array:
    """A key for one device: from the operating system, or for tests from ``seed``."""
    if seed is None:
        data = secrets.token_bytes(16)
    else:
        own = (device_rank,) if device_rank else ()
        data = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=own)).bytes(16)
    # rbg's keys have the four words that dpsgd.jax.noise takes.
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(data, np.uint32)), impl="rbg")


class OneDevice:
    """No mesh: functions run as they are."""

    shards, world, device_ranks, even, resumable = 1, 1, (0,), False, True

    def __init__(self, device: jax.Device) -> None:
        self.device = device

    def put(self, rows: Any) -> Any:
        """An array of the batch to the device."""
        return jax.device_put(rows, self.device)

    def replicate(self, tree: Any) -> Any:
        """``tree`` on the device."""
        return jax.device_put(tree, self.device)

    def keys(self, seed: int | None) -> jax.Array:
        """The key of the noise."""
        return self.replicate(noise_key(seed))

    def zeros(self, params: Any) -> Any:
        """An empty sum."""
        return jax.tree.map(lambda a: self.replicate(jnp.zeros_like(a)), params)

    def added(self, total: Any) -> Any:
        """The sum over the devices of this process."""
        return total

    def opt_state(self, optimizer: optax.GradientTransformation, params: Any) -> Any:
        """The optimizer's first state."""
        return self.replicate(optimizer.init(params))

    def shapes(self, params: Any) -> Any:
        """What the device holds of them."""
        return params

    def first(self, tree: Any) -> Any:
        """Parameters and a batch, as one device has them."""
        return tree

    def buffers(self, size: int) -> Any:
        """Memory for two flat arrays of noise."""
        return [self.replicate(np.zeros(size, np.float32)) for _ in range(2)]

    def norming(self, function: Callable) -> Callable:
        """``(params, clip_norm, inputs, targets, mask) -> norms``."""
        return function

    def accumulating(self, function: Callable) -> Callable:
        """``(params, total, clip_norm, inputs, targets, mask) -> total``."""
        return function

    def drawing(self, function: Callable) -> Callable:
        """``key, number, std, buffers -> noise`` of the update with that number."""
        return function

    def updating(self, function: Callable, shaped: Callable) -> Callable:
        """``(params, opt_state, total, noise, L) -> params, opt_state, total``."""

        def updated(params, opt_state, total, noise, size):
            return function(params, opt_state, plus(total, noise, shaped), size)

        return updated

    def update(self, function: Callable, *state: Any) -> Any:
        """``function(params, opt_state, total, noise, L)``."""
        return function(*state)

    def here(self, params: Any) -> Any:
        """The parameters, for programs of this process."""
        return params

    def pace(self, total: Any) -> None:
        """Before each physical batch."""

    def declare(self, **facts: int) -> None:
        """Digests to compare with those of other processes, of which there is none."""


def place_of(
    device: jax.Device,
    ranks: Ranks | None,
    devices: Sequence[jax.Device] | None,
    model_shards: int = 1,
    **options: str,
) -> "OneDevice | ManyDevices":
    """Where a step runs whose model is on ``device``; ``ranks`` and ``devices`` None: there."""
    if ranks is None and devices is None and model_shards == 1:
        return OneDevice(device)
    if devices is None:
        devices = jax.devices(device.platform)
    if model_shards > 1:
        from dpsgd.jax.sharded import ShardedDevices

        return ShardedDevices(devices, ranks or Ranks(), model_shards, **options)
    from dpsgd.jax.mesh import ManyDevices

    many = ManyDevices(devices, ranks or Ranks(), **options)
    return many if many.world > 1 else OneDevice(many.device)


def nothing(key: jax.Array, number: int, std: float, old: Any) -> Any:
    """No noise, in the memory of the last."""
    return jax.tree.map(jnp.zeros_like, old)


def plus(total: Any, noise: Any, shaped: Callable) -> Any:
    """The sum with its noise, if there is any."""
    return total if noise is None else jax.tree.map(jnp.add, total, shaped(noise))


def mapped(function: Callable, mesh: Mesh, takes: Sequence[Kind], gives: Any) -> Callable:
    """``function`` on each device of ``mesh``."""

    def each(*args):
        given = [
            jax.tree.map(lambda a: a[0], arg) if kind.own else arg
            for arg, kind in zip(args, takes, strict=True)
        ]
        found = function(*given)
        if isinstance(gives, Kind):
            return _lifted(found, gives)
        return tuple(_lifted(one, kind) for one, kind in zip(found, gives, strict=True))

    return jax.shard_map(
        each,
        mesh=mesh,
        in_specs=tuple(kind.spec for kind in takes),
        out_specs=gives.spec if isinstance(gives, Kind) else tuple(kind.spec for kind in gives),
        check_vma=False,
    )


def _lifted(tree, kind):
    return jax.tree.map(lambda a: a[None], tree) if kind.own else tree
