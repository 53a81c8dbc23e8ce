"""Merging on the CPU, block by block, while the next blocks are read and those that are done are written.

Rows that are groups of their own are independent: a block of them is merged from one read. A group that does not lie
in one block needs all its Gram matrices before the first block can be combined: where its tensor fits the memory, it is
read once as a whole, else twice. Elementwise descents (Adam, l1) on such a group keep the tensor in memory.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from awd_fast import ops, solver
from awd_fast.block_jobs import Tensors
from awd_fast.blocks import Block, blocks_of, cut, matrix
from awd_fast.errors import InputError
from awd_fast.merger import Result, finite, group_count, require_solved
from awd_fast.objective import SGD, Converge, Groups
from awd_fast.ops import reference
from awd_fast.plan import Source, Step
from awd_fast.prefetch import Job, Read, carry_out, one_by_one
from awd_fast.report import Similarity
from awd_fast.solver import Solution
from awd_fast.wudi_jobs import WudiJobs


class StreamMerger(WudiJobs):
    """Carries out a plan on the CPU, in the memory of the recipe.

    alone: one job after the other, each with all threads, as `awd_fast.prefetch.one_by_one` does; of the figures of
    tensors only the losses are found. Raises InputError where a descent on elements needs more memory than there is,
    saying how much.
    """

    def __init__(self, *given: Any, alone: bool = False, **named: Any) -> None:
        super().__init__(*given, **named)
        self._alone = alone
        if alone:
            self._threads = torch.get_num_threads()
        self._factors: dict[str, Tensor] = {}  # weights [R, K] of tensors that were solved before they are combined
        self._solved_before: dict[str, Similarity] = {}
        self._kept: dict[tuple[str, int], Tensor] = {}  # d of blocks of the global group outside the span

    def prepare(self, plan: Sequence[Step], blocks: Sequence[Block]) -> None:
        if self._all_shared:
            selected = [step for step in plan if step.action == "awd"]
            mine = [block for block in blocks if block.step.action == "awd"]
            if self.recipe.options.spans:
                self._solve_global(selected, mine)
            else:
                self._stream_global(selected, mine)
            return
        self._solve_shared([step for step in plan if self._together(step)], blocks)

    def take_over(
        self, steps: Sequence[Step], shared: Solution, parts: dict[str, Similarity], shifts: Mapping[str, Tensor]
    ) -> None:
        """Has steps of a global group merged as it was solved elsewhere; shifts: d, where it is outside the span."""
        self._parts = parts
        if shared.coefficients is not None:
            self._factors[""] = self._awd_weights(shared.coefficients)
            return
        for block in cut(steps, self.recipe):
            self._kept[block.step.name, block.begin] = shifts[block.step.name].view(-1)[block.begin : block.end]

    def results(self, blocks: Sequence[Block]) -> Generator[Result, None, None]:
        for job, found in self._carry_out(self._jobs(blocks)):
            self._count(job)
            yield from found

    def inspections(self, plan: Sequence[Step]) -> Generator[tuple[Step, Similarity | None, bool], None, None]:
        jobs = (job for step in plan for job in self._inspecting(step))
        for job, (step, similarity) in self._carry_out(jobs):
            self._count(job)
            yield step, similarity, False

    def _carry_out(self, jobs: Iterable[Job]) -> Generator[tuple[Job, Any], None, None]:
        return one_by_one(jobs) if self._alone else carry_out(jobs, self._most)

    def _jobs(self, blocks: Sequence[Block]) -> Iterator[Job]:
        for step, same in groupby(blocks, lambda block: block.step):
            own = list(same)
            if step.action == "base":
                yield from map(self._keep, own)
            elif step.action == "wudi":
                yield from self._wudi_jobs(step, own)
            elif step.action != "awd" or self._all_shared or step.name in self._factors:
                yield from (self._job(block, self._weigh) for block in own)
            elif not self._together(step):
                yield from (self._job(block, self._solve_block) for block in own)
            elif self._fits(step):
                yield self._whole(step, partial(self._solve_whole, step, own))
            elif self.recipe.options.spans:
                yield from self._gathering(step)
                yield from (replace(self._job(block, self._weigh), fresh=block is own[0]) for block in own)
            else:
                raise self._too_large(self._whole(step, lambda tensors: None).cost, f"tensor {step.name!r}")

    # Blocks that need no other.

    def _keep(self, block: Block) -> Job:
        """The base's elements; where they are not floating, the models' must be the same."""
        step = block.step
        others = self._to_compare(step)
        place = (step.name, block.begin, block.end, block.shape, step.info.dtype)

        def run(tensors: list[Tensor]) -> list[Result]:
            kept, *same = tensors
            for model, found in zip(others, same, strict=True):
                if not torch.equal(kept, found):
                    raise InputError(
                        f"{model.where(step.name)}: the {str(kept.dtype).removeprefix('torch.')} tensor {step.name!r} "
                        "differs from the base's; only floating tensors can be merged"
                    )
            result = kept.to(step.dtype, copy=True)  # what was read lies in memory that is used again
            if step.info.dtype.is_floating_point:
                self._require_sound(step, result)
            return [Result(block, result)]

        return Job([Read(source, *place) for source in (self.base, *others)], run, block.count * step.dtype.itemsize)

    def _to_compare(self, step: Step) -> Sequence[Source]:
        """The models whose tensors must be as the base's."""
        if step.info.dtype.is_floating_point:
            return []
        return [model for model in self.models if step.name in model.tensors]

    def _weigh(self, block: Block, tensors: Tensors) -> list[Result]:
        """The combination with weights that are known, or with a d that is."""
        step = block.step
        similarity = self._known(step) if block.first else None
        shift = self._kept.pop((step.name, block.begin), None)
        if shift is not None:
            merged = self._rounded(step, lambda dtype: self._without(*tensors, shift.view(block.shape), dtype))
        else:
            merged = self._combined(block, tensors, self._weights_for(block))
        return [Result(block, merged, similarity)]

    def _known(self, step: Step) -> Similarity | None:
        """What was found of a step before its blocks are combined."""
        return self._parts.get(step.name, self._solved_before.get(step.name))

    def _figures(self, solution: Solution) -> Similarity:
        return Similarity.losses_of(solution) if self._alone else Similarity.of(solution, self.recipe)

    def _weights_for(self, block: Block) -> Tensor:
        step = block.step
        if step.action != "awd":
            return self._plain_weights(step, torch.device("cpu"))
        return self._factors["" if self._all_shared else step.name]

    def _combined(self, block: Block, tensors: Tensors, weights: Tensor) -> Tensor:
        groups, backend = self.recipe.options.groups, self.recipe.backend
        kind = groups if len(weights) > 1 else "row"
        base, models = tensors
        return self._rounded(
            block.step, lambda dtype: ops.combine(base, models, weights, kind, dtype=dtype, backend=backend)
        )

    def _solve_block(self, block: Block, tensors: Tensors) -> list[Result]:
        """Groups that lie in the block: all its rows, or columns, or the tensor that it is."""
        step, options, recipe = block.step, self.recipe.options, self.recipe
        base, models = tensors
        if options.fuses and isinstance(options.optimizer, (SGD, Converge)):
            arguments = (recipe.scale * self._weights[0], options.objective, options.optimizer, options.groups)
            total = group_count(step, options.groups)
            solution: Solution | None = None

            def fused(dtype: torch.dtype) -> Tensor:
                nonlocal solution
                found = ops.merge_rows(base, models, *arguments, dtype=dtype, total=total, backend=recipe.backend)
                solution = solver.unchecked_span(found.gram, found.coefficients, found.history)
                require_solved(self, step, solution)
                return found.merged

            merged = self._rounded(step, fused)
            assert solution is not None
        else:
            solution = self._solution(block, tensors)
            merged = self._with(block, tensors, solution)
        return [Result(block, merged, self._figures(solution))]

    def _solution(self, block: Block, tensors: Tensors) -> Solution:
        """The solution of the groups in a block, or in a whole tensor; what is wrong with values, if they are."""
        options = self.recipe.options
        total = None if block.whole else group_count(block.step, options.groups)
        try:
            return solver.solve(*tensors, options, self.recipe.backend, total)
        except InputError:
            self._require_finite(block.step)
            raise

    def _with(self, block: Block, tensors: Tensors, solution: Solution) -> Tensor:
        """The combination with a solution for just these elements."""
        if solution.coefficients is not None:
            return self._combined(block, tensors, self._awd_weights(solution.coefficients))
        assert solution.shift is not None
        shift = reference.ungroup(solution.shift, block.shape, self.recipe.options.groups)
        return self._rounded(block.step, lambda dtype: self._without(*tensors, shift, dtype))

    # Blocks of one tensor that are solved together.

    def _gathering(self, step: Step) -> Iterator[Job]:
        """Jobs that add up the Gram matrices of a step's blocks and, with the last, give the weights of all."""
        grams: list[Tensor] = []

        def add(block: Block, gram: Tensor) -> list[Result]:
            grams[:] = [grams[0].add_(gram) if grams else gram]
            if block.last:
                self._solve_grams(step, grams)
            return []

        return (
            replace(self._job(block, self._gram), then=partial(add, block)) for block in blocks_of(step, self.recipe)
        )

    def _gram(self, block: Block, tensors: Tensors) -> Tensor:
        # Columns whose rows are all in one block do not come here, so that one row here is a part of its columns.
        groups: Groups = "column" if self.recipe.options.groups == "column" else "tensor"
        return ops.gram(*tensors, groups, backend=self.recipe.backend)

    def _solve_grams(self, step: Step, grams: Iterable[Tensor]) -> Solution:
        """The solution for a tensor from the Gram matrices of its blocks, in order."""
        whole = _total(grams)
        if not finite(whole):
            self._require_finite(step)
        solution = solver.solve_span(whole, self.recipe.options, self.recipe.backend)
        assert solution.coefficients is not None
        self._factors[step.name] = self._awd_weights(solution.coefficients)
        self._solved_before[step.name] = self._figures(solution)
        return solution

    def _solve_whole(self, step: Step, wanted: Sequence[Block], tensors: Tensors) -> list[Result]:
        """Those blocks of a tensor that are wanted, from one read of all; the same to the bit as from two."""
        blocks = blocks_of(step, self.recipe)
        if self.recipe.options.spans:
            self._solve_grams(step, (self._gram(block, _part(block, tensors)) for block in blocks))
            results = [result for block in wanted for result in self._weigh(block, _part(block, tensors))]
            del self._factors[step.name]
            return results
        block = Block(step, 0, step.info.count, matrix(step))
        solution = self._solution(block, tensors)
        merged = self._with(block, tensors, solution).view(-1)
        similarity = self._figures(solution)
        return [
            Result(block, merged[block.begin : block.end].view(block.shape), similarity if block.first else None)
            for block in wanted
        ]

    def _solve_shared(self, steps: Sequence[Step], blocks: Sequence[Block]) -> None:
        """Tensors whose blocks several processes have: the sums of their Gram matrices, and the solutions in each."""
        if self.ranks.count == 1 or not self.recipe.options.spans or self.recipe.options.groups == "column":
            return
        own = {step: len(list(same)) for step, same in groupby(blocks, lambda block: block.step)}
        split = [step for step in steps if own.get(step, 0) not in (0, len(blocks_of(step, self.recipe)))]
        # Every process must know of every tensor that is split anywhere.
        chosen = torch.zeros(len(steps))
        chosen[[steps.index(step) for step in split]] = 1.0
        split = [step for step, times in zip(steps, self.ranks.sum(chosen).tolist(), strict=True) if times > 0]
        grams = self._gather_all(cut(split, self.recipe), [block for block in blocks if block.step in split])
        for step, same in groupby(zip(cut(split, self.recipe), grams, strict=True), lambda pair: pair[0].step):
            self._solve_grams(step, [gram for _, gram in same])

    def _gather_all(self, blocks: Sequence[Block], mine: Sequence[Block]) -> list[Tensor]:
        """The Gram matrices [1, K, K] of blocks, of which this process computes its own."""
        k = len(self.models)
        grams = torch.zeros(len(blocks), 1, k, k, dtype=torch.float64)
        place = {block: index for index, block in enumerate(blocks)}

        def gather(block: Block, tensors: Tensors) -> list[Result]:
            gram = ops.gram(*tensors, "tensor", backend=self.recipe.backend)
            if not finite(gram):
                self._require_finite(block.step)
            grams[place[block]] = gram
            return []

        for job, _ in self._carry_out(self._job(block, gather) for block in mine):
            self._count(job)
        # Each is 0 but in one process, so that the sum has the bits of that one, in whatever order it is made.
        return list(self.ranks.sum(grams))

    # The one group of all disentangled tensors.

    def _solve_global(self, steps: Sequence[Step], mine: Sequence[Block]) -> None:
        """In the span: all Gram matrices, and one descent."""
        parts = self._global_parts(steps, mine)
        solution = solver.solve_span(
            torch.stack(list(parts.values())).sum(dim=0), self.recipe.options, self.recipe.backend
        )
        assert solution.coefficients is not None
        self._factors[""] = self._awd_weights(solution.coefficients)
        self._note_global(solution)
        self._note_parts(solution, parts)

    def _global_parts(self, steps: Sequence[Step], mine: Sequence[Block]) -> dict[str, Tensor]:
        """The Gram matrix [1, K, K] of each step, the same in all processes."""
        blocks = cut(steps, self.recipe)
        parts: dict[str, Tensor] = {}
        for block, gram in zip(blocks, self._gather_all(blocks, mine), strict=True):
            parts[block.step.name] = parts[block.step.name] + gram if block.step.name in parts else gram
        return parts

    def _stream_global(self, steps: Sequence[Step], mine: Sequence[Block]) -> None:
        """Outside the span: the tensors stay in memory while d is iterated on, block by block."""
        needed = sum(self._job(block, self._weigh).cost for block in mine)
        if needed > self._most:
            raise self._too_large(needed, "the global group")
        tensors = {}

        def hold(block: Block, given: Tensors) -> list[Result]:
            sources = (self.base, *self.models)
            both = zip(sources, (given[0], *given[1]), strict=True)
            held = [part if source.in_memory(block.step.name) else part.clone() for source, part in both]
            tensors[block] = (held[0], held[1:])
            return []

        for job, _ in self._carry_out(self._job(block, hold) for block in mine):
            self._count(job)
        blocks = cut(steps, self.recipe)
        try:
            add_up = None if self.ranks.count == 1 else self.ranks.sum
            held = [tensors.get(block) for block in blocks]
            solution, parts = solver.solve_parts(
                held, self.recipe.options, self.recipe.backend, add_up, len(self.models)
            )
        except InputError:
            for step in steps:
                self._require_finite(step)
            raise
        self._note_global(solution)
        for step, same in groupby(zip(blocks, parts, strict=True), lambda pair: pair[0].step):
            own = list(same)
            sums = (
                torch.stack(each).sum(0) for each in zip(*((p.gram, p.inner, p.square) for _, p in own), strict=True)
            )
            self._parts[step.name] = Similarity.of(solution.part(*sums), self.recipe)
            for block, part in own:
                if part.shift is not None:
                    self._kept[step.name, block.begin] = part.shift

    # Inspections.

    def _inspecting(self, step: Step) -> Iterator[Job]:
        similarity = self._parts.get(step.name)
        if step.action != "awd" or similarity is not None:
            yield Job((), lambda tensors: (step, similarity))
        elif not self._together(step):
            for block in blocks_of(step, self.recipe):
                yield self._job(block, self._inspect_block)
        elif self.recipe.options.spans:
            for job in self._gathering(step):
                assert job.then is not None
                yield replace(job, then=partial(self._gathered, step, job.then))
        elif self._fits(step):
            block = Block(step, 0, step.info.count, matrix(step))
            yield self._whole(step, lambda tensors: self._inspect_block(block, tensors))
        else:
            raise self._too_large(self._whole(step, lambda tensors: None).cost, f"tensor {step.name!r}")

    def _gathered(self, step: Step, add: Callable[[Tensor], Any], gram: Tensor) -> tuple[Step, Similarity | None]:
        """What an inspection is told: with the last Gram matrices, what became of the similarity."""
        add(gram)
        return step, self._solved_before.get(step.name)

    def _inspect_block(self, block: Block, tensors: Tensors) -> tuple[Step, Similarity]:
        return block.step, Similarity.of(self._solution(block, tensors), self.recipe)


def _total(grams: Iterable[Tensor]) -> Tensor:
    """The sum in order, of which only one is needed at a time: of columns they may be larger than their block."""
    each = iter(grams)
    whole = next(each).clone()
    for gram in each:
        whole += gram
    return whole


def _part(block: Block, tensors: Tensors) -> Tensors:
    """A block of whole tensors."""
    base, models = tensors
    cuts = [tensor.reshape(-1)[block.begin : block.end].view(block.shape) for tensor in (base, *models)]
    return cuts[0], cuts[1:]
