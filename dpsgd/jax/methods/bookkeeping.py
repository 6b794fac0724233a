"""
Book-keeping (arXiv:2210.00038), planned layer by layer: one forward and one backward pass.

s = Σ_p c_p g_p,   c_p = min(1, C/‖g_p‖)

Each layer's norm and weighted sum are computed in the way that ``dpsgd.cost`` finds to be the
fastest within the memory budget; what no rule takes is kept, by autodiff under vmap.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd import cost
from dpsgd.jax.layers.base import square_rows, weighted_rows
from dpsgd.jax.layers.embed import Attend, Lookup
from dpsgd.jax.record import Parts, Tapped, Use
from dpsgd.jax.step import JaxStep, select_rows

# FLOPs in the time of one byte. XLA's batched products reach 60 % of its large ones on a CPU, so
# what is kept by example costs more there than its FLOPs and bytes say.
BALANCE = {"cpu": 30.0, "gpu": 15.0, "tpu": 15.0}


class Recorded(JaxStep):
    """A step that knows the uses of the layers, found at the first batch and at each new shape."""

    def __init__(self, *args: Any, memory_budget_bytes: int | None = None, **options: Any) -> None:
        super().__init__(*args, memory_budget_bytes=memory_budget_bytes, **options)
        self.memory_budget_bytes = memory_budget_bytes
        self.plan: list[cost.Choice] = []
        self.ways: dict[str, str] = {}
        self._parts = Parts(self._graph, self.params, self._rest, self.loss, self.cast)
        self._proved: dict[Any, list[Use]] = {}

    def explain(self) -> str:
        """The plan, one line for each layer; empty before the first batch."""
        return cost.show(self.plan)

    def uses(self, inputs: Any, targets: Any) -> list[Use]:
        """What the rules take, for ``inputs`` of this shape; plans at the first call."""
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (inputs, targets)
        )
        key = str(shapes)
        if key not in self._proved:
            self._proved[key] = self._parts.proved(*shapes)
            self._plan(self._proved[key])
        return self._proved[key]

    def tapped(self, uses: list[Use], ways: dict[str, str]) -> Tapped:
        """The model with the taps of ``uses``, told in ``ways``, {use: way}."""
        return Tapped(self._parts, [use.told(ways[use.name]) for use in uses])

    def others(self, uses: list[Use]) -> list[int]:
        """Numbers of the parameters that no use takes."""
        taken = {path for use in uses for path in use.places.values()}
        return [n for n, path in enumerate(self._parts.paths) if path not in taken]

    def state(self, leaves: dict[int, jax.Array]) -> nnx.State:
        """{number: array} as a state."""
        return jax.tree.unflatten(self._parts.tree, [leaves[n] for n in range(len(leaves))])

    def _plan(self, uses: list[Use]) -> None:
        modules = dict(nnx.iter_graph(self._parts.model()))
        examples, layers = self.physical_batch_size, []
        for use in uses:
            kind = type(modules[use.path]).__name__
            layer = use.rule.layer(use.name, kind, examples, use.copies, use.x, use.y)
            if sum(other.path == use.path for other in uses) > 1:  # they have a cross term
                layer = dataclasses.replace(layer, ways=("gram",))
            layers.append(layer)
        rest: dict[Any, int] = {}
        for n in self.others(uses):
            path = self._parts.paths[n]
            size = jax.tree.leaves(self._parts.params)[n].size
            rest[path[:-1]] = rest.get(path[:-1], 0) + size
        for path, size in rest.items():
            layers.append(
                cost.Layer(
                    name=".".join(map(str, path)) or "model",
                    kind=f"{type(modules[path]).__name__} (autodiff)",
                    examples=examples,
                    positions=1,
                    inputs=1,
                    outputs=size,
                    ways=("keep",),
                )
            )
        self.plan = cost.plan(
            layers,
            memory_budget_bytes=self.memory_budget_bytes,
            balance=BALANCE[self.device.platform],
        )
        self.ways = {choice.layer.name: choice.way for choice in self.plan}

    def _norm_pass(self, tapped: Tapped, params, inputs, targets):
        # One gradient per example of the parameters that no use takes and of the taps; ‖g‖² [P].
        leaves, numbers = jax.tree.leaves(params), self.others(tapped.uses)

        def loss(own, taps, inputs, target):
            whole = {**dict(enumerate(leaves)), **dict(zip(numbers, own, strict=True))}
            values = [whole[n] for n in range(len(leaves))]
            return tapped.loss(values, taps, self._rest, inputs, target)

        gradients = jax.vmap(jax.grad(loss, argnums=(0, 1)), (None, None, 0, 0))
        rows, found = gradients([leaves[n] for n in numbers], tapped.zeros(), inputs, targets)
        parts = [square_rows(r) for r in rows]
        for taps in found:
            parts += [square_rows(taps[w]) for w in ("weight", "bias") if w in taps]
            if "squared" in taps:
                parts.append(taps["squared"].reshape(len(targets), -1).sum(1))
        for (table, one), (_, two) in _tied(tapped.uses, found):
            parts.append(jax.vmap(table.rule.crossed)(one["x"], one["g"], two["x"], two["g"]))
        squared = sum(parts, jnp.zeros(len(targets)))
        return dict(zip(numbers, rows, strict=True)), found, squared

    def _factors(self, squared, mask):
        # min(1, C/‖g‖); 0 for masked rows and where ‖g‖² is not finite in float32.
        keep = mask & jnp.isfinite(squared.astype(jnp.float32))
        norms = jnp.sqrt(jnp.where(keep, squared, 0))
        factors = jnp.where(keep, jnp.minimum(1, self.privacy.clip_norm / norms), 0)
        return factors, jnp.sqrt(jnp.where(mask, squared, 0))

    def weighted(self, uses: list[Use], found: list[dict], factors, finite) -> dict[int, jax.Array]:
        """{number: Σ_p factors_p · gradient_p} of all that the uses take."""
        total: dict[int, jax.Array] = {}
        number = {path: n for n, path in enumerate(self._parts.paths)}

        def add(path, value):
            n = number[path]
            total[n] = total[n] + value if n in total else value

        for use, taps in zip(uses, found, strict=True):
            for own, path in use.places.items():
                what = "bias" if own == "bias" else "weight"
                if what in taps:
                    add(path, weighted_rows(factors, taps[what]))
                else:
                    add(path, _product(use, taps["x"], taps["g"], factors, finite))
        return total


class Bookkeeping(Recorded):
    """
    Exact flat clipping for unmodified ``flax.nnx`` models, at about the cost of SGD.

    Raises:
        ValueError: at the first batch, a memory budget that no plan fits.
    """

    def _sum_and_norms(self, params, inputs, targets, mask):
        uses = self.uses(inputs, targets)
        tapped = self.tapped(uses, self.ways)
        rows, found, squared = self._norm_pass(tapped, params, select_rows(mask, inputs), targets)
        factors, norms = self._factors(squared, mask)
        finite = jnp.isfinite(squared.astype(jnp.float32))
        rows, found = _cleaned(rows, found, finite)
        total = self.weighted(tapped.uses, found, factors, finite)
        total |= {n: weighted_rows(factors, r) for n, r in rows.items()}
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
        return self.state({n: a.astype(dtypes[n]) for n, a in total.items()}), norms


def _cleaned(rows, found, finite):
    # Almost never entered. A plain select would copy every gradient before the products.
    kept = [{w: a for w, a in taps.items() if w in ("weight", "bias")} for taps in found]
    _, (rows, kept) = jax.lax.while_loop(
        lambda state: state[0],
        lambda state: (jnp.zeros_like(state[0]), select_rows(finite, state[1])),
        (~finite.all(), (rows, kept)),
    )
    return rows, [taps | own for taps, own in zip(found, kept, strict=True)]


def _product(use: Use, x, g, factors, finite):
    # The select of a bad example's rows fuses with the copies that the product makes anyway.
    factors = factors.reshape(-1, *[1] * (g.ndim - 1)).astype(g.dtype)
    g = jnp.where(finite.reshape(factors.shape), g * factors, 0)
    product, x = use.rule.weighted, select_rows(finite, x)
    for _ in use.stack:
        product = jax.vmap(product, in_axes=1)
    return product(x, g)


def _tied(uses, found):
    # (lookup, attend) of one table, each with what was found.
    for table, one in zip(uses, found, strict=True):
        for head, two in zip(uses, found, strict=True):
            both = isinstance(table.rule, Lookup) and isinstance(head.rule, Attend)
            if both and table.path == head.path:
                yield (table, one), (head, two)
