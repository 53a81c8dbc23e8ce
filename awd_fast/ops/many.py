"""Operators over the parameters of a whole model at once: one launch where a backend has it, a loop elsewhere.

A GPU is filled by a model, not by one of its hundreds of tensors. Each parameter keeps its own groups, its own loss and
its own history: results are those of the operators in `awd_fast.ops`, parameter by parameter.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import SGD, Converge, Groups, Objective
from awd_fast.ops import backends
from awd_fast.ops.checks import (
    check,
    check_dtype,
    check_gradient,
    check_rows,
    check_weights,
    require_constant,
    require_span,
    require_tensor,
    typed,
)

Parameter = tuple[Tensor | None, Sequence[Tensor]]
"""A base (or None, where the models are task vectors already) and K models like it."""


def select_many(operator: str, backend: str | None, parameters: Sequence[Parameter]) -> ModuleType | None:
    """The backend that runs `operator` for all these parameters in one call, or None where each goes its own way."""
    chosen = None
    for base, models in parameters:
        one = backends.select(operator, backend, [*models] if base is None else [base, *models])
        if chosen not in (None, one) or not hasattr(one, f"{operator}_many"):
            return None
        chosen = one
    return chosen


def alike(parameters: Sequence[Parameter]) -> bool:
    """Whether one call can take them: the same K, dtype and device, and all or none with a base."""
    kinds = {(len(m), m[0].dtype, m[0].device, base is None) for base, m in parameters}
    return len(kinds) <= 1


def checked(parameters: Sequence[Parameter], groups: Groups) -> list[Parameter]:
    """The parameters, each checked as `awd_fast.ops.gram` would. Raises InputError naming which one does not fit."""
    found: list[Parameter] = []
    for index, (base, models) in enumerate(parameters):
        try:
            models = typed(base, models, groups)
            check(base, models, groups)
        except InputError as error:
            raise InputError(f"parameter {index}: {error}") from error
        found.append((base, models))
    return found


def gram_many(parameters: Sequence[Parameter], groups: Groups = "row", *, backend: str | None = None) -> list[Tensor]:
    """`awd_fast.ops.gram` of each parameter: G [R, K, K] float64. Not differentiable."""
    parameters = checked(parameters, groups)
    return _run("gram", parameters, [()] * len(parameters), (groups,), backend)


def combine_many(
    parameters: Sequence[Parameter],
    weights: Sequence[Tensor],
    groups: Groups = "row",
    *,
    dtypes: Sequence[torch.dtype | None] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """`awd_fast.ops.combine` of each parameter with its weights [R, K] or [1, K] and its dtype. Not differentiable."""
    parameters = checked(parameters, groups)
    targets = _targets(parameters, dtypes)
    if len(weights) != len(parameters):
        raise InputError(f"weights has {len(weights)} tensors; expected {len(parameters)}, one per parameter")
    for (_, models), factors in zip(parameters, weights, strict=True):
        check_weights(factors, models, groups)
    moved = [factors.to(models[0].device) for (_, models), factors in zip(parameters, weights, strict=True)]
    own = list(zip(moved, [groups] * len(parameters), targets, strict=True))
    return _run("combine", parameters, own, (), backend)


def multi_dot_many(
    parameters: Sequence[Parameter],
    gradients: Sequence[Tensor],
    groups: Groups = "row",
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """`awd_fast.ops.multi_dot` of each parameter with its gradient: [R, K] float64. Not differentiable."""
    parameters = checked(parameters, groups)
    if len(gradients) != len(parameters):
        raise InputError(f"gradients has {len(gradients)} tensors; expected {len(parameters)}, one per parameter")
    for (_, models), gradient in zip(parameters, gradients, strict=True):
        require_tensor("gradient", gradient)
        check_gradient(gradient, models[0])
    require_constant("multi_dot_many", gradients)
    return _run("multi_dot", parameters, [(gradient,) for gradient in gradients], (groups,), backend)


def merge_rows_many(
    parameters: Sequence[Parameter],
    weights: Tensor,
    objective: Objective,
    optimizer: SGD | Converge,
    groups: Groups = "row",
    *,
    dtypes: Sequence[torch.dtype | None] | None = None,
    backend: str | None = None,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The fields of `awd_fast.ops.Merged` for each parameter; the weights m [K] are those of all. No gradients."""
    parameters = checked(parameters, groups)
    require_span(objective, optimizer, "merge_rows")
    for _, models in parameters:
        check_rows(weights, models, groups)
    targets = _targets(parameters, dtypes)
    factors = weights.detach().to("cpu", torch.float64)  # once: from a GPU it waits
    own = [(factors, objective, optimizer, groups, dtype) for dtype in targets]
    return _run("merge_rows", parameters, own, (), backend)


def _targets(parameters: Sequence[Parameter], dtypes: Sequence[torch.dtype | None] | None) -> list[torch.dtype]:
    given = [None] * len(parameters) if dtypes is None else list(dtypes)
    if len(given) != len(parameters):
        raise InputError(f"dtypes has {len(given)} entries; expected {len(parameters)}, one per parameter")
    targets = [
        models[0].dtype if dtype is None else dtype for (_, models), dtype in zip(parameters, given, strict=True)
    ]
    for dtype in targets:
        check_dtype(dtype)
    return targets


def _run(
    operator: str,
    parameters: Sequence[Parameter],
    own: Sequence[tuple[Any, ...]],
    shared: tuple[Any, ...],
    backend: str | None,
) -> list[Any]:
    """One call of `<operator>_many(parameters, own, *shared)`, or a call of the operator for each parameter.

    own: the arguments behind the tensors that each parameter has for itself; shared: those behind them.
    """
    backends.require_known(backend)
    for base, models in parameters:
        require_constant(f"{operator}_many", [*models] if base is None else [base, *models])
    chosen = select_many(operator, backend, parameters) if alike(parameters) else None
    if chosen is not None and parameters:
        together: Callable[..., list[Any]] = getattr(chosen, f"{operator}_many")
        return together(parameters, own, *shared)
    found = []
    for (base, models), arguments in zip(parameters, own, strict=True):
        tensors = [*models] if base is None else [base, *models]
        single: Callable[..., Any] = getattr(backends.select(operator, backend, tensors), operator)
        found.append(single(base, models, *arguments, *shared))
    return found
