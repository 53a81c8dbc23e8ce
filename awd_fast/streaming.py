"""One group that no cache holds, and that may span many tensors: Adam or l1 in one pass over memory per iteration.

The task vectors are never stored: a pass reads the tensors, moves d and returns <t_i, d>, <d, d> and sum |d|. Between
two passes everything about the loss is K x K.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awd_fast import ops, statistics
from awd_fast.objective import SGD, Adam, Objective
from awd_fast.ops import backends

Tensors = tuple[Tensor | None, Sequence[Tensor]]
"""A base (or None) and K models like it: a part of the group."""


@dataclass(frozen=True)
class Streamed:
    """d of each part in its shape, and of each part G [P, K, K], <t_i, d> [P, K], <d, d> [P]; the loss of the group.

    Of a part in another process d is None. All lie on the device of the parts; but for d all are float64.
    """

    shifts: Sequence[Tensor | None]
    gram: Tensor
    inner: Tensor
    square: Tensor
    history: Tensor


def descend(
    parts: Sequence[Tensors | None],
    objective: Objective,
    optimizer: SGD | Adam,
    backend: str | None,
    add_up: Callable[[Tensor], Tensor] | None = None,
    k: int | None = None,
) -> Streamed:
    """All iterations from d = 0 for the one group that the elements of all parts make.

    add_up: where processes share the group, the sum over them of a float64 tensor that each has; the parts of others
    are None, so that all have the same list, and k says how many models there are. What is summed is 0 but in one.

    parts: tensors of one dtype and device. Memory beside them: d and the optimiser's one or two numbers per element,
    float32 (float64 for float64 storage). The loss is float64 [iterations + 1]. Nothing is looked at before the end, so
    that on a GPU the host only sends work ahead. A backend that has all iterations in a call of its own,
    `descend_stream(parts, objective, optimizer)` with the fields of `Streamed` as result, is given them.
    """
    own = [
        (index, part[0] if part[0] is None else part[0].contiguous(), [model.contiguous() for model in part[1]])
        for index, part in enumerate(parts)
        if part is not None
    ]
    if add_up is None:
        fused = _fused([(base, models) for _, base, models in own], backend)
        if fused is not None:
            return Streamed(*fused([(base, models) for _, base, models in own], objective, optimizer))
    share = (lambda tensor: tensor) if add_up is None else add_up
    k = len(own[0][2]) if k is None else k
    gram = torch.zeros(len(parts), k, k, dtype=torch.float64, device=own[0][2][0].device if own else "cpu")
    for index, base, models in own:
        gram[index] = ops.gram(base, models, "tensor", backend=backend)[0]
    gram = share(gram)
    whole = gram.sum(dim=0, keepdim=True)
    shifts = {index: _zeros(models[0]) for index, _, models in own}
    keeps_velocity = isinstance(optimizer, Adam) or optimizer.momentum != 0.0
    velocities = {index: torch.zeros_like(shift) if keeps_velocity else None for index, shift in shifts.items()}
    squares = {index: torch.zeros_like(d) if isinstance(optimizer, Adam) else None for index, d in shifts.items()}
    l1 = objective.alpha if objective.penalty == "l1" else 0.0
    moments = gram.new_zeros(len(parts), k + 2)
    loss, slope = evaluate(whole, moments.sum(dim=0), objective)
    history = [loss]
    for step in range(1, optimizer.iterations + 1):
        moments = torch.zeros_like(moments)
        for index, base, models in own:
            state = (shifts[index], velocities[index], squares[index])
            moments[index] = ops.adam_step(base, models, *state, slope, optimizer, step, l1=l1, backend=backend)
        moments = share(moments)
        loss, slope = evaluate(whole, moments.sum(dim=0), objective)
        history.append(loss)
    found = [shifts.get(index) for index in range(len(parts))]
    return Streamed(found, gram, moments[:, :k], moments[:, k], torch.stack(history))


def _fused(parts: Sequence[Tensors], backend: str | None) -> Callable[..., tuple[Any, ...]] | None:
    """The call that makes all iterations, where the backend that would make the single steps of every part has one."""
    # Part by part: a backend may refuse a call of many tensors, and those of all parts are never in one.
    chosen = {
        backends.select("adam_step", backend, [tensor for tensor in (base, *models) if tensor is not None])
        for base, models in parts
    }
    found: Callable[..., tuple[Any, ...]] | None = None
    if len(chosen) == 1:
        found = getattr(chosen.pop(), "descend_stream", None)
    return found


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=ops.compute_dtype(like.dtype), device=like.device)


def evaluate(gram: Tensor, moments: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The loss (scalar) and the slope [K + 1] of `ops.adam_step`, from G [1, K, K] and b, s and sum |d| [K + 2]."""
    inner, square, size = moments[None, :-2], moments[None, -2], moments[-1]
    after = statistics.shifted_gram(gram, inner, square)
    l1 = objective.alpha * size if objective.penalty == "l1" else 0.0
    loss = statistics.similarity(after, objective) + objective.alpha * statistics.penalty(square, objective) + l1
    r = statistics.pull(after, objective)
    multiple = 2.0 * r.sum(dim=1) + objective.alpha * statistics.penalty_slope(square, objective)
    return loss[0], torch.cat([r[0], multiple])
