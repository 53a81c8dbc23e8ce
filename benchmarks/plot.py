"""The picture of a run: the time of each operation in every backend, and what the memory alone would take."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awd_fast import measure
from awd_fast.measure import Result

GROUPS = {
    "merge_rows row sgd300": "merge, 300 steps of SGD by rows",
    "merge_rows row converge": "merge, Converge by rows",
    "adam_step": "one step of Adam, one global group",
    "adam_rows 300": "300 steps of Adam by rows",
    "combine": "combine (Task Arithmetic)",
    "gram row": "Gram matrices of rows",
}
"""The operations that are drawn, from the top down."""

COLOURS = {
    "native": "#0b6e4f",
    "native, three calls": "#6bbf9c",
    "reference": "#7a7a7a",
    "adam_step x 300": "#2f9db5",
    "PyTorch": "#3b6fb6",
    "autograd": "#d1603d",
    "compiled": "#e8a33d",
    "cosine loop": "#a34a8f",
    "pairwise": "#5a4fa2",
}
LABELS = {
    "native": "awd_fast",
    "native, three calls": "awd_fast, three calls",
    "reference": "awd_fast, reference path",
    "adam_step x 300": "awd_fast, adam_step x 300",
    "PyTorch": "PyTorch, as one writes it",
    "autograd": "autograd, batched",
    "compiled": "autograd, batched and compiled",
    "cosine loop": "autograd, loop of cosine_similarity",
    "pairwise": "gradient by hand, pair by pair",
}


def draw(results: Sequence[Result], title: str, file: Path) -> None:
    """Horizontal bars on a logarithmic scale; `file` ends in .svg or .png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    limit = measure.memory_limit(results) * 1e9
    bars: list[tuple[float, Result]] = []
    ticks: list[tuple[float, str]] = []
    lines: list[tuple[float, float, float]] = []  # seconds, from, to
    place = 0.0
    for operation, label in GROUPS.items():
        found = [measure.find(results, operation, backend) for backend in COLOURS]
        timed = sorted((result for result in found if result is not None), key=lambda result: result.median)
        if not timed:
            continue
        bars += [(place + index, result) for index, result in enumerate(timed)]
        ticks.append((place + (len(timed) - 1) / 2, label))
        if timed[0].case.moved and not math.isnan(limit):
            lines.append((timed[0].case.moved / limit, place - 0.5, place + len(timed) - 0.5))
        place += len(timed) + 0.8
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(9.0, 1.2 + 0.26 * place), layout="constrained")
    for at, result in bars:
        axes.barh(at, result.median, height=0.85, color=COLOURS[result.case.backend])
        axes.annotate(
            measure.duration(result.median),
            (result.median, at),
            (4, 0),
            textcoords="offset points",
            va="center",
            size=8,
        )
    for seconds, top, bottom in lines:
        axes.vlines(seconds, top, bottom, colors="black", linestyles="dashed", linewidth=1.2)
    low = min([*(result.median for _, result in bars), *(seconds for seconds, _, _ in lines)])
    axes.set_xscale("log")
    axes.set_xlim(low / 2.0, max(result.median for _, result in bars) * 5.0)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(place - 0.8, -0.8)
    axes.set_xlabel("seconds")
    axes.set_title(title, size=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    used = {result.case.backend for _, result in bars}
    handles: list[Any] = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in COLOURS if name in used]
    names = [LABELS[name] for name in COLOURS if name in used]
    if lines:
        handles.append(pyplot.Line2D([], [], color="black", linestyle="dashed", linewidth=1.2))
        names.append("memory limit (triad)")
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)
