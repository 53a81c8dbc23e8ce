"""The table of a comparison of merges: one row per encoder, as text for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.evaluate import Outcome, accuracy, difference, standard_error


@dataclass(frozen=True)
class Row:
    """One encoder's test outcome. block: heading that it stands under. scale: None where the method has none."""

    block: str
    name: str
    scale: float | None
    outcome: Outcome


def cells(row: Row) -> list[str]:
    """Name, scale, accuracy on each task, their mean, and its standard error."""
    scale = "-" if row.scale is None else f"{row.scale:.2f}"
    tasks = [f"{float(right.double().mean()):.3f}" for right in row.outcome.values()]
    return [row.name, scale, *tasks, f"{accuracy(row.outcome):.3f}", f"{standard_error(row.outcome):.3f}"]


def headings(rows: Sequence[Row]) -> list[str]:
    """Column headings that go with `cells`."""
    return ["encoder", "scale", *rows[0].outcome, "average", "s.e."]


def as_text(rows: Sequence[Row]) -> str:
    """Aligned columns, each block under its heading."""
    head, body = headings(rows), [cells(row) for row in rows]
    widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head))]

    def aligned(line: Sequence[str]) -> str:
        first = line[0].ljust(widths[0] + 2)
        return "  ".join([first, *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])

    lines = [aligned(head)]
    block = ""
    for row, line in zip(rows, body, strict=True):
        if row.block != block:
            block = row.block
            lines += ["", f"{block}:"]
        lines.append(aligned(["  " + line[0], *line[1:]]))
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row], title: str, closing: str) -> str:
    """A Markdown page: title, table, closing sentence."""
    head = ["block", *headings(rows)]
    lines = [f"# {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join([row.block, *cells(row)])} |" for row in rows]
    return "\n".join([*lines, "", closing, ""])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The same figures as `cells`, one line per row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["block", *headings(rows)])
        writer.writerows([row.block, *cells(row)] for row in rows)


def compared(name: str, first: Outcome, other: str, second: Outcome) -> str:
    """One clause: how far `first` is above or below `second`, against the standard error of the paired difference."""
    gain, error = difference(first, second)
    if gain == 0:
        return f"{name} is level with {other} (standard error of the difference {error:.3f})"
    direction = "above" if gain > 0 else "below"
    verdict = "more than two" if abs(gain) > 2 * error else "too close to call at less than two"
    return f"{name} is {abs(gain):.3f} {direction} {other} ({verdict} standard errors of the difference, {error:.3f})"
