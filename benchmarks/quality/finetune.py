"""Fine-tune the encoder on one task with its head frozen, and keep the result.

A result is a folder under `cache_folder()/finetuned`, named after everything that decides what is in it:

    TASK/               Hugging Face folder (config, model.safetensors, tokenizer) of the fine-tuned encoder
    head.safetensors    the frozen head; not part of the encoder, so a merge never sees it
    record.json         the settings, the time taken in seconds, the training loss of each epoch
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from benchmarks.quality.classes import phrases
from benchmarks.quality.data import PACKAGES, Sizes, Split, cache_folder, load_task
from benchmarks.quality.encoder import (
    FrozenHead,
    Tokens,
    embed,
    features,
    fit_head,
    load_encoder,
    load_tokenizer,
    named_head,
    pad,
    pretrained_folder,
    save_encoder,
    tokenise,
)

# Part of every cache key. Raise it when a change to this folder's code changes what fine-tuning yields.
CODE_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fine-tuned model.

    train: training texts. tokens: longest text in tokens. learning_rate: peak of AdamW; it rises linearly over the
    first tenth of the steps and then falls linearly to zero. batch: texts per step. bfloat16: multiply matrices in it,
    nearly twice as fast where the CPU has it; the weights and AdamW stay float32. head: made of the "means" of the
    classes' training texts, or of the "names" of the classes.
    """

    task: str
    seed: int = 0
    train: int = 1000
    tokens: int = 48
    epochs: int = 2
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    batch: int = 16
    bfloat16: bool = False
    head: Literal["means", "names"] = "means"

    def folder(self) -> Path:
        """Where the result lies once it is finished."""
        sources = [package.sha256 for package in PACKAGES]
        everything = json.dumps([asdict(self), sources, CODE_VERSION], sort_keys=True)
        key = hashlib.sha256(everything.encode()).hexdigest()[:16]
        return cache_folder() / "finetuned" / f"{self.task}-seed{self.seed}-{key}"


@dataclass(frozen=True)
class Finetuned:
    """A finished result on disk."""

    settings: Settings

    @property
    def encoder(self) -> Path:
        """The Hugging Face folder of the encoder; pictures and model cards call it by its name, which is the task's."""
        return self.settings.folder() / self.settings.task

    def head(self) -> FrozenHead:
        """The frozen head."""
        return FrozenHead.load(self.settings.folder() / "head.safetensors")


def cached(settings: Settings) -> Finetuned | None:
    """The finished result of these settings, or None."""
    folder = settings.folder()
    parts = (folder / "record.json", folder / "head.safetensors", folder / settings.task / "model.safetensors")
    return Finetuned(settings) if all(part.is_file() for part in parts) else None


def finetune(settings: Settings, report: Callable[[str], None] = print) -> Finetuned:
    """The fine-tuned encoder and head of these settings, from the cache or trained now.

    report: called with one line of progress at a time. Raises ValueError for an unknown task or too few texts,
    FetchError if encoder or texts cannot be fetched.
    """
    found = cached(settings)
    if found is not None:
        return found
    started = time.perf_counter()
    task = load_task(settings.task, Sizes(settings.train, 0, 0), settings.seed)
    base = pretrained_folder()
    tokenizer = load_tokenizer(base)
    tokens = tokenise(tokenizer, task.train.texts, settings.tokens)
    model = load_encoder(base)
    rows = embed(model, tokens)
    if settings.head == "names":
        names = tokenise(tokenizer, phrases(task.name, task.classes), settings.tokens)
        head = named_head(rows, embed(model, names))
    else:
        head = fit_head(rows, task.train.labels, len(task.classes))
    losses = train(model, head, tokens, task.train, settings, report)

    folder = settings.folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written elsewhere and renamed as the last step: `cached` never takes an interrupted run for a result.
    work = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        save_encoder(model, tokenizer, work / settings.task)
        head.save(work / "head.safetensors")
        record = {"settings": asdict(settings), "seconds": time.perf_counter() - started, "losses": losses}
        (work / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Finetuned(settings)


def train(
    model: PreTrainedModel,
    head: FrozenHead,
    tokens: Tokens,
    split: Split,
    settings: Settings,
    report: Callable[[str], None],
) -> list[float]:
    """Minimise the cross-entropy of the frozen head's logits over the encoder's parameters, in place.

    Returns the mean training loss of each epoch.
    """
    shuffler = random.Random(f"{settings.task} {settings.seed} batches")
    # Dropout stays off (evaluation mode): two epochs do not need it, and without it attention runs in one fused kernel.
    model.eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    steps = settings.epochs * -(-len(tokens) // settings.batch)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    labels = torch.tensor(split.labels)
    losses = []
    for epoch in range(settings.epochs):
        started = time.perf_counter()
        total = 0.0
        for chosen in shuffled_batches(tokens, settings.batch, shuffler):
            ids, mask = pad([tokens[k] for k in chosen])
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                rows = features(model, ids, mask)
            loss = torch.nn.functional.cross_entropy(head.logits(rows), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        losses.append(total / len(tokens))
        report(
            f"  {settings.task}: epoch {epoch + 1} of {settings.epochs}, training loss {losses[-1]:.3f}, "
            f"{time.perf_counter() - started:.0f} s"
        )
    return losses


def shuffled_batches(tokens: Tokens, batch: int, shuffler: random.Random, window: int = 8) -> list[list[int]]:
    """Indices in random batches of texts of similar lengths: sorted within windows of `window` batches, then mixed."""
    order = list(range(len(tokens)))
    shuffler.shuffle(order)
    batches = []
    for start in range(0, len(order), batch * window):
        near = sorted(order[start : start + batch * window], key=lambda k: len(tokens[k]))
        batches += [near[k : k + batch] for k in range(0, len(near), batch)]
    shuffler.shuffle(batches)
    return batches
