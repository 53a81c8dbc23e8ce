"""What the study writes: one Markdown page with its tables, the same figures as CSV and JSON, and plots."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality import pictures
from benchmarks.quality.claims import Point
from benchmarks.quality.evaluate import accuracy
from benchmarks.quality.study import COMMON_SCALE, Finding, Mean, gain, mean

Findings = Mapping[str, Sequence[Finding]]
"""Of each method, its findings on the seeds."""


def percent(value: Mean, signed: bool = False) -> str:
    """In points, with the larger of the two standard errors."""
    return f"{100 * value.value:{'+' if signed else ''}.1f} ± {100 * value.error:.1f}"


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table, the first its head."""
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])


def table(findings: Findings, against: str) -> list[list[str]]:
    """Head and rows: accuracy at the chosen scales, how much that is above `against`, and at the common scale."""
    rows = [["block", "method", "scales", "accuracy", f"above {against}", f"at {COMMON_SCALE}", "by seed", "merge, s"]]
    reference = [one.outcome for one in findings[against]]
    for name, found in findings.items():
        outcomes = [one.outcome for one in found]
        seeds = [one.seed for one in found]
        matched = [r for r, one in zip(reference, findings[against], strict=True) if one.seed in seeds]
        seconds = sum(one.seconds for one in found) / len(found)
        common = [one.common for one in found if one.common is not None]
        rows.append(
            [
                found[0].block,
                name,
                _chosen(found),
                percent(mean(outcomes)),
                "" if name == against else percent(gain(outcomes, matched), signed=True),
                percent(mean(common)) if common else "-",
                ", ".join(f"{100 * accuracy(outcome):.1f}" for outcome in outcomes),
                f"{seconds:.2f}" if math.isfinite(seconds) else "-",
            ]
        )
    return rows


def _chosen(found: Sequence[Finding]) -> str:
    """What validation texts chose on each seed: scales, or steps."""
    if not found[0].validation:
        return "-"
    listed = ", ".join(f"{one.chosen:g}" for one in found)
    return listed if found[0].scaled else f"{listed} steps"


def by_task(findings: Findings, names: Sequence[str]) -> list[list[str]]:
    """Accuracy on each task, over the seeds, of some methods."""
    tasks = list(findings[names[0]][0].outcome)
    rows = [["method", *tasks]]
    for name in names:
        found = findings[name]
        rows.append(
            [name, *(f"{100 * mean([{task: one.outcome[task]} for one in found]).value:.1f}" for task in tasks)]
        )
    return rows


def write_csv(path: Path, findings: Findings) -> None:
    """One line for each method, seed, half of the held-out texts and scale."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        tasks: list[str] = []
        for found in findings.values():
            tasks += [task for task in found[0].outcome if task not in tasks]
        writer.writerow(["block", "method", "seed", "half", "scale", "chosen", "accuracy", *tasks, "merge_seconds"])
        for found in findings.values():
            for one in found:
                start = [one.block, one.method, one.seed]
                for scale, value in one.validation.items():
                    writer.writerow(
                        [*start, "validation", scale, scale == one.chosen, f"{value:.4f}", *[""] * len(tasks), ""]
                    )
                for scale, outcome in sorted(one.test.items()):
                    each = [f"{float(outcome[t].double().mean()):.4f}" if t in outcome else "" for t in tasks]
                    seconds = f"{one.seconds:.3f}"
                    shown = scale if one.validation else ""
                    writer.writerow(
                        [*start, "test", shown, scale == one.chosen, f"{accuracy(outcome):.4f}", *each, seconds]
                    )


def write_points(path: Path, points: Sequence[Point]) -> None:
    """The points of the experiments, one line each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["experiment", "series", "x", "y", "error", "note"])
        writer.writeheader()
        for point in points:
            writer.writerow(asdict(point) | {"y": f"{point.y:.4f}", "error": f"{point.error:.4f}"})


def summary(findings: Findings, against: str) -> dict[str, Any]:
    """The table as plain data."""
    reference = {one.seed: one.outcome for one in findings[against]}
    result = {}
    for name, found in findings.items():
        outcomes = [one.outcome for one in found]
        result[name] = {
            "block": found[0].block,
            "seeds": [one.seed for one in found],
            "chosen": [one.chosen if one.validation else None for one in found],
            "accuracy": asdict(mean(outcomes)),
            "gain": asdict(gain(outcomes, [reference[one.seed] for one in found])),
            "merge_seconds": [one.seconds for one in found],
        }
    return json.loads(json.dumps(result).replace("NaN", "null"))


def write_pictures(folder: Path, findings: Findings, individual: float, points: Sequence[Point]) -> list[str]:
    """All plots; returns their file names."""
    drawn = {name: found for name, found in findings.items() if len(found[0].test) > 2}
    pictures.curves(drawn, individual, folder / "scales.png")
    own = {name: [p for p in points if p.experiment == name] for name in dict.fromkeys(p.experiment for p in points)}
    accuracies = "test accuracy"
    plots = {
        "negation": ("scale", accuracies),
        "growth": ("merged tasks", "accuracy as a share of the individual models'"),
        "unseen": ("tasks that were not merged", accuracies),
        "alpha": ("alpha", accuracies),
        "iterations": ("iterations of gradient descent", accuracies),
        "included": ("tensors that are disentangled", accuracies),
    }
    written = ["scales.png"]
    for name, labels in plots.items():
        if own.get(name):
            pictures.lines(own[name], *labels, folder / f"{name}.png", logarithmic=name in ("alpha", "iterations"))
            written.append(f"{name}.png")
    if own.get("similarity"):
        pictures.cloud(own["similarity"], "mean |cos| after", accuracies, folder / "similarity.png")
        written.append("similarity.png")
    return written
