"""AWD of one parameter: task vectors in, redundant vector and disentangled vectors out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from awd_fast import ops, solver, statistics
from awd_fast.errors import InputError
from awd_fast.objective import Converge, Groups, Objective, Optimizer, Options, Penalty, Similarity
from awd_fast.ops import reference


@dataclass(frozen=True)
class Disentangled:
    """What `disentangle` found.

    task_vectors: the K input tensors. coefficients: a [R, K] float64 with d_r = sum_j a_rj t_rj, or None where d is
    outside the span (Adam, l1). similarity_before, similarity_after: mean over groups and pairs of the similarity
    that was minimised, cos^2 or |cos|, of t_i and of t_i - d. history: the loss at d_0 = 0, d_1, ... (float64, 1-D).
    Tensors are on the device of the inputs.
    """

    task_vectors: tuple[Tensor, ...]
    groups: Groups
    coefficients: Tensor | None
    similarity_before: float
    similarity_after: float
    history: Tensor
    shift: Tensor | None
    backend: str | None

    @cached_property
    @torch.no_grad()
    def redundant(self) -> Tensor:
        """d in the shape and dtype of a task vector; for autograd a constant."""
        first = self.task_vectors[0]
        if self.coefficients is None:
            assert self.shift is not None
            return reference.ungroup(self.shift, first.shape, self.groups).to(first.dtype)
        weights = self.coefficients.to(first.device)
        return ops.combine(None, self.task_vectors, weights, self.groups, backend=self.backend)

    def disentangled(self, i: int) -> Tensor:
        """t_i - d in the shape and dtype of a task vector."""
        return self.task_vectors[i] - self.redundant


def disentangle(
    task_vectors: Tensor | Sequence[Tensor],
    *,
    groups: Groups = "row",
    similarity: Similarity = "squared",
    penalty: Penalty = "l2",
    alpha: float = 1e-6,
    optimizer: Optimizer = Converge(),  # noqa: B008  frozen
    eps: float = 1e-8,
    backend: str | None = None,
    include: object = None,
    exclude: object = None,
) -> Disentangled:
    """Finds the redundant vector d of one parameter's task vectors (AWD, arXiv 2411.18729, equations 9 to 11).

    task_vectors: [K, *shape], or a sequence of K tensors of one shape; float32, bfloat16, float16 or float64; finite.
    groups: which elements of the parameter form one vector: "row" (the first dimension of a 2-D weight; all but the
        last dimension for more), "column" (the last dimension), "tensor" ("global" is the same for one parameter).
    similarity, penalty, alpha, eps: see `awd_fast.objective.Objective`. The loss is the mean over the groups and over
        the K (K - 1) / 2 pairs, plus alpha times the sum over groups of R(d).
    optimizer: `SGD`, `Adam` or `Converge`.
    backend: "native" or "reference"; None lets the fastest that can run the call take it.
    include, exclude: taken so that a preset can be passed whole; a parameter alone has no name, so they change nothing.

    Raises InputError for tensors that differ in shape, dtype or device, are not floating or not finite.
    """
    objective = Objective(similarity=similarity, penalty=penalty, alpha=alpha, eps=eps)
    options = Options(groups=groups, objective=objective, optimizer=optimizer)
    vectors = as_vectors(task_vectors)
    solution = solver.solve(None, vectors, options, backend)
    before, after = (_mean_similarity(g, objective) for g in (solution.gram, solution.gram_after))
    return Disentangled(
        task_vectors=vectors,
        groups=groups,
        coefficients=solution.coefficients,
        similarity_before=before,
        similarity_after=after,
        history=solution.history,
        shift=solution.shift,
        backend=backend,
    )


def as_vectors(task_vectors: Any) -> tuple[Tensor, ...]:
    """The K task vectors as a tuple, checked: at least one, tensors, finite."""
    if not isinstance(task_vectors, (Tensor, list, tuple)) or (
        isinstance(task_vectors, Tensor) and task_vectors.ndim == 0
    ):
        raise InputError(f"task_vectors is {type(task_vectors).__name__}; expected a tensor [K, *shape] or K tensors")
    vectors = tuple(task_vectors.unbind(0) if isinstance(task_vectors, Tensor) else task_vectors)
    if not vectors:
        raise InputError("task_vectors is empty; expected at least one task vector")
    for index, vector in enumerate(vectors):
        if not isinstance(vector, Tensor):
            raise InputError(f"task_vectors[{index}] is {type(vector).__name__}; expected a tensor")
    ops.check(None, vectors, "row")
    for index, vector in enumerate(vectors):
        if not torch.isfinite(vector).all():
            raise InputError(f"task_vectors[{index}] holds NaN or Inf; expected finite values")
    return vectors


def _mean_similarity(gram: Tensor, objective: Objective) -> float:
    return float(statistics.similarity(gram, objective).sum()) / max(len(gram), 1)
