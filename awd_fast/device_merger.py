"""What a merge on a device begins with: what is solved for all tensors together, and what is left to the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from awd_fast import ops, solver
from awd_fast.blocks import Block
from awd_fast.errors import InputError
from awd_fast.merger import Merger
from awd_fast.parts import Cutter, Part
from awd_fast.plan import FLOAT8, Source, Step, common_dtype
from awd_fast.progress import Progress
from awd_fast.ranks import Ranks
from awd_fast.recipe import Recipe
from awd_fast.report import Similarity
from awd_fast.solver import Solution
from awd_fast.stream import StreamMerger
from awd_fast.transfer import Conveyor, Link, Load, Work


class DeviceMerger(Merger):
    """A merger with the device of `link`, a `Cutter` of what fits there, and a merger on the CPU for what does not."""

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
        self._factors: dict[str, Tensor] = {}  # weights [R, K] of their task vectors, on the device
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

    def _on_host(self, step: Step) -> bool:
        return step.action == "base" or step.dtype in FLOAT8 or (self._all_on_cpu and step.action == "awd")

    def _loads(self, part: Part) -> list[Load]:
        loads = self.cutter.loads(part)
        if part.way == "_shift":
            shift = self._shared_shift[part.step.name].view(-1)[part.begin : part.end]
            loads.append(Load(lambda: shift, part.shape, shift.dtype))
        return loads

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
                    if not solver.all_finite(gram):
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
