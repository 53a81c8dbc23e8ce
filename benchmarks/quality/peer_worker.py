"""Runs one merge of mergekit or FusionBench. A script for the peers' own Python: it imports them, and nothing of ours.

    python -I peer_worker.py JOB.json

The job is an object with these members:

    peer        "mergekit" or "fusion_bench"
    algorithm   mergekit: a `merge_method`; FusionBench: the dotted path of an algorithm's class
    options     mergekit: `parameters` of the whole merge; FusionBench: what the class is made with
    rename      {part of a tensor's name: what the algorithm sees instead}; FusionBench only, may be empty
    only_changed  whether tensors that equal the base's in every model are kept from the algorithm; mergekit only
    seed        of the random numbers that the algorithm draws
    base        Hugging Face folder with one `model.safetensors`
    models      folders of the fine-tuned models, in the order in which they are merged
    output      folder, existing and empty, for `model.safetensors` and `report.json`

The report gives the seconds of loading, merging and writing (mergekit does all three at once, as `merging`), and what
the merge did: how many tensors of each number of dimensions differ from the base, and the length of the update
relative to that of the sum of all task vectors.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
Times = dict[str, float]


def run_mergekit(job: Mapping[str, Any], work: Path) -> tuple[Weights, Times]:
    """The merge as the command `mergekit-pytorch` makes it, tensor by tensor.

    The command for Hugging Face folders, `mergekit-yaml`, stops at every BERT in 0.1.5: its description of BERT has
    optional tensors with other names, and the planner adds those names, a tuple, to a list.
    """
    import mergekit.scripts.merge_raw_pytorch as raw
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions

    base = load_file(Path(job["base"]) / "model.safetensors")
    kept: set[str] = set()
    if job["only_changed"]:
        models = [load_file(Path(folder) / "model.safetensors") for folder in job["models"]]
        kept = {name for name, tensor in base.items() if all(torch.equal(tensor, model[name]) for model in models)}

    def file(folder: str) -> str:
        whole = Path(folder) / "model.safetensors"
        if not kept:
            return str(whole)
        part = work.parent / f"part-{hashlib.sha256(folder.encode()).hexdigest()[:8]}.safetensors"
        save_file({name: tensor for name, tensor in load_file(whole).items() if name not in kept}, part)
        return str(part)

    config: dict[str, Any] = {
        "merge_method": job["algorithm"],
        "models": [{"model": file(folder)} for folder in job["models"]],
        "parameters": job["options"],
        "dtype": "float32",
    }
    # These two know no base: they would average it in, as one more model.
    if job["algorithm"] not in ("linear", "karcher"):
        config["base_model"] = file(job["base"])
    options = MergeOptions(random_seed=job["seed"])
    options.apply_global_options()
    started = time.perf_counter()
    tasks = raw.plan_flat_merge(raw.RawPyTorchMergeConfig.model_validate(config), str(work), False, False, options)
    Executor(tasks, math_device=options.device, storage_device="cpu").execute()
    times = {"loading": 0.0, "merging": time.perf_counter() - started, "writing": 0.0}
    merged: Weights = {name: base[name] for name in kept}
    for part in sorted(work.glob("*.safetensors")):
        merged.update(load_file(part))
    return merged, times


class Tensors(torch.nn.Module):
    """Tensors as a module whose parameters have exactly these names: for algorithms that look at names only."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name, tensor in weights.items():
            *path, last = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_parameter(last, torch.nn.Parameter(tensor))


def run_fusion_bench(job: Mapping[str, Any], work: Path) -> tuple[Weights, Times]:
    """The merge by an algorithm of FusionBench, from a pool of models that lie in memory."""
    from fusion_bench import BaseModelPool
    from transformers import AutoModel
    from transformers.models.clip import modeling_clip

    # OPCM is imported together with an evaluation of CLIP that wants a class of older versions of transformers. The
    # merge does not use it; the name is enough.
    if not hasattr(modeling_clip, "CLIPVisionTransformer"):
        modeling_clip.CLIPVisionTransformer = modeling_clip.CLIPVisionModel

    class Pool(BaseModelPool):
        """Hands out copies, as a pool that reads folders would: some algorithms change the models that they get."""

        def load_model(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
            return copy.deepcopy(super().load_model(model_name_or_config, *args, **kwargs))

    module, _, name = job["algorithm"].rpartition(".")
    algorithm = getattr(importlib.import_module(module), name)(**job["options"])

    started = time.perf_counter()
    folders = {"_pretrained_": job["base"]} | {f"model_{k}": folder for k, folder in enumerate(job["models"])}
    back: dict[str, str] = {}

    def load(folder: str) -> torch.nn.Module:
        if not job["rename"]:
            return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        weights = {}
        for own, tensor in load_file(Path(folder) / "model.safetensors").items():
            seen = own
            for part, other in job["rename"].items():
                seen = seen.replace(part, other)
            weights[seen], back[seen] = tensor, own
        return Tensors(weights)

    pool = Pool({name: load(folder) for name, folder in folders.items()})
    torch.manual_seed(job["seed"])
    loaded = time.perf_counter()
    model = algorithm.run(pool)
    times = {"loading": loaded - started, "merging": time.perf_counter() - loaded, "writing": 0.0}
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{job['algorithm']} gave a {type(model).__name__}, not one merged model")
    return {back.get(seen, seen): tensor.detach() for seen, tensor in model.state_dict().items()}, times


PEERS: dict[str, Callable[[Mapping[str, Any], Path], tuple[Weights, Times]]] = {
    "mergekit": run_mergekit,
    "fusion_bench": run_fusion_bench,
}


def checked(base: Weights, merged: Weights) -> Weights:
    """The merged tensors, contiguous. ValueError unless names and shapes are the base's and all values finite."""
    if merged.keys() != base.keys():
        raise ValueError(f"the merge has other tensors than the base: {sorted(merged.keys() ^ base.keys())}")
    for name, tensor in merged.items():
        if tensor.shape != base[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the merge, {tuple(base[name].shape)} before")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite")
    return {name: tensor.contiguous() for name, tensor in merged.items()}


def what_changed(base: Weights, merged: Weights, models: list[str]) -> dict[str, Any]:
    """Tensors that differ from the base, by number of dimensions, and the relative length of the update."""
    tensors: dict[str, list[int]] = {}
    for name, tensor in base.items():
        count = tensors.setdefault(str(tensor.dim()), [0, 0])
        count[0] += not torch.equal(tensor, merged[name])
        count[1] += 1
    total = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    for folder in models:
        for name, tensor in load_file(Path(folder) / "model.safetensors").items():
            total[name] += tensor - base[name]
    update = sum(float((merged[name] - tensor).double().square().sum()) for name, tensor in base.items()) ** 0.5
    whole = sum(float(tensor.double().square().sum()) for tensor in total.values()) ** 0.5
    return {"changed": tensors, "relative_update": update / whole if whole else 0.0}


def main(job_file: str) -> None:
    """Do what the job says. Raises whatever the peer raises; the caller reads the last words from stderr."""
    job = json.loads(Path(job_file).read_text())
    output = Path(job["output"])
    scratch = output / "scratch" / "merged"
    scratch.mkdir(parents=True)
    merged, times = PEERS[job["peer"]](job, scratch)
    base = load_file(Path(job["base"]) / "model.safetensors")
    merged = checked(base, merged)
    started = time.perf_counter()
    save_file(merged, output / "model.safetensors", metadata={"format": "pt"})
    times["writing"] += time.perf_counter() - started
    report = {"seconds": times, **what_changed(base, merged, job["models"])}
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
