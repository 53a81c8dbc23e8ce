"""The merges that the study compares, each as one encoder that is then scaled.

A method gives the merged weights at scale 1; all of them but those marked `scaled=False` are linear in their scale, so
that one merge serves the whole grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import awd_fast
from awd_fast import SGD, Adam, Converge
from benchmarks.quality.lab import Lab, Weights, at_scale
from benchmarks.quality.models import CHOOSING_SEEDS

BASELINES = "baselines"
AWD = "AWD + Task Arithmetic"
WUDI = "WUDI in closed form"
MERGEKIT = "mergekit 0.1.5"
FUSION_BENCH = "FusionBench 0.2.33"
JOINED = "joined"
RULES = "scales chosen without data"
ADAPTED = "adapted to unlabelled texts"

TASK_ARITHMETIC = "Task Arithmetic"
AWD_ROWS = "AWD rows (authors' later code)"
AWD_PAPER = "AWD global (paper)"


@dataclass(frozen=True)
class Method:
    """A row of the table. curve: whether test accuracy is measured at every scale, too. seeds: None for all.
    stages: instead of `make`, merges of which validation texts choose one, as they choose scales.
    took: seconds of the merge, where they are not those of `make`, which may find the merge in the cache."""

    name: str
    block: str
    make: Callable[[Lab], Weights]
    scaled: bool = True
    curve: bool = False
    seeds: tuple[int, ...] | None = None
    took: Callable[[Lab], float] | None = None
    stages: Callable[[Lab], Iterator[tuple[float, Weights]]] | None = None

    def runs_on(self, seed: int) -> bool:
        """Whether the study has this row on a seed."""
        return self.seeds is None or seed in self.seeds


def ours(name: str, block: str, *, main: bool = False, scaled: bool = True, **options: Any) -> Method:
    """A merge of this package. main: with a curve and on every seed; others that have a scale are there to choose from,
    on the seeds that choose."""
    given: Mapping[str, Any] = {"scale": 1.0} | options if scaled else options
    seeds = None if main or not scaled else CHOOSING_SEEDS
    return Method(name, block, lambda lab: awd_fast.merge(lab.base, lab.states, **given), scaled, main, seeds)


CONVERGE = {"optimizer": Converge()}
SQUARED = {"similarity": "squared"}
ABSOLUTE = {"similarity": "absolute"}


def baselines() -> list[Method]:
    """What has no options."""
    return [
        Method("pretrained", BASELINES, lambda lab: lab.base, scaled=False),
        ours("average", BASELINES, scaled=False, method="average"),
        ours(TASK_ARITHMETIC, BASELINES, main=True, method="task_arithmetic"),
    ]


def awd_variants() -> list[Method]:
    """AWD with the paper's options, those of its authors' later code, and what can be changed in them."""
    adam = Adam(lr=1e-5, iterations=300)
    return [
        ours(AWD_PAPER, AWD, main=True, **awd_fast.PAPER),
        ours(AWD_ROWS, AWD, main=True, **awd_fast.ROWS),
        ours("AWD rows, absolute, Converge", AWD, **ABSOLUTE, **CONVERGE),
        ours("AWD rows, squared, Converge", AWD, main=True, **SQUARED, **CONVERGE),
        ours("AWD rows, squared, SGD", AWD, **SQUARED, optimizer=SGD()),
        ours("AWD rows, squared, Adam", AWD, **SQUARED, optimizer=adam),
        ours("AWD rows, absolute, l1 penalty, SGD", AWD, **ABSOLUTE, penalty="l1", optimizer=SGD()),
        ours("AWD rows, squared, no penalty", AWD, alpha=0.0, **SQUARED, **CONVERGE),
        ours("AWD columns, squared, Converge", AWD, groups="column", **SQUARED, **CONVERGE),
        ours("AWD tensors, squared, Converge", AWD, groups="tensor", **SQUARED, **CONVERGE),
        ours("AWD global, squared, Converge", AWD, groups="global", **SQUARED, **CONVERGE),
    ]


BEST_AWD: Mapping[str, Any] = {**SQUARED, **CONVERGE}


def merge_wudi(lab: Lab, states: Sequence[Weights] | None = None, scale: float = 1.0, **options: Any) -> Weights:
    """WUDI with the other tensors at 1 / sqrt(K) of its scale, unless options say otherwise."""
    states = lab.states if states is None else states
    given = {"others_scale": scale / math.sqrt(len(states))} | options
    return awd_fast.merge(lab.base, states, method="wudi", scale=scale, **given)


def _wudi(name: str, main: bool = False, **options: Any) -> Method:
    seeds = None if main else CHOOSING_SEEDS
    return Method(name, WUDI, lambda lab: merge_wudi(lab, **options), curve=main, seeds=seeds)


def wudi_variants() -> list[Method]:
    """WUDI in closed form: its ridge, blocks of columns, and what becomes of the tensors that it leaves alone."""
    return [
        _wudi("WUDI, ridge 0.1", main=True),
        _wudi("WUDI, ridge 0.01", ridge=0.01),
        _wudi("WUDI, ridge 0.3", ridge=0.3),
        _wudi("WUDI, ridge 1", ridge=1.0),
        _wudi("WUDI, ridge 0.1, others at the same scale", others_scale=1.0),
        _wudi("WUDI, ridge 0.1, others left as they were", others="base"),
        _wudi("WUDI, ridge 0.1, blocks of 384 columns", columns=384),
    ]


def disentangled(lab: Lab, options: Mapping[str, Any] = BEST_AWD) -> list[Weights]:
    """Of each model, the base and its disentangled vector: theta_0 + t_i - d."""
    count = len(lab.states)
    picks = [[float(i == k) for i in range(count)] for k in range(count)]
    return [awd_fast.merge(lab.base, lab.states, scale=1.0, weights=pick, **options) for pick in picks]


def _of_disentangled(lab: Lab) -> Weights:
    return merge_wudi(lab, disentangled(lab))


def _towards_awd(lab: Lab) -> Weights:
    """The ridge draws WUDI's update to AWD's sum of disentangled vectors instead of the plain one."""
    plain = awd_fast.merge(lab.base, lab.states, scale=1.0, method="task_arithmetic")
    awd = awd_fast.merge(lab.base, lab.states, scale=1.0, **BEST_AWD)
    found = merge_wudi(lab, ridge=0.3)
    for name, vectors in selected(lab).items():
        # tau is linear in what the ridge draws to: e (S' - S) (A + e I)^-1 is added.
        products = torch.zeros(vectors[0].shape[1], vectors[0].shape[1], dtype=torch.float64)
        for vector in vectors:
            wide = vector.double()
            products += wide.T @ wide / wide.square().sum()
        e = 0.3 * products.diagonal().mean()
        products.diagonal().add_(e)
        change = e * (awd[name] - plain[name]).double()
        found[name] = found[name] + torch.linalg.solve(products, change.T).T.float()
    return found


def selected(lab: Lab) -> dict[str, list[torch.Tensor]]:
    """The task vectors of each tensor that AWD and WUDI work on, but of those that no model changed."""
    reports: list[awd_fast.MergeReport] = []
    awd_fast.merge(lab.base, lab.states, method="task_arithmetic", on_report=reports.append)
    names = [one.step.name for one in reports[0].tensors if one.step.reason == "2-D weight"]
    vectors = {name: [state[name] - lab.base[name] for state in lab.states] for name in names}
    return {name: own for name, own in vectors.items() if any(vector.any() for vector in own)}


def least_interference(lab: Lab, full: Weights, by_tensor: bool, factor: float = 1.0) -> Weights:
    """A merge, given at scale 1, at `factor` times the scale s at which sum_i |(s u - t_i) t_i'|^2 / |t_i|^2 is least.

    u is the merge's update. One s for each tensor, or one for all; other tensors have the s of all.
    """
    across, within = {}, {}
    for name, vectors in selected(lab).items():
        update = full[name] - lab.base[name]
        products = [((update @ t.T).double(), (t @ t.T).double(), t.double().square().sum()) for t in vectors]
        across[name] = float(sum((p * q).sum() / n for p, q, n in products))
        within[name] = float(sum((p * p).sum() / n for p, q, n in products))
    shared = factor * sum(across.values()) / sum(within.values())
    found = at_scale(lab.base, full, shared)
    if by_tensor:
        for name in across:
            found[name] = lab.base[name] + factor * across[name] / within[name] * (full[name] - lab.base[name])
    return found


def flattened(lab: Lab, full: Weights) -> Weights:
    """A merge whose update has, in each selected tensor, equal singular values: their mean. Of Task Arithmetic this is
    Iso-C (arXiv 2502.04959)."""
    found = dict(full)
    for name in selected(lab):
        left, values, right = torch.linalg.svd((full[name] - lab.base[name]).double(), full_matrices=False)
        found[name] = lab.base[name] + (values.mean() * (left @ right)).float()
    return found


def _flat_awd(lab: Lab) -> Weights:
    # Its norms call for larger scales than those of the tensors that are merged by Task Arithmetic.
    apart = 1 / math.sqrt(len(lab.states))
    return flattened(lab, awd_fast.merge(lab.base, lab.states, scale=1.0, others_scale=apart, **BEST_AWD))


def joined() -> list[Method]:
    """Ways to have AWD's orthogonality and WUDI's row spaces in one merge, and a flat spectrum of either."""
    return [
        Method("AWD rows, squared, flat spectrum", JOINED, _flat_awd),
        Method("WUDI, ridge 0.1, flat spectrum", JOINED, lambda lab: flattened(lab, merge_wudi(lab))),
        Method("WUDI of disentangled rows", JOINED, _of_disentangled, seeds=CHOOSING_SEEDS),
        Method("WUDI, ridge 0.3, drawn to AWD's sum", JOINED, _towards_awd, seeds=CHOOSING_SEEDS),
    ]


def _ruled(name: str, make: Callable[[Lab], Weights], by_tensor: bool, factor: float) -> Method:
    return Method(name, RULES, lambda lab: least_interference(lab, make(lab), by_tensor, factor), scaled=False)


def _by_count(name: str, options: Mapping[str, Any], factor: float) -> Method:
    def make(lab: Lab) -> Weights:
        return awd_fast.merge(lab.base, lab.states, scale=factor / math.sqrt(len(lab.states)), **options)

    return Method(name, RULES, make, scaled=False)


FACTORS = (1.0, 1.25, 1.5)
PLAIN: Mapping[str, Any] = {"method": "task_arithmetic"}


def _plain(lab: Lab) -> Weights:
    return awd_fast.merge(lab.base, lab.states, scale=1.0, **PLAIN)


def _awd(lab: Lab) -> Weights:
    return awd_fast.merge(lab.base, lab.states, scale=1.0, **BEST_AWD)


def rules() -> list[Method]:
    """Scales from the models alone, each against the one that validation texts choose for the same merge."""
    awd = "AWD rows, squared, Converge"
    return [
        *(_by_count(f"Task Arithmetic at {factor:g} / sqrt(K)", PLAIN, factor) for factor in FACTORS),
        *(_by_count(f"{awd} at {factor:g} / sqrt(K)", BEST_AWD, factor) for factor in FACTORS),
        Method("WUDI, ridge 0.1 at scale 1", RULES, merge_wudi, scaled=False),
        _ruled("Task Arithmetic at the scale of least interference", _plain, False, 1.0),
        _ruled("Task Arithmetic at 1.25 x that scale", _plain, False, 1.25),
        _ruled(f"{awd} at the scale of least interference", _awd, False, 1.0),
        _ruled(f"{awd} at 1.25 x that scale", _awd, False, 1.25),
        _ruled(f"{awd} at 1.25 x that scale of each tensor", _awd, True, 1.25),
        _ruled("WUDI, ridge 0.1 at the scale of least interference", merge_wudi, False, 1.0),
        _ruled("WUDI, ridge 0.1 at 1.25 x that scale", merge_wudi, False, 1.25),
    ]


def own_methods() -> list[Method]:
    """All rows that this package computes, but for AdaMerging."""
    return [*baselines(), *awd_variants(), *wudi_variants(), *joined(), *rules()]


def confirming() -> list[Method]:
    """What is examined on tasks that chose nothing, too."""
    names = (TASK_ARITHMETIC, AWD_PAPER, AWD_ROWS, "AWD rows, squared, Converge", "WUDI, ridge 0.1")
    return [method for method in own_methods() if method.name in names or method.block == RULES]
