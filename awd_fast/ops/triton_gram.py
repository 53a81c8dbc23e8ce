"""Gram matrices in Triton: K x K products of a block of elements, summed in float64 over a part of a group.

A program reads each of its elements once from memory and keeps KB x KB sums per lane. More than BAND models are taken
in pairs of bands, whose second and later readings come from the cache: a program's part is small.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from awd_fast.ops.triton_launch import Inputs, Matrix, launch, pointer, pointers, power_of_two

BAND = 8  # 8 x 8 float64 sums of a lane are 128 registers: with twice as many a thread would spill
LANES = 32  # one warp: loads of 16 bytes in a row, and the sum over lanes needs no shared memory
STEPS = 256  # of a program at least: its K x K result is then nothing beside what it has read
PROGRAMS = 4096  # enough to fill any GPU several times over; groups are divided among programs until there are as many


@triton.jit
def gram_kernel(
    table,
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
    """Part `program % splits` of a row, or of BLOCK columns, into out [splits, groups, K, K] float64."""
    program = tl.program_id(0).to(tl.int64)
    part = program % splits
    begin = part * chunk
    end = tl.minimum(begin + chunk, size)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    group = program // splits * BLOCK + lane if BY_COLUMN else program // splits
    base = pointer(table, 0, ALIGNED, STORED)
    BANDS: tl.constexpr = (K + KB - 1) // KB
    for left in range(BANDS):
        for right in range(left + 1):
            i = left * KB + tl.arange(0, KB)
            j = right * KB + tl.arange(0, KB)
            rows = pointers(table, left * KB, K, KB, ALIGNED, STORED)[:, None, None]
            columns = pointers(table, right * KB, K, KB, ALIGNED, STORED)[None, :, None]
            sums = tl.zeros((KB, KB, BLOCK), tl.float64)
            for step in range(begin, end, 1 if BY_COLUMN else BLOCK):
                if BY_COLUMN:
                    at = (step * groups + group)[None, None, :]
                    inside = (group < groups)[None, None, :]
                else:
                    at = (group * size + step + lane)[None, None, :]
                    inside = (step + lane < end)[None, None, :]
                a = tl.load(rows + at, mask=inside & (i < K)[:, None, None], other=0.0).to(COMPUTE)
                if BANDS > 1:
                    b = tl.load(columns + at, mask=inside & (j < K)[None, :, None], other=0.0).to(COMPUTE)
                if BASE:
                    origin = tl.load(base + at, mask=inside, other=0.0).to(COMPUTE)
                    a = a - origin
                    if BANDS > 1:
                        b = b - origin
                if BANDS == 1:
                    b = tl.permute(a, (1, 0, 2))
                sums += a.to(tl.float64) * b.to(tl.float64)
            if BY_COLUMN:
                corner = out + ((part * groups + group) * K * K)[None, None, :]
                here = (i < K)[:, None, None] & (j < K)[None, :, None] & (group < groups)[None, None, :]
                tl.store(corner + i[:, None, None] * K + j[None, :, None], sums, mask=here)
                if BANDS > 1:
                    tl.store(corner + j[None, :, None] * K + i[:, None, None], sums, mask=here)
            else:
                corner = out + (part * groups + group) * K * K
                here = (i < K)[:, None] & (j < K)[None, :]
                found = tl.sum(sums, 2)
                tl.store(corner + i[:, None] * K + j[None, :], found, mask=here)
                if BANDS > 1:
                    tl.store(corner + j[None, :] * K + i[:, None], found, mask=here)


def gram(inputs: Inputs, shape: Matrix) -> Tensor:
    """G [R, K, K] float64. Parts of a group are summed in their order: no result depends on the GPU's size."""
    k, groups = inputs.k, shape.groups
    blocks, stride = (triton.cdiv(groups, LANES), 1) if shape.by_column else (groups, LANES)
    chunk, splits = divided(shape.size, blocks, stride)
    parts = torch.empty(splits, groups, k, k, dtype=torch.float64, device=inputs.device)
    constants: dict[str, Any] = {"KB": min(power_of_two(k), BAND), "BLOCK": LANES, "BY_COLUMN": shape.by_column}
    launch(
        gram_kernel,
        blocks * splits,
        inputs.device,
        inputs.table(),
        parts,
        groups,
        shape.size,
        chunk,
        splits,
        threads=LANES,
        # The product of two float32 is exact in float64, so that fusing it with the sum changes nothing.
        enable_fp_fusion=True,
        **inputs.constants,
        **constants,
    )
    return parts[0] if splits == 1 else parts.sum(dim=0)


def divided(size: int, blocks: int, stride: int) -> tuple[int, int]:
    """Elements of a program's part of a group (a multiple of its stride), and the number of parts."""
    steps = triton.cdiv(size, stride)
    wanted = max(STEPS, triton.cdiv(steps * blocks, PROGRAMS))
    splits = max(1, triton.cdiv(steps, wanted))
    return max(1, triton.cdiv(steps, splits)) * stride, splits
