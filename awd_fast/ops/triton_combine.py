"""base + sum_j w_rj (model_j - base) in Triton: one reading of every tensor, one writing of the result."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from awd_fast.ops.triton_launch import Inputs, Matrix, launch, pointer, power_of_two

ELEMENTS = 1024  # of a program: 8 for each of its threads, a load of 16 bytes of 16-bit storage, two of float32
THREADS = 128


@triton.jit
def combine_kernel(
    table,
    weights,
    out,
    rows,
    columns,
    across,
    K: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BASE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A block of BR x BC elements, of which there are `across` in a row of blocks.

    weights: [rows, K], or by column [K, columns], of type COMPUTE.
    """
    program = tl.program_id(0).to(tl.int64)
    row = (program // across * BR + tl.arange(0, BR))[:, None]
    column = (program % across * BC + tl.arange(0, BC))[None, :]
    inside = (row < rows) & (column < columns)
    at = row * columns + column
    total = tl.zeros((BR, BC), COMPUTE)
    if BASE:
        origin = tl.load(pointer(table, 0, ALIGNED, STORED) + at, mask=inside, other=0.0).to(COMPUTE)
    for j in tl.static_range(K):
        value = tl.load(pointer(table, 1 + j, ALIGNED, STORED) + at, mask=inside, other=0.0).to(COMPUTE)
        if BASE:
            value = value - origin
        if BY_COLUMN:
            # Read for every row, from the cache, so that a thread has the weights of its own elements.
            weight = tl.load(weights + j * columns + column + row * 0, mask=inside, other=0.0)
        else:
            weight = tl.load(weights + row * K + j, mask=row < rows, other=0.0)
        total += weight * value
    if BASE:
        total += origin
    if out.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def combine(inputs: Inputs, shape: Matrix, weights: Tensor, out: Tensor) -> Tensor:
    """Fills `out`. weights: dense, in the dtype of the arithmetic, [rows, K], or by column [K, columns]."""
    wide = min(power_of_two(shape.columns), ELEMENTS)
    across = triton.cdiv(shape.columns, wide)
    high = min(power_of_two(shape.rows), ELEMENTS // wide)
    constants: dict[str, Any] = {"BR": high, "BC": wide, "BY_COLUMN": shape.by_column}
    launch(
        combine_kernel,
        triton.cdiv(shape.rows, high) * across,
        inputs.device,
        inputs.table(),
        weights,
        out,
        shape.rows,
        shape.columns,
        across,
        threads=THREADS,
        **inputs.constants,
        **constants,
    )
    return out
