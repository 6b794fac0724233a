"""
‖GᵀX‖² = ⟨XXᵀ, GGᵀ⟩ for every example, the Gram matrices never leaving the registers.

A program holds one BLOCK×BLOCK tile of both Gram matrices, multiplies them and writes one number.
Both are symmetric: only tiles with row block ≤ column block are computed, those off the diagonal
count twice. ``gram_squares`` of the package says what is moved and computed.

Sources: arXiv:2110.05679 (norms by Gram matrices); the layout of tiles is that of any SYRK.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dpsgd.torch.kernels.common import configs, exact, smallest, unfit
from dpsgd.torch.kernels.plain import gram_squares_plain

SIZES = ("BLOCK", "DEPTH")
CONFIGS = configs(
    SIZES, (32, 64, 4, 3), (64, 32, 4, 4), (64, 64, 4, 3), (128, 32, 8, 4), (128, 64, 8, 3)
)
# Float32's own products unroll the depth, in registers: a deep tile spills.
CONFIGS_EXACT = configs(
    SIZES,
    (32, 16, 4, 4),
    (64, 16, 4, 4),
    (64, 16, 8, 4),
    (64, 32, 8, 3),
    (128, 16, 8, 2),
    (128, 16, 16, 2),
)


@triton.jit
def _tile(
    rows, row, column, T, width, per_position, per_number, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Tile (row, column) of rows·rowsᵀ, rows being [T, width]; zero beyond T."""
    position = tl.arange(0, BLOCK)
    number = tl.arange(0, DEPTH)
    # Block starts in 64 bits, what is inside a block in 32: large tensors, few registers.
    each = position[:, None] * per_position + number[None, :] * per_number
    left = rows + (row * BLOCK).to(tl.int64) * per_position + each
    right = rows + (column * BLOCK).to(tl.int64) * per_position + each
    in_left = (position < T - row * BLOCK)[:, None]
    in_right = (position < T - column * BLOCK)[:, None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, DEPTH):
        inside = (number < width - start)[None, :]
        a = tl.load(left, mask=in_left & inside, other=0.0)
        b = tl.load(right, mask=in_right & inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        left += DEPTH * per_number
        right += DEPTH * per_number
    return total


@triton.jit
def kernel(
    X, G, parts, T, d, p, x_example, x_position, x_number, g_example, g_position, g_number, slots,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of one example's Gram matrices; its sum goes to parts[example, tile]."""
    blocks = tl.cdiv(T, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    example = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    # tile = column (column + 1) / 2 + row, row ≤ column; the root may be off by one.
    column = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > tile, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= tile, column + 1, column)
    row = tile - column * (column + 1) // 2

    pairs = _tile(
        X + example * x_example, row, column, T, d, x_position, x_number, PRECISION, BLOCK, DEPTH
    )
    if BIAS:
        pairs += 1.0
    pairs *= _tile(
        G + example * g_example, row, column, T, p, g_position, g_number, PRECISION, BLOCK, DEPTH
    )
    total = tl.sum(pairs)
    parts += example * slots
    tl.store(parts + tile, tl.where(row == column, total, 2.0 * total))
    # Room was made for the smallest BLOCK: what a larger one leaves over is zeroed.
    for slot in range(tile + tiles, slots, tiles):
        tl.store(parts + slot, 0.0)


tuned = triton.autotune(configs=CONFIGS, key=["T", "d", "p"])(kernel)
tuned_exact = triton.autotune(configs=CONFIGS_EXACT, key=["T", "d", "p"])(kernel)


def launch(kernel, block: int, X: Tensor, G: Tensor, bias: bool, **blocks: int) -> Tensor:
    """Run ``kernel``, ``block`` being its smallest BLOCK; ``blocks`` where it is not tuned."""
    examples, positions, inputs = X.shape

    def tiles(size: int) -> int:
        count = triton.cdiv(positions, size)
        return count * (count + 1) // 2

    slots = tiles(block)
    parts = torch.empty(examples, slots, dtype=torch.float32, device=X.device)
    kernel[lambda meta: (examples * tiles(meta["BLOCK"]),)](
        X, G, parts, positions, inputs, G.shape[2], *X.stride(), *G.stride(), slots,
        BIAS=bias, PRECISION="ieee" if exact(X) else "tf32", **blocks,
    )  # fmt: skip
    return parts.sum(1).clamp(min=0)


@triton_op("dpsgd::gram_squares", mutates_args=())
def squares(X: Tensor, G: Tensor, bias: bool) -> Tensor:
    """[P], float32."""
    if unfit(X, G):
        return gram_squares_plain(X, G, bias)
    if exact(X):
        return launch(wrap_triton(tuned_exact), smallest(CONFIGS_EXACT, "BLOCK"), X, G, bias)
    return launch(wrap_triton(tuned), smallest(CONFIGS, "BLOCK"), X, G, bias)
