"""What a merge did, tensor by tensor and overall: similarity or interference before and after, and the update."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awd_fast import statistics
from awd_fast.plan import Step
from awd_fast.recipe import Recipe
from awd_fast.solver import Solution


@dataclass(frozen=True)
class Similarity:
    """Mean absolute cosines of R groups before and after disentangling, in sums that add up over tensors.

    before, after: [K, K] float64, the sum over the groups of |c_ij|, diagonal 0. groups: R. products: see
    `awd_fast.solver.Solution.update_products`. loss_before, loss_after: of the parameter.
    """

    before: Tensor
    after: Tensor
    groups: int
    products: Tensor
    loss_before: float
    loss_after: float

    @classmethod
    def of(cls, solution: Solution, recipe: Recipe) -> "Similarity":
        weights = torch.tensor(recipe.weights, dtype=torch.float64, device=solution.gram.device)
        return cls.from_figures(figures(solution, weights, recipe).cpu(), len(solution.gram))

    @classmethod
    def losses_of(cls, solution: Solution) -> "Similarity":
        """Of no groups: the losses alone, for who shows no figures, which take time."""
        none = torch.zeros(0)
        return cls(none, none, 0, none, float(solution.history[0]), float(solution.history[-1]))

    @classmethod
    def from_figures(cls, figures: Tensor, groups: int) -> "Similarity":
        """The inverse of `figures`, which lie on the CPU."""
        k = math.isqrt((len(figures) - 5) // 2)
        before, after, products, losses = figures.split([k * k, k * k, 3, 2])
        return cls(before.view(k, k), after.view(k, k), groups, products, *losses.tolist())

    def to_figures(self) -> Tensor:
        """The inverse of `from_figures`."""
        losses = torch.tensor([self.loss_before, self.loss_after], dtype=torch.float64)
        return torch.cat([self.before.flatten(), self.after.flatten(), self.products, losses])

    def __add__(self, other: "Similarity") -> "Similarity":
        return Similarity(
            self.before + other.before,
            self.after + other.after,
            self.groups + other.groups,
            self.products + other.products,
            self.loss_before + other.loss_before,
            self.loss_after + other.loss_after,
        )

    def matrix(self, after: bool) -> Tensor:
        """The mean over groups of |c_ij| [K, K]."""
        return (self.after if after else self.before) / max(self.groups, 1)

    def mean(self, after: bool) -> float:
        """The mean over groups and pairs of |c_ij|."""
        matrix = self.matrix(after)
        return float(matrix.sum()) * statistics.pair_weight(len(matrix))

    @property
    def update_cosine(self) -> float:
        """cos of AWD's update and Task Arithmetic's; NaN where one of them is 0."""
        return cosine_of(self.products)


@dataclass(frozen=True)
class Interference:
    """What WUDI did to sum_i |(tau - t_i) t_i'|^2 / |t_i|^2, the paper's objective, in sums that add up over tensors.

    before: of Task Arithmetic's update S. after: of WUDI's. products: <S, S>, <S, tau>, <tau, tau>; both without
    their scale. groups: how many tensors.
    """

    before: float
    after: float
    products: Tensor
    groups: int = 1

    @classmethod
    def from_figures(cls, figures: Tensor, groups: int = 1) -> "Interference":
        """Of float64 [5], as `awd_fast.wudi.Solved` has them, on the CPU."""
        return cls(float(figures[0]), float(figures[1]), figures[2:].clone(), groups)

    def to_figures(self) -> Tensor:
        """The inverse of `from_figures`."""
        return torch.cat([torch.tensor([self.before, self.after], dtype=torch.float64), self.products])

    def __add__(self, other: "Interference") -> "Interference":
        return Interference(
            self.before + other.before,
            self.after + other.after,
            self.products + other.products,
            self.groups + other.groups,
        )

    @property
    def removed(self) -> float:
        """The part of Task Arithmetic's interference that is gone; NaN where that has none."""
        return 1.0 - self.after / self.before if self.before > 0 else math.nan

    @property
    def update_cosine(self) -> float:
        """cos of WUDI's update and Task Arithmetic's; NaN where one of them is 0."""
        return cosine_of(self.products)


Figures = Similarity | Interference
"""What is reported of a tensor that AWD, or WUDI, has merged."""


def cosine_of(products: Tensor) -> float:
    """<u, v> / (|u| |v|) from <u, u>, <u, v>, <v, v>; NaN where one of the vectors is 0."""
    plain, across, other = products.tolist()
    size = math.sqrt(max(plain, 0.0) * max(other, 0.0))
    return across / size if size > 0 else math.nan


def figures(solution: Solution, weights: Tensor, recipe: Recipe) -> Tensor:
    """What a `Similarity` needs of a solution, as one vector float64 [2 K^2 + 5] on its device.

    So that of a GPU one small copy per batch reaches the host. weights: m [K] float64 on the same device.
    """
    eps = recipe.options.objective.eps
    grams = (solution.gram, solution.gram_after)
    matrices = [statistics.cosines(gram, eps).abs().sum(dim=0).flatten() for gram in grams]
    return torch.cat([*matrices, solution.update_products(weights), solution.history[:1], solution.history[-1:]])


@dataclass(frozen=True)
class TensorReport:
    """What happened to one tensor; similarity is None where nothing was disentangled.

    Of a global group it is the tensor's part: the cosines of the tensor alone, without a loss. interference: where it
    was merged by wudi. on_cpu: whether it was computed on the CPU although a device was asked for.
    """

    step: Step
    similarity: Similarity | None = None
    on_cpu: bool = False
    interference: Interference | None = None

    @property
    def figures(self) -> Figures | None:
        """Whatever there is to report."""
        return self.similarity or self.interference


@dataclass
class MergeReport:
    """What a merge did. path: the output folder, or None for a merge of state dicts or an inspection.

    adapters: what each model is, where they are LoRA adapters. as_adapter: whether the output is one.
    """

    recipe: Recipe
    base: str
    models: tuple[str, ...]
    path: Path | None = None
    tensors: list[TensorReport] = field(default_factory=list)
    shared: Similarity | None = None  # of the one global group
    read_twice: int = 0  # bytes
    adapters: tuple[str, ...] = ()
    as_adapter: bool = False

    @property
    def overall(self) -> Similarity | None:
        """All disentangled groups together, or None where there was none."""
        if self.shared is not None:
            return self.shared
        parts = [report.similarity for report in self.tensors if report.similarity is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    @property
    def interference(self) -> Interference | None:
        """All tensors that wudi merged together, or None where there was none."""
        parts = [report.interference for report in self.tensors if report.interference is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    @property
    def figures(self) -> Figures | None:
        """The one of both that there is."""
        return self.overall or self.interference

    @property
    def similarity_before(self) -> float | None:
        """Mean over groups and pairs of |cos(t_i, t_j)|."""
        return None if self.overall is None else self.overall.mean(after=False)

    @property
    def similarity_after(self) -> float | None:
        """Mean over groups and pairs of |cos(t_i - d, t_j - d)|."""
        return None if self.overall is None else self.overall.mean(after=True)

    @property
    def update_cosine(self) -> float | None:
        """cos of AWD's, or WUDI's, update and Task Arithmetic's over all tensors that it merged."""
        return None if self.figures is None else self.figures.update_cosine

    def warning(self) -> str | None:
        """One sentence where the optimiser made the loss worse, or None."""
        overall = self.overall
        if overall is None or not overall.loss_after > overall.loss_before:
            return None
        return (
            f"the loss rose from {overall.loss_before:.4g} to {overall.loss_after:.4g}: the step size does not fit "
            "these models; lower lr, or use Converge (--optimizer converge)"
        )

    def fallback(self) -> str | None:
        """One sentence where tensors did not fit the memory of the device, or None."""
        names = [report.step.name for report in self.tensors if report.on_cpu]
        if not names:
            return None
        advice = "or use SGD or Converge with a Euclidean penalty"
        if self.recipe.method == "wudi":
            advice = "or solve fewer columns together (--columns)"
        several = "" if len(names) == 1 else f" and {len(names) - 1} more"
        return (
            f"{names[0]!r}{several} did not fit the memory of {self.recipe.device} and was computed on the CPU; "
            f"give more memory (--device-memory), {advice}"
        )

    def note(self) -> str | None:
        """One sentence where inputs were read twice, or None."""
        if self.read_twice == 0:
            return None
        groups = self.recipe.options.groups
        if self.recipe.method == "wudi":
            why = "all models of a tensor did not fit the memory, so that they were read one by one with the base"
            return f"{self.read_twice / 1e9:.3g} GB were read again, because {why}; give more (--memory) to read once"
        why = "one group needs all tensors" if groups == "global" else f"{groups} groups did not fit the memory"
        more = "" if groups == "global" else "; give more (--memory) to read once"
        return f"{self.read_twice / 1e9:.3g} GB were read twice, because {why}{more}"

    def summary(self) -> str | None:
        """The figures over all disentangled tensors in one line, or None where there are none."""
        overall = self.figures
        if overall is None:
            return None
        if isinstance(overall, Interference):
            before, after, removed, cosine = _figures(overall)
            tensors = "1 tensor" if overall.groups == 1 else f"{overall.groups} tensors"
            return (
                f"interference of {tensors}: {before} by Task Arithmetic, {after} by WUDI, {removed} less; "
                f"cos(update, Task Arithmetic): {cosine}"
            )
        groups, before, after, cosine = _figures(overall)
        return (
            f"mean |cos| of {groups} groups ({self.recipe.options.groups}): {before} before, {after} after; "
            f"cos(update, Task Arithmetic): {cosine}"
        )

    def counts(self) -> dict[str, int]:
        """How many tensors were treated in each way."""
        names = [report.step.action for report in self.tensors]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def table(self) -> str:
        """One line per tensor that was disentangled, or merged by wudi, and the whole, as text."""
        wudi = self.recipe.method == "wudi"
        columns = ("interference of TA", "of WUDI", "removed") if wudi else ("groups", "before", "after")
        rows: list[tuple[str, ...]] = [("tensor", *columns, "cos(update, TA)")]
        listed = [(r.step.name, r.figures) for r in self.tensors]
        whole = "all tensors of wudi" if wudi else "all disentangled tensors"
        rows += [(name, *_figures(found)) for name, found in [*listed, (whole, self.figures)] if found is not None]
        return aligned(rows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data: every tensor with its action, similarity matrices for the whole."""
        overall = self.figures
        return {
            "base": self.base,
            "models": list(self.models),
            **({"adapters": list(self.adapters), "as_adapter": self.as_adapter} if self.adapters else {}),
            "recipe": self.recipe.to_config(self.base, self.models),
            "overall": None if overall is None else _plain(overall) | _matrices(overall),
            "tensors": {
                report.step.name: {
                    "action": report.step.action,
                    "reason": report.step.reason,
                    "shape": list(report.step.info.shape),
                }
                | ({"device": "cpu"} if report.on_cpu else {})
                | ({} if report.figures is None else _plain(report.figures))
                for report in self.tensors
            },
        }

    def json_text(self) -> str:
        """`to_json` as text; never NaN or Infinity, which JSON does not have."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"


class Tally:
    """The similarities of tensors, added up from those of their parts in the order of the tensors' elements."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, Any]] = {}  # of one kind
        self._on_cpu: set[str] = set()

    def add(self, name: str, begin: int, similarity: Figures | None, on_cpu: bool = False) -> None:
        """Notes the part of a tensor that begins at an element."""
        if similarity is not None:
            self._parts.setdefault(name, {})[begin] = similarity
        if on_cpu:
            self._on_cpu.add(name)

    def report(self, plan: Sequence[Step]) -> list[TensorReport]:
        """What happened to each tensor of a plan."""
        found = []
        for step in plan:
            parts = [part for _, part in sorted(self._parts.get(step.name, {}).items())]
            whole = sum(parts[1:], start=parts[0]) if parts else None
            kind = "interference" if isinstance(whole, Interference) else "similarity"
            found.append(TensorReport(step, on_cpu=step.name in self._on_cpu, **{kind: whole}))
        return found


def _figures(found: Figures) -> tuple[str, ...]:
    cosine = _or(found.update_cosine, "-", ".4f")
    if isinstance(found, Interference):
        removed = _or(found.removed, "-", ".1%")
        return f"{found.before:.4g}", f"{found.after:.4g}", removed, cosine
    return str(found.groups), f"{found.mean(after=False):.4f}", f"{found.mean(after=True):.4f}", cosine


def _or(number: float, otherwise: str, form: str) -> str:
    return otherwise if math.isnan(number) else format(number, form)


def _plain(found: Figures) -> dict[str, Any]:
    if isinstance(found, Interference):
        numbers = {"interference_before": found.before, "interference_after": found.after}
    else:
        numbers = {
            "similarity_before": found.mean(after=False),
            "similarity_after": found.mean(after=True),
            "loss_before": found.loss_before,
            "loss_after": found.loss_after,
        }
    numbers["update_cosine"] = found.update_cosine
    plain = {name: None if math.isnan(number) else number for name, number in numbers.items()}
    return plain if isinstance(found, Interference) else {"groups": found.groups} | plain


def _matrices(found: Figures) -> dict[str, Any]:
    if isinstance(found, Interference):
        return {}
    return {
        "matrix_before": found.matrix(after=False).tolist(),
        "matrix_after": found.matrix(after=True).tolist(),
    }


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns, the first left-aligned and the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
