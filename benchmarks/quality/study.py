"""Scales and accuracies: what is measured of one method on one seed, and what several seeds say together.

Every method has the same grid of scales, and the same validation texts choose from it. Test texts choose nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.quality.evaluate import Outcome, accuracy, difference, standard_error
from benchmarks.quality.lab import TEST_TEXTS, VALIDATION_TEXTS, Lab, Weights, at_scale
from benchmarks.quality.methods import Method
from benchmarks.quality.models import CHOOSING_SEEDS

SCALES = (0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5)
COMMON_SCALE = 0.3
# Scales are tried in their order until the last two of them lie so far below the best that no larger one can win.
HOPELESS = 0.03
# A variant that is there to choose from, and lies further below the best of its block on the first seed's validation
# texts, is not run on another seed.
BEHIND = 0.01


@dataclass
class Finding:
    """One method on the models of one seed.

    validation: accuracy by scale, or by what else there is to choose from (AdaMerging's steps). test: outcome by the
    same; a method without either has 1 alone. chosen: what has the best validation accuracy, the smaller one of equals.
    seconds: what the merge took.
    """

    method: str
    block: str
    seed: int
    scaled: bool
    seconds: float
    chosen: float = 1.0
    validation: dict[float, float] = field(default_factory=dict)
    test: dict[float, Outcome] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        """On the test texts, at the chosen scale."""
        return self.test[self.chosen]

    @property
    def reached(self) -> float:
        """Validation accuracy at the chosen scale."""
        return self.validation[self.chosen]

    @property
    def common(self) -> Outcome | None:
        """On the test texts, at the scale that is common to all methods; None where the method has no scale."""
        return self.test[COMMON_SCALE] if self.scaled else None


def cost(method: Method) -> float:
    """Texts that an encoder reads for a method, on each task; somewhat less where scales turn out hopeless."""
    if method.stages is not None:
        return 5 * VALIDATION_TEXTS + TEST_TEXTS
    if not method.scaled:
        return TEST_TEXTS
    return len(SCALES) * VALIDATION_TEXTS + (len(SCALES) if method.curve else 2) * TEST_TEXTS


def sweep(lab: Lab, full: Weights, tasks: Sequence[str] | None = None) -> dict[float, float]:
    """Validation accuracy by scale."""
    found: dict[float, float] = {}
    for scale in SCALES:
        found[scale] = accuracy(lab.examine(at_scale(lab.base, full, scale), "validation", tasks))
        if len(found) > 2 and max(list(found.values())[-2:]) < max(found.values()) - HOPELESS:
            break
    return found


def best(validation: dict[float, float]) -> float:
    """The scale that the validation texts choose."""
    return max(validation, key=lambda scale: (validation[scale], -scale))


def investigate(lab: Lab, method: Method, seed: int) -> Finding:
    """All figures of a method on the models of a lab."""
    started = time.perf_counter()
    if method.stages is not None:
        found = Finding(method.name, method.block, seed, False, math.nan)
        merges = dict(method.stages(lab))
        found.validation = {stage: accuracy(lab.examine(merged, "validation")) for stage, merged in merges.items()}
        found.chosen = best(found.validation)
        found.test[found.chosen] = lab.examine(merges[found.chosen], "test")
        return found
    full = method.make(lab)
    seconds = time.perf_counter() - started
    found = Finding(
        method.name, method.block, seed, method.scaled, seconds if method.took is None else method.took(lab)
    )
    if not method.scaled:
        found.test[1.0] = lab.examine(full, "test")
        return found
    found.validation = sweep(lab, full)
    found.chosen = best(found.validation)
    for scale in found.validation if method.curve else sorted({found.chosen, COMMON_SCALE}):
        found.test[scale] = lab.examine(at_scale(lab.base, full, scale), "test")
    return found


def behind(method: Method, findings: Mapping[str, Sequence[Finding]]) -> bool:
    """Whether a variant that is there to choose from has fallen behind on a seed before this one."""
    if method.seeds != CHOOSING_SEEDS or not method.scaled or method.name not in findings:
        return False
    block = [found[0] for found in findings.values() if found[0].block == method.block and found[0].scaled]
    return findings[method.name][0].reached < max(one.reached for one in block) - BEHIND


def individual(lab: Lab, seed: int, block: str) -> Finding:
    """Each task by its own model."""
    found = Finding("individual (one model a task)", block, seed, False, 0.0)
    found.test[1.0] = {}
    for name, state in zip(lab.names, lab.states, strict=True):
        found.test[1.0] |= lab.examine(state, "test", [name])
    return found


@dataclass(frozen=True)
class Mean:
    """An accuracy, or a difference of two, over seeds. by_texts, by_seeds: its standard errors, from the texts within
    the seeds, and from how much the seeds differ (NaN for one seed)."""

    value: float
    by_texts: float
    by_seeds: float

    @property
    def error(self) -> float:
        """The larger of the two."""
        return self.by_texts if math.isnan(self.by_seeds) else max(self.by_texts, self.by_seeds)


def _mean(values: Sequence[float], errors: Sequence[float]) -> Mean:
    n = len(values)
    by_seeds = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Mean(sum(values) / n, math.sqrt(sum(error**2 for error in errors)) / n, by_seeds)


def mean(outcomes: Sequence[Outcome]) -> Mean:
    """Accuracy over the seeds, given each seed's outcome."""
    return _mean([accuracy(outcome) for outcome in outcomes], [standard_error(outcome) for outcome in outcomes])


def gain(first: Sequence[Outcome], second: Sequence[Outcome]) -> Mean:
    """How much higher the first is than the second, paired seed by seed and text by text."""
    pairs = [difference(a, b) for a, b in zip(first, second, strict=True)]
    return _mean([value for value, _ in pairs], [error for _, error in pairs])
