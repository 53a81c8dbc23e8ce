"""One iteration of Adam or SGD on the elements of d in Triton: one reading and one writing of d and its state."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from awd_fast.objective import SGD, Adam
from awd_fast.ops.triton_launch import VECTOR, Inputs, launch, number, pointer, pointers, power_of_two

WARPS = 4
TILE = 4096  # values of K x BLOCK: 32 in each of 128 threads, next to their double precision copies one by one
STEPS = 16  # blocks of a program at least, so that its K + 2 sums are nothing beside what it has read
PROGRAMS = 4096

LR, MOMENTUM, SQUARE_DECAY, EPS, WEIGHT_DECAY, L1, VELOCITY_BIAS, SQUARE_BIAS = range(8)
"""The numbers behind the addresses. For SGD all but lr, momentum, weight decay and l1 are unused."""


@triton.jit
def moved(
    gradient,
    shift,
    velocity,
    square,
    lr,
    momentum,
    square_decay,
    eps,
    decay,
    velocity_bias,
    square_bias,
    ADAM: tl.constexpr,
    KEEPS: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """d, velocity and square after a step: `reference.element_move`. All in the dtype of d, each operation rounded.

    The numbers are float64 and rounded to that dtype once, as torch does; so are 1 - beta.
    """
    STATE: tl.constexpr = shift.dtype
    slope = gradient.to(STATE) + decay.to(STATE) * shift
    if ADAM:
        velocity = momentum.to(STATE) * velocity + (1.0 - momentum).to(STATE) * slope
        square = square_decay.to(STATE) * square + (1.0 - square_decay).to(STATE) * (slope * slope)
        if STATE == tl.float32:  # whose / and sqrt are approximations unless they are named like this
            spread = tl.sqrt_rn(tl.div_rn(square, square_bias.to(STATE) + tl.zeros_like(square))) + eps.to(STATE)
            step = tl.div_rn(velocity, velocity_bias.to(STATE) + tl.zeros_like(square))
            shift = shift - tl.div_rn(lr.to(STATE) * step, spread)
        else:
            spread = tl.sqrt(square / square_bias) + eps
            shift = shift - lr * (velocity / velocity_bias) / spread
    else:
        if KEEPS:
            velocity = momentum.to(STATE) * velocity + slope
            if NESTEROV:
                slope = slope + momentum.to(STATE) * velocity
            else:
                slope = velocity
        shift = shift - lr.to(STATE) * slope
    return shift, velocity, square


@triton.jit
def sign(value):
    """-1, 0 or 1; of NaN, NaN."""
    return tl.where(value > 0.0, 1.0, tl.where(value < 0.0, -1.0, value))


@triton.jit
def step_kernel(
    table,
    slope,
    shift,
    velocity,
    square,
    moments,
    size,
    chunk,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    ADAM: tl.constexpr,
    KEEPS: tl.constexpr,
    NESTEROV: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`chunk` elements of the group. slope [K + 1] float64; moments [programs, K + 2] float64."""
    program = tl.program_id(0).to(tl.int64)
    begin = program * chunk
    end = tl.minimum(begin + chunk, size)
    i = tl.arange(0, KP)
    models = pointers(table, 0, K, KP, ALIGNED, STORED)[:, None]
    base = pointer(table, 0, ALIGNED, STORED)
    r = tl.load(slope + i, mask=i < K, other=0.0)[:, None]
    multiple = tl.load(slope + K)
    lr = number(table, K, 0)
    momentum = number(table, K, 1)
    square_decay = number(table, K, 2)
    eps = number(table, K, 3)
    decay = number(table, K, 4)
    l1 = number(table, K, 5)
    velocity_bias = number(table, K, 6)
    square_bias = number(table, K, 7)
    inner = tl.zeros((KP, BLOCK), tl.float64)
    squares = tl.zeros((1, BLOCK), tl.float64)
    sizes = tl.zeros((1, BLOCK), tl.float64)
    for start in range(begin, end, BLOCK):
        at = (start + tl.arange(0, BLOCK))[None, :]
        inside = at < end
        t = tl.load(models + at, mask=inside & (i < K)[:, None], other=0.0).to(COMPUTE)
        if BASE:
            t = t - tl.load(base + at, mask=inside, other=0.0).to(COMPUTE)
        d = tl.load(shift + at, mask=inside, other=0.0)
        v = d
        q = d
        if KEEPS:
            v = tl.load(velocity + at, mask=inside, other=0.0)
        if ADAM:
            q = tl.load(square + at, mask=inside, other=0.0)
        wide = d.to(tl.float64)
        pulled = tl.sum(r * t.to(tl.float64), 0)[None, :]
        gradient = multiple * wide - 2.0 * pulled + l1 * sign(wide)
        d, v, q = moved(
            gradient, d, v, q, lr, momentum, square_decay, eps, decay, velocity_bias, square_bias, ADAM, KEEPS, NESTEROV
        )
        tl.store(shift + at, d, mask=inside)
        if KEEPS:
            tl.store(velocity + at, v, mask=inside)
        if ADAM:
            tl.store(square + at, q, mask=inside)
        wide = tl.where(inside, d, 0.0).to(tl.float64)
        inner += t.to(tl.float64) * wide
        squares += wide * wide
        sizes += tl.abs(wide)
    found = moments + program * (K + 2)
    tl.store(found + i, tl.sum(inner, 1), mask=i < K)
    tl.store(found + K, tl.sum(tl.sum(squares, 1), 0))
    tl.store(found + K + 1, tl.sum(tl.sum(sizes, 1), 0))


def adam_step(
    inputs: Inputs,
    state: tuple[Tensor, Tensor | None, Tensor | None],
    slope: Tensor,
    optimizer: SGD | Adam,
    step: int,
    l1: float,
) -> Tensor:
    """Changes d, velocity and square; returns the moments [K + 2] of the new d. slope: dense, on the device."""
    shift, velocity, square = state
    size, wide = shift.numel(), power_of_two(inputs.k)
    # At least a load of 16 bytes for each thread, whatever K.
    block = max(TILE // wide, 32 * WARPS * VECTOR // inputs.models[0].element_size())
    block = min(block, 1024)
    chunk = max(STEPS, triton.cdiv(triton.cdiv(size, block), PROGRAMS)) * block
    programs = triton.cdiv(size, chunk)
    moments = torch.empty(programs, inputs.k + 2, dtype=torch.float64, device=inputs.device)
    launch(
        step_kernel,
        programs,
        inputs.device,
        inputs.table(numbers(optimizer, shift.dtype, step, l1)),
        slope,
        shift,
        shift if velocity is None else velocity,  # not used
        shift if square is None else square,
        moments,
        size,
        chunk,
        KP=wide,
        BLOCK=block,
        warps=WARPS,
        **kind(optimizer),
        **inputs.constants,
    )
    return moments.sum(dim=0)


def kind(optimizer: SGD | Adam) -> dict[str, Any]:
    """What kernels are compiled for. KEEPS: whether there is a velocity."""
    adam = isinstance(optimizer, Adam)
    keeps = isinstance(optimizer, Adam) or optimizer.momentum != 0.0
    return {"ADAM": adam, "KEEPS": keeps, "NESTEROV": isinstance(optimizer, SGD) and optimizer.nesterov}


def numbers(optimizer: SGD | Adam, dtype: torch.dtype, step: int, l1: float) -> list[float]:
    """The numbers of `moved`, in their order in the table."""
    if isinstance(optimizer, SGD):
        return [optimizer.lr, optimizer.momentum, 0.0, 0.0, optimizer.weight_decay, l1, 1.0, 1.0]
    beta1, beta2 = optimizer.betas
    eps = max(optimizer.eps, torch.finfo(dtype).tiny)  # one that rounds to 0 would leave 0 / 0
    biases = [1.0 - beta1**step, 1.0 - beta2**step]
    return [optimizer.lr, beta1, beta2, eps, optimizer.weight_decay, l1, *biases]
