"""The picture of a run: the time of each operation in every backend, and what the memory alone would take.

    python -m benchmarks.plot benchmarks/results/DEVICE.csv PICTURE.svg [--shape minilm_x8]

draws the last run of a shape again from the file.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awd_fast import measure

Row = Mapping[str, str]
"""Of the CSV file (`benchmarks.harness.COLUMNS`)."""

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


def draw(rows: Sequence[Row], file: Path) -> None:
    """Horizontal bars on a logarithmic scale, from the rows of one run; `file` ends in .svg or .png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["dtype"] == "float32":
            first.setdefault((row["operation"], row["backend"]), row)  # later sections measure some of them again
    limit = max((float(row["GB/s"]) for row in rows if row["operation"] == measure.TRIAD), default=0.0) * 1e9
    bars: list[tuple[float, Row]] = []
    ticks: list[tuple[float, str]] = []
    lines: list[tuple[float, float, float]] = []  # seconds, from, to
    place = 0.0
    for operation, label in GROUPS.items():
        timed = [first[operation, backend] for backend in COLOURS if (operation, backend) in first]
        if not timed:
            continue
        timed.sort(key=lambda row: float(row["median_s"]))
        bars += [(place + index, row) for index, row in enumerate(timed)]
        ticks.append((place + (len(timed) - 1) / 2, label))
        moved = [float(row["bytes"]) for row in timed if row["backend"] == "native" and row["bytes"]]
        if moved and limit:
            lines.append((moved[0] / limit, place - 0.5, place + len(timed) - 0.5))
        place += len(timed) + 0.8
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(9.0, 1.4 + 0.24 * place), layout="constrained")
    for at, row in bars:
        seconds = float(row["median_s"])
        axes.barh(at, seconds, height=0.85, color=COLOURS[row["backend"]])
        axes.annotate(measure.duration(seconds), (seconds, at), (4, 0), textcoords="offset points", va="center", size=8)
    for seconds, top, bottom in lines:
        axes.vlines(seconds, top, bottom, colors="black", linestyles="dashed", linewidth=1.2)
    every = [*(float(row["median_s"]) for _, row in bars), *(seconds for seconds, _, _ in lines)]
    axes.set_xscale("log")
    axes.set_xlim(min(every) / 2.0, max(every) * 5.0)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 0.8, -0.8)
    axes.set_xlabel("seconds")
    one = rows[0]
    axes.set_title(f"{one['shape']}: {one['device']}, {one['threads']} threads, commit {one['commit']}", size=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    used = {row["backend"] for _, row in bars}
    handles: list[Any] = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in COLOURS if name in used]
    names = [LABELS[name] for name in COLOURS if name in used]
    if lines:
        handles.append(pyplot.Line2D([], [], color="black", linestyle="dashed", linewidth=1.2))
        names.append("memory limit (triad)")
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)


def last_run(file: Path, shape: str) -> list[Row]:
    """The rows of the last run of this shape."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["shape"] == shape]
    if not rows:
        raise SystemExit(f"{file} has no rows of {shape}")
    return [row for row in rows if row["date"] == rows[-1]["date"]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--shape", default="minilm_x8")
    arguments = parser.parse_args()
    draw(last_run(arguments.results, arguments.shape), arguments.picture)
