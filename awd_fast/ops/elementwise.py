"""Adam, and SGD with an l1 penalty, on the elements of d: `adam_rows` for many groups, `adam_step` for one large one.

`adam_rows` runs all iterations of a group while its task vectors lie in the cache. `adam_step` makes one iteration of a
group, or of a part of one, in one pass over memory, and leaves the K x K mathematics between two passes to the caller
(`awd_fast.streaming`), so that a group can span tensors and its task vectors are never stored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awd_fast.objective import SGD, Adam, Groups, Objective
from awd_fast.ops.backends import require_known as require_backend
from awd_fast.ops.checks import check_l1, check_step, check_total, require_elementwise, typed
from awd_fast.ops.inputs import given
from awd_fast.ops.library import flat


class Descent(NamedTuple):
    """d in the parameter's shape, the loss at d_0, d_1, ..., and G [R, K, K], <t_i, d> [R, K], <d, d> [R] float64."""

    shift: Tensor
    history: Tensor
    gram: Tensor
    inner: Tensor
    square: Tensor


def adam_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    objective: Objective,
    optimizer: SGD | Adam,
    groups: Groups = "row",
    *,
    backend: str | None = None,
    total: int | None = None,
) -> tuple[Tensor, Tensor]:
    """All iterations of Adam or SGD on the elements of d, from d = 0, for every group.

    base, models, groups: as in `awd_fast.ops.gram`. Returns d in the models' shape, float32 (float64 for float64
    storage), and the loss at d_0, d_1, ... (float64 [iterations + 1]). d and the optimiser's state have d's dtype,
    gradients are sums in float64. A group should fit the cache: one of millions of elements is right, but slow. total:
    the number of groups of the whole parameter, where these are a part of it; the loss is then their share.
    """
    return descend_groups(base, models, objective, optimizer, groups, backend=backend, total=total)[:2]


def descend_groups(
    base: Tensor | None,
    models: Sequence[Tensor],
    objective: Objective,
    optimizer: SGD | Adam,
    groups: Groups = "row",
    *,
    backend: str | None = None,
    total: int | None = None,
) -> Descent:
    """As `adam_rows`, with the products that the kernels know anyway."""
    base, models = typed(base, models, groups)
    require_elementwise(optimizer)
    require_backend(backend)
    check_total(total)
    kind = Adam if isinstance(optimizer, Adam) else SGD
    options = (*flat(objective, Objective), *flat(optimizer, kind))
    operators = torch.ops.awd_fast.adam_rows
    operator = operators.adam if kind is Adam else operators.sgd
    return Descent(*operator(base, models, *options, groups, backend, total))


def adam_step(
    base: Tensor | None,
    models: Sequence[Tensor],
    shift: Tensor,
    velocity: Tensor | None,
    square: Tensor | None,
    slope: Tensor,
    optimizer: SGD | Adam,
    step: int,
    *,
    l1: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """One iteration of Adam or SGD on the elements of one group, or of a part of one.

    base, models: K tensors of any shape, as in `awd_fast.ops.gram`. shift, velocity, square: d and the optimiser's
    state, contiguous, in the models' shape, float32 (float64 for float64 storage); 0 before step 1; changed in place.
    They overlap neither each other nor the inputs. SGD does not use square, and without a momentum no velocity: None.
    slope: (r_1 .. r_K, multiple) float64 [K + 1] of the gradient multiple d - 2 sum_i r_i t_i. step: from 1 on. l1:
    weight of the penalty sum |d|, whose gradient is added. Returns <t_i, d> (K numbers), <d, d> and sum |d| at the new
    d, float64 [K + 2].
    """
    base, models = typed(base, models)
    require_elementwise(optimizer)
    require_backend(backend)
    shift = given("shift", shift, changed=True)
    velocity = None if velocity is None else given("velocity", velocity, changed=True)
    square = None if square is None else given("square", square, changed=True)
    slope = given("slope", slope)
    check_step(step)
    check_l1(l1)
    operators = torch.ops.awd_fast.adam_step
    if isinstance(optimizer, Adam):
        state, options = (shift, velocity, square), flat(optimizer, Adam)
        return operators.adam(base, models, *state, slope, step, *options[:-1], l1, backend)
    velocity = velocity if optimizer.momentum != 0.0 else None
    return operators.sgd(base, models, shift, velocity, slope, step, *flat(optimizer, SGD)[:-1], l1, backend)
