"""WUDI in closed form beside FusionBench's 300 iterations of Adam, on the same layers: time and objective, on the CPU.

    python -m benchmarks.wudi --peer PYTHON [--rows 384] [--columns 384] [--tasks 8] [--threads 1] [--iterations 300]

PYTHON is the interpreter of an environment that has `fusion-bench` (0.2.33); its function
`fusion_bench.method.wudi.wudi.wudi_merging` runs there, in a process of its own, and its time is that of the call
alone. Without --peer only ours is run. The task vectors are random plus low-rank, with a part in common; `--size` is
the standard deviation of their elements. Adam's steps of 1e-5 do not grow with them, so that the peer's result depends
on it while ours does not. The objective is sum_i |(tau - t_i) t_i'|^2 / |t_i|^2 in float64.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awd_fast import wudi

WORKER = """
import json, sys, time
import torch
from safetensors.torch import load_file, save_file
from fusion_bench.method.wudi.wudi import wudi_merging

vectors, merged, iterations, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
held = load_file(vectors)
each = [{"layer.weight": held[name]} for name in sorted(held)]
start = time.perf_counter()
found = wudi_merging(each, accelerator="cpu", iter_num=iterations)
seconds = time.perf_counter() - start
save_file({"layer.weight": found["layer.weight"].detach().contiguous()}, merged)
print(json.dumps({"seconds": seconds, "torch": torch.__version__}))
"""
RANK = 16


def task_vectors(rows: int, columns: int, tasks: int, size: float) -> list[Tensor]:
    """t_i [rows, columns] float32: a low-rank part of each, one in common, and noise."""
    g = torch.Generator().manual_seed(0)

    def low_rank() -> Tensor:
        return torch.randn(rows, RANK, generator=g) @ torch.randn(RANK, columns, generator=g) / RANK**0.5

    common = low_rank()
    found = [low_rank() + 0.5 * common + 0.3 * torch.randn(rows, columns, generator=g) for _ in range(tasks)]
    return [size * vector / vector.std() for vector in found]


def objective(tau: Tensor, vectors: list[Tensor]) -> float:
    """The interference in float64."""
    return float(wudi.interference(tau.double(), [vector.double() for vector in vectors]))


def peer(python: str, vectors: list[Tensor], iterations: int, threads: int) -> tuple[Tensor, dict[str, Any]]:
    """What FusionBench gives, and what its process said of it."""
    with tempfile.TemporaryDirectory() as folder:
        given, merged = Path(folder) / "vectors.safetensors", Path(folder) / "merged.safetensors"
        save_file({f"{index:03d}": vector for index, vector in enumerate(vectors)}, given)
        command = [python, "-c", WORKER, str(given), str(merged), str(iterations), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the peer failed: {done.stderr[-2000:]}")
        said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return load_file(merged)["layer.weight"], said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of an environment with fusion-bench")
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--columns", type=int, default=384)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--size", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--ridge", type=float, nargs="+", default=[0.1, 0.01, 0.001])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    vectors = task_vectors(given.rows, given.columns, given.tasks, given.size)
    plain = torch.stack(vectors).sum(dim=0)
    before = objective(plain, vectors)
    rows: list[tuple[str, float, float]] = [("Task Arithmetic", 0.0, before)]
    for ridge in given.ridge:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            tau = wudi.update(vectors, ridge=ridge)
            seconds.append(time.perf_counter() - start)
        rows.append((f"closed form, ridge {ridge:g}", min(seconds), objective(tau, vectors)))
    if given.peer:
        merged, said = peer(given.peer, vectors, given.iterations, given.threads)
        name = f"FusionBench, {given.iterations} iterations"
        rows.append((name, said["seconds"], objective(merged, vectors)))
    print(f"{given.tasks} task vectors [{given.rows}, {given.columns}], std {given.size:g}, {given.threads} threads")
    for name, time_taken, value in rows:
        print(f"{name:32} {time_taken:9.3f} s   objective {value:.6g}   {value / before:8.3%} of Task Arithmetic's")
    if given.json:
        keys = ("name", "seconds", "objective")
        given.json.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
