"""What a merge did, tensor by tensor and overall: similarity before and after, and how the update changed."""

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
        plain, across, awd = self.products.tolist()
        size = math.sqrt(max(plain, 0.0) * max(awd, 0.0))
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

    Of a global group it is the tensor's part: the cosines of the tensor alone, without a loss. on_cpu: whether it was
    computed on the CPU although a device was asked for.
    """

    step: Step
    similarity: Similarity | None = None
    on_cpu: bool = False


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
    def similarity_before(self) -> float | None:
        """Mean over groups and pairs of |cos(t_i, t_j)|."""
        return None if self.overall is None else self.overall.mean(after=False)

    @property
    def similarity_after(self) -> float | None:
        """Mean over groups and pairs of |cos(t_i - d, t_j - d)|."""
        return None if self.overall is None else self.overall.mean(after=True)

    @property
    def update_cosine(self) -> float | None:
        """cos of AWD's update and Task Arithmetic's over all disentangled tensors."""
        return None if self.overall is None else self.overall.update_cosine

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
        several = "" if len(names) == 1 else f" and {len(names) - 1} more"
        return (
            f"{names[0]!r}{several} did not fit the memory of {self.recipe.device} and was computed on the CPU; "
            "give more memory (--device-memory), or use SGD or Converge with a Euclidean penalty"
        )

    def note(self) -> str | None:
        """One sentence where inputs were read twice, or None."""
        if self.read_twice == 0:
            return None
        groups = self.recipe.options.groups
        why = "one group needs all tensors" if groups == "global" else f"{groups} groups did not fit the memory"
        more = "" if groups == "global" else "; give more (--memory) to read once"
        return f"{self.read_twice / 1e9:.3g} GB were read twice, because {why}{more}"

    def summary(self) -> str | None:
        """The figures over all disentangled tensors in one line, or None where there are none."""
        overall = self.overall
        if overall is None:
            return None
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
        """One line per disentangled tensor, and the whole, as text."""
        rows: list[tuple[str, ...]] = [("tensor", "groups", "before", "after", "cos(update, TA)")]
        listed = [(r.step.name, r.similarity) for r in self.tensors if r.similarity is not None]
        for name, similarity in [*listed, ("all disentangled tensors", self.overall)]:
            if similarity is not None:
                rows.append((name, *_figures(similarity)))
        return aligned(rows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data: every tensor with its action, similarity matrices for the whole."""
        overall = self.overall
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
                | ({} if report.similarity is None else _plain(report.similarity))
                for report in self.tensors
            },
        }

    def json_text(self) -> str:
        """`to_json` as text; never NaN or Infinity, which JSON does not have."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"


class Tally:
    """The similarities of tensors, added up from those of their parts in the order of the tensors' elements."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, Similarity]] = {}
        self._on_cpu: set[str] = set()

    def add(self, name: str, begin: int, similarity: Similarity | None, on_cpu: bool = False) -> None:
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
            found.append(TensorReport(step, whole, step.name in self._on_cpu))
        return found


def _figures(similarity: Similarity) -> tuple[str, ...]:
    cosine = similarity.update_cosine
    return (
        str(similarity.groups),
        f"{similarity.mean(after=False):.4f}",
        f"{similarity.mean(after=True):.4f}",
        "-" if math.isnan(cosine) else f"{cosine:.4f}",
    )


def _plain(similarity: Similarity) -> dict[str, Any]:
    cosine = similarity.update_cosine
    return {
        "groups": similarity.groups,
        "similarity_before": similarity.mean(after=False),
        "similarity_after": similarity.mean(after=True),
        "loss_before": None if math.isnan(similarity.loss_before) else similarity.loss_before,
        "loss_after": None if math.isnan(similarity.loss_after) else similarity.loss_after,
        "update_cosine": None if math.isnan(cosine) else cosine,
    }


def _matrices(similarity: Similarity) -> dict[str, Any]:
    return {
        "matrix_before": similarity.matrix(after=False).tolist(),
        "matrix_after": similarity.matrix(after=True).tolist(),
    }


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns, the first left-aligned and the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
