"""Linear layers: y = x Wᵀ + b, for x [P·k, …, d]."""

from torch import Tensor

from dpsgd.torch.layers.base import Product, fold


class Linear(Product):
    """``nn.Linear``: weight [p, d]."""

    def matrices(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """(X [P, T, d], G [P, T, p])."""
        return (
            x.reshape(examples, -1, x.shape[-1]).to(g.dtype),
            g.reshape(examples, -1, g.shape[-1]),
        )

    def bias(self, g: Tensor, examples: int) -> Tensor:
        """[P, p]."""
        return fold(g, examples).flatten(1, -2).sum(1)

    def add_product(self, inputs: Tensor, outputs: Tensor, examples: int, view: Tensor) -> None:
        """One matrix product over all examples, added in place."""
        view.addmm_(outputs.flatten(0, 1).t().to(view.dtype), inputs.flatten(0, 1).to(view.dtype))


class TransposedLinear(Linear):
    """Hugging Face's ``Conv1D``, a linear layer with weight [d, p]."""

    def shaped(self, weight: Tensor) -> Tensor:
        """[…, p, d] as [d, p]."""
        return weight.mT

    def add_product(self, inputs: Tensor, outputs: Tensor, examples: int, view: Tensor) -> None:
        """One matrix product over all examples, added in place."""
        super().add_product(outputs, inputs, examples, view)
