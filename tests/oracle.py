"""An independent evaluation of the design's formulas: the loss written out pair by pair, in float64, under autograd.

Nothing here uses the package: it is what the reference path itself is checked against.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def matrix(tensor: Tensor, groups: str) -> Tensor:
    """The vectors of a tensor's groups as the rows of a matrix: its rows, its columns, or everything as one."""
    if groups in ("tensor", "global"):
        return tensor.reshape(1, -1)
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if groups == "row" else rows.T


def penalty(d: Tensor, kind: str) -> Tensor:
    """R(d) of each row of d."""
    return {
        "none": lambda: d.sum(1) * 0.0,
        "l2": lambda: torch.linalg.vector_norm(d, dim=1),
        "squared_l2": lambda: (d * d).sum(1),
        "l1": lambda: d.abs().sum(1),
    }[kind]()


def cosine(u: Tensor, v: Tensor, eps: float) -> Tensor:
    """The cosine of each row of u with the same row of v."""
    return (u * v).sum(1) / ((torch.linalg.vector_norm(u, dim=1) + eps) * (torch.linalg.vector_norm(v, dim=1) + eps))


def cosines(vectors: Sequence[Tensor], d: Tensor, groups: str, eps: float = 1e-8) -> Tensor:
    """The cosines of all pairs i < j of all groups, 1-D."""
    shifted = [matrix(t - d, groups) for t in vectors]
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
    return torch.cat([torch.zeros(0, dtype=d.dtype), *(cosine(shifted[i], shifted[j], eps) for i, j in pairs)])


def loss(
    vectors: Sequence[Tensor],
    d: Tensor,
    *,
    groups: str = "row",
    similarity: str = "absolute",
    kind: str = "l2",
    alpha: float = 1e-6,
    eps: float = 1e-8,
) -> Tensor:
    """L(d): mean over groups and pairs of the similarity, plus alpha times the sum over groups of R(d)."""
    values = cosines(vectors, d, groups, eps)
    mean = (values.abs() if similarity == "absolute" else values * values).mean() if len(values) else d.sum() * 0.0
    return mean + alpha * penalty(matrix(d, groups), kind).sum()


def trajectory(
    vectors: Sequence[Tensor],
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    iterations: int,
    groups: str,
    **objective: object,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """d_0 ... d_n, the signs of all cosines and the loss at each, by autograd and a torch optimiser."""
    d = torch.zeros_like(vectors[0], requires_grad=True)
    optimizer = make_optimizer([d])
    points, signs, losses = [], [], []
    for _ in range(iterations + 1):
        value = loss(vectors, d, groups=groups, **objective)  # type: ignore[arg-type]
        points.append(d.detach().clone())
        signs.append(cosines(vectors, d.detach(), groups).sign())
        losses.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return points, signs, losses
