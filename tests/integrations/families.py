"""Small checkpoints that mergekit knows the architecture of: a base and models that were tuned from it, on disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file

from tests.conftest import tuned

MODELS = 3
WEIGHTS = (1.0, 0.5, 1.5)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@dataclass(frozen=True)
class Family:
    """The folders of a base and its models."""

    base: Path
    models: tuple[Path, ...]

    @property
    def paths(self) -> list[str]:
        return [str(model) for model in self.models]

    def config(self, method: str = "awd", **others: object) -> dict:
        """A configuration of mergekit's, with weights; others: more of its keys."""
        entries = [
            {"model": path, "parameters": {"weight": weight}} for path, weight in zip(self.paths, WEIGHTS, strict=True)
        ]
        return {"merge_method": method, "base_model": str(self.base), "models": entries, **others}


def make(folder: Path, kind: str, dtype: torch.dtype, shards: bool) -> Family:
    """kind: llama, tied (a llama without a head of its own), qwen (has biases), electra, vit (both inferred), bert."""
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SHAPE))
    elif kind == "vit":
        shape = {name: size for name, size in SHAPE.items() if name != "vocab_size"}
        model = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=8, patch_size=4))
    elif kind == "electra":
        model = transformers.ElectraModel(transformers.ElectraConfig(**SHAPE, embedding_size=32))
    elif kind == "qwen":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE, num_key_value_heads=2))
    else:
        tie = kind == "tied"
        config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=tie)
        model = transformers.LlamaForCausalLM(config)
    model.to(dtype)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = "16KB" if shards else "1GB"
    names = ["base", *(f"model{index}" for index in range(MODELS))]
    for index, name in enumerate(names):
        if index > 0:
            model.load_state_dict(tuned(start, index, 0.02))
        model.save_pretrained(folder / name, max_shard_size=size)
    assert len(list((folder / "base").glob("*.safetensors"))) > 1 or not shards
    return Family(folder / "base", tuple(folder / name for name in names[1:]))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def written(folder: Path, config: dict) -> Path:
    """A configuration as a file in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    return folder / "config.yml"


def copied(model: Path, folder: Path) -> Path:
    """A copy of a model's folder, to be spoilt."""
    shutil.copytree(model, folder)
    return folder


def same(merged: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], steps: float = 0) -> None:
    """All tensors equal: names, shapes, dtypes, and every bit, or up to `steps` of the dtype at the largest element."""
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype, name
        if steps:
            most = steps * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=most, msg=name)
        else:
            assert torch.equal(merged[name], tensor), name
