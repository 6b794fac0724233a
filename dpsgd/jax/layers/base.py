"""
What a rule has to say about one use of one layer, for one example at a time.

x is what the layer got, g = dL/dy what came back to its output. Everything here is written for one
example and batched by ``jax.vmap``, except :meth:`Rule.weighted`, which sees all P at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd import cost
from dpsgd.jax.rows import squared

Found = dict[str, jax.Array]


def transposed(a: jax.Array) -> jax.Array:
    """aᵀ, laid out in memory: XLA's products with a transposed operand are slow on CPUs."""
    return jax.lax.optimization_barrier(a.T) if jax.default_backend() == "cpu" else a.T


@jax.custom_batching.custom_vmap
def column_sums(a: jax.Array) -> jax.Array:
    """
    Σ_T of [T, p]; by example it is a product with ones.

    XLA's own sums over an inner axis take a CPU several times as long.
    """
    return a.sum(0)


@column_sums.def_vmap
def _column_sums(size: int, batched: list[bool], a: jax.Array) -> tuple[jax.Array, bool]:
    ones = jnp.ones((size, a.shape[1]), a.dtype)
    wide = jnp.promote_types(a.dtype, jnp.float32)
    found = jnp.einsum("et,etp->ep", ones, a, preferred_element_type=wide)
    return found.astype(a.dtype), batched[0]


class Rule:
    """
    A layer whose weight gradient is XᵀG, X: [groups, T, d], G: [groups, T, p].

    Args:
        module: the layer; only its configuration is read.
        trained: names of its own trained parameters.
    """

    ways: tuple[str, ...] = cost.WAYS
    weight = "kernel"
    pulls = False  # whether ``pull`` is there
    need_outputs: tuple[str, ...] = ()  # the ways that need y

    def __init__(self, module: Any, trained: list[str]) -> None:
        self.shape = self.shape_of(module)
        self.trained = trained

    @classmethod
    def takes(cls, module: Any) -> bool:
        """Whether the rule covers all options of this module."""
        raise NotImplementedError

    @staticmethod
    def shape_of(module: Any) -> tuple[int, ...]:
        """The weight's shape in one layer; the stored one has more axes in a stack of layers."""
        raise NotImplementedError

    def matrices(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(X, G)."""
        raise NotImplementedError

    def sides(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """L and R, where LᵀR is the weight's gradient, or what :meth:`pulled` takes for it."""
        return self.matrices(x, g)

    def output(self, layer: Callable, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """``layer(x, …)``, perhaps in a shape that XLA likes better."""
        return layer(x, *args, **kwargs)

    def shaped(self, product: jax.Array) -> jax.Array:
        """LᵀR [groups, d, p] as the weight."""
        return product.reshape(self.shape)

    def bias(self, g: jax.Array) -> jax.Array:
        """Σ_T g [p], the gradient of the bias."""
        return column_sums(g.reshape(-1, g.shape[-1]))

    def found(self, x: jax.Array, g: jax.Array, way: str, *more: jax.Array, held: bool) -> Found:
        """
        What the backward pass hands out for one example.

        Args:
            x: what the layer got.
            g: what came back to its output.
            way: ``keep`` hands out the gradients; ``gram`` and ``rebuild`` their squared norm;
                ``none`` neither.
            *more: the weight; and y, in the ways that need it.
            held: hand out x and g, too, unless the gradients are kept.
        """
        found: Found = {}
        if self.weight in self.trained:
            if way == "keep":
                found["weight"] = self.gradient(x, g)
            elif held:
                found["x"] = x if jnp.issubdtype(x.dtype, jnp.floating) else self.ids(x)
                found["g"] = g
            if way in ("gram", "rebuild"):
                found["squared"] = self.squared(x, g, way)
        if "bias" in self.trained:
            bias = self.bias(g)
            if held or way == "keep":
                found["bias"] = bias
            else:
                found["squared"] = found.get("squared", 0.0) + squared(bias)
        return found

    def pull(self, weight: jax.Array, g: jax.Array) -> jax.Array:
        """dL/dx from g, by a faster product than autodiff's."""
        raise NotImplementedError

    def pulled(self, weight: jax.Array, total: jax.Array) -> jax.Array:
        """A sum of what the rule takes for gradients of the weight, as a sum of gradients."""
        return total

    def ids(self, x: jax.Array) -> jax.Array:
        """Integers as floats, the only thing that a backward pass can hand out."""
        raise NotImplementedError

    def gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """The weight's gradient."""
        left, right = self.sides(x, g)
        return self.shaped(jnp.einsum("ntd,ntp->ndp", left, right))

    def squared(self, x: jax.Array, g: jax.Array, way: str) -> jax.Array:
        """Squared norm of the weight's gradient: ⟨XXᵀ, GGᵀ⟩, or from the gradient itself."""
        if way == "rebuild":
            return squared(self.gradient(x, g))
        inputs, outputs = self.matrices(x, g)
        wide = jnp.promote_types(g.dtype, jnp.float32)

        def gram(a):
            return jnp.einsum("ntd,nsd->nts", a, a, preferred_element_type=wide)

        return jnp.maximum((gram(inputs) * gram(outputs)).sum(), 0)

    def weighted(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Σ_p of the weight's gradients, for x and g with a leading P; one large product."""
        left, right = jax.vmap(self.sides)(x, g)
        wide = jnp.promote_types(g.dtype, jnp.float32)
        if left.shape[1] > 1:
            product = jnp.einsum("entd,entp->ndp", left, right, preferred_element_type=wide)
            return self.shaped(product)
        product = jax.lax.dot_general(
            left.reshape(-1, left.shape[-1]),
            right.reshape(-1, right.shape[-1]),
            (((0,), (0,)), ((), ())),
            preferred_element_type=wide,
        )
        return self.shaped(product[None])

    def layer(
        self, name: str, kind: str, examples: int, stacked: int, x: Any, g: Any
    ) -> cost.Layer:
        """Its sizes, for the plan; ``x`` and ``g`` are abstract."""
        groups, positions, inputs, outputs = 1, 1, 1, 1
        ways: tuple[str, ...] = ("keep",)
        if self.weight in self.trained:
            ways = self.ways
            inner, outer = jax.eval_shape(self.matrices, x, g)
            groups, positions, inputs = inner.shape
            outputs = outer.shape[-1]
        return cost.Layer(
            name=name,
            kind=kind,
            examples=examples,
            positions=positions,
            inputs=inputs,
            outputs=outputs,
            groups=groups * stacked,
            itemsize=g.dtype.itemsize,
            ways=ways,
        )


def default(module: nnx.Module, **expected: Any) -> bool:
    """Whether the named options of ``module`` are as given, and its types are promoted as usual."""
    expected["promote_dtype"] = nnx.nn.dtypes.promote_dtype
    return all(getattr(module, name) is value for name, value in expected.items())
