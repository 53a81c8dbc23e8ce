"""Merging on a device: many tensors per launch, large ones in pieces, in the memory that it may use.

Steps become parts (a tensor, or some of its elements), parts become works of a `awd_fast.transfer.Conveyor`. A tensor
that does not fit whole is read twice where d is in the span of the task vectors: its Gram matrices piece by piece, then
one descent for all its groups, then the combination piece by piece. Nothing waits for the device but the conveyor; what
the report and the checks for NaN need of a work comes back as one vector.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from awd_fast import ops, solver, wudi
from awd_fast.blocks import Block, matrix
from awd_fast.device_merger import DeviceMerger
from awd_fast.errors import InputError
from awd_fast.merger import Result, overflow
from awd_fast.objective import SGD, Converge
from awd_fast.ops import reference
from awd_fast.parts import Part
from awd_fast.plan import Step
from awd_fast.report import Figures, Interference, Similarity, figures
from awd_fast.solver import Solution
from awd_fast.transfer import Conveyor, Work
from awd_fast.wudi_jobs import difference

Tensors = tuple[Tensor, list[Tensor]]
"""The base's and the models' elements of a part, on the device."""


@dataclass(frozen=True)
class Found:
    """What a part gave, on the device."""

    merged: Tensor | None = None
    solution: Solution | None = None
    layer: wudi.Solved | None = None


class BatchMerger(DeviceMerger):
    """Carries out a plan on the device of `link`. The result of a step is what `Merger` gives, up to rounding.

    Elementwise descents (Adam, l1) need their tensors whole on the device, with a global group all of them: those that
    do not fit are computed on the CPU, as the report then says; and so do layers of wudi.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._grams: dict[str, list[Tensor]] = {}  # of tensors in pieces, on the device
        self._pieces: dict[str, Tensor] = {}  # merged tensors in pieces, where they will be given
        self._ready: dict[str, Tensor] = {}  # merged tensors
        self._found: dict[str, Figures] = {}

    def results(self, blocks: Sequence[Block]) -> Generator[Result, None, None]:
        steps = [(step, list(own)) for step, own in groupby(blocks, lambda block: block.step)]
        parts = {step.name: self._parts_of(step, combine=True) for step, _ in steps if not self._on_host(step)}
        with Conveyor(self.link) as conveyor:
            carried = conveyor.carry(self._works([part for found in parts.values() for part in found]))
            for step, own in steps:
                if not parts.get(step.name):
                    on_cpu = not self._on_host(step) or self._all_on_cpu
                    if on_cpu:
                        self._require_any_backend(step)
                    for result in self.host.results(own):
                        yield replace(result, on_cpu=on_cpu)
                    continue
                while step.name not in self._ready:
                    next(carried)
                merged = self._ready.pop(step.name).view(-1)
                similarity = self._known(step)
                self.progress.read(sum(self.host.size(step, block.count) for block in own), step.name)
                for block in own:
                    tensor = merged[block.begin : block.end].view(block.shape)
                    yield Result(block, tensor, similarity if block.first else None)

    def _known(self, step: Step) -> Figures | None:
        """What was found of a step, once."""
        found = self._found.pop(step.name, None)
        return self._parts.get(step.name, found)

    def inspections(self, plan: Sequence[Step]) -> Generator[tuple[Step, Figures | None, bool], None, None]:
        wanted = [step for step in plan if step.action == "awd" and step.name not in self._parts]
        parts = {step.name: self._parts_of(step, combine=False) for step in wanted}
        with Conveyor(self.link) as conveyor:
            carried = conveyor.carry(self._works([part for found in parts.values() for part in found]))
            for step in plan:
                if self._all_on_cpu or (step.name in parts and not parts[step.name]):
                    on_cpu = step.action == "awd"
                    if on_cpu:
                        self._require_any_backend(step)
                    for _, similarity, _ in self.host.inspections([step]):
                        yield step, similarity, on_cpu
                    continue
                while parts.get(step.name) and step.name not in self._found:
                    next(carried)
                if step.name in parts:
                    self.progress.read(self.host.size(step, step.info.count), step.name)
                yield step, self._known(step), False

    def indivisible(self, step: Step) -> bool:
        return step.action != "base"  # it is cut as the memory of the device asks for

    def bytes_to_read(self, plan: Sequence[Step], blocks: Sequence[Block], done: Sequence[Block]) -> int:
        return self.host.bytes_to_read(plan, blocks, done)

    def bytes_to_inspect(self, plan: Sequence[Step], blocks: Sequence[Block]) -> int:
        return self.host.bytes_to_inspect(plan, blocks)

    def bytes_to_read_twice(self, blocks: Sequence[Block], done: Sequence[Block] = ()) -> int:
        return self.host.bytes_to_read_twice(blocks, done)

    def _parts_of(self, step: Step, combine: bool) -> list[Part]:
        """What is done for a step on the device, in order; nothing where it does not fit there."""
        options, groups, cutter = self.recipe.options, self.recipe.options.groups, self.cutter
        if step.action == "wudi":
            whole = cutter.whole(step, "_wudi", "tensor", combines=combine)
            return [whole] if cutter.fits(whole) else []
        if step.action != "awd" or self._shared is not None:
            shifted = step.action == "awd" and self._shared is not None and self._shared.coefficients is None
            return cutter.split(step, "_shift" if shifted else "_weigh", "row", flat=True, combines=True)
        whole = cutter.whole(step, "_solve", groups, combines=combine)
        if not options.spans:
            return [whole] if cutter.fits(whole) else []
        if cutter.fits(whole):
            return [replace(whole, way=("_fuse" if options.fuses else "_span") if combine else "_gather")]
        *parts, last = cutter.split(step, "_gather", groups, flat=not options.fuses, combines=False)
        parts.append(replace(last, solves=True))
        if combine:
            same = groups if options.fuses else "row"  # as a vector, with the weights of all
            first, *others = cutter.split(step, "_weigh", same, flat=not options.fuses, combines=True)
            parts += [replace(first, fresh=True), *others]
        return parts

    def _works(self, parts: Sequence[Part]) -> list[Work]:
        return [self._work(together) for together in self.cutter.together(parts)]

    def _work(self, parts: Sequence[Part]) -> Work:
        """The parts as a work; its results are the merged elements that leave the device, and a vector of numbers."""
        loads = [load for part in parts for load in self._loads(part)]
        sent = [(part.shape, part.step.dtype) for part in parts if part.combines and not self.cutter.stays(part.step)]
        numbers = sum(self._numbers(part) for part in parts)
        results = [*sent, ((numbers,), torch.float64)]
        return Work(loads, results, partial(self._run, parts), partial(self._done, parts))

    def _numbers(self, part: Part) -> int:
        """How many numbers of a part come back beside its merged elements."""
        return (self._solved_numbers(part) if part.solves else 0) + (2 if part.combines else 0)

    def _solved_numbers(self, part: Part) -> int:
        """How many of these are the figures of its solution and two checks."""
        return (wudi.FIGURES if part.step.action == "wudi" else 2 * len(self.models) ** 2 + 5) + 2

    def _run(self, parts: Sequence[Part], tensors: list[Tensor]) -> list[Tensor]:
        """On the device: what each way finds of its parts, and the numbers of all, of which nothing is looked at."""
        loaded: list[list[Tensor]] = []
        for part in parts:
            count = len(self.models) + 1 + (part.way == "_shift")
            loaded.append(tensors[:count])
            del tensors[:count]
        found: dict[int, Found] = {}
        key: Callable[[int], Any] = lambda i: (parts[i].way, parts[i].groups, str(loaded[i][0].dtype))  # noqa: E731
        for (way, *_), same in groupby(sorted(range(len(parts)), key=key), key):
            indices = list(same)
            method: Callable[..., list[Found]] = getattr(self, way)
            given = [(loaded[i][0], loaded[i][1:]) for i in indices]
            found |= dict(zip(indices, method([parts[i] for i in indices], given), strict=True))
        sent: list[Tensor] = []
        numbers: list[Tensor] = []
        for index, part in enumerate(parts):
            merged = found[index].merged
            if part.solves:
                numbers += self._figures(found[index])
            if part.combines:
                assert merged is not None
                numbers.append(torch.stack(torch.aminmax(merged)).double())
                if self.cutter.stays(part.step):
                    self._keep(part, merged)
                else:
                    sent.append(merged)
        return [*sent, torch.cat(numbers)] if numbers else [*sent, torch.empty(0, dtype=torch.float64)]

    def _figures(self, found: Found) -> list[Tensor]:
        """The figures of a solution, and two checks of it."""
        if found.layer is not None:
            return [found.layer.figures, torch.stack([found.layer.finite, found.layer.solvable]).double()]
        solution = found.solution
        assert solution is not None
        checks = torch.stack([solver.all_finite(solution.gram), solution.finite()]).double()
        return [figures(solution, self._weights_on(solution.gram.device)[0], self.recipe), checks]

    def _note_figures(self, step: Step, solved: Tensor) -> None:
        """Keeps the figures of a solution that passes its checks. Raises InputError where it does not."""
        first, second = solved[-2:].tolist()
        if step.action == "wudi":
            self._require_solved(step, bool(first), bool(second))
            self._found[step.name] = Interference.from_figures(solved[:-2])
            return
        if not (first and second):
            self._require_finite(step)
            raise solver.diverged()
        meta, groups = torch.empty(step.info.shape, device="meta"), self.recipe.options.groups
        self._found[step.name] = Similarity.from_figures(solved[:-2], reference.group_count(meta, groups))

    def _done(self, parts: Sequence[Part], results: list[Tensor]) -> None:
        """On the host: checks what came back, and keeps what is complete."""
        *sent, numbers = results
        for part in parts:
            name, own = part.step.name, numbers[: self._numbers(part)]
            numbers = numbers[len(own) :]
            if part.solves:
                self._note_figures(part.step, own[: self._solved_numbers(part)])
            if part.combines:
                if not all(map(math.isfinite, own[-2:].tolist())):
                    self._require_finite(part.step)
                    raise overflow(part.step)
                if not self.cutter.stays(part.step):
                    self._keep(part, sent.pop(0))
                if part.last:
                    self._ready[name] = self._pieces.pop(name)

    def _keep(self, part: Part, merged: Tensor) -> None:
        """Puts a part of a merged tensor where it will be given."""
        name = part.step.name
        if part.whole:
            self._pieces[name] = merged
            return
        if name not in self._pieces:
            self._pieces[name] = torch.empty(part.step.info.shape, dtype=merged.dtype, device=merged.device)
        self._pieces[name].view(-1)[part.begin : part.end] = merged.view(-1)

    def _fuse(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> list[Found]:
        """Row or column groups of whole tensors in one pass."""
        recipe, options = self.recipe, self.recipe.options
        assert isinstance(options.optimizer, (SGD, Converge))
        found = ops.merge_rows_many(
            tensors,
            recipe.scale * self._weights[0],
            options.objective,
            options.optimizer,
            parts[0].groups,
            dtypes=[part.step.dtype for part in parts],
            backend=recipe.backend,
        )
        return [Found(merged, solver.unchecked_span(*spanned)) for merged, *spanned in found]

    def _span(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> list[Found]:
        """A group that is a whole tensor: its Gram matrix, the descent, the combination."""
        grams = ops.gram_many(tensors, parts[0].groups, backend=self.recipe.backend)
        solutions = [self._descend(gram) for gram in grams]
        weights = [self._awd_weights(each.coefficients) for each in solutions if each.coefficients is not None]
        merged = self._combine(parts, tensors, weights)
        return [Found(*found) for found in zip(merged, solutions, strict=True)]

    def _gather(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> list[Found]:
        """The Gram matrices of parts; with the last part of a tensor, the solution for all its groups."""
        found = []
        for part, gram in zip(parts, ops.gram_many(tensors, parts[0].groups, backend=self.recipe.backend), strict=True):
            name = part.step.name
            self._grams.setdefault(name, []).append(gram)
            if not part.solves:
                found.append(Found())
                continue
            grams = self._grams.pop(name)
            solution = self._descend(torch.cat(grams) if part.groups == "row" else torch.stack(grams).sum(dim=0))
            assert solution.coefficients is not None
            self._factors[name] = self._awd_weights(solution.coefficients)
            found.append(Found(solution=solution))
        return found

    def _weigh(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> list[Found]:
        """The combination with weights that are known: those of Task Arithmetic, or of a solution found before."""
        weights = []
        for part, (base, _) in zip(parts, tensors, strict=True):
            if part.step.action != "awd":
                weights.append(self._plain_weights(part.step, base.device))
                continue
            factors = self._factors["" if self._shared is not None else part.step.name]
            if len(factors) > 1 and part.groups == "row":
                factors = factors[part.begin // part.shape[-1] : part.end // part.shape[-1]]
            weights.append(factors)
        return [Found(merged) for merged in self._combine(parts, tensors, weights)]

    def _solve(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> list[Found]:
        """Whole tensors whose d is outside the span, one by one."""
        found = []
        for part, (base, models) in zip(parts, tensors, strict=True):
            try:
                solution = solver.solve(base, models, self.recipe.options, self.recipe.backend)
            except InputError:
                self._require_finite(part.step)
                raise
            merged = None
            if part.combines:
                assert solution.shift is not None
                shift = reference.ungroup(solution.shift, base.shape, self.recipe.options.groups)
                merged = self._without(base, models, shift, part.step.dtype)
            found.append(Found(merged, solution))
        return found

    def _wudi(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> list[Found]:
        """Whole layers, one by one."""
        found = []
        for part, (base, models) in zip(parts, tensors, strict=True):
            shape, wide = matrix(part.step), ops.compute_dtype(base.dtype)
            first, *others = [tensor.reshape(shape) for tensor in (base, *models)]
            layer = wudi.Layer(*shape, columns=self.recipe.columns, dtype=wide, device=base.device)
            for weight, model in zip(self.recipe.weights, others, strict=True):
                layer.add(weight, partial(difference, first, model))
            solved = layer.solve(self.recipe.ridge)
            merged = (first + self.recipe.scale * solved.update).to(part.step.dtype)
            found.append(Found(merged.view(part.shape), layer=solved))
        return found

    def _shift(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> list[Found]:
        """The combination with a d of the global group that came along as the last of the tensors."""
        pairs = zip(parts, tensors, strict=True)
        return [Found(self._without(base, models[:-1], models[-1], part.step.dtype)) for part, (base, models) in pairs]

    def _descend(self, gram: Tensor) -> Solution:
        options = self.recipe.options
        assert isinstance(options.optimizer, (SGD, Converge))
        found = ops.descend(gram, options.objective, options.optimizer, backend=self.recipe.backend)
        return solver.unchecked_span(gram, *found)

    def _combine(self, parts: Sequence[Part], tensors: Sequence[Tensors], weights: Sequence[Tensor]) -> list[Tensor]:
        dtypes = [part.step.dtype for part in parts]
        return ops.combine_many(tensors, weights, parts[0].groups, dtypes=dtypes, backend=self.recipe.backend)
