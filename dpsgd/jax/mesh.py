"""
A step on W devices of several processes, with one sum per update.

s = Σ_w s_w,   s_w = (clipped sum of device w) + N(0, σ²C²/W)

Between two updates a process works alone, on a mesh of the D devices that it drives, in programs
without a collective: it may see more physical batches than another one, or none. An update joins
the shards, without a copy, to arrays on the mesh of all W, adds them up in one all-reduce, and
hands every device the same parameters.

``shard_map`` runs unchecked (``check_vma=False``): the checked one sums a gradient with respect to
a replicated parameter over the mesh by itself, once for each physical batch, and refuses models
that scan from a constant.

Several processes send digests of what they must agree on in the same sum.

Guarantees: no two devices share a noise key. The sum has noise of variance σ²C², once per update,
whichever devices have no example. The processes trust each other: with ``split``, one that knows
its own noise sees a sum with σ²C²(W-1)/W of it; with ``rank0``, the first sees one without.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpsgd.jax.place import AXIS, OWN, ROWS, SHARED, Kind, mapped, noise_key, nothing, plus
from dpsgd.ranks import FACTS, Agreement, Ranks

PLACEMENTS = ("split", "rank0")
SYNCS = ("once", "every")


class ManyDevices:
    """
    W devices of all processes, D of them this one's; rank w is the w-th device by process.

    Args:
        devices: all W.
        ranks: this process among all.
        noise_placement: ``split`` gives each device σ²C²/W, ``rank0`` everything to device 0.
        sync: ``once`` per update, or ``every`` physical batch, for SGD as it is usually written.

    Attributes:
        even: whether all devices need equally many physical batches.

    Raises:
        ValueError: an unknown placement or sync, a process without a device, or ranks that are not
            those of ``jax.distributed``.
    """

    own, resumable = OWN, True

    def __init__(
        self,
        devices: Sequence[jax.Device],
        ranks: Ranks,
        *,
        noise_placement: str = "split",
        sync: str = "once",
    ) -> None:
        for name, value, known in (
            ("noise_placement", noise_placement, PLACEMENTS),
            ("sync", sync, SYNCS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}")
        devices = sorted(devices, key=lambda d: (d.process_index, d.id))
        here = jax.process_index()
        if (ranks.rank, ranks.world) != (here, jax.process_count()):
            raise ValueError(
                f"ranks say {ranks.rank} of {ranks.world}, JAX {here} of {jax.process_count()}: "
                "call dpsgd.jax.distributed.connect() before anything else of JAX"
            )
        self.device_ranks = tuple(w for w, d in enumerate(devices) if d.process_index == here)
        if not self.device_ranks:
            raise ValueError(f"process {here} drives none of the {len(devices)} devices given")
        own = [devices[w] for w in self.device_ranks]
        self.device, self.shards, self.world = own[0], len(own), len(devices)
        self.noise_placement, self.even = noise_placement, sync == "every"
        self.ranks, self.agreement = ranks, Agreement(ranks=ranks)
        self.mesh = Mesh(np.array(devices), AXIS)
        self.own_mesh = self.mesh if len(own) == len(devices) else Mesh(np.array(own), AXIS)
        # Programs of every physical batch run here.
        self.home = self.mesh if self.even else self.own_mesh
        self.noise_share = self.world**-0.5  # of σC
        self._updates = 0
        self._program: Any = None

    def put(self, rows: Any) -> Any:
        """An array [D·P, ...] of the batch to the devices, P rows each."""
        sharding = NamedSharding(self.home, PartitionSpec(AXIS))
        if self.home is self.own_mesh:
            return jax.device_put(rows, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(rows))

    def replicate(self, tree: Any) -> Any:
        """``tree`` on every device."""
        tree = jax.device_put(tree, NamedSharding(self.own_mesh, PartitionSpec()))
        return self._join(tree, SHARED) if self.even else tree

    def keys(self, seed: int | None) -> jax.Array:
        """One key for each device of this process, [D]."""
        keys = jnp.stack([noise_key(seed, rank) for rank in self.device_ranks])
        return jax.device_put(keys, NamedSharding(self.own_mesh, PartitionSpec(AXIS)))

    def zeros(self, params: Any) -> Any:
        """An empty sum, one on each device, [D, ...]; of all of them where all are summed often."""
        if self.even:
            return jax.tree.map(lambda a: self.replicate(np.zeros(a.shape, a.dtype)), params)
        sharding = NamedSharding(self.own_mesh, PartitionSpec(AXIS))

        def zero(a):
            return jax.device_put(np.zeros((self.shards, *a.shape), a.dtype), sharding)

        return jax.tree.map(zero, params)

    def added(self, total: Any) -> Any:
        """The sum over the devices of this process."""
        return total if self.even else jax.tree.map(lambda a: a.sum(0), total)

    def opt_state(self, optimizer: optax.GradientTransformation, params: Any) -> Any:
        """The optimizer's first state."""
        return self.replicate(optimizer.init(self.here(params)))

    def shapes(self, params: Any) -> Any:
        """What a device holds of them."""
        return params

    def first(self, tree: Any) -> Any:
        """Parameters and a batch, as the first device of this process has them."""
        return jax.tree.map(lambda a: a.addressable_shards[0].data, tree)

    def buffers(self, size: int) -> Any:
        """Memory for two flat arrays of noise, on each device [D, size]."""
        sharding = NamedSharding(self.own_mesh, PartitionSpec(AXIS))
        zeros = np.zeros((self.shards, size), np.float32)
        return [jax.device_put(zeros, sharding) for _ in range(2)]

    def norming(self, function: Callable) -> Callable:
        """``(params, clip_norm, inputs, targets, mask) -> norms``."""
        return mapped(function, self.home, (SHARED, SHARED, ROWS, ROWS, ROWS), ROWS)

    def accumulating(self, function: Callable) -> Callable:
        """``(params, total, clip_norm, inputs, targets, mask) -> total``, that of each device."""
        takes = SHARED, OWN, SHARED, ROWS, ROWS, ROWS
        if not self.even:
            return mapped(function, self.home, takes, OWN)

        def summed(params, total, *batch):
            part = function(params, jax.tree.map(jnp.zeros_like, total), *batch)
            return jax.tree.map(jnp.add, total, jax.lax.psum(part, AXIS))

        return mapped(summed, self.mesh, (SHARED, SHARED, SHARED, ROWS, ROWS, ROWS), SHARED)

    def drawing(self, function: Callable) -> Callable:
        """``keys, number, std, buffers -> noise``: each device's share of it."""
        takes = OWN, SHARED, SHARED, OWN
        if self.noise_placement == "split":

            def share(key, number, std, old):
                return function(key, number, std * self.noise_share, old)

            return mapped(share, self.own_mesh, takes, OWN)

        def first(key, number, std, old, rank):
            return jax.lax.cond(rank == 0, function, nothing, key, number, std, old)

        drawn = mapped(first, self.own_mesh, (*takes, OWN), OWN)
        return lambda *args: drawn(*args, jnp.asarray(self.device_ranks))

    def updating(self, function: Callable, shaped: Callable) -> Callable:
        """``(params, opt_state, total, noise, L, slots) -> params, opt_state, total, slots``."""
        kind = SHARED if self.even else OWN

        def summed(params, opt_state, total, noise, size, slots):
            total = plus(total, noise, shaped)
            if slots is not None:
                facts, place = slots
                slots = facts + place * fingerprint(params)
            if self.even:
                slots = _summed(slots)
            else:
                total, slots = _summed((total, slots))
            return *function(params, opt_state, total, size), slots

        takes = SHARED, SHARED, kind, OWN, SHARED, OWN
        return mapped(summed, self.mesh, takes, (SHARED, SHARED, kind, SHARED))

    def update(
        self, function: Any, params: Any, opt_state: Any, total: Any, noise: Any, size: float
    ) -> Any:
        """
        The one sum over the devices, and the optimizer.

        Raises:
            Disagreement: processes differ in step, draw, configuration or parameters.
        """
        self._settle(total)
        self._updates += 1
        self.agreement.declare(step=self._updates)
        args = (
            self._join(params, SHARED),
            self._join(opt_state, SHARED),
            self._join(total, self.own),
            self._join(noise, self.own),
            size,
            self._join(self._slots(), self.own),
        )
        if self.ranks.world > 1:
            if self._program is None:  # compiled before anyone waits for it
                with self.ranks.busy():
                    self._program = function.lower(*args).compile()
            function = self._program
        with self.ranks.waiting(self._updates):
            params, opt_state, total, slots = function(*args)
            if slots is not None:
                slots = np.asarray(slots)
        if slots is not None:
            self.agreement.check(slots)
        if not self.even:
            params, total = self.here(params), self._part(total, OWN)
        return params, opt_state, total

    def here(self, params: Any) -> Any:
        """The parameters, for programs of this process."""
        return self._part(params, SHARED)

    def pace(self, total: Any) -> None:
        """Before each physical batch: a watched process waits for its own last one."""
        self._settle(total)
        self.ranks.progress()

    def declare(self, **facts: int) -> None:
        """Digests that must be the same in all processes at the next update."""
        self.agreement.declare(**facts)

    def _settle(self, total: Any) -> None:
        if self.ranks.watch:
            joint = self.ranks.waiting(self._updates + 1) if self.even else nullcontext()
            with joint:  # where each physical batch is reduced, others may keep this one waiting
                jax.block_until_ready(total)

    def _slots(self) -> Any:
        # Facts of this process, and where the digest of its parameters goes: by its first device.
        if self.ranks.world == 1:
            return None
        table = np.zeros((2, self.shards, self.ranks.world * len(FACTS)), np.float32)
        table[0, 0] = self.agreement.slots()
        table[1, 0, self.ranks.rank * len(FACTS) + FACTS.index("parameters")] = 1
        return jax.device_put(tuple(table), NamedSharding(self.own_mesh, PartitionSpec(AXIS)))

    def _join(self, tree: Any, kind: Kind) -> Any:
        # Arrays of this process as arrays of all, without a copy.
        def joined(a):
            leading = (self.world, *a.shape[1:]) if kind.own else a.shape
            return _assembled(a, leading, self.mesh, kind)

        if self.mesh is self.own_mesh or _spans(tree):
            return tree
        return jax.tree.map(joined, tree)

    def _part(self, tree: Any, kind: Kind) -> Any:
        # The reverse.
        def parted(a):
            leading = (self.shards, *a.shape[1:]) if kind.own else a.shape
            return _assembled(a, leading, self.own_mesh, kind)

        return tree if self.mesh is self.own_mesh else jax.tree.map(parted, tree)


def fingerprint(tree: Any) -> jax.Array:
    """24 bits of the bits of all leaves, as float32: equal for equal leaves."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        odd = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
        total = 31 * total + (bits * odd).sum(dtype=jnp.uint32)
    return ((total >> 8) ^ (total & 0xFF)).astype(jnp.float32)


def _spans(tree):
    # Whether arrays are those of all processes already.
    return all(not a.is_fully_addressable for a in jax.tree.leaves(tree))


def _assembled(a, shape, mesh, kind):
    shards = {shard.device: shard.data for shard in a.addressable_shards}
    here = [shards[d] for d in mesh.devices.flat if d in shards]
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, kind.spec), here)


def _summed(tree):
    # Leaves of one type make one all-reduce.
    if not jax.tree.leaves(tree):
        return tree
    wide = jnp.result_type(jnp.float32, *jax.tree.leaves(tree))
    total = jax.lax.psum(jax.tree.map(lambda a: a.astype(wide), tree), AXIS)
    return jax.tree.map(lambda a, like: a.astype(like.dtype), total, tree)
