"""Adam, and SGD with an l1 penalty, on the elements of d: `adam_rows` for many groups, `adam_step` for one large one.

`adam_rows` runs all iterations of a group while its task vectors lie in the cache. `adam_step` makes one iteration of a
group, or of a part of one, in one pass over memory, and leaves the K x K mathematics between two passes to the caller
(`awd_fast.streaming`), so that a group can span tensors and its task vectors are never stored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Groups, Objective, real
from awd_fast.ops import backends, reference
from awd_fast.ops.checks import check


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
) -> tuple[Tensor, Tensor]:
    """All iterations of Adam or SGD on the elements of d, from d = 0, for every group.

    base, models, groups: as in `awd_fast.ops.gram`. Returns d in the models' shape, float32 (float64 for float64
    storage), and the loss at d_0, d_1, ... (float64 [iterations + 1]). d and the optimiser's state have d's dtype,
    gradients are sums in float64. A group should fit the cache: one of millions of elements is right, but slow.
    """
    return descend_groups(base, models, objective, optimizer, groups, backend=backend)[:2]


def descend_groups(
    base: Tensor | None,
    models: Sequence[Tensor],
    objective: Objective,
    optimizer: SGD | Adam,
    groups: Groups = "row",
    *,
    backend: str | None = None,
) -> Descent:
    """As `adam_rows`, with the products that the kernels know anyway."""
    tensors = check(base, models, groups)
    _check_optimizer(optimizer)
    chosen = backends.select("adam_rows", backend, tensors)
    return Descent(*chosen.adam_rows(base, models, objective, optimizer, groups))


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
    tensors = check(base, models, "tensor")
    _check_optimizer(optimizer)
    k = len(models)
    if not isinstance(slope, Tensor) or slope.dtype != torch.float64 or slope.shape != (k + 1,):
        raise InputError(f"slope is {_described(slope)}; expected float64 [{k + 1}]")
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise InputError(f"step is {step!r}; expected an integer of 1 or more")
    if real("l1", l1) < 0.0:
        raise InputError(f"l1 is {l1!r}; expected a number of 0 or more")
    velocity = velocity if isinstance(optimizer, Adam) or optimizer.momentum != 0.0 else None
    square = square if isinstance(optimizer, Adam) else None
    state = {"shift": _checked_state("shift", shift, models[0])}
    if isinstance(optimizer, Adam) or optimizer.momentum != 0.0:
        state["velocity"] = _checked_state("velocity", velocity, models[0])
    if isinstance(optimizer, Adam):
        state["square"] = _checked_state("square", square, models[0])
    _check_apart(state, [*tensors, slope])
    chosen = backends.select("adam_step", backend, [*tensors, slope, *state.values()])
    return chosen.adam_step(base, models, shift, velocity, square, slope, optimizer, step, l1)


def _check_optimizer(optimizer: SGD | Adam) -> None:
    if not isinstance(optimizer, (SGD, Adam)):
        raise InputError(f"optimizer is {optimizer!r}; expected awd_fast.SGD or Adam")


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def _checked_state(name: str, tensor: Tensor | None, like: Tensor) -> Tensor:
    dtype = reference.compute_dtype(like.dtype)
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype != dtype
        or tensor.shape != like.shape
        or tensor.device != like.device
    ):
        raise InputError(
            f"{name} is {_described(tensor)}; expected {dtype} {list(like.shape)} on {like.device} as the models' shape"
        )
    if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_neg():
        raise InputError(f"{name} is not contiguous; expected a contiguous tensor, for it is changed in place")
    return tensor


def _check_apart(state: dict[str, Tensor], inputs: list[Tensor]) -> None:
    """Raises InputError where memory that is written is also something else's."""
    names = list(state)
    for index, name in enumerate(names):
        others = [state[other] for other in names[index + 1 :]]
        if any(_overlap(state[name], other) for other in [*others, *inputs]):
            raise InputError(f"{name} shares memory with another tensor of the call; expected tensors apart")


def _overlap(written: Tensor, other: Tensor) -> bool:
    if written.numel() == 0 or other.numel() == 0 or written.device != other.device:
        return False
    begin, end = _span(written)
    first, last = _span(other)
    return begin < last and first < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
