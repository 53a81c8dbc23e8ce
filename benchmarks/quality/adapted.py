"""AdaMerging on the study's encoders: coefficients learned on unlabelled texts that are in no other split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import awd_fast
from benchmarks.quality.data import cache_folder
from benchmarks.quality.encoder import features, load_encoder, pad
from benchmarks.quality.lab import Lab, Weights
from benchmarks.quality.methods import ADAPTED, Method

# Coefficients begin at the paper's value. The others were fixed before any result was seen, to fit the time: the paper
# takes 500 or more steps of 1e-3. A step reads this many texts of every task.
INITIAL, STEPS, RATE, BATCH = 0.3, 100, 1e-2, 8
# Raise it when what is learned changes by a change to the package.
CODE_VERSION = 1


def adapt(lab: Lab, say: Callable[[str], None] = lambda line: None, **options: Any) -> Weights:
    """The merged weights that AdaMerging ends with; the learned coefficients are kept in the cache.

    options: those of `awd_fast.adamerge` that differ from its defaults.
    """
    settings = [str(model.settings) for model in lab.models]
    written = {name: str(value) for name, value in options.items()}
    key = json.dumps([settings, written, INITIAL, STEPS, RATE, BATCH, lab.bfloat16, CODE_VERSION], sort_keys=True)
    path = cache_folder() / "adapted" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    kept = path.is_file()
    start = load_file(path)["coefficients"] if kept else INITIAL
    model = load_encoder(lab.base_folder)

    def logits(encoder: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], task: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=lab.bfloat16):
            rows = features(encoder, *batch)
        return lab.heads[lab.names[task]].logits(rows)

    def told(step: int, entropy: float, coefficients: torch.Tensor) -> None:
        if step % 20 == 0:
            say(f"  AdaMerging: step {step} of {STEPS}, entropy {entropy / len(lab.names):.3f} a task")

    found = awd_fast.adamerge(
        model,
        lab.base,
        lab.states,
        [_batches(lab, name) for name in lab.names],
        logits=logits,
        initial=start,
        steps=0 if kept else STEPS,
        lr=RATE,
        on_step=told,
        **options,
    )
    if not kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"coefficients": found.coefficients}, path)
    return {name: tensor.detach().clone() for name, tensor in found.state_dict.items()}


def _batches(lab: Lab, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tokens = lab.unlabelled(name)
    return [pad(tokens[k : k + BATCH]) for k in range(0, len(tokens) - BATCH + 1, BATCH)]


def adapted(say: Callable[[str], None]) -> list[Method]:
    """AdaMerging by task and by tensor, of plain and of disentangled vectors."""
    plain: dict[str, Any] = {"method": "task_arithmetic"}
    squared: dict[str, Any] = {"similarity": "squared", "optimizer": awd_fast.Converge()}
    wanted = [
        ("AdaMerging, by task", {"per": "task"} | plain),
        ("AdaMerging, by tensor", {"per": "tensor"} | plain),
        ("AWD rows + AdaMerging, by task", {"per": "task"} | squared),
        ("AWD rows + AdaMerging, by tensor", {"per": "tensor"} | squared),
    ]
    return [Method(name, ADAPTED, partial(adapt, say=say, **options), scaled=False) for name, options in wanted]
