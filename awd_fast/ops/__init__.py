"""The operators: what each takes and gives, whatever backend runs it.

Each is also `torch.ops.awd_fast.<name>` (`awd_fast.ops.library`), which these functions call and `torch.compile` keeps
whole. `gram`, `combine` and `multi_dot` are differentiable, and so are those over many parameters; the others refuse
tensors that require a gradient.

Shapes: R groups of D elements, K tasks. A call names a backend ("native", "reference") or lets the fastest that takes
the call run it. Every function raises InputError with one sentence when shapes, dtypes or devices do not fit.
Results, histories among them, are on the device of the inputs.

Tensors of the CPU may be numpy arrays of float16, float32 or float64, read-only ones too. They are read where they lie;
other byte orders, steps backwards and other dtypes are refused. Results are always tensors. DTensor, nested, masked,
sparse and quantised tensors are refused; tensors on the device "meta" give the shapes of results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective
from awd_fast.ops import reference
from awd_fast.ops.backends import require_known as require_backend
from awd_fast.ops.checks import FLOATING, check, check_dtype, check_total, require_span, typed
from awd_fast.ops.elementwise import Descent, adam_rows, adam_step, descend_groups
from awd_fast.ops.inputs import given
from awd_fast.ops.library import flat
from awd_fast.ops.many import combine_many, gram_many, merge_rows_many, multi_dot_many
from awd_fast.ops.reference import compute_dtype
from awd_fast.ops.sparse import (
    Bernoulli,
    Cut,
    Drop,
    MagPrune,
    band,
    kept,
    l1_rescales,
    sparse_merge,
    sparse_norms,
    trim,
    trim_together,
)

__all__ = [
    "FLOATING",
    "Bernoulli",
    "Cut",
    "Descent",
    "Drop",
    "MagPrune",
    "Merged",
    "adam_rows",
    "adam_step",
    "band",
    "check",
    "combine",
    "combine_many",
    "compute_dtype",
    "descend",
    "descend_elements",
    "descend_groups",
    "gram",
    "gram_many",
    "kept",
    "l1_rescales",
    "merge_rows",
    "merge_rows_many",
    "multi_dot",
    "multi_dot_many",
    "sparse_merge",
    "sparse_norms",
    "trim",
    "trim_together",
]


def gram(
    base: Tensor | None, models: Sequence[Tensor], groups: Groups = "row", *, backend: str | None = None
) -> Tensor:
    """The Gram matrices of the task vectors t_i = models[i] - base: G [R, K, K] float64.

    base: a floating tensor of any shape, or None where `models` are task vectors already. models: K tensors like it.
    groups: "row", "column" or "tensor" (see `awd_fast.ops.reference.group_view` for tensors that are not 2-D).
    Differences and products are float32 (float64 for float64 storage), sums over a group float64.
    """
    base, models = typed(base, models, groups)
    require_backend(backend)
    return torch.ops.awd_fast.gram.default(base, models, groups, backend)


def descend(
    gram: Tensor,
    objective: Objective,
    optimizer: SGD | Converge,
    *,
    backend: str | None = None,
    total: int | None = None,
) -> tuple[Tensor, Tensor]:
    """All iterations of the optimiser on the coefficients of d = sum_j a_j t_j, from d = 0.

    gram: G [R, K, K] float64. Returns a [R, K] float64 and the loss at d_0, d_1, ... (float64, 1-D), both on its
    device. The loss is the mean over the R groups plus the penalty's sum. total: the R of the whole parameter, where
    these groups are a part of it; the loss is then their share. Raises InputError for Adam and for l1, which leave the
    span, and for a total below the number of groups.
    """
    gram = given("gram", gram)
    require_span(objective, optimizer, "descend")
    require_backend(backend)
    check_total(total)
    if isinstance(optimizer, Converge):
        operator, options = torch.ops.awd_fast.descend.converge, flat(optimizer, Converge)
    else:
        operator, options = torch.ops.awd_fast.descend.sgd, flat(optimizer, SGD)
    return operator(gram, *flat(objective, Objective), *options, backend, total)


def descend_elements(
    vectors: Tensor, objective: Objective, optimizer: SGD | Adam | Converge, *, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """All iterations of an elementwise optimiser (Adam) or penalty (l1), from d = 0.

    vectors: t [R, K, D] float32 or float64. Returns d [R, D] of the same dtype and the loss at d_0, d_1, ... (float64).
    total: as in `descend`.
    """
    vectors = given("vectors", vectors)
    if vectors.ndim != 3 or vectors.dtype not in (torch.float32, torch.float64) or vectors.shape[1] == 0:
        raise InputError(f"vectors is {vectors.dtype} {list(vectors.shape)}; expected float32 or float64 [R, K, D]")
    check_total(total, vectors.shape[0])
    return reference.descend_elements(vectors, objective, optimizer, total)


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
    base, models = typed(base, models, groups)
    weights = given("weights", weights)
    require_backend(backend)
    if dtype is not None:
        check_dtype(dtype)
    return torch.ops.awd_fast.combine.default(base, models, weights, groups, dtype, backend)


def multi_dot(
    base: Tensor | None,
    models: Sequence[Tensor],
    gradient: Tensor,
    groups: Groups = "row",
    *,
    backend: str | None = None,
) -> Tensor:
    """The inner products <g_r, t_rj> of a gradient and the task vectors t_j = models[j] - base: [R, K] float64.

    base, models, groups: as in `gram`. gradient: g, a floating tensor of the models' shape, of any floating dtype.
    Differences are float32 (float64 for float64 storage), and so is g; their products and the sums over a group are
    float64. With weights w of `combine`, this is the gradient of a loss with respect to w, where g is that with respect
    to what `combine` gives.
    """
    base, models = typed(base, models, groups)
    gradient = given("gradient", gradient)
    require_backend(backend)
    return torch.ops.awd_fast.multi_dot.default(base, models, gradient, groups, backend)


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
    total: int | None = None,
) -> Merged:
    """base + sum_i m_i (t_i - d): `gram`, `descend` and `combine` of row or column groups, in one pass where compiled.

    weights: m [K], of any floating dtype; scale included. dtype: of the merged tensor, default the models'. The
    redundant vector d of a group, the history and `total` are those of `descend`, the dtypes of the arithmetic those of
    the three operators. Without a base, `models` are task vectors and the sum alone is returned.
    """
    base, models = typed(base, models, groups)
    weights = given("weights", weights)
    require_span(objective, optimizer, "merge_rows")
    require_backend(backend)
    check_total(total)
    if dtype is not None:
        check_dtype(dtype)
    if isinstance(optimizer, Converge):
        operator, options = torch.ops.awd_fast.merge_rows.converge, flat(optimizer, Converge)
    else:
        operator, options = torch.ops.awd_fast.merge_rows.sgd, flat(optimizer, SGD)
    options = [*flat(objective, Objective), *options, groups, dtype, backend, total]
    return Merged(*operator(base, models, weights, *options))
