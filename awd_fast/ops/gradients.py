"""The gradients of `gram`, `combine` and `multi_dot`, one task vector at a time in plain PyTorch but for `dweights`.

With t_j = models[j] - base (or models[j] without a base) and a gradient g that arrives:

    combine   dweights_rj = <t_rj, g_r>    dmodels_j = w_rj g            dbase = (1 - sum_j w_rj) g
    gram      dmodels_i = sum_j (g_ij + g_ji) t_j                        dbase = - sum_i dmodels_i
    multi_dot dgradient_r = sum_j g_rj t_rj    dmodels_rj = g_rj gradient_r  dbase = - sum_j dmodels_j

`dweights` is the operator `multi_dot`, run by the backend that the call of `combine` named; that of `combine_many` is
`multi_dot_many`, so that it takes one call as well. Each operator over many parameters has the gradients of its
parameters one by one.

They are differentiable themselves. The other operators have none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awd_fast.objective import Groups
from awd_fast.ops.reference import compute_dtype, group_view, ungroup, weighted_sum

Slopes = tuple[Tensor | None, list[Tensor | None]]
"""The gradients of a base and its models; None where none is wanted."""


def _combine(
    base: Tensor | None, models: list[Tensor], weights: Tensor, slope: Tensor, groups: Groups, needs: list[bool]
) -> Slopes:
    """Gradients of base and models. needs: which are wanted, the base's first."""
    if not any(needs):
        return None, [None] * len(models)
    g = group_view(slope.to(compute_dtype(models[0].dtype)), groups)
    factors = weights.to(g.device, g.dtype)

    def back(part: Tensor) -> Tensor:
        return ungroup(part, models[0].shape, groups).to(models[0].dtype)

    to_base = back((1.0 - factors.sum(dim=1, keepdim=True)) * g) if needs[0] else None
    return to_base, [back(factors[:, j, None] * g) if need else None for j, need in enumerate(needs[1:])]


def _multi_dot(
    base: Tensor | None,
    models: list[Tensor],
    gradient: Tensor,
    slope: Tensor,
    groups: Groups,
    needs: list[bool],
    need_gradient: bool,
) -> tuple[Slopes, Tensor | None]:
    """Gradients of base and models, and of the gradient."""
    shape, compute = models[0].shape, compute_dtype(models[0].dtype)
    g = group_view(gradient.to(compute), groups)
    factors = slope.to(compute)

    def back(weights: Tensor) -> Tensor:
        return ungroup(weights * g, shape, groups).to(models[0].dtype)

    to_base = back(-factors.sum(dim=1, keepdim=True)) if needs[0] else None
    to_models = [back(factors[:, j, None]) if need else None for j, need in enumerate(needs[1:])]
    to_gradient = None
    if need_gradient:
        to_gradient = ungroup(weighted_sum(base, models, factors, groups), shape, groups).to(gradient.dtype)
    return (to_base, to_models), to_gradient


def _gram(base: Tensor | None, models: list[Tensor], slope: Tensor, groups: Groups, needs: list[bool]) -> Slopes:
    """Gradients of base and models."""
    factors = slope + slope.mT  # [R, K, K]

    def back(weights: Tensor) -> Tensor:
        part = weighted_sum(base, models, weights, groups)
        return ungroup(part, models[0].shape, groups).to(models[0].dtype)

    to_base = back(-factors.sum(dim=1)) if needs[0] else None
    return to_base, [back(factors[:, i]) if need else None for i, need in enumerate(needs[1:])]


def keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What `combine_backward` reads."""
    base, models, weights, ctx.groups = inputs[:4]
    ctx.backend = inputs[5] if len(inputs) > 5 else None  # the dispatcher leaves out what has its default
    ctx.save_for_backward(weights, base, *models)


def combine_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    """Gradients of the arguments of `combine`."""
    weights, base, *models = ctx.saved_tensors
    found = _combine(base, models, weights, slope, ctx.groups, _needs(ctx, base, models))
    to_weights = None
    if ctx.needs_input_grad[2]:
        kind = _kind(weights, ctx.groups)
        products = torch.ops.awd_fast.multi_dot.default(base, models, slope, kind, ctx.backend)
        to_weights = products.to(weights.device, weights.dtype)
    return _as_given(ctx, *found, to_weights)


def keep_multi_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What `multi_dot_backward` reads."""
    base, models, gradient, ctx.groups = inputs[:4]
    ctx.save_for_backward(gradient, base, *models)


def multi_dot_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    """Gradients of the arguments of `multi_dot`."""
    gradient, base, *models = ctx.saved_tensors
    needs = _needs(ctx, base, models)
    found, to_gradient = _multi_dot(base, models, gradient, slope, ctx.groups, needs, ctx.needs_input_grad[2])
    return _as_given(ctx, *found, to_gradient)


def keep_gram(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What `gram_backward` reads."""
    base, models, ctx.groups = inputs[:3]
    ctx.save_for_backward(base, *models)


def gram_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    """Gradients of the arguments of `gram`."""
    base, *models = ctx.saved_tensors
    return _as_given(ctx, *_gram(base, models, slope, ctx.groups, _needs(ctx, base, models)))


def keep_combine_many(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """What `combine_many_backward` reads."""
    bases, models, weights, ctx.k, ctx.groups = inputs[:5]
    ctx.based = len(bases) > 0
    ctx.backend = inputs[6] if len(inputs) > 6 else None
    ctx.save_for_backward(*bases, *models, *weights)


def combine_many_backward(ctx: Any, slopes: list[Tensor]) -> tuple[Any, ...]:
    """Gradients of the arguments of `combine_many`."""
    parameters, weights = _parameters(ctx, len(slopes))
    needs, need_weights = _needs_of_each(ctx, parameters)
    found = [
        _combine(*parameter, factors, slope, ctx.groups, need)
        for parameter, factors, slope, need in zip(parameters, weights, slopes, needs, strict=True)
    ]
    to_weights: list[Tensor | None] = [None] * len(slopes)
    kinds = [_kind(factors, ctx.groups) for factors in weights]
    for kind in dict.fromkeys(kinds):
        asked = [index for index, need in enumerate(need_weights) if need and kinds[index] == kind]
        if not asked:
            continue
        bases = [base for base in (parameters[index][0] for index in asked) if base is not None]
        models = [model for index in asked for model in parameters[index][1]]
        given = [slopes[index] for index in asked]
        products = torch.ops.awd_fast.multi_dot_many.default(bases, models, given, ctx.k, kind, ctx.backend)
        for index, product in zip(asked, products, strict=True):
            to_weights[index] = product.to(weights[index].device, weights[index].dtype)
    return _as_given(ctx, *_gathered(ctx, found), to_weights)


def keep_multi_dot_many(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """What `multi_dot_many_backward` reads."""
    bases, models, gradients, ctx.k, ctx.groups = inputs[:5]
    ctx.based = len(bases) > 0
    ctx.save_for_backward(*bases, *models, *gradients)


def multi_dot_many_backward(ctx: Any, slopes: list[Tensor]) -> tuple[Any, ...]:
    """Gradients of the arguments of `multi_dot_many`."""
    parameters, gradients = _parameters(ctx, len(slopes))
    needs, need_gradients = _needs_of_each(ctx, parameters)
    found = [
        _multi_dot(*parameter, gradient, slope, ctx.groups, need, wanted)
        for parameter, gradient, slope, need, wanted in zip(
            parameters, gradients, slopes, needs, need_gradients, strict=True
        )
    ]
    return _as_given(ctx, *_gathered(ctx, [slopes for slopes, _ in found]), [own for _, own in found])


def keep_gram_many(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """What `gram_many_backward` reads."""
    bases, models, ctx.k, ctx.groups = inputs[:4]
    ctx.based = len(bases) > 0
    ctx.save_for_backward(*bases, *models)


def gram_many_backward(ctx: Any, slopes: list[Tensor]) -> tuple[Any, ...]:
    """Gradients of the arguments of `gram_many`."""
    parameters, _ = _parameters(ctx, len(slopes))
    needs, _ = _needs_of_each(ctx, parameters)
    found = [
        _gram(*parameter, slope, ctx.groups, need)
        for parameter, slope, need in zip(parameters, slopes, needs, strict=True)
    ]
    return _as_given(ctx, *_gathered(ctx, found))


def _kind(weights: Tensor, groups: Groups) -> Groups:
    """One row of weights is the same for every group: its gradient is that of the tensor as one group."""
    return groups if weights.shape[0] > 1 else "tensor"


def _needs(ctx: Any, base: Tensor | None, models: list[Tensor]) -> list[bool]:
    """Which of the base and the models want a gradient."""
    return [base is not None and bool(ctx.needs_input_grad[0]), *_flags(ctx.needs_input_grad[1], len(models))]


def _parameters(ctx: Any, count: int) -> tuple[list[tuple[Tensor | None, list[Tensor]]], list[Tensor]]:
    """The base and the models of each of `count` parameters from what was kept, and what was kept behind them."""
    saved, k = list(ctx.saved_tensors), ctx.k
    bases = saved[:count] if ctx.based else [None] * count
    models = saved[count * ctx.based :]
    parameters = [(base, models[at * k : (at + 1) * k]) for at, base in enumerate(bases)]
    return parameters, models[count * k :]


def _needs_of_each(ctx: Any, parameters: list[Any]) -> tuple[list[list[bool]], list[bool]]:
    """`_needs` of each parameter, and of the one argument that each has behind the models."""
    count, k = len(parameters), ctx.k
    bases = _flags(ctx.needs_input_grad[0] if ctx.based else False, count)
    models = _flags(ctx.needs_input_grad[1], count * k)
    each = [[bases[at], *models[at * k : (at + 1) * k]] for at in range(count)]
    return each, _flags(ctx.needs_input_grad[2], count)


def _gathered(ctx: Any, found: list[Slopes]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of all bases, as many as there are, and of all models."""
    bases = [base for base, _ in found] if ctx.based else []
    return bases, [model for _, models in found for model in models]


def _as_given(ctx: Any, *found: Any) -> tuple[Any, ...]:
    """The gradients, with None for each option that was given: the dispatcher leaves out those at their defaults."""
    return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))


def _flags(needed: bool | Sequence[bool], count: int) -> list[bool]:
    """Which models want a gradient: autograd gives a list, or one answer for none."""
    return [needed] * count if isinstance(needed, bool) else list(needed)
