"""Model folders to merge, made by a script: llama's layout, normal values from fixed seeds, written in blocks.

A fine-tuned model is its base plus noise of its own; a LoRA adapter has two factors for every linear weight.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from awd_fast.checkpoints import INDEX, SINGLE

BASE_SIZE, NOISE = 0.02, 0.002
BLOCK = 1 << 22  # elements that are drawn at once
CODES = {"float32": "F32", "bfloat16": "BF16"}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MADE = "made.json"


@dataclass(frozen=True)
class Layout:
    """Sizes of a llama. shard: bytes of a file at most, 0 for one file. unit: a factor of all values."""

    hidden: int
    layers: int
    inner: int
    vocab: int
    heads: int
    kv_heads: int
    dtype: str
    shard: int = 0
    tied: bool = True
    unit: float = 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by its name, in the order of the layers."""
        width, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        attention = {"q_proj": (width, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, width)}
        block = {"gate_proj": (self.inner, width), "up_proj": (self.inner, width), "down_proj": (width, self.inner)}
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, width)}
        for layer in range(self.layers):
            start = f"model.layers.{layer}"
            found |= {f"{start}.self_attn.{name}.weight": shape for name, shape in attention.items()}
            found |= {f"{start}.mlp.{name}.weight": shape for name, shape in block.items()}
            found |= {f"{start}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        found["model.norm.weight"] = (width,)
        return found if self.tied else found | {"lm_head.weight": (self.vocab, width)}

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def elements(self) -> int:
        """Of one model."""
        return sum(map(math.prod, self.shapes().values()))

    def config(self) -> dict[str, Any]:
        """As transformers and mergekit read it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
        }


@dataclass(frozen=True)
class Case:
    """What is merged: a base of this layout and `models` fine-tuned models, or adapters of `rank` where it is not 0."""

    name: str
    layout: Layout
    models: int
    rank: int = 0

    @property
    def model_bytes(self) -> int:
        """Of the tensors of one whole model, which is also what a merge writes."""
        return self.layout.elements * self.layout.itemsize


BILLION = Layout(2048, 20, 8192, 128256, 32, 8, "bfloat16", shard=1_000_000_000)
FULL = {
    "110m": Case("110m", Layout(768, 12, 2048, 32000, 12, 12, "float32"), models=8),
    "llm": Case("llm", BILLION, models=3),
    "lora": Case("lora", BILLION, models=8, rank=16),
}
"""110m: 110 tensors, 0.44 GB a model. llm, lora: the layers of Llama-3.2-1B, 20 of them: 1.48 G elements, 2.96 GB a
model in four files."""


def case(name: str, scale: str) -> Case:
    """A case in full, or tiny: the same layout with narrow layers, in files of 40 kB where the full one is sharded.

    The values of the tiny one are larger: a step of the default optimiser would be too long for so few small ones.
    """
    full = FULL[name]
    if scale == "full":
        return full
    small = replace(full.layout, hidden=32, layers=2, inner=64, vocab=96, heads=4, kv_heads=2, unit=30.0)
    small = replace(small, shard=40_000 if full.layout.shard else 0)
    return Case(f"{name} tiny", small, min(full.models, 3), min(full.rank, 4))


def make(chosen: Case, folder: Path) -> tuple[Path, list[Path]]:
    """The base's folder and the models' (or adapters'), made unless an earlier run left them whole."""
    base, models = folder / "base", [folder / f"model{index}" for index in range(chosen.models)]
    text = json.dumps(asdict(chosen), indent=2)
    if (folder / MADE).is_file() and (folder / MADE).read_text() == text:
        return base, models
    shutil.rmtree(folder, ignore_errors=True)
    if chosen.rank:
        make_models(chosen.layout, [base])
        for index, adapter in enumerate(models):
            make_adapter(chosen.layout, adapter, base, chosen.rank, seed=1 + index)
    else:
        make_models(chosen.layout, [base, *models])
    (folder / MADE).write_text(text)
    return base, models


def make_models(layout: Layout, folders: Sequence[Path]) -> None:
    """The base in the first folder and base + noise in the others, all files of a shard side by side."""
    draws = [torch.Generator().manual_seed(seed) for seed in range(len(folders))]
    shapes, dtype = layout.shapes(), getattr(torch, layout.dtype)
    files = shards(layout)
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(layout.config(), indent=2) + "\n")
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": layout.elements * layout.itemsize}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file, names in files.items():
        opened = [start_file(folder / file, {name: shapes[name] for name in names}, layout.dtype) for folder in folders]
        try:
            for name in names:
                for size in blocks(math.prod(shapes[name])):
                    base = normal(size, BASE_SIZE * layout.unit, draws[0]).to(dtype)
                    write(opened[0], base)
                    for out, draw in zip(opened[1:], draws[1:], strict=True):
                        write(out, normal(size, NOISE * layout.unit, draw).add_(base).to(dtype))
        finally:
            for out in opened:
                out.close()


def make_adapter(layout: Layout, folder: Path, base: Path, rank: int, seed: int) -> None:
    """A LoRA adapter as PEFT saves it, float32, for every linear weight: task vectors of about the size of NOISE."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": list(LINEAR),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in linear(layout).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        shapes |= {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}
    size = math.sqrt(NOISE * layout.unit / 2 / math.sqrt(rank))
    with start_file(folder / "adapter_model.safetensors", shapes, "float32") as out:
        for shape in shapes.values():
            write(out, normal(math.prod(shape), size, draw))


def linear(layout: Layout) -> dict[str, tuple[int, int]]:
    """The weights that an adapter changes."""
    found = {name: shape for name, shape in layout.shapes().items() if name.split(".")[-2] in LINEAR}
    return {name: (shape[0], shape[1]) for name, shape in found.items()}


def shards(layout: Layout) -> dict[str, list[str]]:
    """The files of a model with their tensors, in order, each as full as it may be."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in layout.shapes().items():
        size = math.prod(shape) * layout.itemsize
        if layout.shard and parts[-1] and filled + size > layout.shard:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{index:05d}-of-{len(parts):05d}.safetensors": names for index, names in enumerate(parts, 1)}


def blocks(count: int) -> list[int]:
    """A tensor of `count` elements in blocks."""
    return [min(BLOCK, count - start) for start in range(0, count, BLOCK)]


def normal(count: int, size: float, draw: torch.Generator) -> Tensor:
    """float32 from a generator."""
    return torch.randn(count, generator=draw).mul_(size)


def start_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> BinaryIO:
    """A safetensors file with its header; the tensors' bytes are to follow. save_file wants all of them at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * int(getattr(torch, dtype).itemsize)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out = path.open("wb")
    out.write(len(text).to_bytes(8, "little") + text)
    return out


def write(out: BinaryIO, tensor: Tensor) -> None:
    """The bytes of a tensor of any dtype."""
    out.write(tensor.contiguous().view(torch.uint8).numpy().data)
