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

from awd_fast import ops, solver
from awd_fast.blocks import Block
from awd_fast.errors import InputError
from awd_fast.merger import Merger, Result, overflow
from awd_fast.objective import SGD, Converge
from awd_fast.ops import reference
from awd_fast.parts import Cutter, Part
from awd_fast.plan import FLOAT8, Source, Step, common_dtype
from awd_fast.progress import Progress
from awd_fast.ranks import Ranks
from awd_fast.recipe import Recipe
from awd_fast.report import Similarity, figures
from awd_fast.solver import Solution
from awd_fast.stream import StreamMerger
from awd_fast.transfer import Conveyor, Link, Load, Work

Tensors = tuple[Tensor, list[Tensor]]
"""The base's and the models' elements of a part, on the device."""


@dataclass(frozen=True)
class Found:
    """What a part gave, on the device."""

    merged: Tensor | None = None
    solution: Solution | None = None


class BatchMerger(Merger):
    """Carries out a plan on the device of `link`. The result of a step is what `Merger` gives, up to rounding.

    Elementwise descents (Adam, l1) need their tensors whole on the device, with a global group all of them: those that
    do not fit are computed on the CPU, as the report then says.
    """

    def __init__(
        self,
        base: Source,
        models: Sequence[Source],
        recipe: Recipe,
        link: Link,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(base, models, recipe, progress, ranks)
        self.link = link
        self.cutter = Cutter([base, *models], recipe, link)
        self.host = StreamMerger(base, models, recipe, progress, ranks)  # for what stays there or does not fit
        self._weights_on(link.device)  # now, because a work that copied them would wait
        self._grams: dict[str, list[Tensor]] = {}  # of tensors in pieces, on the device
        self._factors: dict[str, Tensor] = {}  # weights [R, K] of their task vectors, on the device
        self._pieces: dict[str, Tensor] = {}  # merged tensors in pieces, where they will be given
        self._ready: dict[str, Tensor] = {}  # merged tensors
        self._found: dict[str, Similarity] = {}
        self._all_on_cpu = False  # the elementwise global group did not fit

    def prepare(self, plan: Sequence[Step], blocks: Sequence[Block]) -> None:
        if not self._all_shared:
            return
        selected = [step for step in plan if step.action == "awd"]
        if self.recipe.options.spans:
            mine = {block.step.name for block in blocks}
            self._span_global(selected, [step for step in selected if step.name in mine])
        else:
            self._elements_global(plan, selected, blocks)
        if self._shared is not None:  # what stays on the host is merged there, with the solution from here
            self.host.take_over(list(filter(self._on_host, selected)), self._shared, self._parts, self._shared_shift)

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
                similarity = self._parts.get(step.name, self._found.pop(step.name, None))
                self.progress.read(sum(self.host.size(step, block.count) for block in own), step.name)
                for block in own:
                    tensor = merged[block.begin : block.end].view(block.shape)
                    yield Result(block, tensor, similarity if block.first else None)

    def inspections(self, plan: Sequence[Step]) -> Generator[tuple[Step, Similarity | None, bool], None, None]:
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
                yield step, self._parts.get(step.name, self._found.pop(step.name, None)), False

    def indivisible(self, step: Step) -> bool:
        return step.action != "base"  # it is cut as the memory of the device asks for

    def bytes_to_read(self, plan: Sequence[Step], blocks: Sequence[Block], done: Sequence[Block]) -> int:
        return self.host.bytes_to_read(plan, blocks, done)

    def bytes_to_inspect(self, plan: Sequence[Step], blocks: Sequence[Block]) -> int:
        return self.host.bytes_to_inspect(plan, blocks)

    def bytes_to_read_twice(self, blocks: Sequence[Block], done: Sequence[Block] = ()) -> int:
        return self.host.bytes_to_read_twice(blocks, done)

    def _on_host(self, step: Step) -> bool:
        return step.action == "base" or step.dtype in FLOAT8 or (self._all_on_cpu and step.action == "awd")

    def _parts_of(self, step: Step, combine: bool) -> list[Part]:
        """What is done for a step on the device, in order; nothing where it does not fit there."""
        options, groups, cutter = self.recipe.options, self.recipe.options.groups, self.cutter
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

    def _loads(self, part: Part) -> list[Load]:
        loads = self.cutter.loads(part)
        if part.way == "_shift":
            shift = self._shared_shift[part.step.name].view(-1)[part.begin : part.end]
            loads.append(Load(lambda: shift, part.shape, shift.dtype))
        return loads

    def _numbers(self, part: Part) -> int:
        """How many numbers of a part come back beside its merged elements."""
        k = len(self.models)
        return (2 * k * k + 7 if part.solves else 0) + (2 if part.combines else 0)

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
            solution, merged = found[index].solution, found[index].merged
            if part.solves:
                assert solution is not None
                checks = torch.stack([torch.isfinite(solution.gram).all(), solution.finite()]).double()
                numbers += [figures(solution, self._weights_on(solution.gram.device)[0], self.recipe), checks]
            if part.combines:
                assert merged is not None
                numbers.append(torch.stack(torch.aminmax(merged)).double())
                if self.cutter.stays(part.step):
                    self._keep(part, merged)
                else:
                    sent.append(merged)
        return [*sent, torch.cat(numbers)] if numbers else [*sent, torch.empty(0, dtype=torch.float64)]

    def _done(self, parts: Sequence[Part], results: list[Tensor]) -> None:
        """On the host: checks what came back, and keeps what is complete."""
        *sent, numbers = results
        k = len(self.models)
        for part in parts:
            name, own = part.step.name, numbers[: self._numbers(part)].tolist()
            numbers = numbers[len(own) :]
            if part.solves:
                solved, own = torch.tensor(own[: 2 * k * k + 7], dtype=torch.float64), own[2 * k * k + 7 :]
                if not solved[-2:].all():
                    self._require_finite(part.step)
                    raise solver.diverged()
                meta, options = torch.empty(part.step.info.shape, device="meta"), self.recipe.options
                self._found[name] = Similarity.from_figures(solved[:-2], reference.group_count(meta, options.groups))
            if part.combines:
                if not all(map(math.isfinite, own)):
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

    def _span_global(self, steps: Sequence[Step], mine: Sequence[Step]) -> None:
        """The one group in the span: the Gram matrix of every tensor, piece by piece, and one descent."""
        options, backend = self.recipe.options, self.recipe.backend
        cut = partial(self.cutter.split, way="_gather", groups="tensor", flat=True, combines=False)
        parts = [part for step in mine for part in cut(step)]
        grams: dict[str, Tensor] = {}

        def work(together: Sequence[Part]) -> Work:
            k = len(self.models)
            loads = [load for part in together for load in self._loads(part)]

            def run(tensors: list[Tensor]) -> list[Tensor]:
                each = [tensors[at : at + k + 1] for at in range(0, len(tensors), k + 1)]
                found = ops.gram_many([(base, models) for base, *models in each], "tensor", backend=backend)
                return [torch.cat(found)]

            def done(results: list[Tensor]) -> None:
                for part, gram in zip(together, results[0].split(1), strict=True):
                    name = part.step.name
                    grams[name] = grams[name] + gram if name in grams else gram
                    if not torch.isfinite(gram).all():
                        self._require_finite(part.step)
                    self.progress.read(self.host.size(part.step, part.end - part.begin), name)

            return Work(loads, [((len(together), k, k), torch.float64)], run, done)

        with Conveyor(self.link) as conveyor:
            for _ in conveyor.carry([work(together) for together in self.cutter.together(parts)]):
                pass
        none = torch.zeros(1, len(self.models), len(self.models), dtype=torch.float64)
        every = self.ranks.sum(torch.stack([grams.get(step.name, none) for step in steps]))
        solution = solver.solve_span(every.sum(dim=0).to(self.link.device), options, backend).moved("cpu")
        assert solution.coefficients is not None
        self._note_global(solution)
        self._note_parts(solution, {step.name: gram for step, gram in zip(steps, every, strict=True)})
        self._factors[""] = self._awd_weights(solution.coefficients).to(self.link.device)

    def _elements_global(self, plan: Sequence[Step], steps: Sequence[Step], blocks: Sequence[Block]) -> None:
        """The one group outside the span, whose tensors must lie on the device together, or are left to the CPU."""
        parts = [self.cutter.whole(step, "_solve", "tensor", combines=False) for step in steps]
        if sum(part.cost + part.beside for part in parts) > self.cutter.budget:
            self._require_any_backend(steps[0])
            self._all_on_cpu = True
            self.host.prepare(plan, blocks)
            self.shared = self.host.shared
            return
        if self.ranks.count > 1:
            raise InputError(
                f"{type(self.recipe.options.optimizer).__name__} with a global group runs in one process on a device; "
                "use one, or device cpu"
            )
        k = len(self.models)
        found: list[tuple[Solution, list[Solution]]] = []

        def run(tensors: list[Tensor]) -> list[Tensor]:
            each = [tensors[at : at + k + 1] for at in range(0, len(tensors), k + 1)]
            try:
                solved = solver.solve_parts([(base, m) for base, *m in each], self.recipe.options, self.recipe.backend)
            except InputError:
                for step in steps:
                    self._require_finite(step)
                raise
            found.append(solved)
            return [part.shift for part in solved[1] if part.shift is not None]

        def done(shifts: list[Tensor]) -> None:
            for step, part, shift in zip(steps, found[0][1], shifts, strict=True):
                self._shared_shift[step.name] = shift
                self._parts[step.name] = Similarity.of(replace(part, shift=None), self.recipe)
                self.progress.read(self.host.size(step, step.info.count), step.name)

        results = [
            ((1, step.info.count), ops.compute_dtype(common_dtype(self.cutter.sources, step.name))) for step in steps
        ]
        work = Work([load for part in parts for load in self._loads(part)], results, run, done)
        with Conveyor(self.link) as conveyor:
            for _ in conveyor.carry([work]):
                pass
        self._note_global(found[0][0].moved("cpu"))

    def _require_any_backend(self, step: Step) -> None:
        """Raises InputError where what does not fit must not go to the CPU: a backend of the device was named."""
        name = self.recipe.backend
        if name not in (None, "native", "reference"):
            raise InputError(
                f"tensor {step.name!r} does not fit {self.cutter.budget / 1e9:.3g} GB of {self.recipe.device}; "
                f"give more (device_memory), or leave out backend {name} to compute it on the CPU"
            )
