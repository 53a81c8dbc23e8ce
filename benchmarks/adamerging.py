"""AdaMerging's own part of a step beside the plain way, and what memory each takes: python -m benchmarks.adamerging.

A step merges for the present coefficients, and, once the gradient of the merged model is there, takes that of the
coefficients. What a model's forward and backward take is the same for both and is left out: the gradient is given. The
plain way stacks nothing either: theta_0 + sum_i c_i t_i in a loop over stored task vectors, and autograd back. Each
way is timed in a process of its own, so that its memory is its own, looked at where a step holds most: after the merge
and after the gradient. The ways are timed in turns.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from awd_fast import disk
from awd_fast.mixture import Mixture
from awd_fast.plan import StateDict, make_plan
from awd_fast.recipe import make_recipe

LAYER = {"query": (384, 384), "key": (384, 384), "value": (384, 384), "dense": (384, 384)}
LAYER |= {"up": (1536, 384), "down": (384, 1536)}
State = dict[str, Tensor]


def states(layers: int, tasks: int, dtype: torch.dtype) -> list[State]:
    """A MiniLM-like encoder and its fine-tuned models: base first."""
    torch.manual_seed(0)
    shapes = {"embedding.weight": (30522, 384)}
    for layer in range(layers):
        for name, shape in LAYER.items():
            shapes |= {f"layer.{layer}.{name}.weight": shape, f"layer.{layer}.{name}.bias": shape[:1]}
    base = {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}
    models = [{name: t + 0.002 * torch.randn(t.shape) for name, t in base.items()} for _ in range(tasks)]
    return [{name: t.to(dtype) for name, t in state.items()} for state in (base, *models)]


def ours(
    base: State, models: list[State], method: str, backend: str | None
) -> Callable[[], tuple[float, float, Tensor, int]]:
    """A step of `awd_fast.mixture`."""
    recipe = make_recipe(len(models), method=method, backend=backend)
    sources = [StateDict("base", base), *(StateDict(f"models[{i}]", state) for i, state in enumerate(models))]
    steps = make_plan(sources[0], sources[1:], recipe)
    places = [(base[step.name].device, base[step.name].dtype) for step in steps]
    mixture = Mixture(sources[0], sources[1:], steps, recipe, places)
    coefficients = torch.full((len(models), len(steps)), 0.3, dtype=torch.float64)
    gradients = [tensor.flip(0).contiguous() for tensor in base.values()]  # in the order of the steps

    def step() -> tuple[float, float, Tensor, int]:
        begin = time.perf_counter()
        merged = [tensor for _, tensor in mixture.merged(coefficients)]
        first, held = time.perf_counter() - begin, resident()
        begin = time.perf_counter()
        slopes = mixture.slopes(gradients)
        second = time.perf_counter() - begin
        assert len(merged) == len(gradients)
        return first, second, slopes, max(held, resident())

    return step


def plain(
    base: State, models: list[State], method: str, backend: str | None
) -> Callable[[], tuple[float, float, Tensor, int]]:
    """The same through autograd, with stored task vectors; of AWD, t_i - d would be stored in their place."""
    vectors = [{name: state[name] - tensor for name, tensor in base.items()} for state in models]
    models.clear()
    coefficients = torch.full((len(vectors), len(base)), 0.3, requires_grad=True)
    gradients = [tensor.flip(0).contiguous() for tensor in base.values()]

    def step() -> tuple[float, float, Tensor, int]:
        coefficients.grad = None
        begin = time.perf_counter()
        merged = []
        for column, (name, tensor) in enumerate(base.items()):
            total = tensor
            for task, vector in enumerate(vectors):
                total = total + coefficients[task, column].to(tensor.dtype) * vector[name]
            merged.append(total)
        first, held = time.perf_counter() - begin, resident()
        begin = time.perf_counter()
        torch.autograd.backward(merged, gradients)
        second = time.perf_counter() - begin
        assert coefficients.grad is not None
        return first, second, coefficients.grad.double(), max(held, resident())

    return step


WAYS = {
    "plain autograd": (plain, "task_arithmetic"),
    "awd_fast, task arithmetic": (ours, "task_arithmetic"),
    "awd_fast, AWD rows": (ours, "awd"),
}


def work(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """Steps on demand in a process of its own."""
    torch.set_num_threads(options.threads)
    if options.keep_memory:
        disk.keep_freed_memory()
    base, *models = states(options.layers, options.models, getattr(torch, options.dtype))
    make, method = WAYS[name]
    step = make(base, models, method, options.backend)
    before = resident()
    while pipe.recv():
        pipe.send((*step(), before))


def resident() -> int:
    """Bytes in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory is used again, without page faults")
    options = parser.parse_args()
    count = sum(tensor.numel() for tensor in states(options.layers, 0, torch.float32)[0].values())
    print(f"{count / 1e6:.1f}M parameters x {options.models} models, {options.dtype}, {options.threads} threads")
    context = multiprocessing.get_context("spawn")
    pipes, found = {}, {name: [] for name in WAYS}
    for name in WAYS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=work, args=(name, options, theirs), daemon=True).start()
    for _ in range(options.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            found[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    expected = found["plain autograd"][-1][2]
    print(f"{'':28}{'merge ms':>10}{'gradient ms':>13}{'step ms':>9}{'ratio':>7}{'peak MB':>9}{'before MB':>11}")
    medians = {}
    for name, results in found.items():
        times = [statistics.median(result[which] for result in results[1:]) for which in (0, 1)]
        medians[name] = statistics.median(result[0] + result[1] for result in results[1:])
        ratio = medians["plain autograd"] / medians[name]
        memory = [most / 1e6 for most in (max(result[3] for result in results), results[0][4])]
        row = [1e3 * seconds for seconds in (*times, medians[name])]
        print(f"{name:28}{row[0]:10.1f}{row[1]:13.1f}{row[2]:9.1f}{ratio:7.2f}{memory[0]:9.0f}{memory[1]:11.0f}")
    error = (found["awd_fast, task arithmetic"][-1][2] - expected).norm() / expected.norm()
    print(f"gradients differ by {error:.1e} of their norm")


if __name__ == "__main__":
    main()
