"""Model pools of FusionBench with small models, and what a tiny CLIP needs to be one of its tasks."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool, CLIPVisionModelPool
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from tests.conftest import tuned
from tests.integrations.families import Family

TASKS = ("mnist", "svhn")


def named(family: Family) -> dict[str, str]:
    """The folders of a family as the models of a pool."""
    return {"_pretrained_": str(family.base), **{f"m{index}": path for index, path in enumerate(family.paths)}}


def language(family: Family, lazy: bool = False, **model_kwargs: Any) -> CausalLMPool:
    return CausalLMPool(named(family), tokenizer=None, enable_lazy_loading=lazy, model_kwargs=model_kwargs or None)


class Net(nn.Module):
    """A vector, matrices, tied ones, a float and an integer buffer."""

    def __init__(self, seed: int, start: "Net | None" = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second, self.norm = nn.Linear(6, 9), nn.Linear(9, 6, bias=False), nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.first.weight
        with torch.no_grad():
            for name, own in self.named_parameters():
                before = start.get_parameter(name).float() if start is not None else 0.0
                own.copy_(before + 0.1 * torch.randn(own.shape, generator=generator))
            self.norm.running_mean.copy_(torch.randn(6, generator=generator))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(torch.tanh(self.first(x))))


def nets(count: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    base = Net(0)
    models = {f"m{index}": Net(index + 1, base, dtype) for index in range(count)}
    return {"_pretrained_": base.to(dtype), **models}


def pool_of(models: dict[str, nn.Module]) -> BaseModelPool:
    return BaseModelPool(models)


def images(seed: int, count: int = 8) -> list[tuple[Image.Image, int]]:
    """A test dataset: noise, with labels that nobody looks at."""
    generator = np.random.default_rng(seed)
    return [(Image.fromarray(generator.integers(0, 256, (20, 20, 3), np.uint8)), 0) for _ in range(count)]


def clip(folder: Path) -> dict[str, str]:
    """A tiny CLIP with its processor, and one that was tuned from it for each task, on disk."""
    letters = [chr(code) for code in range(33, 127) if chr(code) in string.printable]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    last = len(words) - 1
    text = {"vocab_size": len(words), "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    vision = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=shape | text, vision_config=shape | vision, projection_dim=24)
    torch.manual_seed(0)
    model = CLIPModel(config)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = {"height": 16, "width": 16}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), tokenizer)
    found = {}
    for index, name in enumerate(("_pretrained_", *TASKS)):
        if index > 0:
            model.load_state_dict(tuned(start, index, 0.05))
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


def clip_pool(models: dict[str, str]) -> CLIPVisionModelPool:
    data = {task: {"_target_": f"{__name__}.images", "seed": index} for index, task in enumerate(TASKS)}
    return CLIPVisionModelPool(
        OmegaConf.create(models), processor=models["_pretrained_"], test_datasets=OmegaConf.create(data)
    )
