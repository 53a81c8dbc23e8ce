"""From statistics to the redundant vector: chooses the way, runs it, measures what it did.

*Span*: SGD or Converge with a Euclidean penalty keep d = sum_j a_j t_j, so the vectors are read once for their Gram
matrix and K numbers per group are iterated. *Elementwise*: Adam, or an l1 penalty, iterate on the elements of d: a
group at a time in the cache, or, where all is one large group, streaming (`awd_fast.streaming`). Converge with an l1
penalty is the only one that stores the task vectors. Autograd does not look inside: d is a constant of the tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from awd_fast import ops, statistics, streaming
from awd_fast.errors import InputError
from awd_fast.objective import Adam, Converge, Options
from awd_fast.ops import reference

RESIDENT = 32768  # elements of a single group up to which it is iterated in the cache, by one thread


@dataclass(frozen=True)
class Solution:
    """The redundant vectors of the R groups of one parameter (or of many, for one global group).

    coefficients: a [R, K] with d = sum_j a_j t_j, or None where d is outside the span. shift: d [R, D], or None where
    the coefficients say it all. gram: G [R, K, K]. inner, square: <t_i, d> [R, K] and <d, d> [R]; all float64.
    history: the loss at d_0, d_1, ... All lie on the device of the tensors that they were found from.
    """

    coefficients: Tensor | None
    shift: Tensor | None
    gram: Tensor
    inner: Tensor
    square: Tensor
    history: Tensor

    @property
    def gram_after(self) -> Tensor:
        """G' [R, K, K] of the disentangled vectors t_i - d."""
        return statistics.shifted_gram(self.gram, self.inner, self.square)

    def update_products(self, weights: Tensor) -> Tensor:
        """<T, T>, <T, A>, <A, A> of the plain update T = sum_i m_i t_i and AWD's A = sum_i m_i (t_i - d).

        weights: m [K] float64, on the solution's device. The products are summed over the groups; the cosine of the
        two updates follows.
        """
        plain = torch.einsum("i,rij,j->", weights, self.gram, weights)
        across = (self.inner @ weights).sum() * weights.sum()
        return torch.stack([plain, plain - across, plain - 2.0 * across + weights.sum().square() * self.square.sum()])

    def part(self, gram: Tensor, inner: Tensor, square: Tensor) -> "Solution":
        """The share of one tensor in a global group: its own G [1, K, K], b and s; it has no loss of its own."""
        return Solution(self.coefficients, None, gram, inner, square, gram.new_full((1,), torch.nan))

    def finite(self) -> Tensor:
        """Whether the descent stayed in the range of numbers: a bool [] on the solution's device, not looked at."""
        found = (part for part in (self.coefficients, self.shift, self.history) if part is not None)
        return torch.stack([all_finite(part) for part in found]).all()

    def moved(self, device: torch.device | str) -> "Solution":
        """The same on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in moved.items()})


def all_finite(tensor: Tensor) -> Tensor:
    """Whether no element is NaN or Inf: a bool [] on its device, not looked at, from one read without a copy."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.isfinite(torch.stack(torch.aminmax(tensor))).all()


@torch.no_grad()
def solve_span(gram: Tensor, options: Options, backend: str | None, total: int | None = None) -> Solution:
    """The solution from the Gram matrices G [R, K, K] alone. total: as in `awd_fast.ops.descend`."""
    if isinstance(options.optimizer, Adam):
        raise ValueError("Adam leaves the span of the task vectors")
    coefficients, history = ops.descend(gram, options.objective, options.optimizer, backend=backend, total=total)
    return span_solution(gram, coefficients, history)


def span_solution(gram: Tensor, coefficients: Tensor, history: Tensor) -> Solution:
    """The solution with these coefficients. Raises InputError where the descent left the range of numbers."""
    return _checked(unchecked_span(gram, coefficients, history))


def unchecked_span(gram: Tensor, coefficients: Tensor, history: Tensor) -> Solution:
    """As `span_solution`, but nobody waits for the numbers to look at them: `Solution.finite` says what they are."""
    inner, square = statistics.span_moments(gram, coefficients)
    return Solution(coefficients, None, gram, inner, square, history)


@torch.no_grad()
def solve_elements(vectors: Tensor, options: Options, total: int | None = None) -> Solution:
    """The solution from the task vectors t [R, K, D], by the reference."""
    shift, history = ops.descend_elements(vectors, options.objective, options.optimizer, total=total)
    return _checked(Solution(None, shift, statistics.gram(vectors), *element_moments(vectors, shift), history))


def element_moments(vectors: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """b [R, K] and s [R] float64 of t [R, K, D] and d [R, D]."""
    d = shift.double()
    return torch.einsum("rkd,rd->rk", vectors.double(), d), d.square().sum(dim=1)


@torch.no_grad()
def solve(
    base: Tensor | None,
    models: Sequence[Tensor],
    options: Options,
    backend: str | None = None,
    total: int | None = None,
) -> Solution:
    """The solution for one parameter, its groups as `options.groups` says ("global" here means the whole tensor).

    total: the number of groups of the parameter, where the tensors hold only some of its rows or columns; the history
    is then their share.
    """
    if options.spans:
        return solve_span(ops.gram(base, models, options.groups, backend=backend), options, backend, total)
    ops.check(base, models, options.groups)
    if isinstance(options.optimizer, Converge):
        require_backend(options, backend)
        return solve_elements(reference.task_vectors(base, models, options.groups), options, total)
    count, size = reference.group_view(models[0], options.groups).shape
    if count == 1 and size > RESIDENT and total in (None, 1):
        solution, (part,) = solve_parts([(base, models)], options, backend)
        return replace(solution, shift=part.shift)
    found = ops.descend_groups(
        base, models, options.objective, options.optimizer, options.groups, backend=backend, total=total
    )
    shift = reference.group_view(found.shift, options.groups)
    return _checked(Solution(None, shift, found.gram, found.inner, found.square, found.history))


@torch.no_grad()
def solve_parts(
    parts: Sequence[streaming.Tensors | None],
    options: Options,
    backend: str | None,
    add_up: Callable[[Tensor], Tensor] | None = None,
    k: int | None = None,
) -> tuple[Solution, list[Solution]]:
    """The solution, outside the span, of the one group that many tensors make, and each tensor's part in it.

    parts: base (or None) and models of each tensor. The solution has no shift, the parts have: d [1, D]. add_up, k: see
    `awd_fast.streaming.descend`; parts of other processes are None here, and have no shift.
    """
    if isinstance(options.optimizer, Converge):
        require_backend(options, backend)
        held = [part for part in parts if part is not None]
        if len(held) < len(parts):
            raise InputError("Converge with penalty l1 has no way to share a global group among processes; use one")
        vectors = [reference.task_vectors(base, models, "tensor") for base, models in held]
        whole = solve_elements(torch.cat(vectors, dim=2), options)
        assert whole.shift is not None
        shifts: list[Tensor | None] = [*whole.shift.split([part.shape[2] for part in vectors], dim=1)]
        grams = torch.cat([statistics.gram(part) for part in vectors])
        moments = [element_moments(t, d) for t, d in zip(vectors, shifts, strict=True) if d is not None]
        inner, square = (torch.cat(moment) for moment in zip(*moments, strict=True))
        history = whole.history
    else:
        found = streaming.descend(parts, options.objective, options.optimizer, backend, add_up, k)
        shifts = [None if shift is None else reference.group_view(shift, "tensor") for shift in found.shifts]
        grams, inner, square, history = found.gram, found.inner, found.square, found.history
    solution = Solution(None, None, *_summed(grams, inner, square), history)
    single = zip(shifts, grams.split(1), inner.split(1), square.split(1), strict=True)
    found_parts = [replace(solution.part(gram, b, s), shift=shift) for shift, gram, b, s in single]
    for part in found_parts:
        _checked(replace(part, history=history))
    return solution, found_parts


def _summed(gram: Tensor, inner: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G, b and s of the group from those of its parts."""
    return gram.sum(dim=0, keepdim=True), inner.sum(dim=0, keepdim=True), square.sum(dim=0, keepdim=True)


def _checked(solution: Solution) -> Solution:
    """The solution. Raises InputError where the descent left the range of numbers."""
    if not solution.finite():
        raise diverged()
    return solution


def diverged() -> InputError:
    """What is said where it did."""
    return InputError(
        "the optimiser diverged (the loss is not finite); lower lr, or use Converge (--optimizer converge)"
    )


def require_backend(options: Options, backend: str | None) -> None:
    """Raises InputError where `backend` was asked for by name and cannot run these options."""
    if not options.spans and isinstance(options.optimizer, Converge) and backend not in (None, "reference"):
        raise InputError(f"backend {backend} has no Converge with penalty l1; use reference, or SGD or Adam")
