"""The definition of correct: every operator in plain PyTorch, in the paper's symbols.

Slow and short on purpose. Task vectors are differences in float32 (float64 for float64 storage); sums over a group and
all K x K work are float64.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from awd_fast import converge, statistics
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective

BLOCK_NUMBERS = 1 << 18  # float64 numbers of K x K (or K x D) state iterated together: small enough to stay in a cache

GPU_BLOCK_NUMBERS = 1 << 26  # the same on a GPU, which is better kept busy


def group_view(tensor: Tensor, groups: Groups) -> Tensor:
    """The tensor as [R, D]: R groups of D elements.

    The matrix of a tensor has its last dimension as columns and all leading ones as rows; a vector is one row. "row"
    groups are the matrix's rows, "column" groups its columns, "tensor" (and "global") one group of everything.
    """
    if groups in ("tensor", "global"):
        return tensor.reshape(1, -1)
    matrix = tensor.reshape(matrix_size(tensor))
    return matrix if groups == "row" else matrix.T


def matrix_size(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor's matrix. Sizes are only multiplied, so that symbolic ones pass through."""
    return math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.ndim else 1


def group_count(tensor: Tensor, groups: Groups) -> int:
    """R of `group_view`."""
    rows, columns = matrix_size(tensor)
    return {"row": rows, "column": columns}.get(groups, 1)


def total_groups(total: int | None, count: int) -> int:
    """By how many groups the mean similarity divides: those of the whole parameter, or the `count` that are given."""
    return count if total is None else total


def ungroup(view: Tensor, shape: Sequence[int], groups: Groups) -> Tensor:
    """The inverse of `group_view`: [R, D] back to the tensor's shape."""
    return (view.T if groups == "column" else view).reshape(tuple(shape))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of differences, products and combinations for values stored as `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def task_vectors(base: Tensor | None, models: Sequence[Tensor], groups: Groups) -> Tensor:
    """t [R, K, D] of K models (or, without a base, of K tensors that are task vectors already)."""
    dtype = compute_dtype(models[0].dtype)
    views = [group_view(model.to(dtype), groups) for model in models]
    stacked = torch.stack(views, dim=1)
    return stacked if base is None else stacked - group_view(base.to(dtype), groups)[:, None, :]


def gram(base: Tensor | None, models: Sequence[Tensor], groups: Groups) -> Tensor:
    """G [R, K, K] float64."""
    return statistics.gram(task_vectors(base, models, groups))


def loss(vectors: Tensor, shift: Tensor, objective: Objective, total: int) -> Tensor:
    """L (scalar, float64) at d = shift [R, D] for vectors t [R, K, D]: sum over groups of S / total + alpha R(d)."""
    after = statistics.gram(vectors - shift[:, None, :])
    similarity = statistics.similarity(after, objective).sum() / max(total, 1)
    return similarity + objective.alpha * penalty(shift.double(), objective).sum()


def penalty(shift: Tensor, objective: Objective) -> Tensor:
    """R(d) [R] of d [R, D]."""
    if objective.penalty == "l1":
        return shift.abs().sum(dim=-1)
    return statistics.penalty(shift.square().sum(dim=-1), objective)


def gradient(vectors: Tensor, shift: Tensor, objective: Objective, total: int) -> Tensor:
    """dL/dd [R, D] at d = shift [R, D] for vectors t [R, K, D]; subgradient 0 at the kinks.

    grad = -2 sum_i r_i (t_i - d) + alpha R'(d), with r the row sums of dS/dG' divided by the number of groups `total`.
    """
    u = (vectors - shift[:, None, :]).double()
    r = statistics.pull(statistics.gram(u), objective) / max(total, 1)
    slope = -2.0 * torch.einsum("rk,rkd->rd", r, u)
    d = shift.double()
    if objective.penalty == "l1":
        slope += objective.alpha * d.sign()
    else:
        slope += objective.alpha * statistics.penalty_slope(d.square().sum(dim=-1), objective)[:, None] * d
    return slope.to(shift.dtype)


class SpanDescent:
    """SGD on K numbers per group: the trajectory of d = sum_j a_j t_j without touching the vectors.

    gram: G [R, K, K] float64. total: number of groups of the parameter, of which `gram` may hold a part. The
    numbers are the coordinates of d in an orthonormal basis of the span (see `awd_fast.statistics.factor`).
    """

    def __init__(self, gram: Tensor, objective: Objective, optimizer: SGD, total: int) -> None:
        self.gram, self.objective, self.optimizer, self.total = gram, objective, optimizer, total
        self.basis = statistics.factor(gram)
        self.coordinates = gram.new_zeros(gram.shape[:2])
        self.velocity: Tensor | None = None

    def loss(self) -> Tensor:
        """This part's share of the loss at the present d (scalar)."""
        return statistics.span_loss(self.gram, self.basis, self.coordinates, self.objective, self.total).sum()

    @property
    def coefficients(self) -> Tensor:
        """a [R, K] of the present d."""
        return statistics.coefficients(self.basis, self.coordinates)

    def step(self) -> None:
        """One step with the semantics of torch.optim.SGD."""
        slope = statistics.span_gradient(self.gram, self.basis, self.coordinates, self.objective, self.total)
        move, self.velocity = sgd_move(slope, self.coordinates, self.velocity, self.optimizer)
        self.coordinates = self.coordinates - self.optimizer.lr * move


def sgd_move(slope: Tensor, at: Tensor, velocity: Tensor | None, optimizer: SGD) -> tuple[Tensor, Tensor | None]:
    """The direction of one SGD step and the new velocity, from a gradient (or its coefficients) at `at`."""
    slope = slope + optimizer.weight_decay * at
    if optimizer.momentum == 0.0:
        return slope, None
    velocity = slope if velocity is None else optimizer.momentum * velocity + slope
    return (slope + optimizer.momentum * velocity if optimizer.nesterov else velocity), velocity


class ElementwiseDescent:
    """SGD or Adam on the elements of d, for optimisers and penalties that leave the vectors' span.

    vectors: t [R, K, D]; d and the optimiser's state have its dtype. total as in `SpanDescent`.
    """

    def __init__(self, vectors: Tensor, objective: Objective, optimizer: SGD | Adam, total: int) -> None:
        self.vectors, self.objective, self.optimizer, self.total = vectors, objective, optimizer, total
        self.shift = vectors.new_zeros(vectors.shape[0], vectors.shape[2])
        self.velocity: Tensor | None = None
        self.square: Tensor | None = None
        self.steps = 0

    def loss(self) -> Tensor:
        """This part's share of the loss at the present d (scalar, float64)."""
        return loss(self.vectors, self.shift, self.objective, self.total)

    def step(self) -> None:
        """One step with the semantics of torch.optim.SGD or torch.optim.Adam."""
        self.steps += 1
        slope = gradient(self.vectors, self.shift, self.objective, self.total)
        self.shift, self.velocity, self.square = element_move(
            slope, self.shift, self.velocity, self.square, self.optimizer, self.steps
        )


def element_move(
    slope: Tensor, shift: Tensor, velocity: Tensor | None, square: Tensor | None, optimizer: SGD | Adam, step: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """d and the optimiser's state after step number `step` (from 1 on), from the gradient at d = shift."""
    if isinstance(optimizer, SGD):
        move, velocity = sgd_move(slope, shift, velocity, optimizer)
        return shift - optimizer.lr * move, velocity, square
    beta1, beta2 = optimizer.betas
    slope = slope + optimizer.weight_decay * shift
    velocity = beta1 * (torch.zeros_like(slope) if velocity is None else velocity) + (1.0 - beta1) * slope
    square = beta2 * (torch.zeros_like(slope) if square is None else square) + (1.0 - beta2) * slope.square()
    spread = (square / (1.0 - beta2**step)).sqrt() + optimizer.eps
    return shift - optimizer.lr * (velocity / (1.0 - beta1**step)) / spread, velocity, square


def descend(
    gram: Tensor, objective: Objective, optimizer: SGD | Converge, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients a [R, K] of the redundant vectors d = sum_j a_j t_j, and the loss at d_0, d_1, ... (float64)."""
    total, k = total_groups(total, gram.shape[0]), gram.shape[1]
    coefficients, histories = [gram.new_zeros(0, k)], [gram.new_zeros(1)]
    for block in gram.split(_block(gram, k * k)):
        if isinstance(optimizer, Converge):
            part, losses = converge.minimise_span(block, objective, optimizer, total)
            history = gram.new_tensor(losses)
        else:
            part, history = _run(SpanDescent(block, objective, optimizer, total), optimizer.iterations)
        coefficients.append(part)
        histories.append(history)
    return torch.cat(coefficients), _total_history(histories)


def descend_elements(
    vectors: Tensor, objective: Objective, optimizer: SGD | Adam | Converge, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """d [R, D] by an elementwise optimiser or penalty from t [R, K, D], and the loss at d_0, d_1, ... (float64)."""
    count, k, d = vectors.shape
    total = total_groups(total, count)
    shifts, histories = [vectors.new_zeros(0, d)], [vectors.new_zeros(1, dtype=torch.float64)]
    for block in vectors.split(_block(vectors, k * d)):
        if isinstance(optimizer, Converge):
            shift, losses = converge.minimise_vectors(block, objective, optimizer, total)
            history = vectors.new_tensor(losses, dtype=torch.float64)
        else:
            shift, history = _run(ElementwiseDescent(block, objective, optimizer, total), optimizer.iterations)
        shifts.append(shift)
        histories.append(history)
    return torch.cat(shifts), _total_history(histories)


def adam_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    objective: Objective,
    optimizer: SGD | Adam,
    groups: Groups,
    total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d in the models' shape, its history, and the products at the end: the fields of `awd_fast.ops.Descent`."""
    t = task_vectors(base, models, groups)
    shift, history = descend_elements(t, objective, optimizer, total)
    inner = torch.einsum("rkd,rd->rk", t.double(), shift.double())
    square = shift.double().square().sum(dim=1)
    return ungroup(shift, models[0].shape, groups), history, statistics.gram(t), inner, square


def adam_step(
    base: Tensor | None,
    models: Sequence[Tensor],
    shift: Tensor,
    velocity: Tensor | None,
    square: Tensor | None,
    slope: Tensor,
    optimizer: SGD | Adam,
    step: int,
    l1: float,
) -> Tensor:
    """<t_i, d>, <d, d> and sum |d| after a step of shift, velocity and square, which are changed in place."""
    with torch.no_grad():
        t = task_vectors(base, models, "tensor")[0].double()
        factors = slope.to(t.device)
        d = shift.reshape(-1).double()
        gradient = factors[-1] * d - 2.0 * (factors[:-1] @ t) + l1 * d.sign()
        state = (shift, velocity, square)
        moved = element_move(gradient.to(shift.dtype).view_as(shift), *state, optimizer, step)
        for old, new in zip(state, moved, strict=True):
            if old is not None and new is not None:
                old.copy_(new)
        d = shift.reshape(-1).double()
        return torch.cat([t @ d, torch.stack([d @ d, d.abs().sum()])])


def _block(like: Tensor, numbers: int) -> int:
    """How many groups of so many numbers each are iterated together."""
    together = BLOCK_NUMBERS if like.device.type == "cpu" else GPU_BLOCK_NUMBERS
    return max(1, together // max(numbers, 1))


def _run(descent: SpanDescent | ElementwiseDescent, iterations: int) -> tuple[Tensor, Tensor]:
    """Where d is after all iterations, and the losses, which stay on their device: to look at one would wait for it."""
    history = [descent.loss()]
    for _ in range(iterations):
        descent.step()
        history.append(descent.loss())
    found = descent.coefficients if isinstance(descent, SpanDescent) else descent.shift
    return found, torch.stack(history).detach()


def _total_history(histories: list[Tensor]) -> Tensor:
    """The sum of the parts' losses; a part that finished early stays at its last loss."""
    longest = max(len(history) for history in histories)
    padded = [torch.cat([history, history[-1:].expand(longest - len(history))]) for history in histories]
    return torch.stack(padded).sum(dim=0)


def combine(
    base: Tensor | None, models: Sequence[Tensor], weights: Tensor, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """base + sum_j w_rj t_j in the models' shape, rounded to `dtype`; without a base, sum_j w_rj t_j.

    weights: [R, K], or [1, K] for every group alike.
    """
    merged = weighted_sum(base, models, weights, groups)
    if base is not None:
        merged += group_view(base.to(merged.dtype), groups)
    return ungroup(merged, models[0].shape, groups).to(dtype)


def weighted_sum(base: Tensor | None, models: Sequence[Tensor], weights: Tensor, groups: Groups) -> Tensor:
    """sum_j w_rj t_j [R, D] in the dtype of the arithmetic, one task vector at a time."""
    compute = compute_dtype(models[0].dtype)
    origin = None if base is None else group_view(base.to(compute), groups)
    total = torch.zeros_like(group_view(models[0], groups), dtype=compute)
    for index, model in enumerate(models):
        view = group_view(model.to(compute), groups)
        total += weights[:, index, None].to(compute) * (view if origin is None else view - origin)
    return total


def multi_dot(base: Tensor | None, models: Sequence[Tensor], gradient: Tensor, groups: Groups) -> Tensor:
    """<g_r, t_rj> [R, K] float64, one task vector at a time."""
    compute = compute_dtype(models[0].dtype)
    g = group_view(gradient.to(compute), groups).double()
    origin = None if base is None else group_view(base.to(compute), groups)
    products = []
    for model in models:
        view = group_view(model.to(compute), groups)
        products.append(((view if origin is None else view - origin).double() * g).sum(dim=1))
    return torch.stack(products, dim=1)


def merge_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Tensor,
    objective: Objective,
    optimizer: SGD | Converge,
    groups: Groups,
    dtype: torch.dtype,
    total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base + sum_i m_i (t_i - d) for weights m [K], G [R, K, K], a [R, K] and the history: three operators in turn."""
    g = gram(base, models, groups)
    coefficients, history = descend(g, objective, optimizer, total)
    # Asynchronous: memory of the host that is not pinned is read before the call returns.
    factors = statistics.merge_weights(weights.to(g.device, non_blocking=True), coefficients)
    return combine(base, models, factors, groups, dtype), g, coefficients, history
