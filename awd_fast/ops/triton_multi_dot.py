"""Inner products of task vectors with a gradient in Triton: one reading of every tensor, sums in float64.

A program keeps a sum for each of up to BAND models and each of its lanes; more models are taken in bands, which read
base and gradient again, from the cache: a program's part is small.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from awd_fast.ops.triton_gram import divided
from awd_fast.ops.triton_launch import Inputs, Matrix, launch, pointer, pointers, power_of_two

BAND = 8
ELEMENTS = 256  # of a row, or columns, of a program at a time: 8 for each thread of a warp
THREADS = 32


@triton.jit
def multi_dot_kernel(
    table,
    gradient,
    out,
    groups,
    size,
    chunk,
    splits,
    K: tl.constexpr,
    KB: tl.constexpr,
    BLOCK: tl.constexpr,
    BASE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Part `program % splits` of a row, or of BLOCK columns, into out [splits, groups, K] float64."""
    program = tl.program_id(0).to(tl.int64)
    part = program % splits
    begin = part * chunk
    end = tl.minimum(begin + chunk, size)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    group = program // splits * BLOCK + lane if BY_COLUMN else program // splits
    base = pointer(table, 0, ALIGNED, STORED)
    BANDS: tl.constexpr = (K + KB - 1) // KB
    for band in range(BANDS):
        j = band * KB + tl.arange(0, KB)
        rows = pointers(table, band * KB, K, KB, ALIGNED, STORED)[:, None]
        used = (j < K)[:, None]
        sums = tl.zeros((KB, BLOCK), tl.float64)
        for step in range(begin, end, 1 if BY_COLUMN else BLOCK):
            if BY_COLUMN:
                at = (step * groups + group)[None, :]
                inside = (group < groups)[None, :]
            else:
                at = (group * size + step + lane)[None, :]
                inside = (step + lane < end)[None, :]
            found = tl.load(rows + at, mask=inside & used, other=0.0).to(COMPUTE)
            factor = tl.load(gradient + at, mask=inside, other=0.0).to(COMPUTE)
            if BASE:
                found = found - tl.load(base + at, mask=inside, other=0.0).to(COMPUTE)
            sums += found.to(tl.float64) * factor.to(tl.float64)
        if BY_COLUMN:
            here = used & (group < groups)[None, :]
            tl.store(out + (part * groups + group)[None, :] * K + j[:, None], sums, mask=here)
        else:
            tl.store(out + (part * groups + group) * K + j, tl.sum(sums, 1), mask=j < K)


def multi_dot(inputs: Inputs, shape: Matrix, gradient: Tensor) -> Tensor:
    """<g_r, t_rj> [R, K] float64. Parts of a group are summed in their order: no result depends on the GPU's size.

    gradient: dense, of any floating dtype, rounded to that of the arithmetic.
    """
    k, groups = inputs.k, shape.groups
    block = ELEMENTS if not shape.by_column else min(ELEMENTS, max(power_of_two(groups), THREADS))
    blocks, stride = (triton.cdiv(groups, block), 1) if shape.by_column else (groups, block)
    chunk, splits = divided(shape.size, blocks, stride)
    parts = torch.empty(splits, groups, k, dtype=torch.float64, device=inputs.device)
    constants: dict[str, Any] = {"KB": min(power_of_two(k), BAND), "BLOCK": block, "BY_COLUMN": shape.by_column}
    launch(
        multi_dot_kernel,
        blocks * splits,
        inputs.device,
        inputs.table(),
        gradient,
        parts,
        groups,
        shape.size,
        chunk,
        splits,
        threads=THREADS,
        # The product of two float32 is exact in float64, so that fusing it with the sum changes nothing.
        enable_fp_fusion=True,
        **inputs.constants,
        **constants,
    )
    return parts[0] if splits == 1 else parts.sum(dim=0)
