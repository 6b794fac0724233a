"""Embeddings: one example's gradient is g, row by row, at the ids it looked up."""

import torch
from torch import Tensor, nn

from dpsgd import cost
from dpsgd.torch.layers.base import Rule, Seen, scale_rows, wide


class Embedding(Rule):
    """``nn.Embedding``; never one dense table per example."""

    ways = ("gram",)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Dense, plain lookups."""
        return not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None)

    def _rows(self, seen: Seen) -> tuple[Tensor, Tensor]:
        # (ids [P, T], g [P, T, d])
        examples = seen.examples
        ids, g = seen.x.reshape(examples, -1), seen.g.reshape(examples, -1, seen.g.shape[-1])
        if self.module.padding_idx is not None:
            g = torch.where((ids == self.module.padding_idx)[..., None], torch.zeros_like(g), g)
        return ids, g

    def layer(self, seen: Seen) -> cost.Layer:
        """Its sizes, for the plan: a product with one-hot rows that are never built."""
        return cost.Layer(
            name=self.name,
            kind=type(self.module).__name__,
            examples=seen.examples,
            positions=seen.x.numel() // seen.examples,
            inputs=1,
            outputs=seen.g.shape[-1],
            itemsize=seen.g.element_size(),
            ways=self.ways,
        )

    def gradients(self, seen: Seen) -> list[Tensor]:
        """One dense [P, V, d]: only where two layers share the table."""
        ids, g = self._rows(seen)
        table = g.new_zeros(seen.examples, *self.module.weight.shape)
        return [table.scatter_add_(1, ids[..., None].expand_as(g), g)]

    def squared(self, seen: Seen, way: str) -> Tensor:
        """Σ_{t,s} [id_t = id_s] ⟨g_t, g_s⟩."""
        ids, g = self._rows(seen)
        g = g.to(wide(g))
        same = (ids[:, :, None] == ids[:, None, :]).to(g.dtype)
        return (torch.bmm(same, g) * g).sum((1, 2)).clamp(min=0)

    def crossed(self, seen: Seen, inputs: Tensor, outputs: Tensor) -> Tensor:
        """
        2⟨this gradient, that of a linear layer with the same table⟩ [P].

        Σ_{t,s} G_s[id_t] ⟨h_s, g_t⟩, with h [P, S, d] and G [P, S, V] of the linear layer.
        """
        ids, g = self._rows(seen)
        looked = outputs.mT.gather(1, ids[..., None].expand(-1, -1, outputs.shape[1]))
        dtype = wide(g)
        products = torch.bmm(g.to(dtype), inputs.mT.to(dtype))
        return 2 * (looked.to(dtype) * products).sum((1, 2))

    def add(self, seen: Seen, factors: Tensor, into: list[Tensor]) -> None:
        """One scatter over all examples."""
        ids, g = self._rows(seen)
        scaled = scale_rows(g, factors).flatten(0, 1).to(into[0].dtype)
        into[0].index_add_(0, ids.flatten(), scaled)
