"""What is wrong with an operator's result: a sentence, or None. Checked before any speed is reported.

Sums and combinations are compared with the formula in float64; the bounds are one rounding to the computing type for
each operation, as many as there are. Descents are compared with the reference.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from awd_fast import statistics
from awd_fast.objective import SGD, Converge, Groups, Objective
from awd_fast.ops import reference

COMPARED = 30  # iterations with |cos| before rounding can decide the way
EPS = torch.finfo(torch.float64).eps


def gentle(optimizer: SGD | Converge, gram: Tensor) -> SGD | Converge:
    """SGD with a step that suits these norms: where steps are too long, rounding decides the trajectory."""
    if isinstance(optimizer, Converge):
        return optimizer
    square = gram.diagonal(dim1=1, dim2=2).mean()
    return replace(optimizer, lr=0.005 * len(gram) * float(square))


def exact_vectors(base: Tensor, models: Sequence[Tensor], groups: Groups) -> Tensor:
    """t [R, K, D] float64."""
    return reference.task_vectors(base.double(), [model.double() for model in models], groups)


def wrong_gram(found: Tensor, base: Tensor, models: Sequence[Tensor], groups: Groups) -> str | None:
    """G against float64: two differences rounded to float32, sums in float64."""
    exact = statistics.gram(exact_vectors(base, models, groups))
    size = base.numel() // max(len(exact), 1)
    norms = exact.diagonal(dim1=1, dim2=2).sqrt()
    bound = (2.0**-22 + 4.0 * (size + 8) * EPS) * norms[:, :, None] * norms[:, None, :]
    return beyond("gram", found, exact, bound)


def wrong_multi_dot(
    found: Tensor, base: Tensor, models: Sequence[Tensor], gradient: Tensor, groups: Groups
) -> str | None:
    """<g, t_j> against float64: a difference rounded to float32, sums in float64."""
    t, g = exact_vectors(base, models, groups), reference.group_view(gradient.double(), groups)[:, None, :]
    size = base.numel() // max(len(t), 1)
    bound = (2.0**-23 + 4.0 * (size + 8) * EPS) * (t * g).abs().sum(dim=2)
    return beyond("the products", found, (t * g).sum(dim=2), bound)


def wrong_combination(
    found: Tensor, base: Tensor, models: Sequence[Tensor], weights: Tensor, groups: Groups
) -> str | None:
    """base + sum_j w_j t_j against float64, for w [R, K]."""
    t = exact_vectors(base, models, groups) * weights.double()[:, :, None]
    exact = base.double() + reference.ungroup(t.sum(dim=1), base.shape, groups)
    size = reference.ungroup(t.abs().sum(dim=1), base.shape, groups)
    compute = torch.finfo(reference.compute_dtype(base.dtype)).eps
    stored = torch.finfo(found.dtype)
    bound = 2.0 * (len(models) + 3) * compute * size + 2.0 * max(stored.eps, compute) * exact.abs()
    return beyond("the merge", found.double(), exact, bound + stored.smallest_normal * stored.eps)


def wrong_losses(gram: Tensor, history: Tensor, objective: Objective, optimizer: SGD | Converge) -> str | None:
    """The losses of a descent against the reference's.

    With |cos|, rounding decides in the end which kinks are crossed: then only the start of the trajectory is compared,
    or for Converge the last loss, more loosely.
    """
    smooth = objective.similarity == "squared"
    if isinstance(optimizer, Converge):
        losses = reference.descend(gram, objective, optimizer)[1][-1:]
        history, tolerance = history[-1:], 1e-7 if smooth else 1e-2
    else:
        losses = reference.descend(gram, objective, optimizer if smooth else replace(optimizer, iterations=COMPARED))[1]
        history, tolerance = history[: len(losses)], 1e-7 if smooth else 1e-4
    return beyond("the loss", history, losses, tolerance * losses.abs() + 1e-9)


def wrong_end(gram: Tensor, found: Tensor, history: Tensor, objective: Objective) -> str | None:
    """The last loss against that of the coefficients, and the first against that of d = 0."""
    losses = []
    for coefficients in (torch.zeros_like(found), found):
        inner, square = statistics.span_moments(gram, coefficients)
        after = statistics.similarity(statistics.shifted_gram(gram, inner, square), objective).mean()
        losses.append(after + objective.alpha * statistics.penalty(square, objective).sum())
    exact = torch.stack(losses)
    return beyond("the first or last loss", history[[0, -1]], exact, 1e-6 * exact.abs() + 1e-7)


def beyond(what: str, found: Tensor, exact: Tensor, bound: Tensor) -> str | None:
    """Where |found - exact| is above the bound, or not a number."""
    if found.shape != exact.shape:
        return f"{what} is {list(found.shape)}; expected {list(exact.shape)}"
    right = (found - exact).abs() <= bound
    if bool(right.all()):
        return None
    excess = ((found - exact).abs() / bound).nan_to_num(torch.inf).max()
    return f"{what} is wrong in {int((~right).sum())} of {right.numel()} places, by up to {float(excess):.3g} bounds"


def first_wrong(reasons: Sequence[str | None]) -> str | None:
    """The first reason, or None."""
    return next((reason for reason in reasons if reason is not None), None)


def wrong_shift(found: Tensor, exact: Tensor) -> str | None:
    """d of Adam in float32 against float64: single elements may differ where their gradient nearly vanishes."""
    gap = float((found.double().reshape(exact.shape) - exact).norm() / exact.norm())
    return None if gap <= 1e-3 else f"d differs by {gap:.3g} of its norm"
