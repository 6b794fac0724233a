"""Linear layers: y = x Wᵀ + b, for x [P·k, …, d]."""

from torch import Tensor

from dpsgd.torch.layers.base import Product, Seen, fold


class Linear(Product):
    """``nn.Linear``: weight [p, d]."""

    def matrices(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(X [P, T, d], G [P, T, p])."""
        x, g, examples = seen.x, seen.g, seen.examples
        return (
            x.reshape(examples, -1, x.shape[-1]).to(g.dtype),
            g.reshape(examples, -1, g.shape[-1]),
        )

    def bias(self, g: Tensor, examples: int) -> Tensor:
        """[P, p]."""
        return fold(g, examples).flatten(1, -2).sum(1)

    def add_product(self, seen: Seen, view: Tensor) -> None:
        """One matrix product over all examples, added in place."""
        inputs, outputs = (t.flatten(0, 1).to(view.dtype) for t in self.matrices(seen))
        view.addmm_(outputs.t(), inputs)


class TransposedLinear(Linear):
    """Hugging Face's ``Conv1D``, a linear layer with weight [d, p]."""

    def shaped(self, weight: Tensor) -> Tensor:
        """[…, p, d] as [d, p]."""
        return weight.mT

    def add_product(self, seen: Seen, view: Tensor) -> None:
        """One matrix product over all examples, added in place."""
        super().add_product(seen, view.t())
