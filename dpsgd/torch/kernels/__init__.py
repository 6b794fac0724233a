"""
Fused Triton kernels for per-example norms and clipped sums, each with a plain PyTorch twin.

Legend: X [P, T, d] what went into a layer, G [P, T, p] = dL/dy; example i's weight gradient is
GᵢᵀXᵢ [p, d]; s bytes per number. Any sizes, any strides (transposed views are not copied).

A function runs its kernel on CUDA tensors (of the current device, compute capability ≥ 8.0) where
Triton is installed, and its ``*_plain`` twin anywhere else; both may be called inside
``torch.compile(fullgraph=True)``. Nothing is differentiable. All sums are without atomics: the same
input gives the same bits on one device, as long as tuning (once for each T, d, p and dtype) chose
the same tile.

Matrix products accumulate in float32. Float32 inputs are multiplied in TF32 where torch's own
products are (``torch.set_float32_matmul_precision("high")``), else exactly.
"""

import importlib.util

import torch
from torch import Tensor

from dpsgd.torch.kernels.plain import (
    gram_squares_plain,
    weight_gradient_squares_plain,
    weighted_rows_plain,
)

__all__ = [
    "available",
    "gram_squares",
    "gram_squares_plain",
    "weight_gradient_squares",
    "weight_gradient_squares_plain",
    "weighted_rows",
    "weighted_rows_plain",
]

_TRITON = importlib.util.find_spec("triton") is not None and torch.version.hip is None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(t: Tensor) -> bool:
    """Whether ``t`` goes to a kernel: on a CUDA device, of 16 or 32 bits, Triton installed."""
    return _TRITON and t.is_cuda and t.dtype in _DTYPES


def gram_squares(X: Tensor, G: Tensor, Xbias: bool = False) -> Tensor:
    """
    ‖GᵢᵀXᵢ‖² = ⟨XᵢXᵢᵀ, GᵢGᵢᵀ⟩ of every example i, without the T×T matrices.

    With ``Xbias`` the squared norm of the bias gradient Σ_t G_it is in it, at no cost: a column of
    ones beside Xᵢ adds 1 to every number of XᵢXᵢᵀ.

    The Gram matrices are symmetric, so about half of each is computed: T(T + B)(d + p) FLOPs per
    example with tiles of B ≤ 128, instead of 2T²(d + p). Memory: PT(d + p)s bytes are read (tiles
    beyond an example's first come from the L2 cache), 4 bytes per tile written; two products and
    their inner product move at least 4PT²s more. Worth it where T(d + p) < 2pd; the longer T, the
    more the traffic that is saved counts.

    Args:
        X: [P, T, d]; float32, bfloat16 or float16.
        G: [P, T, p]; of the same dtype.
        Xbias: whether the layer has a trained bias, added to every position.

    Returns:
        [P], float32 (float64 for float64, which has no kernel); never below 0.
    """
    _check(X, G)
    if not available(X):
        return gram_squares_plain(X, G, Xbias)
    from dpsgd.torch.kernels import gram

    return gram.squares(X, G, Xbias)


def weight_gradient_squares(
    X: Tensor, G: Tensor, out: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """
    GᵢᵀXᵢ of every example i into ``out``, and its squared norm; without ``out`` the norm alone.

    2PTpd FLOPs, a batched product's, and 2Ppd for the norms. Memory: PT(d + p)s bytes are read and
    Ppds written. The norm is taken while a tile is still in registers, which saves reading Ppds
    back: of what ``keep`` moves (write, read for the norm, read for the sum) one third. Without
    ``out`` nothing but 4 bytes per tile is written: build, norm, drop needs no memory.

    Args:
        X: [P, T, d]; float32, bfloat16 or float16.
        G: [P, T, p]; of the same dtype.
        out: [P, p, d], of any strides and any of these dtypes; or None.

    Returns:
        ``out``, and [P], float32 (float64 for float64): the squared norms of what ``out`` holds
        after rounding to its dtype, so that C bounds what will be summed.
    """
    _check(X, G)
    if out is not None and out.shape != (len(X), G.shape[2], X.shape[2]):
        raise ValueError(
            f"out is {tuple(out.shape)}; it must be [P, p, d] = "
            f"{(len(X), G.shape[2], X.shape[2])} for X {tuple(X.shape)} and G {tuple(G.shape)}"
        )
    if not available(X):
        return weight_gradient_squares_plain(X, G, out)
    from dpsgd.torch.kernels import weight_gradient

    if out is None:
        return None, weight_gradient.squares(X, G)
    return out, weight_gradient.squares_out(X, G, out)


def weighted_rows(rows: Tensor, factors: Tensor, into: Tensor) -> Tensor:
    """
    Add Σᵢ factorsᵢ · rowsᵢ to ``into``, in place, over the rows whose factor is finite and not 0.

    The others are left out by select: what they hold (NaN, infinities) cannot reach the sum.

    2Pn FLOPs; Pns bytes are read, once, less those of rows left out, and 8n for ``into``. That is
    what ``addmv`` moves for float32. For 16-bit rows summed in float32 it is a fifth: ``addmv``
    wants one dtype, so the rows are widened first (read 2, write 4, read 4 bytes per number).

    Args:
        rows: [P, n]; float32, bfloat16 or float16.
        factors: [P].
        into: [n]; float32.

    Returns:
        ``into``.
    """
    if factors.shape != rows.shape[:1] or into.shape != rows.shape[1:]:
        raise ValueError(
            f"rows must be [P, n], factors [P] and into [n]; they are {tuple(rows.shape)}, "
            f"{tuple(factors.shape)} and {tuple(into.shape)}: flatten them first"
        )
    if not (available(rows) and available(into)):
        return weighted_rows_plain(rows, factors, into)
    from dpsgd.torch.kernels import rows as kernel

    kernel.add(rows, factors, into)
    return into


def _check(X: Tensor, G: Tensor) -> None:
    if X.ndim != 3 or G.ndim != 3 or X.shape[:2] != G.shape[:2] or X.dtype != G.dtype:
        raise ValueError(
            "X must be [P, T, d] and G [P, T, p], of one dtype; they are "
            f"{tuple(X.shape)} {X.dtype} and {tuple(G.shape)} {G.dtype}: reshape or cast them first"
        )
