"""The gradients of `gram` and `combine`, in plain PyTorch, one task vector at a time.

With t_j = models[j] - base (or models[j] without a base) and a gradient g that arrives:

    combine   dweights_rj = <t_rj, g_r>    dmodels_j = w_rj g            dbase = (1 - sum_j w_rj) g
    gram      dmodels_i = sum_j (g_ij + g_ji) t_j                        dbase = - sum_i dmodels_i

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
    to_weights = _weights_gradient(base, models, g, weights, groups) if need_weights else None
    return _as_given(ctx, to_base, to_models, to_weights)


def _weights_gradient(
    base: Tensor | None, models: Sequence[Tensor], g: Tensor, weights: Tensor, groups: Groups
) -> Tensor:
    origin = None if base is None else group_view(base.to(g.dtype), groups)
    products = []
    for model in models:
        view = group_view(model.to(g.dtype), groups)
        products.append(((view if origin is None else view - origin) * g).sum(dim=1, dtype=torch.float64))
    found = torch.stack(products, dim=1)
    if weights.shape[0] == 1:
        found = found.sum(dim=0, keepdim=True)
    return found.to(weights.device, weights.dtype)


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
