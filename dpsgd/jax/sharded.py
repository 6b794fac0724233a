"""
Models whose state does not fit one device: parameters, sum and optimizer cut into M (ZeRO-3).

W = D·M devices in a mesh ("data", "model"). Each of them works on examples of its own, as if it
were alone: it gathers the parameters over "model", clips whole gradients, whose norms therefore
need no traffic, and scatters the sum, of which it keeps one part in M:

    s[m] = Σ_d ( Σ_m' (clipped sum of device d,m')[m] + N(0, σ²C²/D) )

For each physical batch one all-gather and one reduce-scatter per parameter (XLA may join some), for
each update one all-reduce over "data". The devices of a row of "model" therefore need equally many
physical batches, as ``logical.share(w, W, even=True)`` gives them.

Memory of a device, with S bytes of parameters: (2 + optimizer's)·S/M always; while it accumulates
also S for the gathered parameters, at most S for the sum, and what the method holds. So it is
optimizer state, sums and noise that are saved; S itself must fit.

Each parameter is cut along its longest axis, padded where M does not divide it. The optimizer sees
one part of each: it must work element by element, as SGD and Adam do, which is checked.

Guarantees: those of :mod:`dpsgd.jax.mesh`; each part of the sum gets N(0, σ²C²) once, from keys
that no other part and no other device uses. Reference: arXiv:1910.02054.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpsgd.jax.mesh import ManyDevices
from dpsgd.jax.place import SHARED, Kind, mapped, noise_key, nothing, plus
from dpsgd.ranks import Ranks

AXES = ("data", "model")
ROWS = Kind(PartitionSpec(AXES))  # [W·P, ...]
OWN = Kind(PartitionSpec(AXES), own=True)  # [W, ...]
# What an optimizer may not do with a part of a parameter: sum over it, or draw for it.
_MIXING = ("reduce_", "dot_general", "sort", "cum", "arg", "random_", "rng_", "threefry", "top_k")


class ShardedDevices(ManyDevices):
    """
    A place for a step, in the stead of :class:`dpsgd.jax.mesh.ManyDevices`.

    Args:
        devices: all W; those of one row of "model" lie side by side, by process.
        ranks: this process among all.
        model_shards: M, a divisor of W.
        noise_placement: ``split`` gives each row of "data" σ²C²/D, ``rank0`` everything to row 0.
        sync: ``once``.

    Raises:
        ValueError: as there; or M does not fit, or a parameter or the optimizer cannot be cut.
    """

    own, resumable = OWN, False

    def __init__(
        self,
        devices: Sequence[jax.Device],
        ranks: Ranks,
        model_shards: int,
        *,
        noise_placement: str = "split",
        sync: str = "once",
    ) -> None:
        if sync != "once" or len(devices) % model_shards:
            raise ValueError(
                f"model_shards is {model_shards} and sync {sync!r}: use a divisor of the "
                f"{len(devices)} devices, and sync='once'"
            )
        super().__init__(devices, ranks, noise_placement=noise_placement)
        self.model_shards, self.even = model_shards, True
        alone = self.mesh is self.own_mesh
        self.home = self.mesh = Mesh(self.mesh.devices.reshape(-1, model_shards), AXES)
        self.own_mesh = self.mesh if alone else self.own_mesh
        self.noise_share = self.mesh.shape["data"] ** -0.5

    def put(self, rows: Any) -> Any:
        """An array [D·P, ...] of the batch to the devices, P rows each."""
        sharding = NamedSharding(self.mesh, ROWS.spec)
        return jax.make_array_from_process_local_data(sharding, np.asarray(rows))

    def replicate(self, tree: Any) -> Any:
        """The parameters, cut."""
        if any(a.ndim == 0 for a in jax.tree.leaves(tree)):
            raise ValueError("a parameter is a scalar, which cannot be cut: give it the shape (1,)")
        self.like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
        self.parts = Kind(jax.tree.map(self._spec, tree))
        self.sums = Kind(
            jax.tree.map(lambda spec: PartitionSpec("data", *spec), self.parts.spec), own=True
        )

        def cut(a):
            wide, sharding = self._padded(np.asarray(a)), NamedSharding(self.mesh, self._spec(a))
            return jax.make_array_from_callback(wide.shape, sharding, lambda at: wide[at])

        return jax.tree.map(cut, tree)

    def opt_state(self, optimizer: optax.GradientTransformation, params: Any) -> Any:
        """
        The optimizer's first state, cut as the parameters are.

        Raises:
            ValueError: the optimizer does more than look at one element at a time.
        """
        state = jax.eval_shape(optimizer.init, params)
        traced = jax.make_jaxpr(optimizer.update)(params, state, params)
        if mixing := sorted(set(_mixing(traced.jaxpr))):
            raise ValueError(
                f"the optimizer uses {', '.join(mixing)}, but sees one part of each parameter: use "
                "one that works element by element (SGD, Adam, AdamW), or model_shards=1"
            )
        spec = optax.tree_map_params(
            optimizer,
            lambda _, spec: spec,
            state,
            self.parts.spec,
            transform_non_params=lambda _: PartitionSpec(),
        )
        self.state = Kind(spec)
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), spec)
        return jax.jit(optimizer.init, out_shardings=shardings)(params)

    def keys(self, seed: int | None) -> jax.Array:
        """One key for each device, [W]."""
        data = [jax.random.key_data(noise_key(seed, rank)) for rank in self.device_ranks]
        return jax.random.wrap_key_data(self.put(np.stack(data)), impl="rbg")

    def zeros(self, params: Any) -> Any:
        """An empty sum, one part on each device: [D, ...]."""
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.sums.spec)
        rows = self.mesh.shape["data"]
        return jax.jit(
            lambda: jax.tree.map(lambda a: jnp.zeros((rows, *a.shape), a.dtype), params),
            out_shardings=shardings,
        )()

    def added(self, total: Any) -> Any:
        """The sum over all devices."""
        return self._whole(jax.tree.map(lambda a: a.sum(0), total))

    def shapes(self, params: Any) -> Any:
        """What a device holds of them."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype), params
        )

    def norming(self, function: Callable) -> Callable:
        """``(params, clip_norm, inputs, targets, mask) -> norms``."""

        def norms(params, *rest):
            return function(self._gathered(params), *rest)

        return mapped(norms, self.mesh, (self.parts, SHARED, ROWS, ROWS, ROWS), ROWS)

    def first(self, tree: Any) -> Any:
        """Parameters and a batch, as the first device of this process would have them whole."""
        params, *batch = tree
        return super().first((self._whole(params), *batch))

    def buffers(self, size: int) -> Any:
        """Memory for two flat arrays of noise, on each device."""
        zeros = np.zeros((self.shards, size), np.float32)
        return [self.put(zeros) for _ in range(2)]

    def accumulating(self, function: Callable) -> Callable:
        """``(params, total, clip_norm, inputs, targets, mask) -> total``, in parts."""

        def summed(params, total, *rest):
            whole = self._gathered(params)
            part = function(whole, jax.tree.map(jnp.zeros_like, whole), *rest)
            return jax.tree.map(jnp.add, total, self._scattered(part))

        takes = self.parts, self.sums, SHARED, ROWS, ROWS, ROWS
        return mapped(summed, self.mesh, takes, self.sums)

    def drawing(self, function: Callable) -> Callable:
        """``keys, number, std, buffers -> noise``: each device's share of its part's noise."""

        def share(key, number, std, old):
            if self.noise_placement == "split":
                return function(key, number, std * self.noise_share, old)
            first = jax.lax.axis_index("data") == 0
            return jax.lax.cond(first, function, nothing, key, number, std, old)

        return mapped(share, self.mesh, (OWN, SHARED, SHARED, OWN), OWN)

    def updating(self, function: Callable, shaped: Callable) -> Callable:
        """``(params, opt_state, total, noise, L, slots) -> params, opt_state, total, slots``."""

        def summed(params, opt_state, total, noise, size, slots):
            total = jax.lax.psum(plus(total, noise, shaped), "data")
            if slots is not None:
                slots = jax.lax.psum(slots[0], AXES)
            return *function(params, opt_state, total, size), slots

        # The kinds are known once the parameters are cut.
        takes = self.parts, self.state, self.sums, OWN, SHARED, OWN
        return mapped(summed, self.mesh, takes, (self.parts, self.state, self.sums, SHARED))

    def here(self, params: Any) -> Any:
        """The whole parameters, for programs of this process; every process must ask for them."""
        return self._part(self._whole(params), SHARED)

    def _whole(self, tree: Any) -> Any:
        def cropped(tree):
            return jax.tree.map(lambda a, like: a[_corner(like)], tree, self.like)

        gathered = jax.jit(cropped, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        with self.ranks.waiting(self._updates + 1):
            return jax.block_until_ready(gathered(tree))

    def _spec(self, a: Any) -> PartitionSpec:
        return PartitionSpec(*(("model" if n == _longest(a) else None) for n in range(a.ndim)))

    def _padded(self, a: Any) -> Any:
        # With zeros at the end of its longest axis, to a multiple of M.
        library = jnp if isinstance(a, jax.Array) else np
        missing = -a.shape[_longest(a)] % self.model_shards
        return library.pad(a, [(0, missing * (n == _longest(a))) for n in range(a.ndim)])

    def _gathered(self, parts: Any) -> Any:
        def gather(part, like):
            whole = jax.lax.all_gather(part, "model", axis=_longest(like), tiled=True)
            return whole[_corner(like)]

        return jax.tree.map(gather, parts, self.like)

    def _scattered(self, whole: Any) -> Any:
        def scatter(a):
            wide, axis = self._padded(a), _longest(a)
            return jax.lax.psum_scatter(wide, "model", scatter_dimension=axis, tiled=True)

        return jax.tree.map(scatter, whole)


def _longest(a: Any) -> int:
    return int(np.argmax(a.shape))


def _corner(like: Any) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in like.shape)


def _mixing(jaxpr: Any) -> Iterator[str]:
    # Names of operations on arrays that look at more than one element.
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name.startswith(_MIXING) and any(v.aval.size > 1 for v in eqn.invars):
            yield name
        for value in eqn.params.values():
            for part in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _mixing(inner)
