"""The mathematics of low-rank task vectors t_i = s_i B_i A_i: Gram matrices and combinations from the factors alone.

    <t_i, t_j> of row k     = s_i s_j  b_i (A_i A_j') b_j',   b_i = row k of B_i
    <t_i, t_j> of column c  = s_i s_j  a_i' (B_i' B_j) a_j,   a_i = column c of A_i
    <t_i, t_j> of all       = s_i s_j  <B_i' B_j, A_i A_j'>
    sum_j w_j t_j           = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

Shapes: tensors of R rows and C columns, K adapters of ranks r_i, which may differ and may be 0 (a zero task vector).
Gram matrices are float64. No [R, C] matrix is made but by `delta` and `add`, for the rows that they are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import Groups


@dataclass(frozen=True)
class Factors:
    """One task vector, t = scale * left @ right: left B [R, r], right A [r, C], of floating dtypes; r may be 0.

    The layout is that of the base's tensor. Raises InputError where the shapes do not fit.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise InputError(f"the factors are {list(left)} and {list(right)}; expected [R, r] and [r, C]")

    @classmethod
    def zero(cls, shape: Sequence[int]) -> "Factors":
        """The task vector of an adapter that leaves a tensor [R, C] alone: rank 0."""
        rows, columns = shape
        return cls(torch.empty(rows, 0), torch.empty(0, columns))

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """R and C."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def T(self) -> "Factors":
        """Of the transposed task vector: its rows are the columns."""
        return Factors(self.right.T, self.left.T, self.scale)

    def rows(self, start: int, stop: int) -> "Factors":
        """Of the rows start to stop, as views."""
        return replace(self, left=self.left[start:stop])


Cross = list[list[Tensor]]
"""A_i A_j' [r_i, r_j] float64 as cross[i][j - i] for j >= i."""


def cross(rights: Sequence[Tensor]) -> Cross:
    """The products A_i A_j' of all pairs of right factors [r_i, C]; computed once for all row blocks of a tensor."""
    wide = [right.double() for right in rights]
    return [[first @ second.T for second in wide[i:]] for i, first in enumerate(wide)]


def gram_rows(factors: Sequence[Factors], products: Cross | None = None) -> Tensor:
    """G [R, K, K] float64 of the rows of K task vectors, or of a block of rows (`Factors.rows`).

    products: `cross` of the right factors, where it was computed already.
    """
    if products is None:
        products = cross([each.right for each in factors])
    lefts = [each.left.double() for each in factors]

    def entry(i: int, j: int) -> Tensor:
        return ((lefts[i] @ products[i][j - i]) * lefts[j]).sum(dim=1)

    return _symmetric(entry, factors, len(lefts[0]))


def gram_columns(factors: Sequence[Factors]) -> Tensor:
    """G [C, K, K] float64 of the columns of K task vectors."""
    return gram_rows([each.T for each in factors])


def gram_tensor(factors: Sequence[Factors]) -> Tensor:
    """G [1, K, K] float64 of K task vectors as wholes, from products of size r x r."""
    products, lefts = cross([each.right for each in factors]), cross([each.left.T for each in factors])

    def entry(i: int, j: int) -> Tensor:
        return (products[i][j - i] * lefts[i][j - i]).sum().reshape(1)

    return _symmetric(entry, factors, 1)


def gram(factors: Sequence[Factors], groups: Groups) -> Tensor:
    """G [R, K, K] float64 of the groups of K task vectors; of a global group, this tensor's part [1, K, K]."""
    if groups == "row":
        return gram_rows(factors)
    return gram_columns(factors) if groups == "column" else gram_tensor(factors)


def _symmetric(entry: Callable[[int, int], Tensor], factors: Sequence[Factors], count: int) -> Tensor:
    """G [count, K, K] from its entries i <= j, each [count], with the scales multiplied in."""
    k = len(factors)
    found = torch.zeros(count, k, k, dtype=torch.float64, device=factors[0].left.device)
    for i in range(k):
        for j in range(i, k):
            if factors[i].rank and factors[j].rank:
                found[:, i, j] = factors[i].scale * factors[j].scale * entry(i, j)
                found[:, j, i] = found[:, i, j]
    return found


def merged_factors(
    factors: Sequence[Factors], weights: Tensor, groups: Groups = "row", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """left [R, sum r_i] and right [sum r_i, C] with sum_j w_j t_j = left @ right.

    weights: w [R, K] for rows, [C, K] for columns, or [1, K] for every group alike; scales come from the factors.
    They are multiplied in float64 and rounded once to `dtype`. Raises InputError where the weights do not fit.
    """
    rows, columns = factors[0].shape
    count = {"row": rows, "column": columns}.get(groups, 1)
    if weights.ndim != 2 or weights.shape[1] != len(factors) or weights.shape[0] not in (1, count):
        raise InputError(
            f"weights are {list(weights.shape)} for {len(factors)} adapters; expected [{count}, {len(factors)}]"
        )
    # One weight for all goes to the left factors, so that row blocks share the right ones unchanged.
    across = groups == "column" and weights.shape[0] != 1
    left = merged_left(factors, None if across else weights)
    right = merged_right(factors, weights if across else None)
    return left.to(dtype), right.to(dtype)


def merged_left(factors: Sequence[Factors], weights: Tensor | None) -> Tensor:
    """[w_1 s_1 B_1, w_2 s_2 B_2, ...] [R, sum r_i] float64, or the B_i alone without weights.

    weights: w [R, K] or [1, K]; of a block of rows with factors that are (`Factors.rows`).
    """
    if weights is None:
        return torch.cat([each.left.double() for each in factors], dim=1)
    w = weights.double()
    return torch.cat([each.left.double() * (each.scale * w[:, j, None]) for j, each in enumerate(factors)], dim=1)


def merged_right(factors: Sequence[Factors], weights: Tensor | None = None) -> Tensor:
    """[A_1; A_2; ...] [sum r_i, C] float64; with weights w [C, K] of columns, [w_1 s_1 A_1; w_2 s_2 A_2; ...]."""
    if weights is None:
        return torch.cat([each.right.double() for each in factors], dim=0)
    w = weights.double()
    return torch.cat([each.right.double() * (each.scale * w[:, j]) for j, each in enumerate(factors)], dim=0)


def add(base: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """base + left @ right for a block of rows: base [R, C], left [R, r], right [r, C].

    In float32 (float64 for a float64 base or result), rounded once to `dtype`, by default the base's. The last
    bits may depend on how many rows a block has, because those of a product do.
    """
    dtype = base.dtype if dtype is None else dtype
    wide = torch.float64 if torch.float64 in (base.dtype, dtype) else torch.float32
    return torch.addmm(base.to(wide), left.to(wide), right.to(wide)).to(dtype)


def delta(factors: Factors, dtype: torch.dtype = torch.float32) -> Tensor:
    """The task vector t [R, C] itself, multiplied in `dtype` (float32 or float64); of some rows with `Factors.rows`."""
    return (factors.left.double() * factors.scale).to(dtype) @ factors.right.to(dtype)
