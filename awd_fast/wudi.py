"""WUDI merging (arXiv 2503.08099) in closed form: the update that disturbs the inputs of no task, layer by layer.

For task vectors t_i [R, D] of a layer with D input features, each multiplied by its weight,

    A = sum_i t_i' t_i / |t_i|^2,  B = sum_i t_i t_i' t_i / |t_i|^2,  S = sum_i t_i,  e = ridge * mean diagonal of A
    tau = (B + e S) (A + e I)^-1

is the minimum of sum_i |(tau - t_i) t_i'|^2 / |t_i|^2 + e |tau - S|^2 (Frobenius norms). The first sum is the paper's
objective, the *interference*: the rows of t_i stand for the inputs of task i. The paper goes down from S by 300
iterations of Adam; the ridge term, which that has not, makes the minimum unique where A is singular, as it is when the
task vectors do not span all inputs, and keeps S in the directions that no t_i has. A zero t_i adds nothing.

Products are in float32 (float64 for float64 storage), one task vector after the other, so that memory does not grow
with their number; A, its Cholesky factor and all figures are float64. All is cut into panels, each of which one thread
computes, so that the number of threads changes no bit of a result.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.threads import one_thread

PANEL = (64, 512)
"""Columns or rows of a panel, least and most: with fewer a product does not run at full speed."""
PANEL_NUMBERS = 1 << 19
"""Of a panel, where that allows: so few that all threads have some, and that what each needs does not count."""
PANEL_BYTES = 80
"""Per number of a panel, what a thread needs for it."""
RIDGE = 0.1
"""The default: of the order at which neither the interference nor the merged model changes much."""

FIGURES = 5
"""Of a layer."""

Part = Callable[[slice], Tensor]
"""Gives some rows of a task vector, without its weight, in the dtype of products."""
Each = Callable[[Callable[[slice], Any], int, int], list[Any]]
"""Calls a function with the panels of so many columns that are so long, or of rows; gives the results in order."""


@dataclass(frozen=True)
class Solved:
    """The update of a layer.

    update: tau [R, D], in the dtype of products. figures: float64 [FIGURES], the interference of S and that of tau, and
    <S, S>, <S, tau>, <tau, tau>. finite: a bool [], whether all task vectors are. solvable: a bool [], whether
    A + e I is positive definite as it was computed. All lie on the device of the task vectors.
    """

    update: Tensor
    figures: Tensor
    finite: Tensor
    solvable: Tensor


class Layer:
    """Adds up A, B and S of a layer [rows, width], one task vector at a time; then `solve` gives the update.

    columns: how many input features are solved together, 0 for all; fewer need less memory and time, and leave out of
    the objective what the inputs of different blocks have in common: A is its block diagonal then. Nothing here waits
    for a device.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        columns: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.blocks = cuts(width, columns)
        self._dtype, self._on_cpu = dtype, torch.device(device).type == "cpu"
        self._products = [
            torch.zeros(block.stop - block.start, block.stop - block.start, dtype=torch.float64, device=device)
            for block in self.blocks  # of each block A, of which only the lower triangle is made
        ]
        self._b, self._sum = torch.zeros(2, rows, width, dtype=dtype, device=device)
        self._own = torch.zeros((), dtype=torch.float64, device=device)  # sum_i |t_i t_i'|^2 / |t_i|^2
        self._count = torch.zeros((), dtype=torch.float64, device=device)  # of task vectors that are not 0
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, weight: float, part: Part) -> None:
        """Adds the task vector whose rows `part` gives; with the weight 0 it is only looked at for NaN."""
        rows, width = self._sum.shape
        unit = torch.empty_like(self._sum)
        with self._panels() as each:

            def measure(panel: slice) -> Tensor:
                unit[panel] = part(panel)
                return unit[panel].double().square().sum()

            square = torch.stack(each(measure, rows, width)).sum()
            self._finite &= torch.isfinite(square)
            if weight == 0:
                return
            there = (square > 0).double()
            size = square.sqrt()
            inverse = there / torch.where(square > 0, size, 1.0)

            def scale(panel: slice) -> None:
                self._sum[panel] += weight * unit[panel]
                unit[panel] = (unit[panel].double() * inverse).to(self._dtype)

            each(scale, rows, width)
            self._count += there
            for block, product in zip(self.blocks, self._products, strict=True):
                inner = self._add_block(each, unit[:, block], product, self._b[:, block], weight * size)
                self._own += inner * (weight * size).square()

    def _add_block(self, each: Each, unit: Tensor, product: Tensor, b: Tensor, size: Tensor) -> Tensor:
        """Adds to A and B of some columns; |u u'|^2 of the task vector u, scaled to the norm 1, there."""
        rows, width = unit.shape
        factor = size.to(self._dtype)
        if rows >= width:

            def by_columns(panel: slice) -> Tensor:
                own = unit.T @ unit[:, panel]
                product[panel.start :, panel] += own[panel.start :]
                b[:, panel].addmm_(unit, own * factor)
                return own.double().square().sum()

            return torch.stack(each(by_columns, width, width)).sum()
        gram = torch.empty(
            rows, rows, dtype=unit.dtype, device=unit.device
        )  # smaller than t't: B is its product with t

        def by_rows(panel: slice) -> Tensor:
            gram[:, panel] = unit @ unit[panel].T
            return gram[:, panel].double().square().sum()

        inner = torch.stack(each(by_rows, rows, rows)).sum()

        def add(panel: slice) -> None:
            product[panel.start :, panel] += unit[:, panel.start :].T @ unit[:, panel]
            b[:, panel].addmm_(gram, unit[:, panel] * factor)

        each(add, width, width)
        return inner

    @torch.no_grad()
    def solve(self, ridge: float = RIDGE) -> Solved:
        """The update; the layer is used up. ridge: above 0."""
        rows, width = self._sum.shape
        figures = torch.zeros(FIGURES, dtype=torch.float64, device=self._sum.device)
        figures[:2] = self._own
        solvable = torch.ones_like(self._finite)
        e = torch.where(self._count > 0, ridge * self._count / width, 1.0)
        with self._panels() as each:
            for index, block in enumerate(self.blocks):
                self._products[index].diagonal().add_(e)
                factor, info = torch.linalg.cholesky_ex(self._products[index])
                self._products[index] = torch.empty(0)
                solvable &= info == 0

                def update(panel: slice, block: slice = block, factor: Tensor = factor) -> Tensor:
                    s, b = self._sum[panel, block].double(), self._b[panel, block].double()
                    right = b + e * s
                    # Not cholesky_solve, which copies the factor for every panel.
                    half = torch.linalg.solve_triangular(factor.T, right, upper=True, left=False)
                    tau = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
                    plain = (s @ factor).square().sum() - e * s.square().sum() - 2.0 * (s * b).sum()
                    ours = (tau * (right - e * tau - 2.0 * b)).sum()
                    products = [s.square().sum(), (s * tau).sum(), tau.square().sum()]
                    self._b[panel, block] = tau  # at last, because b may be a view of it
                    return torch.stack([plain, ours, *products])

                figures += torch.stack(each(update, rows, block.stop - block.start)).sum(dim=0)
        figures[:2].clamp_(min=0.0)
        return Solved(self._b, figures, self._finite, solvable)

    @contextmanager
    def _panels(self) -> Iterator[Each]:
        """A way to call a function for panels, on the CPU by as many threads as this one may use, each alone."""
        threads = torch.get_num_threads() if self._on_cpu else 1
        if threads == 1 or not self._on_cpu:
            yield lambda function, count, length: [function(panel) for panel in _panels(count, length)]
            return
        with one_thread(), ThreadPoolExecutor(threads, "awd-fast-panel", torch.set_num_threads, (1,)) as pool:
            yield lambda function, count, length: list(pool.map(function, _panels(count, length)))


def _panels(count: int, length: int) -> list[slice]:
    size = _panel(length)
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _panel(length: int) -> int:
    least, most = PANEL
    return max(min(PANEL_NUMBERS // length, most), least)


def cuts(width: int, columns: int) -> list[slice]:
    """Blocks of at most `columns` columns, as equal as can be; one of all with 0."""
    count = math.ceil(width / columns) if columns else 1
    ends = [width * index // count for index in range(count + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends)]


def needed_bytes(rows: int, width: int, columns: int, dtype: torch.dtype, threads: int = 1) -> int:
    """Bytes that a `Layer` takes at most, beside the task vectors that it is given, with so many threads."""
    sizes = [block.stop - block.start for block in cuts(width, columns)]
    largest = max(sizes)
    products = 8 * (sum(size * size for size in sizes) + largest * largest)
    gram = rows * rows * dtype.itemsize if rows < largest else 0
    panel = max(min(_panel(length), count) * length for count, length in ((rows, width), (width, largest)))
    return 3 * rows * width * dtype.itemsize + products + gram + threads * panel * PANEL_BYTES


@torch.no_grad()
def update(
    vectors: Sequence[Tensor], weights: Sequence[float] | None = None, ridge: float = RIDGE, columns: int = 0
) -> Tensor:
    """tau [R, D] of task vectors t_i [R, D], floating, on one device, multiplied by their weights (1 each).

    The result is float64 for float64 task vectors, else float32. Raises InputError where a task vector is not finite,
    or A + e I is not positive definite in that precision because the ridge is too small.
    """
    first = vectors[0]
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    layer = Layer(*first.shape, columns=columns, dtype=wide, device=first.device)
    for vector, weight in zip(vectors, weights or (1.0,) * len(vectors), strict=True):
        layer.add(weight, lambda panel, vector=vector: vector[panel].to(wide))  # type: ignore[misc]
    solved = layer.solve(ridge)
    if not solved.finite:
        raise InputError("a task vector holds NaN or Inf values; expected finite ones")
    if not solved.solvable:
        raise too_small(ridge)
    return solved.update


def interference(tau: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """The paper's objective, sum_i |(tau - t_i) t_i'|^2 / |t_i|^2, as a scalar of the dtype of tau; differentiable.

    tau, t_i: [R, D] of one floating dtype, the t_i with their weights. Zero task vectors add nothing.
    """
    total = tau.new_zeros(())
    for vector in vectors:
        square = vector.square().sum()
        if square > 0:
            total = total + ((tau - vector) @ vector.T).square().sum() / square
    return total


def too_small(ridge: float, where: str = "") -> InputError:
    """What is said where A + e I is not positive definite as it was computed."""
    return InputError(f"ridge is {ridge:g}, too small to solve for the update{where} in this precision; give more")
