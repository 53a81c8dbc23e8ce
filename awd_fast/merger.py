"""Merging, one tensor at a time on the CPU: read, solve, combine."""

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from awd_fast import ops, solver, statistics
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Converge
from awd_fast.ops import reference
from awd_fast.plan import Source, Step, common_dtype
from awd_fast.recipe import Recipe
from awd_fast.report import MergeReport, TensorReport
from awd_fast.report import Similarity as ReportedSimilarity
from awd_fast.solver import Solution


class Merger:
    """Carries out a plan: `results(steps)` gives the tensors of the output and appends to `report`.

    A global group needs all disentangled tensors before the first can be combined: `prepare` reads them once for it.
    This class works on one tensor at a time on the CPU; `awd_fast.batches.BatchMerger` on many, on a device.
    """

    def __init__(self, base: Source, models: Sequence[Source], recipe: Recipe, report: MergeReport) -> None:
        self.base, self.models, self.recipe, self.report = base, models, recipe, report
        self._weights = torch.tensor([recipe.weights], dtype=torch.float64)  # [1, K]
        self._copies: dict[torch.device, Tensor] = {}
        self._shared: Solution | None = None
        self._parts: dict[str, ReportedSimilarity] = {}
        self._shared_shift: dict[str, Tensor] = {}

    def prepare(self, plan: Sequence[Step], bar: "tqdm[Any]") -> None:
        """Solves the global group, if there is one; to be called once, before the first step."""
        selected = [step for step in plan if step.action == "awd"]
        if self.recipe.options.groups == "global" and selected:
            self._shared = self._solve_global(selected, bar)
            self.report.shared = ReportedSimilarity.of(self._shared, self.recipe)

    def results(self, steps: Sequence[Step]) -> Generator[tuple[Step, Tensor], None, None]:
        """Each step with its output tensor, in order. To be closed by whoever stops before the end.

        A tensor lies on the device of the base's; one that is kept as it is may be the base's own.
        """
        for step in steps:
            tensor, similarity = self._merged(step)
            self.report.tensors.append(TensorReport(step, similarity))
            yield step, tensor.to(self.base.device(step.name))

    def inspections(self, steps: Sequence[Step]) -> Generator[Step, None, None]:
        """As `results`, but only for the report: nothing is combined."""
        for step in steps:
            self._inspect(step)
            yield step

    def _merged(self, step: Step) -> tuple[Tensor, ReportedSimilarity | None]:
        """The output tensor of one step, and what it did to the similarity."""
        similarity = self._parts.get(step.name)
        if step.action == "base":
            result = self._kept(step)
        elif step.action == "awd":
            base, models = self._read(step)
            result, solution = self._disentangled(step, base, models)
            similarity = similarity or ReportedSimilarity.of(solution, self.recipe)
        else:
            base, models = self._read(step)
            weights = self._plain_weights(base.device)
            result = ops.combine(base, models, weights, "row", dtype=step.dtype, backend=self.recipe.backend)
        if step.action != "base" and not _finite(result):
            self._require_finite(step)
            raise overflow(step)
        return result, similarity

    def _inspect(self, step: Step) -> None:
        similarity = self._parts.get(step.name)
        if step.action == "awd" and similarity is None:
            similarity = ReportedSimilarity.of(self._solved(step, *self._read(step)), self.recipe)
        self.report.tensors.append(TensorReport(step, similarity))

    def _disentangled(self, step: Step, base: Tensor, models: list[Tensor]) -> tuple[Tensor, Solution]:
        """base + scale * sum_i m_i (t_i - d), for model weights m, and the solution behind d."""
        options, recipe = self.recipe.options, self.recipe
        if self._shared is None and options.fuses and isinstance(options.optimizer, (SGD, Converge)):
            weights = recipe.scale * self._weights[0]
            arguments = (weights, options.objective, options.optimizer, options.groups)
            found = ops.merge_rows(base, models, *arguments, dtype=step.dtype, backend=recipe.backend)
            if not _finite(found.gram):
                self._require_finite(step)
            return found.merged, solver.span_solution(found.gram, found.coefficients, found.history)
        solution = self._shared or self._solved(step, base, models)
        return self._combined(step, base, models, solution), solution

    def _solved(self, step: Step, base: Tensor, models: list[Tensor]) -> Solution:
        """The solution of one tensor; what is wrong with its values, if they are not finite."""
        try:
            return solver.solve(base, models, self.recipe.options, self.recipe.backend)
        except InputError:
            self._require_finite(step)
            raise

    def _require_finite(self, step: Step) -> None:
        """Raises InputError where a tensor that is merged holds NaN or Inf.

        Every result shows that one did, so that values need not be checked before.
        """
        for source in (self.base, *self.models):
            read_finite(source, step.name)

    def _plain_weights(self, device: torch.device) -> Tensor:
        weights = self._weights_on(device)
        return weights / weights.sum() if self.recipe.method == "average" else self.recipe.scale * weights

    def _combined(self, step: Step, base: Tensor, models: list[Tensor], solution: Solution) -> Tensor:
        """base + scale * sum_i m_i (t_i - d), for model weights m."""
        groups, backend = self.recipe.options.groups, self.recipe.backend
        if solution.coefficients is not None:
            weights = self._awd_weights(solution.coefficients)
            return ops.combine(base, models, weights, groups, dtype=step.dtype, backend=backend)
        shift = self._shared_shift.get(step.name, solution.shift)
        assert shift is not None
        return self._without(base, models, reference.ungroup(shift, base.shape, groups), step.dtype)

    def _awd_weights(self, coefficients: Tensor) -> Tensor:
        """What the task vectors are multiplied by, [R, K], for the d with coefficients a [R, K]; on their device."""
        return self.recipe.scale * statistics.merge_weights(self._weights_on(coefficients.device), coefficients)

    def _weights_on(self, device: torch.device) -> Tensor:
        """m [1, K] on a device; copied once, because the host waits for such a copy."""
        if device not in self._copies:
            self._copies[device] = self._weights.to(device)
        return self._copies[device]

    def _without(self, base: Tensor, models: Sequence[Tensor], shift: Tensor, dtype: torch.dtype) -> Tensor:
        """base + scale * sum_i m_i (t_i - d) for a d outside the span, which has the tensors' shape."""
        weights = self._plain_weights(base.device)
        plain = ops.combine(base, models, weights, "row", dtype=shift.dtype, backend=self.recipe.backend)
        plain -= float(self.recipe.scale * self._weights.sum()) * shift
        return plain.to(dtype)

    def _solve_global(self, steps: Sequence[Step], bar: "tqdm[Any]") -> Solution:
        """The one group over all disentangled tensors, and each tensor's part in it: a pass over the data."""
        options, backend = self.recipe.options, self.recipe.backend
        if options.spans:
            grams = []
            for step in steps:
                grams.append(ops.gram(*self._read(step), "tensor", backend=backend))
                if not _finite(grams[-1]):
                    self._require_finite(step)
                bar.update()
            solution = solver.solve_span(torch.stack(grams).sum(dim=0), options, backend)
            self._report_parts(solution, dict(zip([step.name for step in steps], grams, strict=True)))
            return solution
        tensors = []
        for step in steps:
            tensors.append(self._read(step))
            bar.update()
        try:
            solution, parts = solver.solve_parts(tensors, options, backend)
        except InputError:
            for step in steps:
                self._require_finite(step)
            raise
        for step, part in zip(steps, parts, strict=True):
            assert part.shift is not None
            self._shared_shift[step.name] = part.shift
            self._parts[step.name] = ReportedSimilarity.of(part, self.recipe)
        return solution

    def _report_parts(self, solution: Solution, grams: dict[str, Tensor]) -> None:
        """Notes the part of each tensor, by its own Gram matrix, in a global group in the span."""
        assert solution.coefficients is not None
        for name, gram in grams.items():
            part = solution.part(gram, *statistics.span_moments(gram, solution.coefficients))
            self._parts[name] = ReportedSimilarity.of(part, self.recipe)

    def _read(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        """The base's and the models' tensors, of one dtype, on the CPU."""
        sources = (self.base, *self.models)
        dtype = common_dtype(sources, step.name)
        tensors = [source.read(step.name).to("cpu", dtype) for source in sources]
        return tensors[0], tensors[1:]

    def _kept(self, step: Step) -> Tensor:
        """The base's tensor; where it cannot be merged because it is not floating, the models' must be the same."""
        if step.info.dtype.is_floating_point:
            return read_finite(self.base, step.name).to(step.dtype)
        kept = self.base.read(step.name)
        for model in self.models:
            if step.name in model.tensors and not torch.equal(kept, model.read(step.name).to(kept.device)):
                raise InputError(
                    f"{model.where(step.name)}: the {str(kept.dtype).removeprefix('torch.')} tensor {step.name!r} "
                    "differs from the base's; only floating tensors can be merged"
                )
        return kept


def overflow(step: Step) -> InputError:
    """What is said where a merged tensor is not finite although all that went into it is."""
    return InputError(
        f"the merged tensor {step.name!r} overflows {str(step.dtype).removeprefix('torch.')}; "
        "choose a smaller scale or a wider dtype"
    )


def _finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor Inf, in one pass without a copy."""
    return tensor.numel() == 0 or all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def read_finite(source: Source, name: str) -> Tensor:
    """One tensor of a source; InputError where it holds NaN or Inf."""
    tensor = source.read(name)
    finite = torch.isfinite(tensor if tensor.dtype in ops.FLOATING else tensor.float())  # float8 has no isfinite
    if not finite.all():
        count = int((~finite).sum())
        raise InputError(f"{source.where(name)}: tensor {name!r} holds {count} NaN or Inf values; expected finite ones")
    return tensor
