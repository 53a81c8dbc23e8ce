"""SGD in the span of a group's task vectors in Triton: all iterations of a block of groups in registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from awd_fast.objective import SGD, Objective
from awd_fast.ops.triton_group import coefficients, defect, factor, penalty, similarity
from awd_fast.ops.triton_launch import launch, objective_constants, on_device, power_of_two

ENTRIES = 256  # of the K x K matrices of a program: 8 float64 of each in every thread of a warp, and no barrier
LOSSES = 1 << 22  # numbers of recorded losses at once: 32 MiB


@triton.jit(do_not_specialize=["begin", "end", "iterations"])
def descend_kernel(
    numbers,
    gram,
    coordinates,
    velocity,
    found,
    losses,
    groups,
    begin,
    end,
    iterations,
    K: tl.constexpr,
    KP: tl.constexpr,
    B: tl.constexpr,
    SQUARED: tl.constexpr,
    PENALTY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """Losses number `begin` to `end` of B groups, each with a step behind it but for number `iterations`, the last.

    gram [groups, K, K]; coordinates and velocity [groups, K], which go from launch to launch; found: a [groups, K];
    losses [end - begin, programs]: the programs' sums. All float64.
    """
    program = tl.program_id(0).to(tl.int64)
    group = program * B + tl.arange(0, B)
    i = tl.arange(0, KP)
    at = group[:, None] * K + i[None, :]
    here = (group < groups)[:, None] & (i < K)[None, :]
    inside = here[:, :, None] & (i < K)[None, None, :]
    g = tl.load(gram + at[:, :, None] * K + i[None, None, :], mask=inside, other=0.0)
    basis = factor(g, K, KP)
    flaw = defect(g)
    y = tl.load(coordinates + at, mask=here, other=0.0)
    v = tl.load(velocity + at, mask=here, other=0.0)
    total = tl.load(numbers)
    alpha = tl.load(numbers + 1)
    eps = tl.load(numbers + 2)
    lr = tl.load(numbers + 3)
    momentum = tl.load(numbers + 4)
    decay = tl.load(numbers + 5)
    record = losses + program
    for index in range(begin, end):
        inner = tl.sum(basis * y[:, None, :], 2)
        square = tl.sum(y * y, 1)
        mean, r = similarity(g, inner, square, eps, K, KP, SQUARED)
        size, along = penalty(square, PENALTY)
        loss = mean / total + alpha * size + flaw
        tl.store(record, tl.sum(tl.where(group < groups, loss, 0.0), 0))
        record += tl.num_programs(0)
        r = r / total
        multiple = 2.0 * tl.sum(r, 1) + alpha * along
        slope = multiple[:, None] * y - 2.0 * tl.sum(basis * r[:, :, None], 1) + decay * y
        if MOMENTUM:
            v = momentum * v + slope
            slope = slope + momentum * v if NESTEROV else v
        y = tl.where(index < iterations, y - lr * slope, y)
    tl.store(coordinates + at, y, mask=here)
    tl.store(velocity + at, v, mask=here)
    tl.store(found + at, coefficients(basis, y, K, KP), mask=here)


def descend(gram: Tensor, objective: Objective, optimizer: SGD, total: int) -> tuple[Tensor, Tensor]:
    """a [R, K] and the history [iterations + 1], float64. gram: dense [R, K, K] float64. total: R of the parameter."""
    groups, k = gram.shape[:2]
    wide = power_of_two(k)
    block = max(1, ENTRIES // wide**2)
    programs = triton.cdiv(groups, block)
    options: dict[str, Any] = {"dtype": torch.float64, "device": gram.device}
    coordinates, velocity = (torch.zeros(groups, k, **options) for _ in range(2))
    found = torch.empty(groups, k, **options)
    history = torch.zeros(optimizer.iterations + 1, **options)
    numbers = (max(total, 1), objective.alpha, objective.eps, optimizer.lr, optimizer.momentum, optimizer.weight_decay)
    table = on_device((), numbers, gram.device).view(torch.float64)
    stretch = max(1, LOSSES // max(programs, 1))
    for begin in range(0, len(history) if programs else 0, stretch):
        end = min(begin + stretch, len(history))
        losses = torch.empty(end - begin, programs, **options)
        launch(
            descend_kernel,
            programs,
            gram.device,
            table,
            gram,
            coordinates,
            velocity,
            found,
            losses,
            groups,
            begin,
            end,
            optimizer.iterations,
            K=k,
            KP=wide,
            B=block,
            MOMENTUM=optimizer.momentum != 0.0,
            NESTEROV=optimizer.nesterov,
            threads=32 * max(1, wide**2 // ENTRIES),
            **objective_constants(objective),
        )
        torch.sum(losses, dim=1, out=history[begin:end])
    return found, history
