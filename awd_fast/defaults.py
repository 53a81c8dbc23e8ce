"""What a merge does where its options do not say: the options of AWD, and scales that follow from what is merged.

These are the defaults of `awd_fast.merge`, `disentangle`, the command line and YAML files alike. The operators
(`awd_fast.ops`) keep the definitions of the paper. This module imports no torch: the command line reads it to print its
help.
"""

import math
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from awd_fast.errors import InputError
from awd_fast.objective import OPTIMIZERS

AWD: dict[str, Any] = {"groups": "row", "similarity": "squared", "penalty": "l2", "alpha": 1e-6, "eps": 1e-8}
"""Of AWD beside the optimizer. cos^2 has no kinks, so that Newton's method minimises it in a few steps."""

UPDATE = 1.25
"""The length of a merged update in task vectors: 1.25 of them, with weights of 1, equal norms and right angles."""


def optimizer_with(options: Collection[str]) -> str:
    """The optimizer where none is named: the first of converge, sgd and adam that has all the options that are given.

    So it is converge without any, which needs no step size that fits the norms of the task vectors (SGD with the
    authors' 1e-4 stops short on large ones); sgd with lr, momentum, nesterov, weight_decay or iterations; and adam with
    betas or adam_eps. Raises InputError where none has all.
    """
    for name in ("converge", "sgd", "adam"):
        if set(options) <= {"adam_eps" if f.name == "eps" else f.name for f in fields(OPTIMIZERS[name])}:
            return name
    raise InputError(f"no optimizer has all of the options {', '.join(options)}; name one, with options of its own")


def vectors(weights: Collection[float]) -> int:
    """K, the number of models whose weight is not 0, at least 1."""
    return max(1, sum(weight != 0 for weight in weights))


def scale(method: str, weights: Collection[float]) -> float:
    """The scale where none is given: min(1, 1.25 / sqrt(K)) of awd and task_arithmetic, 1 of wudi.

    K nearly orthogonal task vectors of equal length add up to sqrt(K) times that length, so with this scale the update
    is about 1.25 times as long as one of them, whatever K is; on validation texts of eight tasks that was within a
    point of the best scale. It does not lengthen a single one. The update of wudi restores each task at scale 1. An
    average has no scale.
    """
    if method in ("wudi", "average"):
        return 1.0
    return min(1.0, UPDATE / math.sqrt(vectors(weights)))


def others_scale(method: str, scale: float, weights: Collection[float]) -> float | None:
    """The scale of the remaining tensors where none is given: scale / sqrt(K) of wudi; None, the same, of the others.

    The remaining tensors are merged by Task Arithmetic. WUDI's update is about as long as one task vector, but a plain
    sum is sqrt(K) times as long.
    """
    k = vectors(weights)
    return scale / math.sqrt(k) if method == "wudi" and k > 1 else None
