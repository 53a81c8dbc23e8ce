"""What every operator asks of its arguments.

`typed` and `require_span` hold what no schema of `torch.ops.awd_fast` can say; the public functions ask it before the
dispatcher would refuse the call in words of its own, and `typed` makes tensors of numpy arrays (`awd_fast.ops.inputs`).
Everything else is asked inside the operators, by the implementation and (but for values and addresses) by the fake one,
whoever calls.
"""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective, real
from awd_fast.ops import inputs
from awd_fast.ops.foreign import unfit
from awd_fast.ops.reference import compute_dtype, group_count

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GROUPS = get_args(Groups)


def typed(base: Any, models: Sequence[Any], groups: object = "row") -> tuple[Tensor | None, list[Tensor]]:
    """The base and the models as tensors. Raises InputError where something is none, or `groups` is unknown."""
    check_groups(groups)
    return inputs.taken(base, models)


def check_groups(groups: object) -> None:
    """Raises InputError where there are no such groups."""
    if groups not in GROUPS:
        raise InputError(f"groups is {groups!r}; expected one of {', '.join(GROUPS)}")


def check(base: Tensor | None, models: Sequence[Tensor], groups: Groups, *, values: bool = True) -> list[Tensor]:
    """All tensors of a call. Raises InputError where they are not dense, floating and alike, or `groups` is unknown.

    values: whether they must hold values, as those on the device "meta" do not.
    """
    check_groups(groups)
    if not models:
        raise InputError("models is empty; expected at least one tensor")
    tensors = [*models] if base is None else [base, *models]
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        check_plain(tensor, index, base is not None, values)
        if tensor.shape != first.shape or tensor.dtype != first.dtype or tensor.device != first.device:
            raise InputError(
                f"{_place(index, base is not None)} is {described(tensor)}; "
                f"expected {described(first)} as {_place(0, base is not None)}"
            )
    return tensors


def check_many(
    bases: Sequence[Tensor], models: Sequence[Tensor], k: int, groups: Groups, *, values: bool = True
) -> list[list[Tensor]]:
    """All tensors of each parameter of a call, whose models are k for each, one parameter after the other.

    Raises InputError where numbers do not fit, or naming the parameter whose tensors do not, as `check`.
    """
    if k < 1 or not models or len(models) % k or len(bases) not in (0, len(models) // k):
        raise InputError(f"there are {len(models)} models and {len(bases)} bases; expected {k} models for each base")
    found: list[list[Tensor]] = []
    for index in range(len(models) // k):
        try:
            own = models[index * k : (index + 1) * k]
            tensors = check(bases[index] if bases else None, own, groups, values=values)
        except InputError as error:
            raise InputError(f"parameter {index}: {error}") from error
        if tensors[0].dtype != models[0].dtype or tensors[0].device != models[0].device:
            raise InputError("parameters differ in dtype or device; expected all alike")
        found.append(tensors)
    return found


def check_plain(tensor: Tensor, place: str | int, based: bool = False, values: bool = True) -> None:
    """Raises InputError where a tensor's elements are not there to be read, or not floating.

    place: its name, or its number among the tensors of a call, the first of which is the base where there is one.
    """
    reason = unfit(tensor, values=values)
    if reason is None and tensor.dtype not in FLOATING:
        reason = f"{tensor.dtype}; expected one of {', '.join(str(dtype) for dtype in FLOATING)}"
    if reason is not None:
        raise InputError(f"{place if isinstance(place, str) else _place(place, based)} is {reason}")


def _place(index: int, based: bool) -> str:
    """The name of a tensor by its number among all of a call."""
    if based and index == 0:
        return "base"
    return f"models[{index - based}]"


def require_constant(operator: str, tensors: Sequence[Tensor]) -> None:
    """Raises InputError where autograd would want a gradient that `operator` does not have."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise no_gradient(operator)


def no_gradient(operator: str) -> InputError:
    """What is said where autograd wants one."""
    return InputError(
        f"{operator} has no gradient, and a tensor requires one; call it under torch.no_grad() or detach the tensor"
    )


def require_span(objective: Objective, optimizer: object, operator: str) -> None:
    """Raises InputError where d would leave the span of the task vectors."""
    if not isinstance(optimizer, (SGD, Converge)) or not objective.euclidean:
        raise InputError(
            f"{type(optimizer).__name__} with penalty {objective.penalty} leaves the span of the task vectors; "
            f"{operator} needs SGD or Converge with a Euclidean penalty"
        )


def require_elementwise(optimizer: object) -> None:
    """Raises InputError where an optimiser does not iterate on the elements of d."""
    if not isinstance(optimizer, (SGD, Adam)):
        raise InputError(f"optimizer is {optimizer!r}; expected awd_fast.SGD or Adam")


def check_dtype(dtype: object) -> None:
    """Raises InputError for a dtype that no result can have."""
    if dtype not in FLOATING:
        raise InputError(f"dtype is {dtype}; expected one of {', '.join(str(d) for d in FLOATING)}")


def check_gram(gram: Tensor) -> None:
    """Raises InputError where G is not float64 [R, K, K]."""
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.dtype != torch.float64 or gram.shape[1] == 0:
        raise InputError(f"gram is {gram.dtype} {list(gram.shape)}; expected float64 [R, K, K] with K of 1 or more")


def check_weights(weights: Tensor, models: Sequence[Tensor], groups: Groups) -> None:
    """Raises InputError where the weights of `combine` are not [R, K] or [1, K]."""
    count, k = group_count(models[0], groups), len(models)
    check_plain(weights, "weights", values=False)
    if weights.ndim != 2 or weights.shape[1] != k or (weights.shape[0] != 1 and weights.shape[0] != count):
        raise InputError(f"weights is {list(weights.shape)}; expected [{count}, {k}] or [1, {k}]")


def check_gradient(gradient: Tensor, like: Tensor) -> None:
    """Raises InputError where the gradient of `multi_dot` is not dense, floating and of the models' shape."""
    check_plain(gradient, "gradient", values=False)
    if gradient.shape != like.shape or gradient.device != like.device:
        raise InputError(
            f"gradient is {described(gradient)}; expected a floating tensor {list(like.shape)} on {like.device}"
        )


def check_rows(weights: Tensor, models: Sequence[Tensor], groups: Groups) -> None:
    """Raises InputError where `merge_rows` has no single pass, or its weights are not [K]."""
    if groups not in ("row", "column"):
        raise InputError(f"groups is {groups!r}; expected row or column: other groups do not fit in one pass")
    check_plain(weights, "weights", values=False)
    if weights.shape != (len(models),):
        raise InputError(f"weights is {described(weights)}; expected [{len(models)}], one number per model")


def check_total(total: object, count: int = 1) -> None:
    """Raises InputError where `total` is not None and no number of groups of a parameter that has these `count`."""
    if total is None:
        return
    if isinstance(total, bool) or not isinstance(total, int) or total < 1 or total < count:
        raise InputError(f"total is {total!r}; expected an integer of {max(count, 1)} or more, the groups of the whole")


def check_slope(slope: Tensor, k: int) -> None:
    """Raises InputError where the slope of `adam_step` is not float64 [K + 1]."""
    if slope.dtype != torch.float64 or slope.shape != (k + 1,):
        raise InputError(f"slope is {described(slope)}; expected float64 [{k + 1}]")


def check_step(step: object) -> None:
    """Raises InputError where the number of a step is none."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise InputError(f"step is {step!r}; expected an integer of 1 or more")


def check_l1(l1: object) -> None:
    """Raises InputError where the weight of an l1 penalty is no number of 0 or more."""
    if real("l1", l1) < 0.0:
        raise InputError(f"l1 is {l1!r}; expected a number of 0 or more")


def check_state(state: dict[str, Tensor | None], like: Tensor) -> dict[str, Tensor]:
    """The tensors that `adam_step` changes. Raises InputError where one is missing, of another shape, or has gaps."""
    dtype, checked = compute_dtype(like.dtype), {}
    for name, tensor in state.items():
        if tensor is None or tensor.dtype != dtype or tensor.shape != like.shape or tensor.device != like.device:
            raise InputError(
                f"{name} is {described(tensor)}; "
                f"expected {dtype} {list(like.shape)} on {like.device} as the models' shape"
            )
        if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_neg():
            raise InputError(f"{name} is not contiguous; expected a contiguous tensor, for it is changed in place")
        checked[name] = tensor
    return checked


def check_apart(state: dict[str, Tensor], inputs: list[Tensor]) -> None:
    """Raises InputError where memory that is written is also something else's."""
    names = list(state)
    for index, name in enumerate(names):
        others = [state[other] for other in names[index + 1 :]]
        if any(_overlap(state[name], other) for other in [*others, *inputs]):
            raise InputError(f"{name} shares memory with another tensor of the call; expected tensors apart")


def described(value: object) -> str:
    """A value in the words of an error."""
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


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
