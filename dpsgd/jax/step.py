"""
What every JAX method shares: checks, precision, a donated sum, noise once, the optimizer.

A method gives ``_sum_and_norms(params, clip_norm, inputs, targets, mask)``. It is compiled once per
shape, in ``accumulate``, whose running sum is donated, so that it is updated in place. C, σC and L
are arguments of the compiled functions: another ``privacy`` needs no other compilation.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dpsgd.jax import weights
from dpsgd.jax.check import examples_apart
from dpsgd.jax.noise import halves, normals
from dpsgd.jax.place import place_of
from dpsgd.ranks import Ranks, digest

MATMUL_PRECISION = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": "bfloat16"}
_COMPILES: Counter[str] = Counter()


def _listen(event: str, duration_secs: float, **details: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILES[str(details.get("fun_name"))] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def check_model(model: nnx.Module, wrt: Any = nnx.Param) -> None:
    """
    Refuse what cannot be clipped per example; ``wrt`` is the nnx filter of what is trained.

    Raises:
        ValueError: a BatchNorm layer, active dropout, a parameter without a gradient or of 16
            bits, named, or no trainable parameter.
    """
    for path, node in nnx.iter_graph(model):
        name = ".".join(map(str, path))
        if isinstance(node, nnx.BatchNorm):
            raise ValueError(
                f"layer {name!r} is a BatchNorm, which mixes examples, so no "
                "per-example gradient exists: replace it by GroupNorm"
            )
        drops = isinstance(node, nnx.Dropout) and node.rate
        drops = drops or (isinstance(node, nnx.MultiHeadAttention) and node.dropout_rate)
        if drops and node.deterministic is False:
            raise ValueError(
                f"layer {name!r} has active dropout, whose state is not trained: all steps would "
                "drop the same; call model.eval(), or set its rate to 0"
            )
    params = nnx.to_flat_state(nnx.state(model, wrt))
    if not params:
        raise ValueError(
            "the model has no trainable parameter: make some an nnx.Param, or check wrt"
        )
    for path, variable in params:
        if not jnp.issubdtype(variable.dtype, jnp.floating):
            raise ValueError(
                f"parameter {'.'.join(map(str, path))!r} is {variable.dtype}, which has no "
                "gradient: make it an nnx.Variable, or leave it out of wrt"
            )
        if jnp.dtype(variable.dtype).itemsize < 4:
            raise ValueError(
                f"parameter {'.'.join(map(str, path))!r} is {variable.dtype}, in which a sum of "
                "many clipped gradients and its noise are rounded away: keep it in float32 "
                "(param_dtype); precision='bf16' computes in bf16 all the same"
            )


def laid_out(array: Any) -> np.ndarray:
    """As JAX likes it: images NCHW to NHWC, int64 to int32."""
    array = np.asarray(array)
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    return array.astype(np.int32) if array.dtype == np.int64 else array


class JaxStep:
    """
    Base of the JAX steps. ``compile`` is accepted and ignored: JAX always compiles.

    ``wrt`` is the nnx filter of what is trained; the rest is frozen. With ``ranks``, the step
    runs on ``devices`` of all processes (None: all of the model's kind), as :mod:`dpsgd.jax.mesh`
    says: batches are [shards·P, ...], device w works on ``logical.share(w, place.world)``. With
    ``model_shards``, a model is cut into so many (:mod:`dpsgd.jax.sharded`).

    Raises:
        ValueError: BatchNorm, no trainable parameter, or an unknown option.
    """

    private = True

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        privacy: Any,
        *,
        loss: Callable[..., jax.Array],
        physical_batch_size: int,
        precision: str = "fp32",
        compile: bool = True,
        memory_budget_bytes: int | None = None,
        seed: int | None = None,
        wrt: Any = nnx.Param,
        ranks: Ranks | None = None,
        devices: Sequence[jax.Device] | None = None,
        noise_placement: str = "split",
        sync: str = "once",
        model_shards: int = 1,
    ) -> None:
        check_model(model, wrt)
        if sync == "every" and self.private:
            raise ValueError("sync is 'every'; a private method has only 'once' per logical batch")
        if precision not in MATMUL_PRECISION:
            names = ", ".join(MATMUL_PRECISION)
            raise ValueError(f"precision is {precision!r}; use one of {names}")
        if physical_batch_size < 1:
            raise ValueError(f"physical_batch_size is {physical_batch_size}; it must be at least 1")
        self.privacy, self.loss, self.precision = privacy, loss, precision
        self.physical_batch_size, self.optimizer = physical_batch_size, optimizer
        split: Any = nnx.split(model, wrt, ...)
        self._graph, params, self._rest = split
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        options: dict[str, Any] = {"noise_placement": noise_placement, "sync": sync}
        options["model_shards"] = model_shards
        place = place_of(device, ranks, devices, **options)
        self.place, self.device, self.done = place, place.device, 0
        shapes = [(a.shape, str(a.dtype)) for a in jax.tree.leaves(params)]
        facts = type(self).__name__, privacy, physical_batch_size, precision, shapes
        place.declare(config=digest(*facts, options, place.world))
        self.like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        # The step donates its buffers, so it needs its own; committed, or the first call retraces.
        self.params = place.replicate(jax.tree.map(lambda a: a.copy(), params))
        self.opt_state = place.opt_state(optimizer, self.params)
        self.total, self._apart = self._zeros(), False
        self._key = place.keys(seed)
        parts = ("accumulate", "noise", "update")
        self._names = [f"{type(self).__name__}_{part}" for part in parts]
        accumulated = place.accumulating(self._accumulated)
        self._accumulate = self._jit(accumulated, self._names[0], donate_argnums=1)
        # A function of its own: fused with the optimizer, XLA compiles both five times longer. The
        # arrays of the last draw are taken for the next one: new memory costs more than the noise.
        drawn, options = place.drawing(self._drawn), {"donate_argnums": 3, "keep_unused": True}
        self._noise, self._noises = self._jit(drawn, self._names[1], **options), None
        updated = place.updating(self._updated, self._shaped)
        self._update = self._jit(updated, self._names[2], donate_argnums=(0, 1, 2))
        self._norms = self._jit(place.norming(lambda *args: self._sum_and_norms(*args)[1]), "norms")

    @property
    def shards(self) -> int:
        """D, the devices that this process drives; a batch has P rows for each."""
        return self.place.shards

    @property
    def model(self) -> nnx.Module:
        """The model with the parameters as they are now."""
        params = jax.tree.map(jnp.copy, self.place.here(self.params))
        return nnx.merge(self._graph, params, self._rest)

    def cast(self, tree: Any) -> Any:
        """Float32 arrays to bfloat16 where the precision asks for it."""
        if self.precision != "bf16":
            return tree
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, tree)

    def objective(self, params: nnx.State, inputs: Any, targets: jax.Array) -> jax.Array:
        """Per-example losses [P] as a function of the parameters."""
        params, inputs = self.cast((params, inputs))
        return self.loss(nnx.merge(self._graph, params, self._rest), inputs, targets)

    def put(self, inputs: Any, targets: np.ndarray, mask: np.ndarray) -> tuple[Any, Any, Any]:
        """NumPy arrays to the devices, as :func:`laid_out`."""
        return jax.tree.map(lambda a: self.place.put(laid_out(a)), (inputs, targets, mask))

    def accumulate(self, inputs: Any, targets: jax.Array, mask: jax.Array) -> None:
        """
        Add the clipped gradients of the unmasked examples.

        Raises:
            ValueError: at the first call, a loss that mixes examples.
        """
        if self.private and not self._apart:
            first = self.place.first((self.params, inputs, targets, mask))
            examples_apart(self.loss, self._graph, first[0], self._rest, *first[1:])
            self._apart = True
        self.place.pace(self.total)
        clip_norm = self.privacy.clip_norm
        self.total = self._accumulate(self.params, self.total, clip_norm, inputs, targets, mask)

    def declare(self, **facts: int) -> None:
        """Digests (``draw``) that must be the same in all processes at the next ``update``."""
        self.place.declare(**facts)

    def update(self) -> None:
        """Noise once, divide by L, the optimizer, clear."""
        self.done += 1
        noise, std = None, self.privacy.noise_multiplier * self.privacy.clip_norm
        if self.private and std > 0:
            if self._noises is None:
                self._noises = self.place.buffers(self._size)
            noise = self._noises = self._noise(self._key, self.done, std, self._noises)
        size = self.privacy.expected_batch_size
        self.params, self.opt_state, self.total = self.place.update(
            self._update, self.params, self.opt_state, self.total, noise, size
        )

    def synchronize(self) -> None:
        """Wait for the device."""
        jax.block_until_ready((self.params, self.total))

    def clipped_sum(self, inputs: Any, targets: Any, mask: Any) -> dict[str, np.ndarray]:
        """Clipped sum of one physical batch, {name: array}; the running sum is left as it was."""
        saved, self.total = self.total, self._zeros()
        self.accumulate(inputs, targets, mask)
        result, self.total = weights.dump(self.place.added(self.total)), saved
        return result

    def norms(self, inputs: Any, targets: Any, mask: Any) -> np.ndarray:
        """Per-example gradient norms [P]; masked rows are 0."""
        clip_norm = self.privacy.clip_norm
        return np.asarray(self._norms(self.params, clip_norm, inputs, targets, mask))

    def state(self) -> dict[str, np.ndarray]:
        """Model and optimizer, by name, and a digest of what is frozen; nothing secret."""
        found = {name: np.asarray(a) for name, a in _named(self._kept())}
        return found | {"frozen": np.array(self._frozen)}

    def restore(self, state: Mapping[str, np.ndarray], done: int) -> None:
        """
        Come back to ``state`` after ``done`` updates; the noise goes on from there.

        Raises:
            ValueError: what is frozen is not what it was.
        """
        if int(state["frozen"]) != self._frozen:
            raise ValueError(
                "the frozen parameters are not those that the run was begun with: build the model "
                "as it was then, from the same weights or with the same seed"
            )
        kept = self._kept()
        # NumPy's files know bfloat16 as two bytes without a meaning.
        leaves = [jnp.asarray(state[name].view(like.dtype)) for name, like in _named(kept)]
        kept = jax.tree.unflatten(jax.tree.structure(kept), leaves)
        self.params = self.place.replicate(kept["model"])
        self.opt_state = self.place.replicate(kept["optimizer"])
        self.done = done

    def parameters(self) -> dict[str, np.ndarray]:
        """Trainable parameters now, {name: array}."""
        return weights.dump(self.place.here(self.params))

    def compiles(self) -> int:
        """How often this process has compiled this method's functions."""
        return sum(n for name, n in _COMPILES.items() if any(own in name for own in self._names))

    def plan_bytes(self, inputs: Any, targets: Any, mask: Any) -> int:
        """XLA's own memory plan for one ``accumulate``: arguments, results and temporaries."""
        lowered = self._accumulate.lower(self.params, self.total, 1.0, inputs, targets, mask)
        plan = lowered.compile().memory_analysis()
        kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return kept + plan.temp_size_in_bytes

    def _sum_and_norms(self, params, clip_norm, inputs, targets, mask):
        raise NotImplementedError

    def _accumulated(self, params, total, clip_norm, *batch):
        return jax.tree.map(jnp.add, total, self._sum_and_norms(params, clip_norm, *batch)[0])

    def _drawn(self, key, number, std, _):
        # Two flat arrays: a generator per leaf would be compiled hundreds of times.
        own = jax.random.key_data(jax.random.fold_in(key, number))
        return [std * z for z in normals(own, self._size)]

    @property
    def _size(self) -> int:
        leaves = jax.tree.leaves(self.place.shapes(self.params))
        return halves([leaf.size for leaf in leaves])[1]

    def _shaped(self, noise):
        """The flat arrays as a tree like what a device holds of the parameters."""
        leaves, tree = jax.tree.flatten(self.place.shapes(self.params))
        places = halves([leaf.size for leaf in leaves])[0]
        parts = [
            noise[which][start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype)
            for (which, start), leaf in zip(places, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, parts)

    def _updated(self, params, opt_state, total, expected_batch_size):
        gradient = jax.tree.map(lambda g: g / expected_batch_size, total)
        updates, opt_state = self.optimizer.update(gradient, opt_state, params)
        cleared = jax.tree.map(jnp.zeros_like, total)
        return optax.apply_updates(params, updates), opt_state, cleared

    def _kept(self) -> dict[str, Any]:
        if not self.place.resumable:
            raise ValueError("a sharded run cannot be resumed: leave the checkpoint out")
        return {"model": self.place.here(self.params), "optimizer": self.place.here(self.opt_state)}

    @functools.cached_property
    def _frozen(self) -> int:
        leaves = [jnp.asarray(a) for a in jax.tree.leaves(self._rest)]
        values = [a for a in leaves if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]
        return digest(*map(np.asarray, values))

    def _zeros(self) -> nnx.State:
        return self.place.zeros(self.params)

    def _jit(self, function: Callable, name: str, **options: Any) -> Any:
        def traced(*args):
            with jax.default_matmul_precision(MATMUL_PRECISION[self.precision]):
                return function(*args)

        traced.__name__ = traced.__qualname__ = name
        return jax.jit(traced, **options)


def _named(tree: Any) -> list[tuple[str, jax.Array]]:
    """[(path, leaf)], such as ``model/blocks/0/kernel/value``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
