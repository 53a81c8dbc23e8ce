"""One merge by a peer in its own environment, timed after its imports: run by benchmarks.integrations, prints JSON.

    python -m benchmarks.integration_worker mergekit METHOD BASE OUT MODEL... [--accelerate]
    python -m benchmarks.integration_worker fusion_bench METHOD BASE OUT MODEL... [--accelerate] [--lazy]
    python -m benchmarks.integration_worker adamerging TASKS ROUNDS

`wall` and `cpu` are seconds of the merge, reading included, writing of mergekit's too; the processor's time is that of
all threads.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

METHODS = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "awd": {},
    "awd_rows": {},
}
NAMED = {"awd_rows": ("awd", {"preset": "rows"})}
"""Methods of mergekit under another name, with parameters of the merge."""


@contextlib.contextmanager
def timed(found: dict[str, float]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def by_mergekit(given: argparse.Namespace) -> dict[str, float]:
    """`run_merge` of a configuration, as mergekit-yaml calls it."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from awd_fast.integrations import mergekit as integration

    weight = 1.0 / len(given.models)
    entries: list[dict[str, Any]] = [
        {"model": path, "parameters": {"weight": weight} | METHODS[given.method]} for path in given.models
    ]
    method, parameters = NAMED.get(given.method, (given.method, {}))
    config: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "float32", "parameters": parameters}
    if given.method == "linear":  # whose base is a model like the others
        entries.append({"model": given.base, "parameters": {"weight": weight}})
    config["base_model"] = given.base
    options = MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True, random_seed=1)
    if given.accelerate:
        integration.accelerate()
    found: dict[str, float] = {}
    with timed(found):
        run_merge(MergeConfiguration.model_validate(config), given.out, options)
    return found


def by_fusion_bench(given: argparse.Namespace) -> dict[str, float]:
    """An algorithm's run on a pool of causal language models."""
    from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm
    from fusion_bench.modelpool import CausalLMPool

    from awd_fast.integrations import fusion_bench as integration

    algorithms: dict[str, Any] = {
        "task_arithmetic": lambda: TaskArithmeticAlgorithm(scaling_factor=0.3),
        "ties": lambda: TiesMergingAlgorithm(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum"),
    }
    models = {"_pretrained_": given.base, **{f"m{index}": path for index, path in enumerate(given.models)}}
    pool = CausalLMPool(models, tokenizer=None, enable_lazy_loading=given.lazy)
    algorithm = algorithms[given.method]()
    if given.accelerate:
        integration.accelerate()
    found: dict[str, float] = {}
    with timed(found):
        merged = algorithm.run(pool)
    folder = Path(given.out)
    folder.mkdir(parents=True)
    state = {name: tensor for name, tensor in merged.state_dict().items() if name != "lm_head.weight"}  # which is tied
    save_file(state, folder / "model.safetensors")
    return found


def adamerging(tasks: int, rounds: int) -> dict[str, Any]:
    """The parameter arithmetic of a layer-wise AdaMerging step on CLIP ViT-B/32: the merge, and for each task the
    gradient of the coefficients from that of the merged weights, which is random and the same for all. By FusionBench
    and accelerated in turns."""
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from awd_fast.integrations import fusion_bench as integration

    torch.manual_seed(0)
    shape = CLIPVisionConfig(patch_size=32)
    base, *models = (CLIPVisionModel(shape) for _ in range(tasks + 1))
    count = len(list(base.parameters()))
    weights = get_layer_wise_weights(tasks, count, 0.3)
    module = LayerWiseMergedModel(weights, base, models, clamp_weights=False, strict=False)
    names = [name for name, _ in module.pretrained_model.named_parameters()]
    gradients = [torch.randn_like(own) for own in module.pretrained_model.parameters()]
    found: dict[str, Any] = {"parameters": sum(own.numel() for own in module.pretrained_model.parameters())}
    slopes = {}
    for _ in range(rounds + 1):
        for way in ("own", "accelerated"):
            if way == "accelerated":
                integration.accelerate()
            module.merge_weight.grad = None
            step: dict[str, float] = {}
            with timed(step):
                state = module.merge_weights()
                merged = [state[name] for name in names]
                for _ in range(tasks):
                    torch.autograd.backward(merged, gradients, inputs=[module.merge_weight], retain_graph=True)
            found.setdefault(way, []).append(step)
            slopes[way] = module.merge_weight.grad
            del state, merged
            module._merged_state_dict = None
            integration.restore()
    for way in ("own", "accelerated"):
        found[way] = found[way][1:]  # the first warms up
    theirs, ours = slopes["own"].double(), slopes["accelerated"].double()
    return found | {"gradients differ by": float((ours - theirs).norm() / theirs.norm())}


def main() -> None:
    if sys.argv[1] == "adamerging":
        print(json.dumps(adamerging(int(sys.argv[2]), int(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=("mergekit", "fusion_bench"))
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("base")
    parser.add_argument("out")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--accelerate", action="store_true")
    parser.add_argument("--lazy", action="store_true")
    given = parser.parse_args()
    print(json.dumps({"mergekit": by_mergekit, "fusion_bench": by_fusion_bench}[given.peer](given)))


if __name__ == "__main__":
    main()
