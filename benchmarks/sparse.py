"""Sparse merges beside mergekit's and FusionBench's own functions and plain PyTorch: seconds of processor time.

    python -m benchmarks.sparse [--peer PYTHON] [--scale tiny|small|110m] [--models 8] [--dtype float32] [--threads 2]
                                [--methods ties dare_ties ...] [--rounds 3]

PYTHON is the interpreter of an environment that has mergekit 0.1.5 and fusion-bench 0.2.33. Their functions
(`mergekit.merge_methods.api.merge_tensors`, tensor by tensor, and `ties_merging` of the flattened models) run there, in
a process of their own on the same tensors in memory, so that neither side reads or writes files. `plain` is what one
would write: task vectors in memory, kthvalue, torch.bernoulli. `accelerated` are mergekit's functions there after
`awd_fast.integrations.mergekit_accelerate.accelerate()`. Times are the least of the rounds. `differing` is the share of
elements that differ from the peer's by more than 1e-5 of the largest |t|: rounding, where magnitudes tie, and
everywhere for random methods, whose norm of the update is compared as well.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awd_fast import ops
from benchmarks import harness

WORKER = """
import json, sys, time
import torch
from safetensors.torch import load_file, save_file

folder, method, rounds, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
options = json.loads(sys.argv[5])
states = [load_file(f"{folder}/{index}") for index in range(options.pop("files"))]
models = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
names = sorted(models[0])
if method == "global_ties":
    from fusion_bench.method.ties_merging.ties_merging_utils import state_dict_to_vector, ties_merging

    def run():
        flat = torch.vstack([state_dict_to_vector(m) for m in models[1:]])
        base = state_dict_to_vector(models[0])
        merged = base + options["scale"] * ties_merging(flat - base, reset_thresh=options["density"], merge_func="sum")
        sizes = [models[0][name].numel() for name in names]
        return {name: part.view_as(models[0][name]) for name, part in zip(names, merged.split(sizes))}
else:
    from mergekit.merge_methods.api import merge_tensors

    def run():
        given = [(name, [m[name] for m in models]) for name in names]
        return {name: merge_tensors(own, method, parameters=options, base_index=0, name=name) for name, own in given}

def least():
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        merged = run()
        seconds.append(time.process_time() - start)
    return min(seconds), merged

found, merged = least()
save_file({name: tensor.contiguous() for name, tensor in merged.items()}, f"{folder}/merged")
faster = None
if method != "global_ties":
    from awd_fast.integrations import mergekit_accelerate

    mergekit_accelerate.accelerate()
    faster, _ = least()
print(json.dumps([found, faster]))
"""
SCALES = {"tiny": (1, 300, 96), "small": (1, 3000, 768), "110m": (12, 32000, 768)}  # layers, vocabulary, width
DENSITY, GAMMA, EPSILON = 0.5, 0.01, 0.15
State = dict[str, Tensor]


def checkpoints(scale: str, count: int, dtype: torch.dtype) -> list[State]:
    """A base with the shapes of a small language model, and models near it."""
    layers, vocabulary, width = SCALES[scale]
    shapes = {"embed": (vocabulary, width), "norm": (width,)}
    for layer in range(layers):
        shapes |= {f"{layer}.{name}": (width, width) for name in "qkvo"} | {f"{layer}.norm": (width,)}
        shapes |= {f"{layer}.{name}": (8 * width // 3, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.down": (width, 8 * width // 3)}
    g = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=g) for name, shape in sorted(shapes.items())}
    models = [{n: t + 0.002 * torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(count)]
    return [{name: tensor.to(dtype) for name, tensor in state.items()} for state in (base, *models)]


def fast(method: str, base: State, models: list[State], weights: list[float]) -> State:
    """The merge by `awd_fast.ops`: docs/sparse.md in code."""
    k, offset, merged = len(models), 0, {}
    if method == "global_ties":
        total = sum(tensor.numel() for tensor in base.values())
        parameters = [(tensor, [model[name] for model in models]) for name, tensor in base.items()]
        together = ops.trim_together(parameters, [(0, int(total * DENSITY) + 1)] * k)
    for name, origin in base.items():
        own, size = [model[name] for model in models], origin.numel()
        drop: ops.Drop | None = None
        rescales, consensus, normalize = None, "sum", True
        match method:
            case "task_arithmetic":
                consensus, normalize = None, False
            case "ties":
                drop = ops.trim(origin, own, [ops.kept(size, DENSITY)] * k)
            case "global_ties":
                drop, normalize = together, False
            case "breadcrumbs_ties":
                drop, normalize = ops.trim(origin, own, [ops.band(size, DENSITY, GAMMA)] * k), False
            case "dare_ties":
                drop, normalize = ops.Bernoulli((DENSITY,) * k, seed=1), False
            case "della":
                drop = ops.MagPrune((DENSITY,) * k, (EPSILON,) * k, seed=1)
        if method in ("dare_ties", "della"):
            rescales = ops.l1_rescales(ops.sparse_norms(origin, own, drop, offset=offset))
        merged[name] = ops.sparse_merge(
            origin,
            own,
            weights,
            drop,
            rescales=rescales,
            consensus=consensus,
            normalize=normalize,
            offset=0 if isinstance(drop, ops.Cut) and method != "global_ties" else offset,
        )
        offset += size
    return merged


def plain(method: str, base: State, models: list[State], weights: list[float]) -> State:
    """The same in PyTorch as one would write it, tensor by tensor; ties at a threshold are all kept."""
    merged, w = {}, torch.tensor(weights)
    for name, origin in base.items():
        t = torch.stack([model[name] - origin for model in models]).flatten(1)
        size = t.abs()
        if method in ("ties", "breadcrumbs_ties"):
            first, last = (ops.kept if method == "ties" else ops.band)(
                t.shape[1], DENSITY, *[GAMMA] * (method != "ties")
            )
            least = size.kthvalue(t.shape[1] - last + 1, dim=1, keepdim=True).values
            keep = size >= least
            if first:
                keep &= size <= size.kthvalue(t.shape[1] - first, dim=1, keepdim=True).values
            t *= keep
        elif method == "dare_ties":
            t *= torch.bernoulli(torch.full_like(t, DENSITY))
            t *= (size.sum(dim=1) / t.abs().sum(dim=1))[:, None]
        t *= w.to(t.dtype)[:, None]
        found = t.sum(dim=0)
        if method != "task_arithmetic":
            agree = t.sign() == torch.where(found >= 0, 1.0, -1.0).to(t.dtype)
            found = (t * agree).sum(dim=0)
            if method == "ties":
                found /= (agree * w[:, None]).sum(dim=0).clamp(min=1e-30)
        merged[name] = origin + found.view_as(origin)
    return merged


METHODS = ("task_arithmetic", "ties", "global_ties", "breadcrumbs_ties", "dare_ties", "della")
NOT_PLAIN = ("global_ties", "della")
PEER_OPTIONS = {
    "task_arithmetic": {},
    "ties": {"density": DENSITY},
    "breadcrumbs_ties": {"density": DENSITY, "gamma": GAMMA},
    "dare_ties": {"density": DENSITY},
    "della": {"density": DENSITY, "epsilon": EPSILON},
}


def least_seconds(run: Callable[[], State], rounds: int) -> tuple[float, State]:
    """Seconds of processor time of all threads, and the last result."""
    seconds, found = [], {}
    for _ in range(rounds):
        start = time.process_time()
        found = run()
        seconds.append(time.process_time() - start)
    return min(seconds), found


def peer(
    python: str, folder: str, method: str, files: int, rounds: int, threads: int
) -> tuple[float, float | None, State]:
    """What the peer's process says, as it is and, of mergekit, accelerated; and what it merged as it is."""
    options: dict[str, object] = {"files": files}
    if method == "global_ties":
        options |= {"density": DENSITY, "scale": 1.0 / (files - 1)}
    else:
        options |= PEER_OPTIONS[method] | {"weight": 1.0 / (files - 1)}
    command = [python, "-c", WORKER, folder, method, str(rounds), str(threads), json.dumps(options)]
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr[-2000:]}")
    slow, faster = json.loads(done.stdout.strip().splitlines()[-1])
    return slow, faster, load_file(f"{folder}/merged")


def flat(state: State) -> Tensor:
    """All its numbers."""
    return torch.cat([state[name].reshape(-1).float() for name in sorted(state)])


def compared(found: State, expected: State, base: State) -> str:
    """How results differ: a share of the elements, and the ratio of the norms of what was added to the base."""
    origin = flat(base)
    ours, theirs = flat(found) - origin, flat(expected) - origin
    differing = ((ours - theirs).abs() > 1e-5 * theirs.abs().max()).float().mean()
    return f"differing {float(differing):.2%}, norm {float(ours.norm() / theirs.norm()):.4f} of the peer's"


def main() -> None:
    harness.keep_freed_memory("benchmarks.sparse")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of an environment with mergekit and fusion-bench")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base, *models = checkpoints(given.scale, given.models, getattr(torch, given.dtype))
    weights = [1.0 / given.models] * given.models
    count = sum(tensor.numel() for tensor in base.values())
    print(
        f"{count} elements, {given.models} models, {given.dtype}, {given.threads} threads, {ops.backends.machine()[1]}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if given.peer:
            for index, state in enumerate((base, *models)):
                save_file(state, f"{folder}/{index}")
        for method in given.methods:
            seconds, found = least_seconds(lambda m=method: fast(m, base, models, weights), given.rounds)
            line = f"{method:18} awd_fast {seconds:8.3f} s"
            if method not in NOT_PLAIN:
                slow, _ = least_seconds(lambda m=method: plain(m, base, models, weights), given.rounds)
                line += f"   plain {slow:8.3f} s, {slow / seconds:5.1f} x"
            if given.peer:
                slow, faster, theirs = peer(given.peer, folder, method, given.models + 1, given.rounds, given.threads)
                line += f"   peer {slow:8.3f} s, {slow / seconds:5.1f} x; {compared(found, theirs, base)}"
                if faster is not None:
                    line += f"; accelerated {faster:8.3f} s, {slow / faster:5.1f} x"
            print(line, flush=True)


if __name__ == "__main__":
    main()
