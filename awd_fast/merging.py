"""Merging, one tensor at a time: read, solve, combine. `merge` does it for state dicts in memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from awd_fast import ops, solver, statistics
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Converge, Groups, Optimizer, Penalty, Similarity
from awd_fast.ops import reference
from awd_fast.plan import Source, StateDict, Step, make_plan
from awd_fast.recipe import DEFAULT_EXCLUDE, Method, Missing, Others, Recipe, make_recipe
from awd_fast.report import MergeReport, TensorReport
from awd_fast.report import Similarity as ReportedSimilarity
from awd_fast.solver import Solution


class Merger:
    """Carries out a plan: `merged(step)` gives one tensor of the output and appends to `report`.

    A global group needs all disentangled tensors before the first can be combined: `prepare` reads them once for it.
    """

    def __init__(self, base: Source, models: Sequence[Source], recipe: Recipe, report: MergeReport) -> None:
        self.base, self.models, self.recipe, self.report = base, models, recipe, report
        self._weights = torch.tensor([recipe.weights], dtype=torch.float64)  # [1, K]
        self._shared: Solution | None = None
        self._parts: dict[str, ReportedSimilarity] = {}
        self._shared_shift: dict[str, Tensor] = {}

    def prepare(self, plan: Sequence[Step], bar: "tqdm[Any]") -> None:
        """Solves the global group, if there is one; to be called once, before the first step."""
        selected = [step for step in plan if step.action == "awd"]
        if self.recipe.options.groups == "global" and selected:
            self._shared = self._solve_global(selected, bar)
            self.report.shared = ReportedSimilarity.of(self._shared, self.recipe)

    def merged(self, step: Step) -> Tensor:
        """The output tensor of one step."""
        similarity = self._parts.get(step.name)
        if step.action == "base":
            result = self._kept(step)
        elif step.action == "awd":
            base, models = self._read(step)
            result, solution = self._disentangled(step, base, models)
            similarity = similarity or ReportedSimilarity.of(solution, self.recipe)
        else:
            base, models = self._read(step)
            result = ops.combine(
                base, models, self._plain_weights(), "row", dtype=step.dtype, backend=self.recipe.backend
            )
        if step.action != "base" and not _finite(result):
            self._require_finite(step)
            raise InputError(
                f"the merged tensor {step.name!r} overflows {str(step.dtype).removeprefix('torch.')}; "
                "choose a smaller scale or a wider dtype"
            )
        self.report.tensors.append(TensorReport(step, similarity))
        return result

    def inspected(self, step: Step) -> None:
        """As `merged`, but only for the report: nothing is combined."""
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

    def _plain_weights(self) -> Tensor:
        if self.recipe.method == "average":
            return self._weights / self._weights.sum()
        return self.recipe.scale * self._weights

    def _combined(self, step: Step, base: Tensor, models: list[Tensor], solution: Solution) -> Tensor:
        """base + scale * sum_i m_i (t_i - d), for model weights m."""
        groups, backend = self.recipe.options.groups, self.recipe.backend
        if solution.coefficients is not None:
            weights = self.recipe.scale * statistics.merge_weights(self._weights, solution.coefficients)
            return ops.combine(base, models, weights.to(base.device), groups, dtype=step.dtype, backend=backend)
        shift = self._shared_shift.get(step.name, solution.shift)
        assert shift is not None
        plain = ops.combine(base, models, self._plain_weights(), groups, dtype=shift.dtype, backend=backend)
        plain -= float(self.recipe.scale * self._weights.sum()) * reference.ungroup(shift, base.shape, groups)
        return plain.to(step.dtype)

    def _solve_global(self, steps: Sequence[Step], bar: "tqdm[Any]") -> Solution:
        """The one group over all disentangled tensors, and each tensor's part in it: a pass over the data."""
        options, backend = self.recipe.options, self.recipe.backend
        if options.spans:
            grams = []
            for step in steps:
                grams.append(ops.gram(*self._read(step), "tensor", backend=backend).cpu())
                if not _finite(grams[-1]):
                    self._require_finite(step)
                bar.update()
            solution = solver.solve_span(torch.stack(grams).sum(dim=0), options, backend)
            assert solution.coefficients is not None
            for step, gram in zip(steps, grams, strict=True):
                part = solution.part(gram, *statistics.span_moments(gram, solution.coefficients))
                self._parts[step.name] = ReportedSimilarity.of(part, self.recipe)
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

    def _read(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        """The base's and the models' tensors, of one dtype (float32 where storage differs), on the device."""
        tensors = [source.read(step.name) for source in (self.base, *self.models)]
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            wide = torch.float64 if torch.float64 in dtypes else torch.float32
            tensors = [tensor.to(wide) for tensor in tensors]
        tensors = [tensor.to(self.recipe.device) for tensor in tensors]
        return tensors[0], tensors[1:]

    def _kept(self, step: Step) -> Tensor:
        """The base's tensor; where it cannot be merged because it is not floating, the models' must be the same."""
        if step.info.dtype.is_floating_point:
            return read_finite(self.base, step.name).to(step.dtype)
        kept = self.base.read(step.name)
        for model in self.models:
            if step.name in model.tensors and not torch.equal(kept, model.read(step.name)):
                raise InputError(
                    f"{model.where(step.name)}: the {str(kept.dtype).removeprefix('torch.')} tensor {step.name!r} "
                    "differs from the base's; only floating tensors can be merged"
                )
        return kept


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


def progress_bar(plan: Sequence[Step], recipe: Recipe, shown: bool, what: str) -> "tqdm[Any]":
    """A progress bar over the plan's steps, which appears only if the work takes more than a second.

    The tensors of a global group are read twice, and count twice.
    """
    twice = sum(step.action == "awd" for step in plan) if recipe.options.groups == "global" else 0
    return tqdm(total=len(plan) + twice, desc=what, unit="tensor", delay=1.0, disable=not shown)


@torch.no_grad()
def merge(
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    *,
    method: Method = "awd",
    scale: float = 0.3,
    weights: Sequence[float] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    others: Others = "task_arithmetic",
    missing: Missing = "error",
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    progress: bool = False,
    on_report: Callable[[MergeReport], Any] | None = None,
    groups: Groups = "row",
    similarity: Similarity = "absolute",
    penalty: Penalty = "l2",
    alpha: float = 1e-6,
    optimizer: Optimizer | str = SGD(),  # noqa: B008  frozen
    eps: float = 1e-8,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Merges fine-tuned state dicts into one: theta = theta_0 + scale * sum_i w_i (t_i - d), t_i = theta_i - theta_0.

    base, models: state dicts with the same names, shapes and dtypes; they are not changed.
    method: "awd" (arXiv 2411.18729); "task_arithmetic" (arXiv 2212.04089), which is the same with d = 0;
        "average", the weighted mean of the models, without `scale`.
    scale: lambda. weights: w_i, one per model, default 1; a negative one negates (forgets) that task.
    include, exclude: shell patterns on tensor names. By default 2-D weights are disentangled; embeddings, biases,
        norms, pooler and task heads are not (`DEFAULT_EXCLUDE`). Patterns of `exclude` win.
    others: what happens to the remaining floating tensors: "task_arithmetic", with the same scale and weights (with
        method="average" they are averaged), or "base", kept as they are.
    missing: "error", or "base": tensors that not every state dict has are kept as the base has them.
    dtype: of the result's floating tensors, default each as the base's. Arithmetic is float32 at least.
    device: where to compute, "cpu" or "cuda"; the result is on the CPU.
    progress: show a progress bar. on_report: called with the `MergeReport` at the end.
    groups: as in `disentangle`, or "global": one group over all disentangled tensors.
    similarity, penalty, alpha, optimizer, eps, backend: as in `disentangle`; not used by the other methods.

    Tensors that are not floating are copied, and must be the same everywhere. Raises InputError in one sentence naming
    the state dict and the tensor for anything that does not fit, NaN and Inf included.
    """
    recipe = make_recipe(
        len(models),
        method=method,
        scale=scale,
        weights=weights,
        include=include,
        exclude=exclude,
        others=others,
        missing=missing,
        dtype=dtype,
        device=device,
        groups=groups,
        similarity=similarity,
        penalty=penalty,
        alpha=alpha,
        optimizer=optimizer,
        eps=eps,
        backend=backend,
    )
    source = StateDict("base", base)
    sources = [StateDict(f"models[{index}]", model) for index, model in enumerate(models)]
    plan = make_plan(source, sources, recipe)
    report = MergeReport(recipe, "base", tuple(model.label for model in sources))
    merger = Merger(source, sources, recipe, report)
    result = {}
    with progress_bar(plan, recipe, progress, "merging") as bar:
        merger.prepare(plan, bar)
        for step in plan:
            tensor = merger.merged(step).cpu()
            result[step.name] = tensor.clone() if step.action == "base" else tensor
            bar.update()
    if on_report is not None:
        on_report(report)
    return result
