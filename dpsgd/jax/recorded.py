"""What the methods on recorded models share: the plan, and the two kinds of backward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd import cost
from dpsgd.jax.layers.base import Found
from dpsgd.jax.layers.embed import Attend, Lookup
from dpsgd.jax.record import Parts, Tapped, Use
from dpsgd.jax.rows import beside, select_rows, square_rows, weighted_rows
from dpsgd.jax.step import JaxStep


class Recorded(JaxStep):
    """
    A step that knows the uses of the layers; they are found and planned at the first batch.

    ``budgeted``: whether what is held must fit ``memory_budget_bytes``.
    """

    budgeted = False

    def __init__(self, *args: Any, memory_budget_bytes: int | None = None, **options: Any) -> None:
        super().__init__(*args, memory_budget_bytes=memory_budget_bytes, **options)
        self.memory_budget_bytes = memory_budget_bytes
        self.plan: list[cost.Choice] = []
        self.ways: dict[str, str] = {}
        self._parts = Parts(self._graph, self.like, self._rest, self.loss, self.cast)
        self._proved: dict[str, list[Use]] = {}

    def explain(self) -> str:
        """The plan, one line for each layer; empty before the first batch."""
        return cost.show(self.plan)

    def uses(self, inputs: Any, targets: Any) -> list[Use]:
        """What the rules take, and the plan, for ``inputs`` of this shape; called when tracing."""
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (inputs, targets)
        )
        key = str(shapes)
        if key not in self._proved:
            self._proved[key] = self._parts.proved(*shapes)
        self._make_plan(self._proved[key])
        return self._proved[key]

    def allowed(self, ways: tuple[str, ...]) -> tuple[str, ...]:
        """The ways that this method may choose from."""
        return ways

    def norm_pass(
        self, tapped: Tapped, params: nnx.State, inputs: Any, targets: jax.Array
    ) -> tuple[dict[int, jax.Array], list[Found], jax.Array]:
        """
        One backward pass, by example.

        Returns:
            {number: gradients [P, ...]} of the parameters that no use takes; what the taps of each
            use were given, [P, ...]; and ‖g‖² [P] of everything.
        """
        leaves, numbers = jax.tree.leaves(params), self.others(tapped.uses)

        def loss(own, taps, inputs, target):
            values = replaced(leaves, numbers, own)
            return tapped.loss(values, taps, self._rest, inputs, target)

        gradients = jax.vmap(jax.grad(loss, argnums=(0, 1)), (None, None, 0, 0))
        rows, found = gradients([leaves[n] for n in numbers], tapped.zeros(), inputs, targets)
        parts = [square_rows(r) for r in rows]
        for taps in found:
            parts += [square_rows(taps[w]) for w in ("weight", "bias") if w in taps]
            if "squared" in taps:
                parts.append(taps["squared"].reshape(len(targets), -1).sum(1))
        for table, one, two in _tied(tapped.uses, found):
            parts.append(jax.vmap(table.rule.crossed)(one["x"], one["g"], two["x"], two["g"]))
        return dict(zip(numbers, rows, strict=True)), found, _total(parts, len(targets))

    def weighted_pass(
        self, params: nnx.State, inputs: Any, targets: jax.Array, weights: jax.Array
    ) -> nnx.State:
        """∇ Σ_p weights_p ℓ_p: SGD's backward pass, the rules' layers by products of their own."""
        uses = self.uses(inputs, targets)
        tapped = Tapped(self._parts, [use.told("none", held=True) for use in uses])
        leaves, numbers = jax.tree.leaves(params), self.others(uses)
        each = jax.vmap(tapped.loss, (None, 0, None, 0, 0))

        def total(own, taps):
            values = replaced(leaves, numbers, own)
            losses = each(values, taps, self._rest, inputs, targets)
            return jnp.where(weights > 0, losses * weights, 0).sum()

        zeros = jax.tree.map(lambda a: jnp.zeros((len(targets), *a.shape), a.dtype), tapped.zeros())
        own, found = jax.grad(total, argnums=(0, 1))([leaves[n] for n in numbers], zeros)
        ones = jnp.ones_like(weights)
        sums = self.summed(params, uses, found, ones)
        return self.tree_of(dict(zip(numbers, own, strict=True)), sums)

    def summed(
        self,
        params: nnx.State,
        uses: list[Use],
        found: list[Found],
        factors: jax.Array,
        good: jax.Array | None = None,
    ) -> dict[int, jax.Array]:
        """
        {number: Σ_p factors_p · gradient_p} of what the uses take.

        Args:
            params: of the model.
            uses: of the layers.
            found: what their taps were given, [P, ...].
            factors: [P].
            good: [P] booleans; x and g of the others are replaced by zeros.
        """

        def value(use, taps, what):
            if what in taps:
                return weighted_rows(factors, taps[what])
            return _product(use, taps["x"], taps["g"], factors, good)

        return self.added(params, uses, value, found)

    def added(
        self, params: nnx.State, uses: list[Use], value: Callable, found: list[Found]
    ) -> dict[int, jax.Array]:
        """{number: Σ value(use, its taps, ``weight`` or ``bias``)} over the uses of a parameter."""
        sums: dict[int, jax.Array] = {}
        number, leaves = {p: n for n, p in enumerate(self._parts.paths)}, jax.tree.leaves(params)
        for use, taps in zip(uses, found, strict=True):
            for name, path in use.places.items():
                n, part = number[path], value(use, taps, "bias" if name == "bias" else "weight")
                part = part if name == "bias" else use.pulled(leaves[n], part)
                sums[n] = sums[n] + part if n in sums else part
        return sums

    def tree_of(self, *leaves: dict[int, jax.Array]) -> nnx.State:
        """{number: array} as a state of the parameters."""
        whole = {n: a for part in leaves for n, a in part.items()}
        like = jax.tree.leaves(self._parts.params)
        return jax.tree.unflatten(
            self._parts.tree, [whole[n].astype(a.dtype) for n, a in enumerate(like)]
        )

    def others(self, uses: Sequence[Use]) -> list[int]:
        """Numbers of the parameters that no use takes."""
        taken = {path for use in uses for path in use.places.values()}
        return [n for n, path in enumerate(self._parts.paths) if path not in taken]

    def _make_plan(self, uses: list[Use]) -> None:
        modules = dict(nnx.iter_graph(self._parts.model()))
        examples, layers = self.physical_batch_size, []
        for use in uses:
            kind = type(modules[use.path]).__name__
            layer = use.rule.layer(use.name, kind, examples, use.copies, use.x, use.y)
            tied = sum(other.path == use.path for other in uses) > 1  # they have a cross term
            ways = ("gram",) if tied else self.allowed(layer.ways)
            layers.append(dataclasses.replace(layer, ways=ways))
        sizes: dict[Any, int] = {}
        for n in self.others(uses):
            path, size = self._parts.paths[n], jax.tree.leaves(self._parts.params)[n].size
            sizes[path[:-1]] = sizes.get(path[:-1], 0) + size
        for path, size in sizes.items():
            layers.append(
                cost.Layer(
                    name=".".join(map(str, path)) or "model",
                    kind=f"{type(modules[path]).__name__} (autodiff)",
                    examples=examples,
                    outputs=size,
                    ways=("keep",),
                )
            )
        self.plan = cost.plan(
            layers,
            memory_budget_bytes=self.memory_budget_bytes if self.budgeted else None,
            balance=cost.balance(self.device.platform),
        )
        self.ways = {choice.layer.name: choice.way for choice in self.plan}


def _total(parts: list, count: int) -> jax.Array:
    # Rounding may leave the difference of a closed form below zero.
    return jnp.maximum(sum(parts, jnp.zeros(count)), 0)


def replaced(leaves: list, numbers: list[int], own: list) -> list:
    """``leaves`` with ``own`` at ``numbers``."""
    leaves = [*leaves]
    for n, a in zip(numbers, own, strict=True):
        leaves[n] = a
    return leaves


def _product(use: Use, x, g, factors, good):
    # The select fuses with the copies that the product makes anyway.
    # The factors are not rounded to bf16, which could raise one above C/‖g‖.
    g = (g * beside(factors, g)).astype(g.dtype)
    if good is not None:
        x, g = select_rows(good, (x, g))
    product = use.rule.weighted
    for _ in use.stack:
        product = jax.vmap(product, in_axes=1)
    return product(x, g)


def _tied(uses, found):
    # (lookup, its x and g, those of the attend of the same table).
    for table, one in zip(uses, found, strict=True):
        for head, two in zip(uses, found, strict=True):
            both = isinstance(table.rule, Lookup) and isinstance(head.rule, Attend)
            if both and table.path == head.path:
                yield table, one, two
