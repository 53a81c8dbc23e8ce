"""The merges that the study compares, each as one encoder that is then scaled.

A method gives the merged weights at scale 1; all of them but those marked `scaled=False` are linear in their scale, so
that one merge serves the whole grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import awd_fast
from awd_fast import SGD, Adam, Converge
from benchmarks.quality.lab import Lab, Weights

BASELINES = "baselines"
AWD = "AWD + Task Arithmetic"
WUDI = "WUDI in closed form"
MERGEKIT = "mergekit 0.1.5"
FUSION_BENCH = "FusionBench 0.2.33"
ON_AWD = "peers on disentangled vectors"
ADAPTED = "adapted to unlabelled texts"

TASK_ARITHMETIC = "Task Arithmetic"
AWD_ROWS = "AWD rows (authors' later code)"
AWD_PAPER = "AWD global (paper)"


@dataclass(frozen=True)
class Method:
    """A row of the table. curve: whether test accuracy is measured at every scale, too."""

    name: str
    block: str
    make: Callable[[Lab], Weights]
    scaled: bool = True
    curve: bool = False


def ours(name: str, block: str, *, curve: bool = False, scaled: bool = True, **options: Any) -> Method:
    """A merge of this package."""
    given: Mapping[str, Any] = {"scale": 1.0} | options if scaled else options
    return Method(name, block, lambda lab: awd_fast.merge(lab.base, lab.states, **given), scaled, curve)


CONVERGE = {"optimizer": Converge()}
SQUARED = {"similarity": "squared"}


def baselines() -> list[Method]:
    """What has no options."""
    return [
        Method("pretrained", BASELINES, lambda lab: lab.base, scaled=False),
        ours("average", BASELINES, scaled=False, method="average"),
        ours(TASK_ARITHMETIC, BASELINES, curve=True, method="task_arithmetic"),
    ]


def awd_variants() -> list[Method]:
    """AWD with the paper's options, those of its authors' later code, and what can be changed in them."""
    adam = Adam(lr=1e-5, iterations=300)
    return [
        ours(AWD_PAPER, AWD, curve=True, **awd_fast.PAPER),
        ours(AWD_ROWS, AWD, curve=True, **awd_fast.ROWS),
        ours("AWD rows, absolute, Converge", AWD, **CONVERGE),
        ours("AWD rows, squared, Converge", AWD, curve=True, **SQUARED, **CONVERGE),
        ours("AWD rows, squared, SGD", AWD, **SQUARED),
        ours("AWD rows, absolute, Adam", AWD, optimizer=adam),
        ours("AWD rows, squared, Adam", AWD, **SQUARED, optimizer=adam),
        ours("AWD rows, absolute, l1 penalty, SGD", AWD, penalty="l1"),
        ours("AWD rows, squared, no penalty", AWD, alpha=0.0, **SQUARED, **CONVERGE),
        ours("AWD columns, squared, Converge", AWD, groups="column", **SQUARED, **CONVERGE),
        ours("AWD tensors, absolute, Converge", AWD, groups="tensor", **CONVERGE),
        ours("AWD tensors, squared, Converge", AWD, groups="tensor", **SQUARED, **CONVERGE),
        ours("AWD global, squared, Converge", AWD, groups="global", **SQUARED, **CONVERGE),
    ]
