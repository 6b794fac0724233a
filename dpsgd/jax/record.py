"""
One run of an unmodified model that hands out x and dL/dy of each trained layer, by example.

In a clone, each layer that a rule knows gets *taps*: zeros beside its output, whose cotangents are
whatever the rule makes of x and g = dL/dy (:func:`tap`). They are parameters of the layer like its
own, so they go wherever those go: through ``nnx.remat``, ``nnx.scan`` over stacked layers, ``jit``.
The loss of one example is differentiated with respect to the taps and to the parameters that no
rule has taken, and ``vmap`` makes that one gradient per example.

A rule takes a parameter only if the loss depends on it through exactly one call of its layer, which
:func:`look` proves on the traced program. All others are left to autodiff, exact in any case.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import partial_eval

from dpsgd.jax.layers import RULES, Rule

Path = tuple[Any, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tap(made: Callable, pull: Callable | None, y: Any, seen: tuple, zeros: Any) -> Any:
    """
    ``y``; its backward pass gives ``zeros`` the cotangents ``made(g, *seen)``.

    ``seen`` is x, the weight, and y where the rule needs it. g goes on to y, or where the rule has
    a product of its own, ``pull(weight, g)`` goes to x.
    """
    return y


def _forward(made, pull, y, seen, zeros):
    # Examples with taps of their own get a y of their own, and its g, also where x is a constant.
    nothing = sum(a.ravel()[:0].sum() for a in jax.tree.leaves(zeros))
    return y + jnp.asarray(nothing, y.dtype), seen


def _backward(made, pull, seen, g):
    given = made(g, *seen)
    if pull is None:
        return g, (None,) * len(seen), given
    x, weight, *more = seen
    return None, (pull(weight, g).astype(x.dtype), None, *(None for _ in more)), given


tap.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as nnx wants of what is static
class Use:
    """One method of one layer, told in one way; ``stack`` are the layers of an ``nnx.scan``."""

    path: Path
    method: str
    rule: Rule
    stack: tuple[int, ...] = ()
    way: str = "none"
    held: bool = True
    x: Any = None  # abstract, of one example
    y: Any = None

    @property
    def name(self) -> str:
        """Dotted, with the method where it is not the call."""
        name = ".".join(map(str, self.path)) or "model"
        return name if self.method == "__call__" else f"{name}.{self.method}"

    @property
    def places(self) -> dict[str, Path]:
        """{its own name: path} of the parameters that the rule takes."""
        wanted = (self.rule.weight, "bias")
        return {n: (*self.path, n) for n in wanted if n in self.rule.trained}

    @property
    def copies(self) -> int:
        """How many layers are stacked."""
        return math.prod(self.stack)

    def told(self, way: str, *, held: bool) -> "Use":
        """The same use, told in another way."""
        return dataclasses.replace(self, way=way, held=held)

    def pulled(self, weight: jax.Array, total: jax.Array) -> jax.Array:
        """As the rule's, for all stacked layers."""
        pulled = self.rule.pulled
        for _ in self.stack:
            pulled = jax.vmap(pulled)
        return pulled(weight, total)

    def attribute(self, what: str) -> str:
        """Where the tap called ``what`` hangs on the module."""
        return f"dp_tap{self.method}{what}"

    def made(self, g: jax.Array, x: jax.Array, *more: jax.Array) -> dict[str, jax.Array]:
        """What the taps are given; ``more`` is the weight, and y where the rule needs it."""
        return self.rule.found(x, g, self.way, *more, held=self.held)

    def seen(self, x: Any, weight: Any, y: Any) -> tuple:
        """What the backward pass needs beside g."""
        return (x, weight, y) if self.way in self.rule.need_outputs else (x, weight)

    def taps(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Their shapes, as stored on the module."""
        weight = jax.ShapeDtypeStruct(self.rule.shape, self.y.dtype)
        found = jax.eval_shape(self.made, self.y, *self.seen(self.x, weight, self.y))
        return {
            what: jax.ShapeDtypeStruct((*self.stack, *a.shape), a.dtype)
            for what, a in found.items()
        }

    def __call__(self, original: Callable, module: nnx.Module, x, *args, **kwargs) -> jax.Array:
        """The layer's own output, with its taps."""
        pull = self.rule.pull if self.rule.pulls else None
        layer, given = functools.partial(original, module), jax.lax.stop_gradient(x) if pull else x
        y = self.rule.output(layer, given, *args, **kwargs)
        zeros = {what: getattr(module, self.attribute(what))[...] for what in self.taps()}
        weight = getattr(module, self.rule.weight)[...]
        return tap(self.made, pull, y, self.seen(x, weight, y), zeros)


@dataclasses.dataclass(frozen=True, eq=False)
class Look(Use):
    """Notes sizes in ``noted``, and counts calls by the cotangent of a tap."""

    noted: list[tuple] = dataclasses.field(default_factory=list)

    def taps(self) -> dict[str, jax.ShapeDtypeStruct]:
        """One number for each stacked layer."""
        return {"calls": jax.ShapeDtypeStruct(self.stack, jnp.float32)}

    def __call__(self, original: Callable, module: nnx.Module, x, *args, **kwargs) -> jax.Array:
        """What has the output's shape and depends on x, and not on the weights."""
        y = jax.eval_shape(lambda: original(module, x, *args, **kwargs))
        y = jax.ShapeDtypeStruct(y.shape, y.dtype)
        own = getattr(module, self.rule.weight)[...].shape
        plain = all(more is None for more in (*args, *kwargs.values()))  # a norm layer's mask
        self.noted.append((x.shape, x.dtype, y.shape, y.dtype, own, plain))
        fake = checkpoint_name(jnp.zeros(y.shape, y.dtype) + jnp.sum(x).astype(y.dtype), self.name)
        calls = getattr(module, self.attribute("calls"))[...]
        return tap(lambda g, x: jnp.ones(calls.shape), None, fake, (x,), calls)

    @property
    def size(self) -> int:
        """Of the output."""
        return math.prod(self.noted[0][2])

    def settled(self) -> Use | None:
        """The use, if all its traces were alike, and the layer got nothing but x."""
        if len(set(self.noted)) != 1:
            return None
        (x, x_type, y, y_type, own, plain) = self.noted[0]
        if own != self.rule.shape or not plain:
            return None
        x, y = jax.ShapeDtypeStruct(x, x_type), jax.ShapeDtypeStruct(y, y_type)
        return Use(self.path, self.method, self.rule, self.stack, x=x, y=y)


class _Uses:
    """The uses of one layer, by method."""

    def __init__(self, uses: dict[str, Use]) -> None:
        self.get = uses.get


@functools.cache
def _tapped(kind: Any) -> type:
    def wrapped(method: str) -> Callable:
        original = getattr(kind, method)

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            use = self.dp_uses.get(method)
            if use is None:
                return original(self, *args, **kwargs)
            args = args or (kwargs.pop(next(iter(kwargs))),)
            return use(original, self, *args, **kwargs)

        return call

    return type(f"Tapped{kind.__name__}", (kind,), {m: wrapped(m) for m in RULES[kind]})


class Tapped:
    """A clone of the model of ``parts`` with the taps of ``uses``."""

    def __init__(self, parts: "Parts", uses: Sequence[Use]) -> None:
        self.parts, self.uses = parts, uses
        model = parts.model()
        modules = dict(nnx.iter_graph(model))
        self.shapes = [use.taps() for use in uses]
        for use, taps in zip(uses, self.shapes, strict=True):
            module = modules[use.path]
            kind: Any = type(module)
            if kind in RULES:
                object.__setattr__(module, "__class__", _tapped(kind))
                module.dp_uses = _Uses({u.method: u for u in uses if u.path == use.path})
            like = type(getattr(module, use.rule.weight))  # so that the user's filters treat both
            for what, shape in taps.items():  # alike
                setattr(module, use.attribute(what), like(shape))
        split: Any = nnx.split(model, lambda path, _: str(path[-1]).startswith("dp_tap"), ...)
        self._graph, state, _ = split
        leaves, self._tree = jax.tree.flatten(state)
        self._order = [
            next((n, w) for n, t in enumerate(self.shapes) for w, s in t.items() if s is leaf)
            for leaf in leaves
        ]

    def zeros(self) -> list[dict[str, jax.Array]]:
        """What the taps are given: one dict for each use."""
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.shapes)

    def loss(self, params: list, taps: list[dict], others: Any, inputs: Any, target: Any) -> Any:
        """The loss of one example, whose arrays have no batch axis."""
        inputs, target = jax.tree.map(lambda a: a[None], (inputs, target))
        return self.losses(params, taps, others, inputs, target)[0]

    def losses(self, params: list, taps: list[dict], others: Any, inputs: Any, targets: Any) -> Any:
        """Those of a whole batch [P], whose taps get the sums over it."""
        parts = self.parts
        values, inputs = parts.cast((params, inputs))
        state = jax.tree.unflatten(self._tree, [taps[n][what] for n, what in self._order])
        own = jax.tree.unflatten(parts.tree, values)
        return parts.loss(nnx.merge(self._graph, state, own, others, copy=True), inputs, targets)


class Parts:
    """
    A model in pieces.

    Args:
        graph, params, others: ``nnx.split`` of it, where ``params`` are the trained ones.
        loss: ``loss(model, inputs, targets) -> [P]``.
        cast: brings a tree to the precision of the computation.
    """

    def __init__(self, graph, params, others, loss: Callable, cast: Callable) -> None:
        self.loss, self.cast, self._graph = loss, cast, graph
        self.params, self.others = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, others)
        )
        leaves, self.tree = jax.tree.flatten(self.params)
        paths = {id(v.get_value()): path for path, v in nnx.to_flat_state(self.params)}
        self.paths = [paths[id(leaf)] for leaf in leaves]

    def model(self) -> nnx.Module:
        """A fresh one without values."""
        return nnx.merge(self._graph, self.params, self.others, copy=True)

    def candidates(self) -> Iterator[Look]:
        """Uses that a rule would take."""
        modules = {p: m for p, m in nnx.iter_graph(self.model()) if isinstance(m, nnx.Module)}
        own = {
            path: {n: v for n, v in vars(module).items() if isinstance(v, nnx.Variable)}
            for path, module in modules.items()
        }
        owners = Counter(id(v) for variables in own.values() for v in variables.values())
        for path, module in modules.items():
            trained = [n for n in own[path] if (*path, n) in self.paths]
            tied = any(owners[id(own[path][n])] > 1 for n in trained)
            for method, kinds in RULES.get(type(module), {}).items():
                kind = next((kind for kind in kinds if kind.takes(module)), None)
                if trained and not tied and kind:
                    rule = kind(module, trained)
                    stored = own[path][rule.weight].get_value().shape
                    extra = len(stored) - len(rule.shape)
                    if extra >= 0 and stored[extra:] == rule.shape:
                        yield Look(path, method, rule, stored[:extra])

    def proved(self, inputs: Any, target: Any) -> list[Use]:
        """
        Uses whose parameters the loss depends on through nothing but one call of one layer each.

        Args:
            inputs: abstract, of one example, without a batch axis.
            target: the same.
        """
        looks = list(self.candidates())
        tapped = Tapped(self, looks)
        leaves = jax.tree.leaves(self.params)
        given = leaves, tapped.shapes, self.others, inputs, target
        closed = jax.make_jaxpr(tapped.loss)(*given)
        _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True])
        elsewhere = {path for path, u in zip(self.paths, used, strict=False) if u}
        with jax.ensure_compile_time_eval():
            calls = jax.tree.map(np.asarray, _values(jax.grad(tapped.loss, argnums=1), given))
        sizes: dict[str, list[int]] = {}  # more than the output's own under a vmap of the user's
        for name, size in _names(closed.jaxpr):
            sizes.setdefault(name, []).append(size)
        once = {
            look
            for look, found in zip(looks, calls, strict=True)
            if look.noted and sizes.get(look.name) == [look.size] and (found["calls"] == 1).all()
        }
        never = {look for look in looks if look.name not in sizes}
        uses = []
        for look in looks:
            partners = [other for other in looks if other.path == look.path and other not in never]
            settled = look.settled() if look not in never else None
            alone = all(p in once and p.settled() for p in partners)
            # Two uses of one table have a cross term, which is not there for stacked ones.
            crossed = len(partners) > 1 and look.stack
            shared = elsewhere.intersection(look.places.values())
            if settled and alone and not crossed and not shared:
                uses.append(settled)
        return uses


def _values(function: Callable, given: tuple) -> Any:
    """``function(*given)`` of abstract arguments, whose values do not matter."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*given)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    leaves = [a for a, u in zip(jax.tree.leaves(given), used, strict=True) if u]
    found = jax.core.eval_jaxpr(
        jaxpr, closed.consts, *[jnp.zeros(a.shape, a.dtype) for a in leaves]
    )
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _names(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """What ``checkpoint_name`` named, wherever it stands: (name, size)."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            yield eqn.params["name"], eqn.outvars[0].aval.size
        for value in eqn.params.values():
            for part in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _names(inner)
