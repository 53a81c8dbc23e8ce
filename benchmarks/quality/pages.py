"""The study's report: what is said in words, around the tables and pictures of `benchmarks.quality.report`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import report
from benchmarks.quality.claims import FIXED_SCALE, NEGATED, Point
from benchmarks.quality.evaluate import accuracy
from benchmarks.quality.lab import TEST_TEXTS, UNLABELLED_TEXTS, VALIDATION_TEXTS
from benchmarks.quality.methods import AWD, AWD_PAPER, AWD_ROWS, TASK_ARITHMETIC
from benchmarks.quality.models import CHOOSING_SEEDS, CONFIRMING_SEED, EIGHT, LEFT_OUT
from benchmarks.quality.report import Findings, markdown, percent
from benchmarks.quality.study import BEHIND, SCALES, Finding, Mean, gain, mean

WUDI_ROW = "WUDI, ridge 0.1"


def line(found: Finding) -> str:
    """One finding for the terminal."""
    scale = f" at {found.chosen:g}" if found.validation else ""
    return f"{found.method}: {100 * accuracy(found.outcome):.1f}{scale}"


def best_of(findings: Findings, block: str, seeds: Sequence[int]) -> str:
    """The method of a block with the best validation accuracy at its chosen scale, over these seeds."""

    def reached(name: str) -> float:
        return sum(one.reached for one in findings[name] if one.seed in seeds) / len(seeds)

    complete = {name: found for name, found in findings.items() if {one.seed for one in found} >= set(seeds)}
    names = [name for name, found in complete.items() if found[0].block == block and found[0].scaled]
    return max(names, key=reached)


def _gain(findings: Findings, first: str, second: str, seeds: Sequence[int] | None = None) -> Mean:
    pairs = [
        (one.outcome, other.outcome)
        for one in findings[first]
        for other in findings[second]
        if one.seed == other.seed and (seeds is None or one.seed in seeds)
    ]
    return gain([one for one, _ in pairs], [other for _, other in pairs])


def _at_scales(findings: Findings, first: str, second: str) -> list[tuple[float, Mean]]:
    """The gain of one method over another at each scale that all seeds have of both."""
    both = [*findings[first], *findings[second]]
    shared = sorted(set.intersection(*(set(one.test) for one in both)))
    return [
        (scale, gain([one.test[scale] for one in findings[first]], [one.test[scale] for one in findings[second]]))
        for scale in shared
    ]


def verdicts(findings: Findings) -> list[str]:
    """What the study was asked, answered by its figures."""
    seeds = {one.seed for one in findings[TASK_ARITHMETIC]}
    choosing = [seed for seed in CHOOSING_SEEDS if seed in seeds] or sorted(seeds)
    chosen = best_of(findings, AWD, choosing)
    said = []

    def answer(question: str, value: Mean, wanted: float) -> None:
        reached = "reached" if value.value >= wanted else "NOT reached"
        said.append(f"{question}: {percent(value, signed=True)} points; {100 * wanted:.1f} were hoped for: {reached}.")

    answer(
        f"{AWD_ROWS} above Task Arithmetic, each at its chosen scale", _gain(findings, AWD_ROWS, TASK_ARITHMETIC), 0.015
    )
    answer(
        f"{chosen}, the best AWD on validation texts of the choosing seeds, above Task Arithmetic",
        _gain(findings, chosen, TASK_ARITHMETIC),
        0.015,
    )
    answer(f"{chosen} above the paper's own options ({AWD_PAPER})", _gain(findings, chosen, AWD_PAPER), 0.0)
    answer(f"{chosen} above the authors' later options", _gain(findings, chosen, AWD_ROWS), 0.0)
    if CONFIRMING_SEED in {one.seed for one in findings[chosen]}:
        value = _gain(findings, chosen, TASK_ARITHMETIC, [CONFIRMING_SEED])
        answer(f"The same above Task Arithmetic on seed {CONFIRMING_SEED}, which chose nothing", value, 0.0)
    answer("WUDI in closed form above Task Arithmetic", _gain(findings, WUDI_ROW, TASK_ARITHMETIC), 0.04)
    for per in ("by task", "by tensor"):
        if f"AdaMerging, {per}" in findings:
            answer(
                f"AWD + AdaMerging above AdaMerging, {per}",
                _gain(findings, f"AWD rows + AdaMerging, {per}", f"AdaMerging, {per}"),
                0.0,
            )
    for scale, value in _at_scales(findings, AWD_ROWS, TASK_ARITHMETIC):
        if 0.3 <= scale <= 1.0:
            answer(f"{AWD_ROWS} against Task Arithmetic, both at scale {scale:g}", value, -0.005)
    for name, found in findings.items():
        if " at " in name and found[0].block.startswith("scales"):
            base = next(
                other for other in (TASK_ARITHMETIC, "AWD rows, squared, Converge", WUDI_ROW) if name.startswith(other)
            )
            answer(f"{name}, against the chosen scale", _gain(findings, name, base), -0.01)
    return said


def write(
    folder: Path,
    eight: Findings,
    confirmed: Mapping[str, Findings],
    points: Sequence[Point],
    about: Mapping[str, Any],
) -> None:
    """Report, tables and pictures."""
    individual = mean([one.outcome for one in eight["individual"]])
    pictures = report.write_pictures(folder, eight, individual.value, points)
    report.write_csv(folder / "table.csv", eight)
    report.write_points(folder / "points.csv", points)
    data = {
        "about": dict(about),
        "eight": report.summary(eight, TASK_ARITHMETIC),
        "confirmed": {title: report.summary(found, TASK_ARITHMETIC) for title, found in confirmed.items()},
        "verdicts": verdicts(eight),
    }
    (folder / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for title, found in confirmed.items():
        report.write_csv(folder / f"{title.replace(' ', '-')}.csv", found)
    seeds = ", ".join(str(one.seed) for one in eight[TASK_ARITHMETIC])
    shown = ["individual", TASK_ARITHMETIC, AWD_ROWS, "AWD rows, squared, Converge", WUDI_ROW]
    parts = [
        "# Does it merge better?",
        f"One encoder of 22.7M parameters, fine-tuned on {len(EIGHT)} text tasks ({', '.join(EIGHT)}), seeds {seeds}; "
        f"{VALIDATION_TEXTS} validation and {TEST_TEXTS} test texts a task and seed, {UNLABELLED_TEXTS} more without "
        "labels for what adapts. Heads are made of the classes' names and frozen. Accuracies are means over tasks and "
        "seeds in percent, ± the larger of two standard errors: from the texts, and from the seeds. The scale of each "
        f"method is the best of {', '.join(f'{scale:g}' for scale in SCALES)} on the validation texts of its seed "
        "(larger ones are left out once two in a row lie 3 points below the best). Test texts choose nothing.",
        f"`make quality`, {about['machine']}, torch {about['torch']}, awd_fast {about['awd_fast']}.",
        "## Answers",
        "\n".join(f"- {said}" for said in verdicts(eight)),
        "## All methods on the eight tasks",
        markdown(report.table(eight, TASK_ARITHMETIC)),
        "Seconds are of the merge alone on this machine; those of peers include what they read and write. Rows with "
        "one figure by seed were run on the first seed only: peers' other settings, and variants that lay more than "
        f"{100 * BEHIND:g} point below the best of their block on its validation texts.",
        "![accuracy by scale](scales.png)",
        "## By task",
        markdown(report.by_task(eight, shown)),
    ]
    for title, found in confirmed.items():
        parts += [
            f"## {title.capitalize()}",
            f"Nothing was chosen on these ({', '.join(LEFT_OUT)} were left out of every choice), but each row's scale, "
            "on validation texts, where it has one.",
            markdown(report.table(found, TASK_ARITHMETIC)),
        ]
    notes = {
        "negation": f"One task is subtracted (weight -1), seven are added; mean over {', '.join(NEGATED)} as the one.",
        "growth": "Mean over the merged tasks of accuracy relative to the individual model's.",
        "unseen": "Six tasks are merged, two that no model saw are examined with their own frozen heads.",
        "alpha": f"The weight of the norm penalty, AWD rows, Converge, at scale {FIXED_SCALE}.",
        "iterations": f"Gradient descent as in the authors' later code, at scale {FIXED_SCALE}; 0 is Task Arithmetic.",
        "included": "Which tensors are disentangled (rows, squared, Converge), each at its chosen scale.",
        "similarity": f"Every merge of the two experiments above by what is left of the similarity, at {FIXED_SCALE}.",
    }
    if points:
        parts.append("## The paper's other claims")
        parts.append("On the first seed alone; the points with their standard errors are in `points.csv`.")
        for name, said in notes.items():
            if f"{name}.png" in pictures:
                parts += [f"### {name.capitalize()}", said, f"![{name}]({name}.png)"]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
