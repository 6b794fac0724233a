"""What a rule has to say about its layer, and the layers that are a product of two matrices."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpsgd import cost


def fold(t: Tensor, examples: int) -> Tensor:
    """[P·k, …] to [P, k, …]: windows or tokens that were moved into the leading axis."""
    return t.reshape(examples, -1, *t.shape[1:])


def square_rows(t: Tensor) -> Tensor:
    """Squared norms of the rows, float32 [P]; accumulated in float32 whatever the dtype."""
    return torch.linalg.vector_norm(
        t.flatten(1), dim=1, dtype=torch.promote_types(t.dtype, torch.float32)
    ).square()


Buffer = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Rule:
    """
    One module and its own trained parameters.

    ``x`` is what the module got, ``g`` = dL/dy what came back to its output, both with the leading
    axis of the module. ``examples`` is P.
    """

    ways: tuple[str, ...] = ("keep",)
    note = ""

    def __init__(self, name: str, module: nn.Module, trained: list[str]) -> None:
        self.name, self.module, self.trained = name, module, trained
        self.names = [f"{name}.{own}" if name else own for own in trained]

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether the rule covers all options of this module."""
        return True

    def gradients(self, x: Tensor, g: Tensor, examples: int) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        raise NotImplementedError

    def layer(self, x: Tensor, g: Tensor, examples: int) -> cost.Layer:
        """Its sizes, for the plan."""
        numbers = sum(getattr(self.module, n).numel() for n in self.trained)
        return cost.Layer(
            name=self.name,
            kind=type(self.module).__name__ + self.note,
            examples=examples,
            positions=max(1, g.numel() // (examples * g.shape[-1])),
            inputs=1,
            outputs=numbers,
            itemsize=g.element_size(),
            ways=self.ways,
        )

    def kept(
        self, x: Tensor, g: Tensor, examples: int, buffer: Buffer
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``gradients``, in memory from ``buffer`` where that pays; and the squared norms [P]."""
        rows = self.gradients(x, g, examples)
        return rows, [square_rows(r) for r in rows]

    def squared(self, x: Tensor, g: Tensor, examples: int, way: str) -> Tensor:
        """Squared norms [P] of ``gradients``, without keeping them."""
        return sum(map(square_rows, self.gradients(x, g, examples)))

    def add(self, x: Tensor, g: Tensor, examples: int, factors: Tensor, into: list[Tensor]) -> None:
        """Add Σ_p factors_p · gradient_p to each of ``into``, in place."""
        for view, rows in zip(into, self.gradients(x, g, examples), strict=True):
            add_rows(view, rows, factors)


def add_rows(view: Tensor, rows: Tensor, factors: Tensor) -> None:
    """``view`` += Σ_p factors_p · rows_p."""
    flat = rows.reshape(len(rows), -1)
    view.view(-1).addmv_(flat.t().to(view.dtype), factors.to(view.dtype))


class Product(Rule):
    """
    A layer whose weight gradient is GᵀX, G: [P·groups, T, p], X: [P·groups, T, d].

    A subclass gives the matrices, and how [groups·p, d] becomes its weight.
    """

    ways = cost.WAYS
    groups = 1

    def matrices(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """(X, G)."""
        raise NotImplementedError

    def shaped(self, weight: Tensor) -> Tensor:
        """[…, groups·p, d] as the module's weight."""
        return weight.reshape(*weight.shape[:-2], *self.module.weight.shape)

    def bias(self, g: Tensor, examples: int) -> Tensor:
        """[P, p·groups]."""
        raise NotImplementedError

    def pulled(self, weight: Tensor) -> Tensor:
        """Gradient of the parameter, from that of the weight that the product sees."""
        return weight

    def layer(self, x: Tensor, g: Tensor, examples: int) -> cost.Layer:
        """Its sizes, for the plan."""
        inputs, outputs = self.matrices(x, g, examples)
        return cost.Layer(
            name=self.name,
            kind=type(self.module).__name__,
            examples=examples,
            positions=inputs.shape[1],
            inputs=inputs.shape[2],
            outputs=outputs.shape[2],
            groups=self.groups,
            itemsize=g.element_size(),
            ways=self.ways if "weight" in self.trained else ("keep",),
        )

    def gradients(self, x: Tensor, g: Tensor, examples: int) -> list[Tensor]:
        """One [P, *shape] for each trained parameter."""
        return [
            self._weights(x, g, examples) if name == "weight" else self.bias(g, examples)
            for name in self.trained
        ]

    def kept(self, x, g, examples, buffer):
        """The product goes into memory that is there already: new pages would cost a write each."""
        if torch.compiler.is_compiling() or type(self).pulled is not Product.pulled:
            return super().kept(x, g, examples, buffer)
        rows, squares = [], []
        for name in self.trained:
            if name == "weight":
                inputs, outputs = self.matrices(x, g, examples)
                out = buffer((len(inputs), outputs.shape[2], inputs.shape[2]), g.dtype)
                torch.bmm(outputs.mT, inputs, out=out)
                squares.append(square_rows(out).view(examples, -1).sum(1))
                rows.append(self.shaped(out.view(examples, -1, out.shape[-1])))
            else:
                rows.append(self.bias(g, examples))
                squares.append(square_rows(rows[-1]))
        return rows, squares

    def _weights(self, x, g, examples):
        inputs, outputs = self.matrices(x, g, examples)
        rows = torch.bmm(outputs.mT, inputs)
        return self.pulled(self.shaped(rows.view(examples, -1, rows.shape[-1])))

    def squared(self, x: Tensor, g: Tensor, examples: int, way: str) -> Tensor:
        """Squared norms [P], by Gram matrices or by gradients that are dropped at once."""
        total = 0.0
        if "weight" in self.trained:
            inputs, outputs = self.matrices(x, g, examples)
            if way == "gram":
                total = self.gram(inputs, outputs, x, g, examples)
            else:
                each = self.groups
                total = torch.stack(
                    [
                        self.one_squared(inputs[i : i + each], outputs[i : i + each])
                        for i in range(0, len(inputs), each)
                    ]
                )
        if "bias" in self.trained:
            total = total + square_rows(self.bias(g, examples))
        return total

    def one_squared(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Squared norm of one example's gradient; [groups, T, d] and [groups, T, p]."""
        rows = torch.bmm(outputs.mT, inputs)
        return square_rows(self.pulled(self.shaped(rows.flatten(0, 1)))[None])[0]

    def gram(self, inputs: Tensor, outputs: Tensor, x, g, examples: int) -> Tensor:
        """‖GᵀX‖² = ⟨XXᵀ, GGᵀ⟩ [P], accumulated in float32."""
        wide = torch.promote_types(inputs.dtype, torch.float32)
        pairs = torch.bmm(inputs, inputs.mT).to(wide) * torch.bmm(outputs, outputs.mT).to(wide)
        return pairs.view(examples, -1).sum(1).clamp(min=0)

    def add(self, x, g, examples, factors, into) -> None:
        """Add the weighted sum, by one product over all examples and positions."""
        views = dict(zip(self.trained, into, strict=True))
        shape = (-1, *[1] * (g.ndim - 1))
        scaled = g * factors.to(g.dtype).repeat_interleave(len(g) // examples).view(shape)
        if "weight" in views:
            inputs, outputs = self.matrices(x, scaled, examples)
            self.add_product(inputs, outputs, examples, views["weight"])
        if "bias" in views:
            views["bias"].add_(self.bias(scaled, examples).sum(0))

    def add_product(self, inputs, outputs, examples, view) -> None:
        """``view`` += the weight gradient of the whole batch."""
        total = torch.bmm(outputs.mT, inputs).view(examples, -1, inputs.shape[-1]).sum(0)
        view.add_(self.pulled(self.shaped(total)))
