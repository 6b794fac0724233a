"""
GᵀX of every example and its squared norm, from one pass: the norm is taken in the epilogue.

A program holds one tile of an example's [p, d] in registers, writes it (or does not), squares it
and writes one number. ``weight_gradient_squares`` of the package says what is moved and computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dpsgd.torch.kernels.common import configs, exact, smallest, unfit
from dpsgd.torch.kernels.plain import weight_gradient_squares_plain

SIZES = ("ROWS", "COLUMNS", "DEPTH")
CONFIGS = configs(
    SIZES, (64, 64, 32, 4, 4), (64, 64, 64, 4, 3), (64, 128, 32, 4, 4), (128, 64, 32, 4, 4),
    (128, 128, 32, 8, 4), (128, 128, 64, 8, 3),
)  # fmt: skip
# Float32's own products unroll the depth, in registers: a deep tile spills.
CONFIGS_EXACT = configs(
    SIZES, (64, 64, 32, 4, 3), (64, 128, 16, 4, 4), (128, 64, 16, 4, 4), (128, 128, 16, 8, 4)
)


@triton.jit
def kernel(
    X, G, out, parts, T, d, p, x_example, x_position, x_number, g_example, g_position, g_number,
    o_example, o_row, o_column, slots, WRITE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of one example's GᵀX; the sum of its squares goes to parts[example, tile]."""
    down, across = tl.cdiv(p, ROWS), tl.cdiv(d, COLUMNS)
    tiles = down * across
    example = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    # Neighbours share rows of G and columns of X in the L2 cache.
    row, column = tl.swizzle2d(tile // across, tile % across, down, across, 8)

    rows, columns, position = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    in_rows, in_columns = rows < p - row * ROWS, columns < d - column * COLUMNS
    # Block starts in 64 bits, what is inside a block in 32: large tensors, few registers.
    g_start = G + example * g_example + (row * ROWS).to(tl.int64) * g_number
    x_start = X + example * x_example + (column * COLUMNS).to(tl.int64) * x_number
    g = g_start + position[None, :] * g_position + rows[:, None] * g_number
    x = x_start + position[:, None] * x_position + columns[None, :] * x_number
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, T, DEPTH):
        inside = (position < T - start)[:, None]
        a = tl.load(g, mask=(position < T - start)[None, :] & in_rows[:, None], other=0.0)
        b = tl.load(x, mask=inside & in_columns[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        g += DEPTH * g_position
        x += DEPTH * x_position

    if WRITE:
        written = total.to(out.dtype.element_ty)
        start = out + example * o_example
        start += (row * ROWS).to(tl.int64) * o_row + (column * COLUMNS).to(tl.int64) * o_column
        where = start + rows[:, None] * o_row + columns[None, :] * o_column
        tl.store(where, written, mask=in_rows[:, None] & in_columns[None, :])
        # The norm of what will be summed: C bounds the rounded gradient too.
        total = written.to(tl.float32)
    parts += example * slots
    tl.store(parts + tile, tl.sum(total * total))
    # Room was made for the smallest tile: what a larger one leaves over is zeroed.
    for slot in range(tile + tiles, slots, tiles):
        tl.store(parts + slot, 0.0)


tuned = triton.autotune(configs=CONFIGS, key=["T", "d", "p"])(kernel)
tuned_exact = triton.autotune(configs=CONFIGS_EXACT, key=["T", "d", "p"])(kernel)


def launch(kernel, block: tuple[int, int], X: Tensor, G: Tensor, out: Tensor | None, **blocks: int):
    """Run ``kernel``, ``block`` being its smallest tile; ``blocks`` where it is not tuned."""
    examples, positions, inputs = X.shape
    outputs = G.shape[2]

    def tiles(rows: int, columns: int) -> int:
        return triton.cdiv(outputs, rows) * triton.cdiv(inputs, columns)

    slots = tiles(*block)
    parts = torch.empty(examples, slots, dtype=torch.float32, device=X.device)
    written = parts if out is None else out
    kernel[lambda meta: (examples * tiles(meta["ROWS"], meta["COLUMNS"]),)](
        X, G, written, parts, positions, inputs, outputs, *X.stride(), *G.stride(),
        *((0, 0, 0) if out is None else out.stride()), slots,
        WRITE=out is not None, PRECISION="ieee" if exact(X) else "tf32", **blocks,
    )  # fmt: skip
    return parts.sum(1)


def _run(X: Tensor, G: Tensor, out: Tensor | None) -> Tensor:
    if unfit(X, G, *(() if out is None else (out,))):
        return weight_gradient_squares_plain(X, G, out)[1]
    choices = CONFIGS_EXACT if exact(X) else CONFIGS
    block = smallest(choices, "ROWS"), smallest(choices, "COLUMNS")
    if exact(X):
        return launch(wrap_triton(tuned_exact), block, X, G, out)
    return launch(wrap_triton(tuned), block, X, G, out)


@triton_op("dpsgd::weight_gradient_squares", mutates_args=())
def squares(X: Tensor, G: Tensor) -> Tensor:
    """[P], float32; the gradients are not written."""
    return _run(X, G, None)


@triton_op("dpsgd::weight_gradient_squares_out", mutates_args=("out",))
def squares_out(X: Tensor, G: Tensor, out: Tensor) -> Tensor:
    """[P], float32; the gradients go to ``out``."""
    return _run(X, G, out)
