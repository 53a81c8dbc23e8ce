"""Operators over the parameters of a whole model at once: one launch where a backend has it, a loop elsewhere.

A GPU is filled by a model, not by one of its hundreds of tensors. Each parameter keeps its own groups, its own loss and
its own history: results and gradients are those of the operators in `awd_fast.ops`, parameter by parameter. Parameters
of one K, dtype and device, and of one dtype of the result, go together; each such kind is a call of
`torch.ops.awd_fast` (`awd_fast.ops.many_library`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import SGD, Converge, Groups, Objective
from awd_fast.ops import backends, many_library  # noqa: F401 - registers torch.ops.awd_fast.gram_many and the others
from awd_fast.ops.checks import check, check_dtype, require_span, typed
from awd_fast.ops.inputs import given
from awd_fast.ops.library import flat

Parameter = tuple[Tensor | None, Sequence[Tensor]]
"""A base (or None, where the models are task vectors already) and K models like it, as tensors or numpy arrays."""


def checked(parameters: Sequence[Parameter], groups: Groups) -> list[tuple[Tensor | None, list[Tensor]]]:
    """The parameters, each checked as `awd_fast.ops.gram` would. Raises InputError naming which one does not fit."""
    found: list[tuple[Tensor | None, list[Tensor]]] = []
    for index, (base, models) in enumerate(parameters):
        try:
            base, models = typed(base, models, groups)
            check(base, models, groups, values=False)
        except InputError as error:
            raise InputError(f"parameter {index}: {error}") from error
        found.append((base, models))
    return found


def gram_many(parameters: Sequence[Parameter], groups: Groups = "row", *, backend: str | None = None) -> list[Tensor]:
    """`awd_fast.ops.gram` of each parameter: G [R, K, K] float64. Differentiable."""
    every = checked(parameters, groups)
    operator = torch.ops.awd_fast.gram_many.default
    return _by_kind(every, lambda of, bases, models, k, _: operator(bases, models, k, groups, backend), backend)


def combine_many(
    parameters: Sequence[Parameter],
    weights: Sequence[Tensor],
    groups: Groups = "row",
    *,
    dtypes: Sequence[torch.dtype | None] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """`awd_fast.ops.combine` of each parameter with its weights [R, K] or [1, K] and its dtype. Differentiable.

    The gradient with respect to all weights is one call of `multi_dot_many`.
    """
    every = checked(parameters, groups)
    targets = _targets(every, dtypes)
    factors = _each("weights", weights, every)
    operator = torch.ops.awd_fast.combine_many.default
    call: _Call = lambda of, bases, models, k, dtype: operator(  # noqa: E731
        bases, models, [factors[index] for index in of], k, groups, dtype, backend
    )
    return _by_kind(every, call, backend, targets)


def multi_dot_many(
    parameters: Sequence[Parameter],
    gradients: Sequence[Tensor],
    groups: Groups = "row",
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """`awd_fast.ops.multi_dot` of each parameter with its gradient: [R, K] float64. Differentiable."""
    every = checked(parameters, groups)
    slopes = _each("gradients", gradients, every)
    operator = torch.ops.awd_fast.multi_dot_many.default
    call: _Call = lambda of, bases, models, k, _: operator(  # noqa: E731
        bases, models, [slopes[index] for index in of], k, groups, backend
    )
    return _by_kind(every, call, backend)


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
    every = checked(parameters, groups)
    require_span(objective, optimizer, "merge_rows")
    factors = given("weights", weights)
    targets = _targets(every, dtypes)
    kind = Converge if isinstance(optimizer, Converge) else SGD
    operators = torch.ops.awd_fast.merge_rows_many
    operator = operators.converge if kind is Converge else operators.sgd
    options = (*flat(objective, Objective), *flat(optimizer, kind), groups)
    call: _Call = lambda of, bases, models, k, dtype: [  # noqa: E731
        *zip(*operator(bases, models, factors, k, *options, dtype, backend), strict=True)
    ]
    return _by_kind(every, call, backend, targets)


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


def _each(name: str, values: Sequence[Any], parameters: Sequence[Parameter]) -> list[Tensor]:
    """The tensors that each parameter has for itself."""
    if len(values) != len(parameters):
        raise InputError(f"{name} has {len(values)} tensors; expected {len(parameters)}, one per parameter")
    return [given(f"{name}[{index}]", value) for index, value in enumerate(values)]


_Call = Callable[[list[int], list[Tensor], list[Tensor], int, torch.dtype | None], list[Any]]
"""An operator on parameters of one kind: their places among all, bases, models, K, and the dtype of the results."""


def _by_kind(
    parameters: Sequence[tuple[Tensor | None, list[Tensor]]],
    call: _Call,
    backend: str | None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[Any]:
    """What a call for each kind of parameters gives, in the order of the parameters."""
    backends.require_known(backend)
    kinds = [
        (len(models), models[0].dtype, models[0].device, base is None, None if dtypes is None else dtypes[index])
        for index, (base, models) in enumerate(parameters)
    ]
    found: list[Any] = [None] * len(parameters)
    left = list(range(len(parameters)))
    while left:  # no dict of lists: the compiler of PyTorch 2.4 does not know that
        kind = kinds[left[0]]
        of = [index for index in left if kinds[index] == kind]
        left = [index for index in left if kinds[index] != kind]
        bases = [base for base in [parameters[index][0] for index in of] if base is not None]
        models = [model for index in of for model in parameters[index][1]]
        for index, result in zip(of, call(of, bases, models, kind[0], kind[4]), strict=True):
            found[index] = result
    return found
