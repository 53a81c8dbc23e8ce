"""Accuracy of encoders on the held-out texts of tasks, each through its own frozen head, with standard errors.

The unit of every statistic is one text: an evaluation yields, for each task, whether each text was classified
correctly, in a fixed order. Two encoders are compared text by text, which is far more exact than comparing accuracies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.data import Sizes, load_task
from benchmarks.quality.encoder import FrozenHead, Tokens, embed, has_native_bfloat16, load_encoder, tokenise
from benchmarks.quality.finetune import Finetuned

Half = Literal["validation", "test"]
Outcome = dict[str, torch.Tensor]
"""Task name -> bool [n], true where the text was classified correctly."""


@dataclass(frozen=True)
class HeldOut:
    """Tokenised texts of one half and their class numbers, int64 [n]."""

    tokens: Tokens
    labels: torch.Tensor


@dataclass(frozen=True)
class Examination:
    """What is needed to examine an encoder on one task."""

    name: str
    head: FrozenHead
    validation: HeldOut
    test: HeldOut


def prepare(model: Finetuned, tokenizer: PreTrainedTokenizerBase, validation: int, test: int) -> Examination:
    """The examination of a fine-tuned model's task, with this many texts in each half; tokenised once, here.

    Texts and head are those of the model's own settings, so no held-out text has been trained on.
    """
    settings = model.settings
    task = load_task(settings.task, Sizes(settings.train, validation, test), settings.seed)
    halves = [
        HeldOut(tokenise(tokenizer, split.texts, settings.tokens), torch.tensor(split.labels))
        for split in (task.validation, task.test)
    ]
    return Examination(settings.task, model.head(), *halves)


def correct(model: PreTrainedModel, head: FrozenHead, texts: HeldOut, bfloat16: bool = False) -> torch.Tensor:
    """Whether each text is classified correctly, bool [n]."""
    return head.logits(embed(model, texts.tokens, bfloat16=bfloat16)).argmax(dim=1) == texts.labels


class Examiner:
    """Examines encoders of one architecture; holds one model and loads weights into it.

    bfloat16: see `encoder.embed`; by default where the CPU has it in hardware.
    """

    def __init__(self, folder: Path, examinations: Sequence[Examination], bfloat16: bool | None = None) -> None:
        self.examinations = list(examinations)
        self.bfloat16 = has_native_bfloat16() if bfloat16 is None else bfloat16
        self._model = load_encoder(folder)

    def weights(self, encoder: Mapping[str, torch.Tensor], half: Half) -> Outcome:
        """Outcome on all tasks of an encoder's state dict. Raises RuntimeError where its tensors do not fit."""
        self._model.load_state_dict(encoder)
        return self._examine(self._model, half, self.examinations)

    def folder(self, encoder: Path, half: Half, only: str | None = None) -> Outcome:
        """Outcome on all tasks, or `only` one, of an encoder in a Hugging Face folder, loaded by transformers."""
        chosen = [one for one in self.examinations if only in (None, one.name)]
        return self._examine(load_encoder(encoder), half, chosen)

    def _examine(self, model: PreTrainedModel, half: Half, chosen: Sequence[Examination]) -> Outcome:
        return {
            one.name: correct(model, one.head, one.test if half == "test" else one.validation, self.bfloat16)
            for one in chosen
        }


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
