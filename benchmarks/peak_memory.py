"""The memory that a merge of state dicts takes: `python -m benchmarks.peak_memory --shape minilm_x8` prints JSON.

Peak resident memory (VmHWM) above what the process had with torch and the package loaded, against the bytes of inputs
and output. It runs in a process of its own, with the allocator as users have it.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys

from awd_fast import ROWS, merging
from benchmarks.harness import ALLOCATOR, ROOT
from benchmarks.shapes import SHAPES


def status(field: str) -> int:
    """A size of this process in bytes, from /proc."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def forget_building() -> None:
    """Gives back what making the inputs left in the allocator, and starts the peak anew: it would hide the merge's."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def measure_here(shape: str, threads: int) -> dict[str, int]:
    """peak, built (with the inputs), inputs, output: bytes above the process without them."""
    import torch

    torch.set_num_threads(threads)
    small = {"layer.weight": torch.zeros(2, 4)}
    merging.merge(small, [small, small], **ROWS)  # what is loaded on the first call is no part of the merge
    before = status("VmRSS")
    data = SHAPES[shape].parameters()
    names = [f"encoder.{index}.weight" for index in range(len(data.bases))]
    base = dict(zip(names, data.bases, strict=True))
    models = [
        {name: data.models[index][task] for index, name in enumerate(names)} for task in range(SHAPES[shape].tasks)
    ]
    forget_building()
    built = status("VmHWM") - before
    merged = merging.merge(base, models, **ROWS)
    each = data.elements * data.dtype.itemsize
    assert sum(tensor.numel() for tensor in merged.values()) == data.elements
    return {"peak": status("VmHWM") - before, "built": built, "inputs": each * (1 + data.tasks), "output": each}


def ratio(shape: str, threads: int) -> float:
    """Peak over inputs and output, measured in a new process; NaN where /proc is missing."""
    if not os.path.exists("/proc/self/status"):
        return float("nan")
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--shape", shape, "--threads", str(threads)]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    found = json.loads(printed)
    return float(found["peak"] / (found["inputs"] + found["output"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minilm_x8")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps(measure_here(arguments.shape, arguments.threads)))
