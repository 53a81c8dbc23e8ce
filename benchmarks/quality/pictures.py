"""The study's plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.quality.claims import Point
from benchmarks.quality.study import Finding, mean

INK = {"dpi": 110, "bbox_inches": "tight"}


def curves(findings: Mapping[str, Sequence[Finding]], individual: float, path: Path) -> None:
    """Test accuracy over the scale, one line a method, over the scales that all its seeds have."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, found in findings.items():
        shared = sorted(set.intersection(*(set(one.test) for one in found)))
        if len(shared) > 2:
            values = [mean([one.test[scale] for one in found]) for scale in shared]
            axes.errorbar(shared, [v.value for v in values], [v.error for v in values], label=name, capsize=2)
    axes.axhline(individual, color="grey", linestyle=":", label="individual models")
    axes.set(xlabel="scale", ylabel="test accuracy, mean over tasks and seeds")
    axes.legend(fontsize=7)
    figure.savefig(path, **INK)
    plt.close(figure)


def lines(points: Sequence[Point], xlabel: str, ylabel: str, path: Path, logarithmic: bool = False) -> None:
    """One line a series; what is said by name stands along the axis; points that share an x are averaged."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    named = any(isinstance(point.x, str) for point in points)
    places = {x: k for k, x in enumerate(dict.fromkeys(point.x for point in points))} if named else None
    for series in dict.fromkeys(point.series for point in points):
        own = [point for point in points if point.series == series]
        xs = list(dict.fromkeys(point.x for point in own))
        at = {x: [point for point in own if point.x == x] for x in xs}
        ys = [sum(p.y for p in at[x]) / len(at[x]) for x in xs]
        errors = [sum(p.error**2 for p in at[x]) ** 0.5 / len(at[x]) for x in xs]
        where = xs if places is None else [places[x] for x in xs]
        axes.errorbar(where, ys, errors, label=series, marker="o", markersize=3, capsize=2, ls="none" if named else "-")
    if places is not None:
        axes.set_xticks(list(places.values()), [str(x) for x in places], rotation=20, fontsize=7, ha="right")
    if logarithmic:
        axes.set_xscale("symlog", linthresh=min(p.x for p in points if not isinstance(p.x, str) and p.x > 0))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize=7)
    figure.savefig(path, **INK)
    plt.close(figure)


def cloud(points: Sequence[Point], xlabel: str, ylabel: str, path: Path) -> None:
    """One dot a point, coloured by series."""
    figure, axes = plt.subplots(figsize=(6, 4.5))
    for series in dict.fromkeys(point.series for point in points):
        own = [point for point in points if point.series == series]
        axes.errorbar([p.x for p in own], [p.y for p in own], [p.error for p in own], fmt="o", ms=4, label=series)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize=7)
    figure.savefig(path, **INK)
    plt.close(figure)
