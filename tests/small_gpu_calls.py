"""A few small calls of every kernel of a GPU backend, for compute-sanitizer: python -m tests.small_gpu_calls cuda.

The sizes are the least that take every way through a kernel: full and partial vectors of a load, groups that registers
hold and that they do not, tensors of several shapes in one launch.
"""

import argparse
from collections.abc import Sequence
from types import ModuleType

import torch

from awd_fast import streaming
from awd_fast.objective import SGD, Adam, Converge, Objective
from awd_fast.ops import backends, combine_many, gram_many, merge_rows_many, multi_dot_many
from tests.small_calls import calls, tensors, use

CASES = (
    ((3, 5), 2, torch.float32),
    ((33, 40), 3, torch.bfloat16),
    ((5, 131), 8, torch.float32),
    ((4, 12), 5, torch.float16),
    ((2, 9), 9, torch.float64),
)
"""Shapes, numbers of models, dtypes."""
LONG = ((2, 1600), 2, torch.float32)  # rows that fewer blocks hold, in another way
GROUPS = ("row", "column", "tensor")


def many(backend: str, device: str, k: int) -> int:
    """A model of several tensors in one call of each operator that takes one."""
    parameters = [tensors(shape, k, torch.float32, device) for shape in ((3, 8), (5, 12), (33, 7), (1, 1))]
    weights = torch.linspace(0.3, 1.0, k, dtype=torch.float64)
    count = 0
    for groups in ("row", "column"):
        count += use(gram_many(parameters, groups, backend=backend))
        count += use(combine_many(parameters, [weights[None]] * len(parameters), groups, backend=backend))
        count += use(multi_dot_many(parameters, [base for base, _ in parameters], groups, backend=backend))
        for optimizer in (SGD(lr=0.1, iterations=3), SGD(lr=0.1, iterations=0)):
            found = merge_rows_many(parameters, weights, Objective(), optimizer, groups, backend=backend)
            count += sum(use(one) for one in found)
    streamed = streaming.descend(parameters, Objective(penalty="l1", alpha=0.1), Adam(iterations=3), backend)
    return count + use([*streamed.shifts, streamed.history])


def everything(backend: str, device: str) -> int:
    """How many numbers of all results are above 0.5: they are used, so that one that was never written is seen."""
    module: ModuleType = backends.module(backend)
    # Triton has no Converge of its own: it is PyTorch's kernels that would be looked at.
    descents: Sequence[SGD | Converge] = (SGD(lr=0.1, iterations=3), Converge(max_iterations=2))
    descents = descents if backend == "cuda" else descents[:1]
    total = 0
    for shape, k, dtype in CASES:
        total += sum(calls(shape, k, dtype, groups, module, device, descents) for groups in GROUPS)
        print(f"{backend}: {list(shape)}, {k} models, {dtype}", flush=True)
    total += calls(*LONG, "row", module, device, descents[:1])
    return total + sum(many(backend, device, k) for k in (3, 8))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=[name for name in backends.PREFERENCE if name != "reference"])
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(arguments)
    reason = backends.unavailable(chosen.backend)
    if reason is not None:
        parser.exit(1, f"{chosen.backend} cannot run here: {reason}\n")
    torch.set_num_threads(2)
    print("numbers above 0.5:", everything(chosen.backend, chosen.device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
