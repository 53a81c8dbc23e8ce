"""Accuracies and differences of accuracies, with standard errors.

The unit of every statistic is one text: an evaluation yields, for each task, whether each text was classified
correctly, in a fixed order. Two encoders are compared text by text, which is far more exact than comparing accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Half = Literal["validation", "test"]
Outcome = dict[str, torch.Tensor]
"""Task name -> bool [n], true where the text was classified correctly."""


def accuracy(outcome: Outcome) -> float:
    """Mean over the tasks of the share of correct texts."""
    return sum(float(right.double().mean()) for right in outcome.values()) / len(outcome)


def standard_error(outcome: Outcome) -> float:
    """Standard error of `accuracy`: the tasks are taken as given, their texts (two or more) as samples."""
    return _error_of_mean([right.double() for right in outcome.values()])


def difference(first: Outcome, second: Outcome) -> tuple[float, float]:
    """accuracy(first) - accuracy(second) and its standard error, paired text by text.

    Raises ValueError if the two outcomes are not of the same tasks and numbers of texts.
    """
    if {name: len(right) for name, right in first.items()} != {name: len(right) for name, right in second.items()}:
        raise ValueError("the two outcomes are not of the same texts")
    gains = [first[name].double() - second[name].double() for name in first]
    return accuracy(first) - accuracy(second), _error_of_mean(gains)


def _error_of_mean(samples: Sequence[torch.Tensor]) -> float:
    """Standard error of the mean over tasks of the mean over texts."""
    return float(sum(sample.var() / len(sample) for sample in samples) ** 0.5) / len(samples)
