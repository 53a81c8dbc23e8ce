"""Full models out of LoRA adapters, then a merge of them: what it takes where a merge has no adapters as inputs.

    python -m benchmarks.folder_lora --base B --adapter A1 --adapter A2 --work DIR --out OUT

Each model is written to DIR in the base's dtype, a file of the base at a time: the least memory this takes. Prints the
seconds of both parts as JSON.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import awd_fast


def factors(adapter: Path) -> tuple[dict[str, Tensor], float]:
    """The adapter's tensors, and the factor of their product."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return load_file(adapter / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]


def changed(name: str, weight: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    """A weight of the base with what the adapter adds, float32; as it is where the adapter has nothing for it."""
    module = f"base_model.model.{name.removesuffix('.weight')}"
    b = tensors.get(f"{module}.lora_B.weight")
    if b is None:
        return weight.float()
    return torch.addmm(weight.float(), b.float(), tensors[f"{module}.lora_A.weight"].float(), alpha=scale)


def materialise(base: Path, adapter: Path, folder: Path) -> None:
    """The fine-tuned model as a folder like the base's."""
    tensors, scale = factors(adapter)
    folder.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
            continue
        with safe_open(file, framework="pt") as opened:
            part = {}
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                weight = opened.get_tensor(name)
                part[name] = changed(name, weight, tensors, scale).to(weight.dtype)
        save_file(part, folder / file.name, metadata={"format": "pt"})


def main() -> None:
    """Makes the models, merges them and prints both times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    merge = awd_fast.merge_checkpoints  # loads all that it needs
    start = time.perf_counter()
    models = [chosen.work / f"full{index}" for index in range(len(chosen.adapter))]
    for adapter, model in zip(chosen.adapter, models, strict=True):
        materialise(chosen.base, adapter, model)
    made = time.perf_counter() - start
    merge(chosen.base, models, chosen.out, preset="rows", scale=0.3)  # as folder_runs.OPTIONS
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "materialise": made, "merge": seconds - made}))


if __name__ == "__main__":
    main()
