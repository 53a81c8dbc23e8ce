"""A merged model as a function of its coefficients, and the gradient of a loss with respect to them.

With task vectors t_i, the redundant vector d_r of a group r, and coefficients c_i of the tensor that the group is in,

    theta_r = theta_0r + sum_i c_i (t_ri - d_r)        dL/dc_i = sum_r <g_r, t_ri - d_r>

where g is the gradient of L at theta. Where d_r = sum_j a_rj t_rj, both need only K numbers per group beside one read
of the tensors: theta has the weights c_j - (sum_i c_i) a_rj, and dL/dc_i = sum_r (s_ri - sum_j a_rj s_rj) with
s_rj = <g_r, t_rj>. So no task vector is stored, and autograd never sees the merge. A d outside the span is kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from awd_fast import ops, solver
from awd_fast.merger import finite, require_finite
from awd_fast.objective import Groups
from awd_fast.ops import reference
from awd_fast.plan import FLOAT8, Source, Step
from awd_fast.recipe import Recipe
from awd_fast.solver import Solution


@dataclass(frozen=True)
class Part:
    """One merged tensor: its number among all, base and models as they are computed with, its dtype, and its d.

    coefficients: a [R, K] of d in the span, with the groups that it is for; shift: d otherwise, in the tensor's shape;
    both None where d is 0.
    """

    step: Step
    column: int
    base: Tensor
    models: tuple[Tensor, ...]
    dtype: torch.dtype
    groups: Groups = "tensor"
    coefficients: Tensor | None = None
    shift: Tensor | None = None

    @property
    def count(self) -> int:
        """R, as one number per model and group describes the merge."""
        return 1 if self.coefficients is None else len(self.coefficients)

    @property
    def kind(self) -> tuple[str, ...]:
        """What parts that one call takes together have in common."""
        how = (self.base.device, self.base.dtype, self.groups, self.coefficients is None, self.shift is None)
        return tuple(map(str, how))


class Mixture:
    """Merged tensors for any coefficients C [K, N], float64 on the CPU: one column for each merged tensor.

    steps: the N tensors. places: for each the device and dtype of the merged tensor; what does not lie there is copied
    once. Raises InputError where a tensor is not finite or a descent diverges.
    """

    def __init__(
        self,
        base: Source,
        models: Sequence[Source],
        steps: Sequence[Step],
        recipe: Recipe,
        places: Sequence[tuple[torch.device, torch.dtype]],
    ) -> None:
        self._k = len(models)
        parts = []
        for column, (step, (device, dtype)) in enumerate(zip(steps, places, strict=True)):
            origin, *tuned = [_taken(source, step, device, recipe) for source in (base, *models)]
            parts.append(Part(step, column, origin, tuple(tuned), dtype))
        solved = sorted(_solved(parts, recipe), key=lambda part: part.kind)
        self._bundles = [_Bundle(list(same), recipe.backend) for _, same in groupby(solved, lambda part: part.kind)]

    def merged(self, coefficients: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The number of each step, in some order, and its merged tensor for C."""
        for bundle in self._bundles:
            yield from bundle.merged(coefficients)

    def slopes(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """dL/dC [K, N] from the gradient of L with respect to each merged tensor; None stands for 0."""
        found = torch.zeros(len(gradients), self._k, dtype=torch.float64)
        for bundle in self._bundles:
            found[bundle.columns] = bundle.slopes([gradients[part.column] for part in bundle.parts]).cpu()
        return found.T


class _Bundle:
    """Parts of one kind."""

    def __init__(self, parts: Sequence[Part], backend: str | None) -> None:
        self.parts, self._backend = parts, backend
        self.columns = torch.tensor([part.column for part in parts])
        self._parameters = [(part.base, part.models) for part in parts]
        self._groups, self._device = parts[0].groups, parts[0].base.device
        self._counts = [part.count for part in parts]
        self._dtypes = [part.dtype if part.shift is None else part.shift.dtype for part in parts]
        spans = [part.coefficients for part in parts if part.coefficients is not None]
        self._span = torch.cat(spans) if spans else None  # a of all groups of all parts
        self._owners = torch.repeat_interleave(torch.tensor(self._counts)).to(self._device)  # the part of each group

    def merged(self, coefficients: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The number of each part and its merged tensor."""
        own = coefficients.T[self.columns].to(self._device)  # [n, K]
        weights = own[self._owners]
        if self._span is not None:
            weights = weights - weights.sum(dim=1, keepdim=True) * self._span
        each = weights.split(self._counts)
        found = ops.combine_many(self._parameters, each, self._groups, dtypes=self._dtypes, backend=self._backend)
        for part, factors, tensor in zip(self.parts, own, found, strict=True):
            if part.shift is not None:
                tensor = (tensor - factors.sum() * part.shift).to(part.dtype)
            yield part.column, tensor

    def slopes(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """dL/dc [n, K]."""
        given = {index: _dense(gradient) for index, gradient in enumerate(gradients) if gradient is not None}
        asked = [self._parameters[index] for index in given]
        found = ops.multi_dot_many(asked, list(given.values()), self._groups, backend=self._backend)
        products = dict(zip(given, found, strict=True))
        nothing = torch.zeros(1, len(self.parts[0].models), dtype=torch.float64, device=self._device)
        every = torch.cat([products.get(index, nothing.expand(count, -1)) for index, count in enumerate(self._counts)])
        if self._span is not None:
            every = every - (self._span * every).sum(dim=1, keepdim=True)
        for index, gradient in given.items():
            shift = self.parts[index].shift
            if shift is not None:
                every[index] -= ops.multi_dot(None, [shift], gradient, "tensor", backend=self._backend)[0]
        if len(every) == len(self.parts):
            return every
        return torch.stack([own.sum(dim=0) for own in every.split(self._counts)])


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach() if gradient.layout == torch.strided else gradient.detach().to_dense()


def _taken(source: Source, step: Step, device: torch.device, recipe: Recipe) -> Tensor:
    """A source's tensor as the operators read it without another copy. Raises InputError where it is not finite."""
    tensor = source.read(step.name)
    if not finite(tensor):
        require_finite(source, step, recipe)
    tensor = tensor.float() if tensor.dtype in FLOAT8 else tensor
    return tensor.to(device).resolve_neg().contiguous()


def _solved(parts: Sequence[Part], recipe: Recipe) -> list[Part]:
    """The parts with their d."""
    chosen = [part for part in parts if part.step.action == "awd"]
    solved = _solved_as_one(chosen, recipe) if recipe.options.groups == "global" else _solved_alone(chosen, recipe)
    found = {part.column: part for part in parts} | {part.column: part for part in solved}
    return list(found.values())


def _solved_alone(parts: Sequence[Part], recipe: Recipe) -> Iterable[Part]:
    groups = recipe.options.groups
    for part in parts:
        yield _with(part, solver.solve(part.base, part.models, recipe.options, recipe.backend), groups)


def _solved_as_one(parts: Sequence[Part], recipe: Recipe) -> Iterable[Part]:
    """One group over all parts, which in the span may lie on different devices."""
    if not parts:
        return
    options, backend = recipe.options, recipe.backend
    if options.spans:
        home = parts[0].base.device
        grams = [ops.gram(part.base, part.models, "tensor", backend=backend).to(home) for part in parts]
        solution = solver.solve_span(torch.stack(grams).sum(dim=0), options, backend)
        yield from (_with(part, solution.moved(part.base.device), "tensor") for part in parts)
        return
    _, shares = solver.solve_parts([(part.base, part.models) for part in parts], options, backend)
    yield from (_with(part, share, "tensor") for part, share in zip(parts, shares, strict=True))


def _with(part: Part, solution: Solution, groups: Groups) -> Part:
    """A part with the d that was found for these groups."""
    if solution.coefficients is not None:
        return replace(part, groups=groups, coefficients=solution.coefficients)
    assert solution.shift is not None
    return replace(part, shift=reference.ungroup(solution.shift, part.base.shape, groups).contiguous())
