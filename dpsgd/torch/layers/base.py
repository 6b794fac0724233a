"""What a rule has to say about its layer, and the layers that are a product of two matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dpsgd import cost
from dpsgd.torch import kernels


@dataclass(kw_only=True)
class Seen:
    """
    One call of a layer: ``x`` that it got, ``g`` = dL/dy that came back, ``y`` where it is needed.

    All have the module's own leading axis, which is P = ``examples`` or a multiple of it.
    """

    x: Tensor
    g: Tensor
    examples: int
    y: Tensor | None = None


def fold(t: Tensor, examples: int) -> Tensor:
    """[P·k, …] to [P, k, …]: windows or tokens that were moved into the leading axis."""
    return t.reshape(examples, -1, *t.shape[1:])


def wide(t: Tensor) -> torch.dtype:
    """The dtype that sums are accumulated in: at least float32."""
    return torch.promote_types(t.dtype, torch.float32)


def tracing() -> bool:
    """Whether operations are being recorded into a graph, which must not depend on values."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def square_rows(t: Tensor) -> Tensor:
    """Squared norms of the rows, float32 [P]; accumulated in float32 whatever the dtype."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=wide(t)).square()


def dot_channels(
    g: Tensor, x: Tensor, mean: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    (Σ g·(x-mean)·scale, Σ g), each [P, C], over the positions of [P, C, …] in one pass.

    PyTorch's group norm has this reduction for its weight; all examples pass as channels of one.
    ``mean`` and ``scale`` [P, groups] are 0 and 1 if not given.
    """
    g, x = (t.to(wide(g)).contiguous() for t in (g, x))
    rows, channels = g.shape[:2]
    shape = (1, rows * channels, g[0, 0].numel())
    if mean is None or scale is None:
        mean, scale = g.new_zeros(rows), g.new_ones(rows)
    found = torch.ops.aten.native_group_norm_backward(
        g.view(shape),
        x.view(shape),
        mean.to(g.dtype).view(1, -1),
        scale.to(g.dtype).view(1, -1),
        g.new_ones(rows * channels),
        *shape,
        mean.numel(),
        (False, True, True),
    )
    return found[1].view(rows, channels), found[2].view(rows, channels)


class Rule:
    """One module and its own trained parameters."""

    ways: tuple[str, ...] = ("keep",)
    note = ""
    needs_output = False
    inner: str | None = None  # the submodule whose input is the y of this rule

    def __init__(self, name: str, module: nn.Module, trained: list[str]) -> None:
        self.name, self.module, self.trained = name, module, trained
        self.names = [f"{name}.{own}" if name else own for own in trained]

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether the rule covers all options of this module."""
        return True

    def start(self) -> None:
        """Compute what one run needs more than once."""

    def gradients(self, seen: Seen) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        raise NotImplementedError

    def layer(self, seen: Seen) -> cost.Layer:
        """Its sizes, for the plan."""
        numbers = sum(getattr(self.module, n).numel() for n in self.trained)
        return cost.Layer(
            name=self.name,
            kind=type(self.module).__name__ + self.note,
            examples=seen.examples,
            outputs=numbers,
            itemsize=seen.g.element_size(),
            ways=self.ways,
        )

    def kept(self, seen: Seen) -> tuple[list[Tensor], list[Tensor]]:
        """What :meth:`pulled` makes the gradients of, and the gradients' squared norms [P]."""
        rows = self.gradients(seen)
        return rows, [square_rows(r) for r in rows]

    def pulled(self, own: str, rows: Tensor) -> Tensor:
        """The gradient of parameter ``own`` from what was kept, or from a weighted sum of it."""
        return rows

    def add_kept(self, own: str, rows: Tensor, factors: Tensor, view: Tensor) -> None:
        """``view`` += Σ_p factors_p · gradient_p, from what was kept."""
        if type(self).pulled is Rule.pulled:
            add_rows(view, rows, factors)
        else:
            total = torch.zeros_like(view)
            add_rows(total, rows, factors)
            view.add_(self.pulled(own, total))

    def squared(self, seen: Seen, way: str) -> Tensor:
        """Squared norms [P] of ``gradients``, without keeping them."""
        return sum(map(square_rows, self.gradients(seen)))

    def add(self, seen: Seen, factors: Tensor, into: list[Tensor]) -> None:
        """Add Σ_p factors_p · gradient_p to each of ``into``, in place."""
        for view, rows in zip(into, self.gradients(seen), strict=True):
            add_rows(view, rows, factors)


def add_rows(view: Tensor, rows: Tensor, factors: Tensor) -> None:
    """``view`` += Σ_p factors_p · rows_p."""
    flat = rows.reshape(len(rows), -1)
    view.view(-1).addmv_(flat.t().to(view.dtype), factors.to(view.dtype))


def scale_rows(t: Tensor, factors: Tensor) -> Tensor:
    """``t`` [P·k, …], each example times its factor, which rounding must not raise above C/‖g‖."""
    rows = factors.repeat_interleave(len(t) // len(factors)).view(-1, *[1] * (t.ndim - 1))
    if factors.dtype == t.dtype or tracing():
        return (t * rows).to(t.dtype)
    return torch.mul(t, rows, out=torch.empty_like(t))  # on a GPU: no wide copy


class Product(Rule):
    """
    A layer whose weight gradient is GᵀX, G: [P·groups, T, p], X: [P·groups, T, d].

    A subclass gives the matrices, and how [groups·p, d] becomes its weight.
    """

    ways = cost.WAYS
    groups = 1

    def matrices(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(X, G)."""
        raise NotImplementedError

    def shaped(self, weight: Tensor) -> Tensor:
        """[…, groups·p, d] as the module's weight."""
        return weight.reshape(*weight.shape[:-2], *self.module.weight.shape)

    def bias(self, g: Tensor, examples: int) -> Tensor:
        """[P, p·groups]."""
        raise NotImplementedError

    def sizes(self, seen: Seen) -> tuple[int, int, int]:
        """(T, d, p)."""
        inputs, outputs = self.matrices(seen)
        return inputs.shape[1], inputs.shape[2], outputs.shape[2]

    def layer(self, seen: Seen) -> cost.Layer:
        """Its sizes, for the plan."""
        positions, inputs, outputs = self.sizes(seen)
        return cost.Layer(
            name=self.name,
            kind=type(self.module).__name__,
            examples=seen.examples,
            positions=positions,
            inputs=inputs,
            outputs=outputs,
            groups=self.groups,
            itemsize=seen.g.element_size(),
            ways=self.ways if "weight" in self.trained else ("keep",),
        )

    def gradients(self, seen: Seen) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        return [
            self.pulled(name, self.weights(seen))
            if name == "weight"
            else self.bias(seen.g, seen.examples)
            for name in self.trained
        ]

    def kept(self, seen: Seen) -> tuple[list[Tensor], list[Tensor]]:
        """The product as it is, and norms in closed form where there is one."""
        rows, squares = [], []
        for name in self.trained:
            if name == "weight":
                rows.append(self.weights(seen))
                squares.append(self.square_weights(rows[-1], seen))
            else:
                rows.append(self.bias(seen.g, seen.examples))
                squares.append(square_rows(rows[-1]))
        return rows, squares

    def weights(self, seen: Seen) -> Tensor:
        """[P, *weight.shape], before :meth:`pulled`."""
        inputs, outputs = self.matrices(seen)
        rows = torch.bmm(outputs.mT, inputs)
        return self.shaped(rows.view(seen.examples, -1, rows.shape[-1]))

    def square_weights(self, rows: Tensor, seen: Seen) -> Tensor:
        """Squared norms [P] of the gradients that :meth:`weights` stand for."""
        return square_rows(rows)

    def squared(self, seen: Seen, way: str) -> Tensor:
        """Squared norms [P], by Gram matrices or by gradients that are dropped at once."""
        total = 0.0
        if "weight" in self.trained:
            total = self.rebuilt(seen) if way == "rebuild" else self.gram(seen)
        if "bias" in self.trained:
            total = total + square_rows(self.bias(seen.g, seen.examples))
        return total

    def rebuilt(self, seen: Seen) -> Tensor:
        """‖GᵀX‖² [P]; in a kernel that keeps no gradient, or one example after the other."""
        if seen.g.is_cuda and type(self).square_weights is Product.square_weights:
            inputs, outputs = self.matrices(seen)
            if kernels.available(inputs):
                squares = kernels.weight_gradient_squares(inputs, outputs)[1]
                return squares.view(seen.examples, -1).sum(1)
        return torch.cat([self._one_squared(seen, i) for i in range(seen.examples)])

    def _one_squared(self, seen: Seen, number: int) -> Tensor:
        def own(t):
            each = len(t) // seen.examples
            return t[number * each : (number + 1) * each]

        y = None if seen.y is None else own(seen.y)
        one = Seen(x=own(seen.x), g=own(seen.g), y=y, examples=1)

        return self.square_weights(self.weights(one), one)

    def gram(self, seen: Seen) -> Tensor:
        """‖GᵀX‖² = ⟨XXᵀ, GGᵀ⟩ [P], accumulated in float32."""
        return (
            kernels.gram_squares(*self.matrices(seen)).view(seen.examples, -1).sum(1).clamp(min=0)
        )

    def add(self, seen: Seen, factors: Tensor, into: list[Tensor]) -> None:
        """Add the weighted sum, by one product over all examples and positions."""
        views = dict(zip(self.trained, into, strict=True))
        scaled = Seen(x=seen.x, g=scale_rows(seen.g, factors), examples=seen.examples)
        if "weight" in views:
            self.add_product(scaled, views["weight"])
        if "bias" in views:
            views["bias"].add_(self.bias(scaled.g, seen.examples).sum(0))

    def add_product(self, seen: Seen, view: Tensor) -> None:
        """``view`` += the weight gradient of the whole batch."""
        raise NotImplementedError
