"""What mergekit's tests import as tests.common, which its source distribution leaves out: tiny models, and a checked
merge. Written for these tests; nothing here is mergekit's."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open

TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _saved(model: Any, path: Any) -> str:
    model.save_pretrained(path)
    return str(path)


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    return _saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, vocab_size=vocab_size)), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    config = transformers.GraniteConfig(**TINY, vocab_size=vocab_size, num_key_value_heads=2)
    return _saved(transformers.GraniteForCausalLM(config), path)


def make_gpt2size(path: Any) -> str:
    """Narrow: the tests need its architecture and all of its layers."""
    return _saved(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_head=2, vocab_size=97)), path)


def make_picoLlaVa(path: Any) -> str:
    vision = transformers.CLIPVisionConfig(**TINY, image_size=32, patch_size=8)
    text = transformers.LlamaConfig(**TINY, vocab_size=64)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_seq_length=16, image_token_index=63)
    return _saved(transformers.LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], None] | None = None,
    index_json_name: str = "model.safetensors.index.json",
    auto_arch: bool = False,
) -> None:
    """Merges to a folder, looks at each tensor there, and has the test's own `validate` look at the folder."""
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, folder, MergeOptions())
        out = Path(folder)
        assert (out / "config.json").is_file()
        files = sorted(out.glob("*.safetensors"))
        assert files
        names = set()
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  no mapping
                    names.add(name)
                    total = float(opened.get_tensor(name).double().sum())
                    assert not check_nan or not math.isnan(total), name
        assert names or not check_tensors
        if validate is not None:
            validate(folder)
