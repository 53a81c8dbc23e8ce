"""All iterations of Adam or SGD on the elements of d in Triton, a program for each group.

A group whose task vectors fit the registers of a program is read once. Of a larger one every iteration reads the task
vectors, d and its state again, from the GPU's cache if that holds the groups that are being worked on.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from awd_fast.objective import SGD, Adam, Objective
from awd_fast.ops.triton_group import defect, penalty, similarity
from awd_fast.ops.triton_launch import (
    Inputs,
    Matrix,
    launch,
    number,
    objective_constants,
    pointer,
    pointers,
    power_of_two,
    vectors,
)
from awd_fast.ops.triton_step import folded, held, kind, moved, numbers, sign

RESIDENT = 384  # bytes of a thread's K vectors, d and its state: the float64 products need the other registers
BESIDE = 4  # numbers of an element beside those of its K vectors
THREADS = 256  # of a resident group at most: each can then have all the registers that a thread can use
STREAMING_THREADS = 128
LOSSES = 1 << 24  # numbers of recorded losses at once: 128 MiB


@triton.jit
def evaluated(
    gram, inner, square, size, table, K: tl.constexpr, KP: tl.constexpr, SQUARED: tl.constexpr, P: tl.constexpr
):
    """A group's share of the loss, r [KP], and the multiple of d in the gradient, from <t_i, d>, <d, d> and sum |d|."""
    total = number(table, K, 8)
    alpha = number(table, K, 9)
    of_one = tl.zeros((1,), tl.float64)
    mean, r = similarity(gram, inner[None, :], of_one + square, number(table, K, 10), K, KP, SQUARED)
    value, along = penalty(of_one + square, P)
    loss = mean / total + alpha * value + defect(gram)
    r = tl.sum(r, 0) / total
    multiple = 2.0 * tl.sum(r, 0) + alpha * tl.sum(along, 0)
    return tl.sum(loss, 0) + number(table, K, 5) * size, r, multiple


@triton.jit(do_not_specialize=["begin", "end", "iterations"])
def resident_kernel(
    table,
    gram,
    shift,
    velocity,
    square,
    moments,
    losses,
    size,
    step,
    between,
    begin,
    end,
    iterations,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUARED: tl.constexpr,
    PENALTY: tl.constexpr,
    ADAM: tl.constexpr,
    KEEPS: tl.constexpr,
    NESTEROV: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Losses number `begin` to `end` of a group, each with a step behind it but for number `iterations`, the last.

    Elements lie `step` apart, groups `between`. shift, velocity and square go from launch to launch; moments [groups,
    K + 2] float64 are those of the last d; losses [end - begin, groups] float64.
    """
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, KP)
    element = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    inside = element < size
    at = group * between + element * step
    models = pointers(table, 0, K, KP, ALIGNED, STORED)[:, None]
    t = vectors(models, pointer(table, 0, ALIGNED, STORED), at, (i < K)[:, None], inside, BASE, COMPUTE)
    entry = i[:, None] * K + i[None, :]
    both = (i < K)[:, None] & (i < K)[None, :]
    g = tl.load(gram + group * K * K + entry, mask=both, other=0.0)[None, :, :]
    d = tl.load(shift + at, mask=inside, other=0.0)
    v = d
    q = d
    if KEEPS:
        v = tl.load(velocity + at, mask=inside, other=0.0)
    if ADAM:
        q = tl.load(square + at, mask=inside, other=0.0)
    lr = number(table, K, 0)
    momentum = number(table, K, 1)
    square_decay = number(table, K, 2)
    eps = number(table, K, 3)
    decay = number(table, K, 4)
    l1 = number(table, K, 5)
    momentum_power = number(table, K, 6)
    square_power = number(table, K, 7)
    found = moments + group * (K + 2)
    record = losses + group
    for index in range(begin, end):
        wide = d.to(tl.float64)
        inner = tl.sum(t.to(tl.float64) * wide, 1)
        squared = tl.sum(tl.sum(wide * wide, 1), 0)
        length = tl.sum(tl.sum(tl.abs(wide), 1), 0)
        loss, r, multiple = evaluated(g, inner, squared, length, table, K, KP, SQUARED, PENALTY)
        tl.store(record, loss)
        record += tl.num_programs(0)
        if index < iterations:
            momentum_power *= momentum
            square_power *= square_decay
            pulled = tl.sum(r[:, None] * t.to(tl.float64), 0)[None, :]
            gradient = multiple * wide - 2.0 * pulled + l1 * sign(wide)
            d, v, q = moved(
                gradient, d, v, q, lr, momentum, square_decay, eps, decay, 1.0 - momentum_power, 1.0 - square_power,
                ADAM, KEEPS, NESTEROV,
            )  # fmt: skip
        else:
            tl.store(found + i, inner, mask=i < K)
            tl.store(found + K, squared)
    tl.store(shift + at, d, mask=inside)
    if end <= iterations:
        if KEEPS:
            tl.store(velocity + at, v, mask=inside)
        if ADAM:
            tl.store(square + at, q, mask=inside)


@triton.jit(do_not_specialize=["begin", "end", "iterations"])
def streaming_kernel(
    table,
    gram,
    shift,
    velocity,
    square,
    moments,
    losses,
    size,
    step,
    between,
    begin,
    end,
    iterations,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    AGAIN: tl.constexpr,
    SQUARED: tl.constexpr,
    PENALTY: tl.constexpr,
    ADAM: tl.constexpr,
    KEEPS: tl.constexpr,
    NESTEROV: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The same of a group of any size; moments go from launch to launch too."""
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, KP)
    used = (i < K)[:, None]
    models = pointers(table, 0, K, KP, ALIGNED, STORED)[:, None]
    base = pointer(table, 0, ALIGNED, STORED)
    entry = i[:, None] * K + i[None, :]
    both = (i < K)[:, None] & (i < K)[None, :]
    g = tl.load(gram + group * K * K + entry, mask=both, other=0.0)[None, :, :]
    lr = number(table, K, 0)
    momentum = number(table, K, 1)
    square_decay = number(table, K, 2)
    eps = number(table, K, 3)
    decay = number(table, K, 4)
    l1 = number(table, K, 5)
    momentum_power = number(table, K, 6)
    square_power = number(table, K, 7)
    found = moments + group * (K + 2)
    inner = tl.load(found + i, mask=i < K, other=0.0)
    squared = tl.load(found + K)
    length = tl.load(found + K + 1)
    record = losses + group
    for index in range(begin, end):
        loss, r, multiple = evaluated(g, inner, squared, length, table, K, KP, SQUARED, PENALTY)
        tl.store(record, loss)
        record += tl.num_programs(0)
        if index < iterations:
            momentum_power *= momentum
            square_power *= square_decay
            inners = tl.zeros((KP, BLOCK // FOLD), tl.float64)
            squares = tl.zeros((1, BLOCK // FOLD), tl.float64)
            lengths = tl.zeros((1, BLOCK // FOLD), tl.float64)
            tl.debug_barrier()  # another thread may have written what a thread now reads
            for start in range(group * 0, size, BLOCK):  # from an int64 on, so that no sum overflows
                element = (start + tl.arange(0, BLOCK))[None, :]
                inside = element < size
                at = group * between + element * step
                t = vectors(models, base, at, used, inside, BASE, COMPUTE)
                d = tl.load(shift + at, mask=inside, other=0.0)
                v = d
                q = d
                if KEEPS:
                    v = tl.load(velocity + at, mask=inside, other=0.0)
                if ADAM:
                    q = tl.load(square + at, mask=inside, other=0.0)
                wide = d.to(tl.float64)
                pulled = tl.sum(r[:, None] * t.to(tl.float64), 0)[None, :]
                gradient = multiple * wide - 2.0 * pulled + l1 * sign(wide)
                d, v, q = moved(
                    gradient, d, v, q, lr, momentum, square_decay, eps, decay, 1.0 - momentum_power, 1.0 - square_power,
                    ADAM, KEEPS, NESTEROV,
                )  # fmt: skip
                tl.store(shift + at, d, mask=inside)
                if KEEPS:
                    tl.store(velocity + at, v, mask=inside)
                if ADAM:
                    tl.store(square + at, q, mask=inside)
                if AGAIN:
                    t = vectors(models, base, at, used, inside, BASE, COMPUTE)
                wide = tl.where(inside, d, 0.0).to(tl.float64)
                inners += folded(t.to(tl.float64) * wide, KP, BLOCK, FOLD)
                squares += folded(wide * wide, 1, BLOCK, FOLD)
                lengths += folded(tl.abs(wide), 1, BLOCK, FOLD)
            inner = tl.sum(inners, 1)
            squared = tl.sum(tl.sum(squares, 1), 0)
            length = tl.sum(tl.sum(lengths, 1), 0)
    tl.store(found + i, inner, mask=i < K)
    tl.store(found + K, squared)
    tl.store(found + K + 1, length)


def adam_rows(
    inputs: Inputs, shape: Matrix, gram: Tensor, objective: Objective, optimizer: SGD | Adam, shift: Tensor, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills d; returns the history [iterations + 1], <t_i, d> [R, K] and <d, d> [R], float64.

    gram: G [R, K, K]. total: R of the whole parameter.
    """
    k, groups = inputs.k, shape.groups
    options: dict[str, Any] = {"dtype": torch.float64, "device": inputs.device}
    kernel, threads, constants = chosen(inputs, shape.size)
    constants |= kind(optimizer) | inputs.constants | objective_constants(objective)
    shift.zero_()
    velocity = torch.zeros_like(shift) if constants["KEEPS"] else shift
    square = torch.zeros_like(shift) if constants["ADAM"] else shift
    moments = torch.zeros(groups, k + 2, **options)
    history = torch.zeros(optimizer.iterations + 1, **options)
    l1 = objective.alpha if objective.penalty == "l1" else 0.0
    # Of an l1 penalty alpha is the weight of sum |d|, and there is no other penalty.
    given = (max(total, 1), 0.0 if objective.penalty == "l1" else objective.alpha, objective.eps)
    stretch = max(1, LOSSES // max(groups, 1))
    for begin in range(0, len(history) if groups else 0, stretch):
        end = min(begin + stretch, len(history))
        losses = torch.empty(end - begin, groups, **options)
        values = numbers(optimizer, shift.dtype, begin, l1)
        values[6:] = [1.0 - bias for bias in values[6:]]  # beta^begin
        launch(
            kernel,
            groups,
            inputs.device,
            inputs.table([*values, *given]),
            gram,
            shift,
            velocity,
            square,
            moments,
            losses,
            shape.size,
            shape.columns if shape.by_column else 1,
            1 if shape.by_column else shape.columns,
            begin,
            end,
            optimizer.iterations,
            KP=power_of_two(k),
            threads=threads,
            **constants,
        )
        torch.sum(losses, dim=1, out=history[begin:end])
    return history, moments[:, :k].contiguous(), moments[:, k].contiguous()


def chosen(inputs: Inputs, size: int) -> tuple[Any, int, dict[str, Any]]:
    """The kernel for groups of this size, its threads and its blocks."""
    itemsize = 8 if inputs.models[0].dtype == torch.float64 else 4
    block = max(power_of_two(size), 32)
    needed = triton.cdiv((power_of_two(inputs.k) + BESIDE) * block * itemsize, RESIDENT)
    threads = max(32, power_of_two(needed))
    if threads <= THREADS:
        return resident_kernel, threads, {"BLOCK": block}
    fold, again = held(inputs)
    return streaming_kernel, STREAMING_THREADS, {"BLOCK": STREAMING_THREADS * fold, "FOLD": fold, "AGAIN": again}
