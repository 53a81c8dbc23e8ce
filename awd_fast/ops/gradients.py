"""The gradients of `gram`, `combine` and `multi_dot`, one task vector at a time in plain PyTorch but for `dweights`.

With t_j = models[j] - base (or models[j] without a base) and a gradient g that arrives:

    combine   dweights_rj = <t_rj, g_r>    dmodels_j = w_rj g            dbase = (1 - sum_j w_rj) g
    gram      dmodels_i = sum_j (g_ij + g_ji) t_j                        dbase = - sum_i dmodels_i
    multi_dot dgradient_r = sum_j g_rj t_rj    dmodels_rj = g_rj gradient_r  dbase = - sum_j dmodels_j

`dweights` is the operator `multi_dot`, run by the backend that the call of `combine` named.

They are differentiable themselves. The other operators have none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awd_fast.objective import Groups
from awd_fast.ops.reference import compute_dtype, group_view, ungroup, weighted_sum


def keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What `combine_backward` reads."""
    base, models, weights, ctx.groups = inputs[:4]
    ctx.backend = inputs[5] if len(inputs) > 5 else None  # the dispatcher leaves out what has its default
    ctx.save_for_backward(weights, base, *models)


def combine_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    """Gradients of the arguments of `combine`."""
    weights, base, *models = ctx.saved_tensors
    groups: Groups = ctx.groups
    shape, stored, compute = models[0].shape, models[0].dtype, compute_dtype(models[0].dtype)
    need_base, need_models, need_weights = ctx.needs_input_grad[:3]
    g = group_view(slope.to(compute), groups)
    factors = weights.to(g.device, compute)

    def back(part: Tensor) -> Tensor:
        return ungroup(part, shape, groups).to(stored)

    to_base = back((1.0 - factors.sum(dim=1, keepdim=True)) * g) if base is not None and need_base else None
    wanted = _flags(need_models, len(models))
    to_models = [back(factors[:, j, None] * g) if wanted[j] else None for j in range(len(models))]
    to_weights = None
    if need_weights:
        # One row of weights is the same for every group: its gradient is that of the tensor as one group.
        kind: Groups = groups if weights.shape[0] > 1 else "tensor"
        products = torch.ops.awd_fast.multi_dot.default(base, models, slope, kind, ctx.backend)
        to_weights = products.to(weights.device, weights.dtype)
    return _as_given(ctx, to_base, to_models, to_weights)


def keep_multi_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What `multi_dot_backward` reads."""
    base, models, gradient, ctx.groups = inputs[:4]
    ctx.save_for_backward(gradient, base, *models)


def multi_dot_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    """Gradients of the arguments of `multi_dot`."""
    gradient, base, *models = ctx.saved_tensors
    groups: Groups = ctx.groups
    shape, stored, compute = models[0].shape, models[0].dtype, compute_dtype(models[0].dtype)
    need_base, need_models, need_gradient = ctx.needs_input_grad[:3]
    g = group_view(gradient.to(compute), groups)
    factors = slope.to(compute)

    def back(weights: Tensor) -> Tensor:
        return ungroup(weights * g, shape, groups).to(stored)

    to_base = back(-factors.sum(dim=1, keepdim=True)) if base is not None and need_base else None
    wanted = _flags(need_models, len(models))
    to_models = [back(factors[:, j, None]) if wanted[j] else None for j in range(len(models))]
    to_gradient = None
    if need_gradient:
        to_gradient = ungroup(weighted_sum(base, models, factors, groups), shape, groups).to(gradient.dtype)
    return _as_given(ctx, to_base, to_models, to_gradient)


def keep_gram(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What `gram_backward` reads."""
    base, models, ctx.groups = inputs[:3]
    ctx.save_for_backward(base, *models)


def gram_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    """Gradients of the arguments of `gram`."""
    base, *models = ctx.saved_tensors
    need_base, need_models = ctx.needs_input_grad[:2]
    factors = slope + slope.mT  # [R, K, K]

    def back(weights: Tensor) -> Tensor:
        part = weighted_sum(base, models, weights, ctx.groups)
        return ungroup(part, models[0].shape, ctx.groups).to(models[0].dtype)

    wanted = _flags(need_models, len(models))
    to_models = [back(factors[:, i]) if wanted[i] else None for i in range(len(models))]
    to_base = back(-factors.sum(dim=1)) if base is not None and need_base else None
    return _as_given(ctx, to_base, to_models)


def _as_given(ctx: Any, *found: Any) -> tuple[Any, ...]:
    """The gradients, with None for each option that was given: the dispatcher leaves out those at their defaults."""
    return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))


def _flags(needed: bool | Sequence[bool], count: int) -> list[bool]:
    """Which models want a gradient: autograd gives a list, or one answer for none."""
    return [needed] * count if isinstance(needed, bool) else list(needed)
