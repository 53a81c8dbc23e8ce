"""The K x K mathematics of a group: similarity, loss and gradient from its Gram matrix.

Everything about the orthogonality term is in G = [<t_i, t_j>]. For d with b_i = <t_i, d> and s = <d, d>:

    G'_ij = <t_i - d, t_j - d> = G_ij - b_i - b_j + s
    c_ij  = G'_ij / ((n_i + eps)(n_j + eps)),  n_i = sqrt(G'_ii),  and 0 where a norm is 0
    S     = mean over pairs i < j of |c_ij| or c_ij^2
    grad S = -2 sum_i r_i t_i + 2 (sum_i r_i) d,   r = M 1,  M = dS/dG'

Shapes: R groups, K tasks; all tensors float64. K = 1 has no pairs: its similarity is 0.
"""

import torch
from torch import Tensor

from awd_fast.objective import Objective


def gram(vectors: Tensor) -> Tensor:
    """G [R, K, K] float64 of vectors [R, K, D]."""
    t = vectors.double()
    return t @ t.mT


def shifted_gram(gram: Tensor, inner: Tensor, square: Tensor) -> Tensor:
    """G' [R, K, K] of the vectors t_i - d, from G [R, K, K], b [R, K] and s [R]."""
    return gram - inner[:, :, None] - inner[:, None, :] + square[:, None, None]


def norms(gram: Tensor) -> Tensor:
    """Euclidean norms [..., K] of the vectors; a diagonal that rounding made negative counts as 0."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()


def cosines(gram: Tensor, eps: float) -> Tensor:
    """c [R, K, K] with the diagonal 0, and 0 wherever a norm is 0."""
    n = norms(gram)
    inverse = torch.where(n > 0, 1.0 / (n + eps).clamp_min(torch.finfo(n.dtype).tiny), 0.0)
    c = gram * inverse[..., :, None] * inverse[..., None, :]
    return c - torch.diag_embed(c.diagonal(dim1=-2, dim2=-1))


def pair_weight(k: int) -> float:
    """The weight of one ordered pair in the mean over pairs."""
    return 1.0 / (k * (k - 1)) if k > 1 else 0.0


def similarity(gram: Tensor, objective: Objective) -> Tensor:
    """S [R]: each group's mean over pairs of |c_ij| or c_ij^2."""
    c = cosines(gram, objective.eps)
    phi = c.abs() if objective.similarity == "absolute" else c.square()
    return phi.sum(dim=(-2, -1)) * pair_weight(gram.shape[-1])


def pull(gram: Tensor, objective: Objective) -> Tensor:
    """r [R, K] = M 1, the row sums of dS/dG'; 0 for a vector of norm 0, and sign(0) = 0."""
    n = norms(gram)
    alive = n > 0
    tiny = torch.finfo(n.dtype).tiny
    inverse = torch.where(alive, 1.0 / (n + objective.eps).clamp_min(tiny), 0.0)
    inverse_norm = torch.where(alive, 1.0 / n.clamp_min(tiny), 0.0)
    c = cosines(gram, objective.eps)
    slope = c.sign() if objective.similarity == "absolute" else 2.0 * c
    across = torch.einsum("rij,rj->ri", slope, inverse) * inverse
    along = (slope * c).sum(dim=-1) * inverse * inverse_norm
    return (across - along) * pair_weight(gram.shape[-1])


def penalty(square: Tensor, objective: Objective) -> Tensor:
    """R(d) [R] of the Euclidean penalties, from s = <d, d> [R]."""
    match objective.penalty:
        case "l2":
            return square.clamp_min(0.0).sqrt()
        case "squared_l2":
            return square
        case _:
            return torch.zeros_like(square)


def penalty_slope(square: Tensor, objective: Objective) -> Tensor:
    """p [R] with R'(d) = p d for the Euclidean penalties; 0 at d = 0, where the norm has no gradient."""
    match objective.penalty:
        case "l2":
            return torch.where(square > 0, square.clamp_min(torch.finfo(square.dtype).tiny).rsqrt(), 0.0)
        case "squared_l2":
            return torch.full_like(square, 2.0)
        case _:
            return torch.zeros_like(square)


def factor(gram: Tensor) -> Tensor:
    """L [R, K, K], lower triangular with G = L L': row i holds the coordinates of t_i in an orthonormal basis.

    The basis is that of Gram and Schmidt: a vector that depends on the earlier ones (to rounding) adds no coordinate,
    and its column of L is 0. Iterating on coordinates rather than on coefficients keeps d free of the coefficients'
    null space, where rounding grows without bound when vectors depend on each other (K > D, identical models).
    """
    size = gram.shape[-1]
    columns = torch.zeros_like(gram)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    threshold = 16.0 * size * torch.finfo(gram.dtype).eps * diagonal
    for j in range(size):
        rest = gram[:, :, j] - torch.einsum("rik,rk->ri", columns[:, :, :j], columns[:, j, :j])
        pivot = rest[:, j]
        scale = torch.where(pivot > threshold[:, j], pivot.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt(), 0.0)
        columns[:, j:, j] = rest[:, j:] * scale[:, None]
    return columns


def coefficients(basis: Tensor, coordinates: Tensor) -> Tensor:
    """a [R, K] with d = sum_j a_j t_j, from L [R, K, K] and the coordinates y = L' a of d [R, K].

    A vector that adds no coordinate has coefficient 0.
    """
    found = torch.zeros_like(coordinates)
    for j in reversed(range(basis.shape[-1])):
        rest = coordinates[:, j] - torch.einsum("rk,rk->r", basis[:, j + 1 :, j], found[:, j + 1 :])
        pivot = basis[:, j, j]
        found[:, j] = torch.where(pivot > 0, rest / torch.where(pivot > 0, pivot, 1.0), 0.0)
    return found


def span_moments(gram: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """b [R, K] = G a and s [R] = a' G a of d = sum_j a_j t_j."""
    inner = torch.einsum("rij,rj->ri", gram, coefficients)
    return inner, (inner * coefficients).sum(dim=-1).clamp_min(0.0)


def merge_weights(weights: Tensor, coefficients: Tensor) -> Tensor:
    """w [R, K] with sum_j w_rj t_rj = sum_i m_i (t_ri - d_r), for m [K] and d_r = sum_j a_rj t_rj, a [R, K]."""
    return weights - weights.sum() * coefficients


def _shifted(gram: Tensor, basis: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """G' [R, K, K] and s [R] at the d with these coordinates."""
    square = coordinates.square().sum(dim=-1)
    return shifted_gram(gram, torch.einsum("rij,rj->ri", basis, coordinates), square), square


def span_loss(gram: Tensor, basis: Tensor, coordinates: Tensor, objective: Objective, total: int) -> Tensor:
    """Each group's share [R] of the loss, S / total + alpha R(d), at the d with coordinates y [R, K] in L [R, K, K].

    total: the number of groups of the whole parameter, of which `gram` may hold a part.
    """
    after, square = _shifted(gram, basis, coordinates)
    return similarity(after, objective) / max(total, 1) + objective.alpha * penalty(square, objective)


def span_gradient(gram: Tensor, basis: Tensor, coordinates: Tensor, objective: Objective, total: int) -> Tensor:
    """The coordinates [R, K] of dL/dd = -2 sum_i r_i t_i + 2 (sum_i r_i) d + alpha R'(d); see `span_loss`."""
    after, square = _shifted(gram, basis, coordinates)
    r = pull(after, objective) / max(total, 1)
    multiple = 2.0 * r.sum(dim=-1) + objective.alpha * penalty_slope(square, objective)
    return multiple[:, None] * coordinates - 2.0 * torch.einsum("rij,ri->rj", basis, r)
