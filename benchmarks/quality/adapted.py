"""AdaMerging on the study's encoders: coefficients learned on unlabelled texts that are in no other split."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
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

# Coefficients begin at the paper's value; a step reads this many texts of every task. With steps of 1e-2 entropy fell
# and accuracy with it, by 4 to 12 points: texts of two classes became texts of one. The paper takes 1e-3 and 500 steps.
INITIAL, STEPS, RATE, BATCH = 0.3, 40, 3e-3, 8
# After how many steps the merge is looked at; validation texts choose, as they choose scales.
STAGES = (0, 5, 10, 20, 40)
# Raise it when what is learned changes by a change to the package.
CODE_VERSION = 2


def adapt(lab: Lab, say: Callable[[str], None] = lambda line: None, **options: Any) -> Iterator[tuple[float, Weights]]:
    """The merged weights at each of `STAGES`; the learned coefficients are kept in the cache.

    options: those of `awd_fast.adamerge` that differ from its defaults.
    """
    settings = [str(model.settings) for model in lab.models]
    written = {name: str(value) for name, value in options.items()}
    key = json.dumps([settings, written, INITIAL, STEPS, RATE, BATCH, lab.bfloat16, CODE_VERSION], sort_keys=True)
    path = cache_folder() / "adapted" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    model = load_encoder(lab.base_folder)
    batches = [_batches(lab, name) for name in lab.names]

    def logits(encoder: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], task: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=lab.bfloat16):
            rows = features(encoder, *batch)
        return lab.heads[lab.names[task]].logits(rows)

    seen: dict[str, torch.Tensor] = {}

    def told(step: int, entropy: float, coefficients: torch.Tensor) -> None:
        seen[str(step)] = coefficients.clone()
        if step % 20 == 0:
            say(f"  AdaMerging: step {step} of {STEPS}, entropy {entropy / len(lab.names):.3f} a task")

    given = {"logits": logits, "lr": RATE} | options
    if not path.is_file():
        started = time.perf_counter()
        last = awd_fast.adamerge(
            model, lab.base, lab.states, batches, initial=INITIAL, steps=STEPS, on_step=told, **given
        )
        seen[str(STEPS)] = last.coefficients
        kept = {str(stage): seen[str(stage)].contiguous() for stage in STAGES}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(kept, path, {"seconds": f"{time.perf_counter() - started:.1f}"})
    for stage, coefficients in sorted((int(name), tensor) for name, tensor in load_file(path).items()):
        found = awd_fast.adamerge(model, lab.base, lab.states, batches, initial=coefficients, steps=0, **given)
        yield stage, {name: tensor.detach().clone() for name, tensor in found.state_dict.items()}


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
    return [
        Method(name, ADAPTED, lambda lab: lab.base, scaled=False, stages=partial(adapt, say=say, **options))
        for name, options in wanted
    ]
