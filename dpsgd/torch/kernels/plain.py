"""The kernels' plain PyTorch twins: the same signatures and results, on any device and dtype."""

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def gram_squares_plain(X: Tensor, G: Tensor, Xbias: bool = False) -> Tensor:
    """``gram_squares`` through two batches of T×T matrices."""
    X, G = _wide(X), _wide(G)
    pairs = torch.bmm(X, X.mT)
    if Xbias:
        pairs = pairs + 1
    return (pairs * torch.bmm(G, G.mT)).sum((1, 2)).clamp(min=0)


def weight_gradient_squares_plain(
    X: Tensor, G: Tensor, out: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """``weight_gradient_squares`` through a batched product that is read again."""
    if out is None:
        return None, torch.bmm(_wide(G).mT, _wide(X)).square().sum((1, 2))
    out.copy_(torch.bmm(G.mT, X))
    return out, _wide(out).square().sum((1, 2))


def weighted_rows_plain(rows: Tensor, factors: Tensor, into: Tensor) -> Tensor:
    """``weighted_rows`` through a copy of the rows in which the unused ones are zeros."""
    used = factors.isfinite() & (factors != 0)
    rows = torch.where(used[:, None], rows, 0).to(into.dtype)
    return into.addmv_(rows.t(), torch.where(used, factors, 0).to(into.dtype))
