"""The paper's other claims, each as an experiment of its own: points of curves, by method.

They run on the first seed, `growth`, which needs all twelve tasks, on the last. Every scale is chosen on validation
texts, every figure is from test texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import awd_fast
from awd_fast import SGD, Converge
from benchmarks.quality.evaluate import accuracy, standard_error
from benchmarks.quality.lab import Lab, at_scale
from benchmarks.quality.study import best, sweep

Options = Mapping[str, Any]
CONTENDERS: dict[str, Options] = {
    "Task Arithmetic": {"method": "task_arithmetic"},
    "AWD rows": {"similarity": "squared", "optimizer": Converge()},
    "WUDI": {"method": "wudi", "others_scale": None},
}
NEGATED = ("newsgroups", "reuters", "election", "books")
NEGATION_SCALES = (0.3, 0.6, 1.0)
UNSEEN = (("newsgroups", "amazon"), ("reuters", "movies"), ("election", "editorials"))
ALPHAS = (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
ITERATIONS = (1, 10, 30, 100, 300, 1000, 3000)
FIXED_SCALE = 0.8
COUNTS = (2, 4, 8, 12)


@dataclass(frozen=True)
class Point:
    """One measured point. x: what the experiment varies. y, error: what it measures, and its standard error."""

    experiment: str
    series: str
    x: float | str
    y: float
    error: float
    note: str = ""


def merged(lab: Lab, chosen: Sequence[str], options: Options) -> awd_fast.MergeReport:
    """The merge at scale 1 of the models of some tasks, as (weights, report)."""
    reports: list[awd_fast.MergeReport] = []
    states = [lab.states[lab.names.index(name)] for name in chosen]
    full = awd_fast.merge(lab.base, states, **{"scale": 1.0, "on_report": reports.append} | dict(options))
    return full, reports[0]


def negation(lab: Lab) -> Iterator[Point]:
    """Forgetting: one task's vector is subtracted while the seven others are added."""
    for name, options in CONTENDERS.items():
        for target in NEGATED:
            weights = [-1.0 if task == target else 1.0 for task in lab.names]
            full, _ = merged(lab, lab.names, {**options, "weights": weights})
            for scale in NEGATION_SCALES:
                outcome = lab.examine(at_scale(lab.base, full, scale), "test")
                for what, own in (
                    ("forgotten", {target: outcome[target]}),
                    ("kept", {task: right for task, right in outcome.items() if task != target}),
                ):
                    yield Point("negation", f"{name}: {what}", scale, accuracy(own), standard_error(own), target)


def growth(lab: Lab) -> Iterator[Point]:
    """More and more tasks: mean over the merged tasks of the accuracy, as a share of the individual models'."""
    for count in COUNTS:
        names = lab.names[:count]
        alone = {}
        for name in names:
            alone |= lab.examine(lab.states[lab.names.index(name)], "test", [name])
        for series, options in CONTENDERS.items():
            full, _ = merged(lab, names, options)
            scale = best(sweep(lab, full, names))
            outcome = lab.examine(at_scale(lab.base, full, scale), "test", names)
            share = sum(float(outcome[n].double().mean()) / float(alone[n].double().mean()) for n in names) / count
            yield Point("growth", series, count, share, standard_error(outcome) / accuracy(alone), f"scale {scale}")


def unseen(lab: Lab) -> Iterator[Point]:
    """Six tasks are merged; two others, which no model was trained on, are examined with their own frozen heads."""
    for pair in UNSEEN:
        seen = [name for name in lab.names if name not in pair]
        outcome = lab.examine(lab.base, "test", pair)
        yield Point("unseen", "pretrained", " + ".join(pair), accuracy(outcome), standard_error(outcome))
        for series, options in CONTENDERS.items():
            full, _ = merged(lab, seen, options)
            scale = best(sweep(lab, full, seen))
            outcome = lab.examine(at_scale(lab.base, full, scale), "test", pair)
            yield Point(
                "unseen", series, " + ".join(pair), accuracy(outcome), standard_error(outcome), f"scale {scale}"
            )


def _at_fixed(lab: Lab, experiment: str, series: str, x: float | str, options: Options) -> Iterator[Point]:
    full, report = merged(lab, lab.names, options)
    outcome = lab.examine(at_scale(lab.base, full, FIXED_SCALE), "test")
    after, cosine = report.similarity_after, report.update_cosine
    note = "" if after is None else f"mean |cos| {after:.4f}, cos(update, Task Arithmetic) {cosine:.4f}"
    yield Point(experiment, series, x, accuracy(outcome), standard_error(outcome), note)
    if after is not None:
        yield Point("similarity", f"{experiment}: {series}", after, accuracy(outcome), standard_error(outcome), f"{x}")


def alpha(lab: Lab) -> Iterator[Point]:
    """The weight of the norm penalty, at one scale."""
    for value in ALPHAS:
        for kind in ("absolute", "squared"):
            options = {"similarity": kind, "optimizer": Converge(), "alpha": value}
            yield from _at_fixed(lab, "alpha", kind, value, options)


def iterations(lab: Lab) -> Iterator[Point]:
    """How long gradient descent runs, at one scale."""
    yield from _at_fixed(lab, "iterations", "Task Arithmetic", 0, {"method": "task_arithmetic"})
    for count in ITERATIONS:
        for kind in ("absolute", "squared"):
            options = {"similarity": kind, "optimizer": SGD(iterations=count)}
            yield from _at_fixed(lab, "iterations", kind, count, options)


INCLUDED: dict[str, Options] = {
    "2-D weights disentangled, the rest by Task Arithmetic": {},
    "2-D weights disentangled, the rest left as it was": {"others": "base"},
    "and the embeddings": {"include": ("*weight",), "exclude": ("*norm*", "*Norm*", "*pooler*")},
    "and biases and norms": {"exclude": ("*embed*", "*pooler*"), "include": ("*",)},
    "everything disentangled": {"include": ("*",), "exclude": ()},
}


def included(lab: Lab) -> Iterator[Point]:
    """Which tensors are disentangled, each at the scale that validation texts choose."""
    for series, options in INCLUDED.items():
        full, _ = merged(lab, lab.names, {**CONTENDERS["AWD rows"], **options})
        scale = best(sweep(lab, full))
        outcome = lab.examine(at_scale(lab.base, full, scale), "test")
        yield Point("included", "AWD rows", series, accuracy(outcome), standard_error(outcome), f"scale {scale}")


EXPERIMENTS: dict[str, Callable[[Lab], Iterator[Point]]] = {
    "negation": negation,
    "unseen": unseen,
    "alpha": alpha,
    "iterations": iterations,
    "included": included,
}
"""Those on the eight tasks; `growth` needs all twelve."""
