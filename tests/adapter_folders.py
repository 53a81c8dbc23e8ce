"""Adapter folders as PEFT writes them, by hand: configuration and factors, no PEFT."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from awd_fast.plan import TensorInfo
from tests.conftest import Tensors

PREFIX = "base_model.model."


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(module: str, rank: int, inputs: int, outputs: int, seed: int = 0, dtype=torch.float32, name="") -> Tensors:
    """lora_A and lora_B of a module. name: "" or ".default", the adapter's name in the keys."""
    key = f"{PREFIX}{module}.lora_"
    return {
        f"{key}A{name}.weight": random(rank, inputs, seed=2 * seed, dtype=dtype),
        f"{key}B{name}.weight": random(outputs, rank, seed=2 * seed + 1, dtype=dtype),
    }


def embedding(module: str, rank: int, vocabulary: int, size: int, seed: int = 0, name="") -> Tensors:
    """lora_embedding_A and lora_embedding_B of a module."""
    key = f"{PREFIX}{module}.lora_embedding_"
    return {
        f"{key}A{name}": random(rank, vocabulary, seed=2 * seed),
        f"{key}B{name}": random(size, rank, seed=2 * seed + 1),
    }


def write_adapter_folder(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A folder with these tensors; `config` over what PEFT writes for r = 4 and alpha = 8."""
    folder.mkdir(parents=True)
    written = {
        "peft_type": "LORA",
        "base_model_name_or_path": "owner/base",
        "task_type": None,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": sorted({name.split(".lora_")[0].split(".")[-1] for name in tensors if ".lora_" in name}),
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "init_lora_weights": True,
        "loftq_config": {},
        "layer_replication": None,
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    """A base's float32 tensors; `__` stands for the dot in a name."""
    return {name.replace("__", "."): TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
