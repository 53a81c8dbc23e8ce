"""One iteration of Adam or SGD on the elements of d in Triton: one reading and one writing of d and its state."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from awd_fast.objective import SGD, Adam
from awd_fast.ops.triton_launch import VECTOR, Inputs, launch, number, pointer, pointers, power_of_two, vectors

THREADS = 128
HELD = 256  # bytes of task vectors in a thread: 64 registers, and half of that while d moves
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
        if shift.dtype == tl.float32:  # whose / and sqrt are approximations unless they are named like this
            spread = tl.sqrt_rn(tl.div_rn(square, square_bias.to(STATE) + tl.zeros_like(square))) + eps.to(STATE)
            step = tl.div_rn(velocity, velocity_bias.to(STATE) + tl.zeros_like(square))
            shift = shift - tl.div_rn(lr.to(STATE) * step, spread)
        else:
            spread = tl.sqrt(square / square_bias) + eps
            shift = shift - lr * (velocity / velocity_bias) / spread
    else:
        if KEEPS:
            velocity = momentum.to(STATE) * velocity + slope
            slope = slope + momentum.to(STATE) * velocity if NESTEROV else velocity
        shift = shift - lr.to(STATE) * slope
    return shift, velocity, square


@triton.jit
def sign(value):
    """-1, 0 or 1; of NaN, NaN."""
    return tl.where(value > 0.0, 1.0, tl.where(value < 0.0, -1.0, value))


@triton.jit
def folded(values, ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    """The sums [ROWS, BLOCK // FOLD] of neighbours, which one thread has loaded: fewer sums to keep in registers."""
    return tl.sum(tl.reshape(values, (ROWS, BLOCK // FOLD, FOLD)), 2)


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
    FOLD: tl.constexpr,
    AGAIN: tl.constexpr,
    ADAM: tl.constexpr,
    KEEPS: tl.constexpr,
    NESTEROV: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`chunk` elements of the group. slope [K + 1] float64; moments [programs, K + 2] float64.

    AGAIN: whether t is read a second time, from the cache, rather than held in registers while d moves.
    """
    program = tl.program_id(0).to(tl.int64)
    begin = program * chunk
    end = tl.minimum(begin + chunk, size)
    i = tl.arange(0, KP)
    used = (i < K)[:, None]
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
    inner = tl.zeros((KP, BLOCK // FOLD), tl.float64)
    squares = tl.zeros((1, BLOCK // FOLD), tl.float64)
    sizes = tl.zeros((1, BLOCK // FOLD), tl.float64)
    for start in range(begin, end, BLOCK):
        at = (start + tl.arange(0, BLOCK))[None, :]
        inside = at < end
        t = vectors(models, base, at, used, inside, BASE, COMPUTE)
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
        if AGAIN:
            t = vectors(models, base, at, used, inside, BASE, COMPUTE)
        wide = tl.where(inside, d, 0.0).to(tl.float64)
        inner += folded(t.to(tl.float64) * wide, KP, BLOCK, FOLD)
        squares += folded(wide * wide, 1, BLOCK, FOLD)
        sizes += folded(tl.abs(wide), 1, BLOCK, FOLD)
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
    fold, again = held(inputs)
    block = THREADS * fold
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
        FOLD=fold,
        AGAIN=again,
        threads=THREADS,
        **kind(optimizer),
        **inputs.constants,
    )
    return moments.sum(dim=0)


def held(inputs: Inputs) -> tuple[int, bool]:
    """Elements of a thread, a load of 16 bytes or as much of one as registers hold; and whether t is read again."""
    vectors_of_one = power_of_two(inputs.k) * (8 if inputs.models[0].dtype == torch.float64 else 4)  # bytes
    fold = max(1, min(VECTOR // inputs.models[0].element_size(), HELD // vectors_of_one))
    return fold, fold * vectors_of_one > HELD // 2


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
