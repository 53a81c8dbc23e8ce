"""Shared by all tests: one thread, so that many small operations do not wait for each other, and tiny checkpoints."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

if (
    not torch.cuda.is_available()
):  # Triton's kernels then run in its interpreter, which must be said before it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]


LONGEST = (
    *("triton_compile", "wheel", "cuda", "library", "native", "multi_dot", "triton", "batches", "adam", "lora_merge"),
    *("merge_rows", "quality_peers", "fuzz", "properties", "resume", "pipeline", "sparse", "folder_benchmark"),
)
"""Files of tests that take long. Where processes share the files, what is begun last had better be short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_numbers():
    """A test that draws numbers without a generator of its own draws the same in every run and in any order."""
    torch.manual_seed(0)


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Named as a small BERT would: two 2-D weights to disentangle, an embedding, a bias, a norm and an integer."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embeddings.word_embeddings.weight": (11, 6),
        "encoder.layer.0.attention.self.query.weight": (6, 6),
        "encoder.layer.0.output.dense.weight": (6, 10),
        "encoder.layer.0.output.dense.bias": (6,),
        "encoder.layer.0.output.LayerNorm.weight": (6,),
    }
    state = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return state | {"embeddings.position_ids": torch.arange(5)}


def tuned(base: Tensors, seed: int, size: float = 0.1) -> Tensors:
    """A fine-tuned copy: a part common to all seeds, so that task vectors are similar, and a part of its own."""
    common, own = torch.Generator().manual_seed(77), torch.Generator().manual_seed(1000 + seed)

    def changed(t: torch.Tensor) -> torch.Tensor:
        noise = 0.5 * torch.randn(t.shape, generator=common) + torch.randn(t.shape, generator=own)
        return (t.float() + size * noise).to(t.dtype)

    return {name: changed(t) if t.is_floating_point() else t.clone() for name, t in base.items()}


def write_checkpoint(folder: Path, state: Tensors, shards: int = 1) -> Path:
    """A Hugging Face folder: config, tokenizer, generation config, and safetensors in one file or `shards`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"max_length": 7}')
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(state)
    weight_map = {}
    for index in range(shards):
        part = {name: state[name] for name in names[index::shards]}
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def base_state() -> Tensors:
    return tiny_state()


@pytest.fixture
def model_states(base_state) -> list[Tensors]:
    return [tuned(base_state, seed) for seed in range(3)]


@pytest.fixture
def checkpoints(tmp_path, base_state, model_states) -> tuple[Path, list[Path]]:
    """A base folder and three model folders on disk."""
    base = write_checkpoint(tmp_path / "base", base_state)
    return base, [write_checkpoint(tmp_path / f"model{i}", state) for i, state in enumerate(model_states)]
