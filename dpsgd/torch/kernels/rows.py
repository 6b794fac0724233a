"""
into += Σ_p factors_p · rows_p, read once and accumulated in float32 whatever the rows' dtype.

A program owns some columns and runs through the rows in order: no atomics, the same sum every time.
Nothing is tuned: the kernel adds in place, and tuning would run it more than once.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dpsgd.torch.kernels.common import unfit
from dpsgd.torch.kernels.plain import weighted_rows_plain

BLOCKS = {"ROWS": 8, "COLUMNS": 512}


@triton.jit
def kernel(
    rows, factors, into, P, n, per_row, per_column, per_factor, per_sum,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS numbers of the sum."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    totals = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        factor = tl.load(factors + row * per_factor, mask=row < P, other=0.0).to(tl.float32)
        # False for NaN too. A row that is not used is not even read.
        used = (factor != 0.0) & (tl.abs(factor) < float("inf"))
        where = rows + row.to(tl.int64)[:, None] * per_row + column[None, :] * per_column
        values = tl.load(where, mask=used[:, None] & inside[None, :], other=0.0)
        totals += tl.where(used, factor, 0.0)[:, None] * values.to(tl.float32)
    where = into + column * per_sum
    total = tl.load(where, mask=inside, other=0.0) + tl.sum(totals, 0)
    tl.store(where, total.to(into.dtype.element_ty), mask=inside)


def launch(kernel, rows: Tensor, factors: Tensor, into: Tensor, **blocks: int) -> None:
    """Run ``kernel`` with ``blocks``."""
    examples, numbers = rows.shape
    kernel[(triton.cdiv(numbers, blocks["COLUMNS"]),)](
        rows, factors, into, examples, numbers, *rows.stride(), *factors.stride(), *into.stride(),
        **blocks,
    )  # fmt: skip


@triton_op("dpsgd::weighted_rows", mutates_args=("into",))
def add(rows: Tensor, factors: Tensor, into: Tensor) -> None:
    """In place."""
    if unfit(rows):
        weighted_rows_plain(rows, factors, into)
    else:
        launch(wrap_triton(kernel), rows, factors, into, **BLOCKS)
