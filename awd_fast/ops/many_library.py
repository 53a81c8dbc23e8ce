"""The operators over many parameters as `torch.ops.awd_fast.*`: schemas, implementations, shapes, gradients.

    gram_many(bases, models, k, groups, backend)                                -> Tensor[]
    combine_many(bases, models, weights, k, groups, dtype, backend)             -> Tensor[]
    multi_dot_many(bases, models, gradients, k, groups, backend)                -> Tensor[]
    merge_rows_many.sgd, .converge(bases, models, weights, k, OBJECTIVE, OPTIMIZER, groups, dtype, backend)
                                                        -> Tensor[] merged, gram, coefficients, history

The parameters of a call have one K (k), dtype and device, and all have a base or none has: bases is empty or one per
parameter, models has k for each, one parameter after the other. weights of `combine_many` and gradients are one per
parameter, the weights [K] of `merge_rows_many` those of all. The rest is as in `awd_fast.ops.library`. The functions of
`awd_fast.ops.many` take parameters of any kinds, and make a call for each kind.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import SGD, Converge, Groups, Objective
from awd_fast.ops import backends, checks, gradients, library

INPUTS = "Tensor[] bases, Tensor[] models"


def _run(
    operator: str,
    parameters: Sequence[list[Tensor]],
    k: int,
    own: Sequence[tuple[Any, ...]],
    shared: tuple[Any, ...],
    backend: str | None,
    beside: Sequence[Tensor] = (),
) -> list[Any]:
    """One call of a backend's `<operator>_many(parameters, own, *shared)`, or one of the operator for each parameter.

    parameters: all tensors of each. own: the arguments behind the tensors that each parameter has for itself; shared:
    those behind them. beside: of each parameter the tensor among `own` that the backend must be able to read as well.
    """
    pairs = [(tensors[0] if len(tensors) > k else None, tensors[-k:]) for tensors in parameters]
    read = [[*tensors, own] for tensors, own in zip(parameters, beside, strict=True)] if beside else parameters
    chosen = [backends.select(operator, backend, tensors) for tensors in read]
    together = _together(operator, chosen)
    if together is not None:
        return together(pairs, own, *shared)
    calls = zip(chosen, pairs, own, strict=True)
    return [getattr(one, operator)(base, models, *mine, *shared) for one, (base, models), mine in calls]


def _together(operator: str, chosen: Sequence[ModuleType]) -> Callable[..., list[Any]] | None:
    """What takes all parameters at once, or None where each goes its own way."""
    return getattr(chosen[0], f"{operator}_many", None) if len(set(chosen)) == 1 else None


def _alone(parameters: Sequence[list[Tensor]], k: int) -> list[list[Tensor]]:
    """The models of each parameter."""
    return [tensors[-k:] for tensors in parameters]


def _count(name: str, given: Sequence[Tensor], count: int) -> None:
    if len(given) != count:
        raise InputError(f"{name} has {len(given)} tensors; expected {count}, one per parameter")


def _gram(
    bases: list[Tensor], models: list[Tensor], k: int, groups: Groups = "row", backend: str | None = None
) -> list[Tensor]:
    parameters = checks.check_many(bases, models, k, groups)
    return _contiguous(_run("gram", parameters, k, [()] * len(parameters), (groups,), backend))


def _gram_fake(
    bases: list[Tensor], models: list[Tensor], k: int, groups: Groups = "row", backend: str | None = None
) -> list[Tensor]:
    parameters = checks.check_many(bases, models, k, groups, values=False)
    return [library._gram_fake(None, own, groups) for own in _alone(parameters, k)]


def _combine_checked(
    bases: list[Tensor], models: list[Tensor], weights: list[Tensor], k: int, groups: Groups, values: bool
) -> list[list[Tensor]]:
    parameters = checks.check_many(bases, models, k, groups, values=values)
    _count("weights", weights, len(parameters))
    for factors, own in zip(weights, _alone(parameters, k), strict=True):
        checks.check_weights(factors, own, groups)
    return parameters


def _combine(
    bases: list[Tensor],
    models: list[Tensor],
    weights: list[Tensor],
    k: int,
    groups: Groups = "row",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    parameters = _combine_checked(bases, models, weights, k, groups, True)
    dtype = models[0].dtype if dtype is None else dtype
    checks.check_dtype(dtype)
    weights = [factors.to(models[0].device) for factors in weights]
    own = [(factors, groups, dtype) for factors in weights]
    return _contiguous(_run("combine", parameters, k, own, (), backend, weights))


def _combine_fake(
    bases: list[Tensor],
    models: list[Tensor],
    weights: list[Tensor],
    k: int,
    groups: Groups = "row",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    parameters = _combine_checked(bases, models, weights, k, groups, False)
    alone = zip(_alone(parameters, k), weights, strict=True)
    return [library._combine_fake(None, own, factors, groups, dtype) for own, factors in alone]


def _multi_dot(
    bases: list[Tensor],
    models: list[Tensor],
    gradients: list[Tensor],
    k: int,
    groups: Groups = "row",
    backend: str | None = None,
) -> list[Tensor]:
    parameters = checks.check_many(bases, models, k, groups)
    _count("gradients", gradients, len(parameters))
    for gradient, tensors in zip(gradients, parameters, strict=True):
        checks.check_gradient(gradient, tensors[0])
    return _contiguous(_run("multi_dot", parameters, k, [(one,) for one in gradients], (groups,), backend, gradients))


def _multi_dot_fake(
    bases: list[Tensor],
    models: list[Tensor],
    gradients: list[Tensor],
    k: int,
    groups: Groups = "row",
    backend: str | None = None,
) -> list[Tensor]:
    parameters = checks.check_many(bases, models, k, groups, values=False)
    _count("gradients", gradients, len(parameters))
    alone = zip(_alone(parameters, k), gradients, strict=True)
    return [library._multi_dot_fake(None, own, gradient, groups) for own, gradient in alone]


def _define_merge_rows(kind: type) -> None:
    tail = library._Tail((Objective, kind), library.ROW_GROUPS | library.DTYPE | library.BACKEND)

    def read(
        bases: list[Tensor], models: list[Tensor], weights: Tensor, k: int, given: Sequence[Any], values: bool
    ) -> list[Any]:
        objective, optimizer, groups, dtype, backend = tail.read(given)
        parameters = checks.check_many(bases, models, k, groups, values=values)
        checks.check_rows(weights, models[:k], groups)
        checks.require_span(objective, optimizer, "merge_rows")
        dtype = models[0].dtype if dtype is None else dtype
        checks.check_dtype(dtype)
        return [parameters, objective, optimizer, groups, dtype, backend]

    def run(
        bases: list[Tensor], models: list[Tensor], weights: Tensor, k: int, *given: Any
    ) -> tuple[list[Tensor], ...]:
        parameters, *options, backend = read(bases, models, weights, k, given, True)
        weights = weights.detach().to("cpu", torch.float64)  # once: from a GPU it waits
        found = _run("merge_rows", parameters, k, [(weights, *options)] * len(parameters), (), backend)
        return tuple(_contiguous(each) for each in zip(*found, strict=True))

    def fake(
        bases: list[Tensor], models: list[Tensor], weights: Tensor, k: int, *given: Any
    ) -> tuple[list[Tensor], ...]:
        parameters, _, optimizer, groups, dtype, _ = read(bases, models, weights, k, given, False)
        found = [library._merge_rows_fake(own, optimizer, groups, dtype) for own in _alone(parameters, k)]
        return tuple([*each] for each in zip(*found, strict=True))

    name = f"merge_rows_many.{library._name(kind)}"
    results = "(Tensor[] merged, Tensor[] gram, Tensor[] coefficients, Tensor[] history)"
    library._register(name, f"({INPUTS}, Tensor weights, int k, {tail.schema}) -> {results}", run, fake)
    library._refuse_gradients(name)


def _contiguous(found: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in found]


def _define() -> None:
    plain = library._Tail((), library.ROW_GROUPS | library.BACKEND).schema
    typed = library._Tail((), library.ROW_GROUPS | library.DTYPE | library.BACKEND).schema
    for name, schema, run, fake, backward, keep in (
        ("gram_many", f"int k, {plain}", _gram, _gram_fake, gradients.gram_many_backward, gradients.keep_gram_many),
        (
            "combine_many",
            f"Tensor[] weights, int k, {typed}",
            _combine,
            _combine_fake,
            gradients.combine_many_backward,
            gradients.keep_combine_many,
        ),
        (
            "multi_dot_many",
            f"Tensor[] gradients, int k, {plain}",
            _multi_dot,
            _multi_dot_fake,
            gradients.multi_dot_many_backward,
            gradients.keep_multi_dot_many,
        ),
    ):
        library._register(name, f"({INPUTS}, {schema}) -> Tensor[]", run, fake)
        torch.library.register_autograd(f"{library.NAMESPACE}::{name}", backward, setup_context=keep)
    for spanning in (SGD, Converge):
        _define_merge_rows(spanning)


if not hasattr(torch.ops.awd_fast, "gram_many"):
    _define()
