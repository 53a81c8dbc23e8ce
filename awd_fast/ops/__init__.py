"""The operators: what each takes and gives, checked once here, whatever backend runs it.

Shapes: R groups of D elements, K tasks. A call names a backend ("native", "reference") or lets the fastest that takes
the call run it. Every function raises InputError with one sentence when shapes, dtypes or devices do not fit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective
from awd_fast.ops import backends, reference
from awd_fast.ops.checks import FLOATING, check
from awd_fast.ops.elementwise import Descent, adam_rows, adam_step, descend_groups
from awd_fast.ops.reference import compute_dtype

__all__ = [
    "FLOATING",
    "Descent",
    "Merged",
    "adam_rows",
    "adam_step",
    "check",
    "combine",
    "compute_dtype",
    "descend",
    "descend_elements",
    "descend_groups",
    "gram",
    "merge_rows",
]


def gram(
    base: Tensor | None, models: Sequence[Tensor], groups: Groups = "row", *, backend: str | None = None
) -> Tensor:
    """The Gram matrices of the task vectors t_i = models[i] - base: G [R, K, K] float64.

    base: a floating tensor of any shape, or None where `models` are task vectors already. models: K tensors like it.
    groups: "row", "column" or "tensor" (see `awd_fast.ops.reference.group_view` for tensors that are not 2-D).
    Differences and products are float32 (float64 for float64 storage), sums over a group float64.
    """
    tensors = check(base, models, groups)
    return backends.select("gram", backend, tensors).gram(base, models, groups)


def descend(
    gram: Tensor, objective: Objective, optimizer: SGD | Converge, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """All iterations of the optimiser on the coefficients of d = sum_j a_j t_j, from d = 0.

    gram: G [R, K, K] float64. Returns a [R, K] float64 and the loss at d_0, d_1, ... (float64, 1-D). The loss is the
    mean over the R groups plus the penalty's sum. Raises InputError for Adam and for l1, which leave the span.
    """
    if not isinstance(gram, Tensor):
        raise InputError(f"gram is {type(gram).__name__}; expected a tensor [R, K, K]")
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.dtype != torch.float64 or gram.shape[1] == 0:
        raise InputError(f"gram is {gram.dtype} {list(gram.shape)}; expected float64 [R, K, K] with K of 1 or more")
    _require_span(objective, optimizer, "descend")
    return backends.select("descend", backend, [gram]).descend(gram, objective, optimizer)


def descend_elements(vectors: Tensor, objective: Objective, optimizer: SGD | Adam | Converge) -> tuple[Tensor, Tensor]:
    """All iterations of an elementwise optimiser (Adam) or penalty (l1), from d = 0.

    vectors: t [R, K, D] float32 or float64. Returns d [R, D] of the same dtype and the loss at d_0, d_1, ... (float64).
    """
    if vectors.ndim != 3 or vectors.dtype not in (torch.float32, torch.float64) or vectors.shape[1] == 0:
        raise InputError(f"vectors is {vectors.dtype} {list(vectors.shape)}; expected float32 or float64 [R, K, D]")
    return reference.descend_elements(vectors, objective, optimizer)


def combine(
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Tensor,
    groups: Groups = "row",
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """base + sum_j w_rj (models[j] - base); without a base, sum_j w_rj models[j].

    weights: w [R, K], or [1, K] for every group alike. dtype: of the result, default the models'. The sum runs in
    float32 (float64 for float64 storage) over j in order; the result is rounded from float32 to 16-bit dtypes.
    """
    tensors = check(base, models, groups)
    count = reference.group_view(models[0], groups).shape[0]
    if not isinstance(weights, Tensor) or weights.dtype not in FLOATING:
        raise InputError("weights is not a floating tensor; expected [R, K] or [1, K]")
    if weights.ndim != 2 or weights.shape[0] not in (1, count) or weights.shape[1] != len(models):
        raise InputError(f"weights is {list(weights.shape)}; expected [{count}, {len(models)}] or [1, {len(models)}]")
    dtype = _checked_dtype(models[0].dtype if dtype is None else dtype)
    weights = weights.to(models[0].device)
    chosen = backends.select("combine", backend, [*tensors, weights])
    return chosen.combine(base, models, weights, groups, dtype)


class Merged(NamedTuple):
    """What `merge_rows` found: the merged tensor, G [R, K, K], a [R, K] with d = sum_j a_j t_j, and the history."""

    merged: Tensor
    gram: Tensor
    coefficients: Tensor
    history: Tensor


def merge_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Tensor,
    objective: Objective,
    optimizer: SGD | Converge,
    groups: Groups = "row",
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Merged:
    """base + sum_i m_i (t_i - d): `gram`, `descend` and `combine` of row or column groups, in one pass where compiled.

    weights: m [K], of any floating dtype; scale included. dtype: of the merged tensor, default the models'. The
    redundant vector d of a group and the history are those of `descend`, the dtypes of the arithmetic those of the
    three operators. Without a base, `models` are task vectors and the sum alone is returned.
    """
    tensors = check(base, models, groups)
    if groups not in ("row", "column"):
        raise InputError(f"groups is {groups!r}; expected row or column: other groups do not fit in one pass")
    _require_span(objective, optimizer, "merge_rows")
    if not isinstance(weights, Tensor) or weights.dtype not in FLOATING or weights.shape != (len(models),):
        raise InputError(f"weights is not a floating tensor of shape [{len(models)}], one number per model")
    dtype = _checked_dtype(models[0].dtype if dtype is None else dtype)
    weights = weights.detach().to("cpu", torch.float64)
    chosen = backends.select("merge_rows", backend, tensors)
    return Merged(*chosen.merge_rows(base, models, weights, objective, optimizer, groups, dtype))


def _require_span(objective: Objective, optimizer: object, operator: str) -> None:
    if not isinstance(optimizer, (SGD, Converge)) or not objective.euclidean:
        raise InputError(
            f"{type(optimizer).__name__} with penalty {objective.penalty} leaves the span of the task vectors; "
            f"{operator} needs SGD or Converge with a Euclidean penalty"
        )


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOATING:
        raise InputError(f"dtype is {dtype}; expected one of {', '.join(str(d) for d in FLOATING)}")
    return dtype
