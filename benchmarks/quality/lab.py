"""Where merged encoders are examined: the models of one seed, and outcomes that are computed once for equal weights.

An outcome depends on nothing but the encoder's weights, the heads and the texts. It is kept in the cache under a hash
of them, so that a study which was interrupted goes on where it was, and a changed merge is examined anew.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.quality.data import Sizes, Split, Task, cache_folder, load_task, require_disjoint
from benchmarks.quality.encoder import (
    Batches,
    FrozenHead,
    Tokens,
    embed_batches,
    has_native_bfloat16,
    load_encoder,
    load_tokenizer,
    padded_batches,
    pretrained_folder,
    tokenise,
)
from benchmarks.quality.evaluate import Half, Outcome
from benchmarks.quality.finetune import Finetuned

VALIDATION_TEXTS = 100
TEST_TEXTS = 200
# Beyond the validation texts, without their labels, for what adapts to texts: the most that every task still has.
UNLABELLED_TEXTS = 250
Weights = dict[str, torch.Tensor]


def read(folder: Path) -> Weights:
    """The state dict of a Hugging Face folder with one weights file."""
    return load_file(folder / "model.safetensors")


class Ledger:
    """Outcomes by key, in one file of the cache."""

    def __init__(self, path: Path | None = None) -> None:
        path = path or cache_folder() / "outcomes.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._table = sqlite3.connect(path, timeout=60)
        self._table.execute("CREATE TABLE IF NOT EXISTS outcomes (key TEXT PRIMARY KEY, outcome TEXT NOT NULL)")

    def find(self, key: str) -> Outcome | None:
        """The outcome under a key, or None."""
        row = self._table.execute("SELECT outcome FROM outcomes WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        return {name: torch.tensor([int(mark) for mark in marks]).bool() for name, marks in json.loads(row[0]).items()}

    def note(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome."""
        marks = {name: "".join(map(str, right.int().tolist())) for name, right in outcome.items()}
        with self._table:
            self._table.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?)", (key, json.dumps(marks)))


class Lab:
    """The tasks of one seed with their frozen heads, and the means to examine an encoder on all of them.

    ledger: where outcomes are kept, if anywhere. examined: how many texts an encoder has read here, what was found in
    the ledger not counted.
    """

    def __init__(self, models: Sequence[Finetuned], ledger: Ledger | None = None) -> None:
        self.base_folder = pretrained_folder()
        self.models = list(models)
        self.names = [model.settings.task for model in self.models]
        self.base: Weights = read(self.base_folder)
        self.states = [read(model.encoder) for model in self.models]
        self.heads: dict[str, FrozenHead] = {model.settings.task: model.head() for model in self.models}
        self.examined = 0
        self.bfloat16 = has_native_bfloat16()
        self._ledger = ledger
        self._tokenizer = load_tokenizer(self.base_folder)
        self._model = load_encoder(self.base_folder)
        self._tasks: dict[str, Task] = {}
        for model in self.models:
            wanted = model.settings
            sizes = Sizes(wanted.train, VALIDATION_TEXTS + UNLABELLED_TEXTS, TEST_TEXTS)
            task = load_task(wanted.task, sizes, wanted.seed)
            require_disjoint(task)
            self._tasks[wanted.task] = task
        self._tokens = {
            half: {
                name: tokenise(self._tokenizer, self.split(name, half).texts, model.settings.tokens)
                for name, model in zip(self.names, self.models, strict=True)
            }
            for half in ("validation", "test")
        }
        labels = {name: [self.split(name, "validation").labels, task.test.labels] for name, task in self._tasks.items()}
        heads = [digest(head.tensors()) for head in self.heads.values()]
        self._texts = hashlib.sha256(json.dumps([self._tokens, labels, heads]).encode()).hexdigest()
        self._batches: dict[tuple[Half, tuple[str, ...]], Batches] = {}

    def split(self, name: str, half: Half) -> Split:
        """The labelled texts of one half of a task."""
        if half == "test":
            return self._tasks[name].test
        split = self._tasks[name].validation
        return Split(split.texts[:VALIDATION_TEXTS], split.labels[:VALIDATION_TEXTS])

    def tokens(self, name: str, half: Half) -> Tokens:
        """Their token numbers."""
        return self._tokens[half][name]

    def unlabelled(self, name: str) -> Tokens:
        """Token numbers of texts that are in none of the other splits."""
        texts = self._tasks[name].validation.texts[VALIDATION_TEXTS:]
        return tokenise(self._tokenizer, texts, self.models[self.names.index(name)].settings.tokens)

    def examine(self, weights: Mapping[str, torch.Tensor], half: Half, tasks: Sequence[str] | None = None) -> Outcome:
        """Outcome of an encoder on the tasks (all by default)."""
        names = tuple(self.names if tasks is None else tasks)
        key = f"{digest(weights)} {self._texts} {self.bfloat16} {half} {' '.join(names)}"
        key = hashlib.sha256(key.encode()).hexdigest()
        found = None if self._ledger is None else self._ledger.find(key)
        if found is None:
            found = self._examine(weights, half, names)
            if self._ledger is not None:
                self._ledger.note(key, found)
        return found

    def _examine(self, weights: Mapping[str, torch.Tensor], half: Half, names: tuple[str, ...]) -> Outcome:
        tokens = [row for name in names for row in self._tokens[half][name]]
        if (half, names) not in self._batches:
            self._batches[half, names] = padded_batches(tokens)
        self._model.load_state_dict(weights)
        rows = embed_batches(self._model, self._batches[half, names], len(tokens), bfloat16=self.bfloat16)
        self.examined += len(tokens)
        outcome, begin = {}, 0
        for name in names:
            labels = torch.tensor(self.split(name, half).labels)
            own = rows[begin : begin + len(labels)]
            outcome[name] = self.heads[name].logits(own).argmax(dim=1) == labels
            begin += len(labels)
        return outcome


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of all tensors, with their names."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(name.encode())
        whole.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def at_scale(base: Weights, full: Weights, scale: float) -> Weights:
    """The merge at `scale`, from the merge at scale 1: base + scale * (full - base), in float32."""
    return {
        name: tensor + scale * (full[name] - tensor) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }
