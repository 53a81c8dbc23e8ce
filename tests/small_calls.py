"""A few small calls of every compiled operator, for a memory checker that is hundreds of times slower than the CPU.

Results are used, so that the checker sees where they depend on memory that was never written.
"""

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from awd_fast import measure, ops
from awd_fast.objective import SGD, Adam, Converge, Objective
from awd_fast.ops import native, reference

SHAPES = ((1, 1), (3, 5), (65, 9), (70, 33), (9, 130))


def use(tensors: Iterable[Tensor]) -> int:
    """Branches on every number."""
    return sum(number > 0.5 for tensor in tensors for number in tensor.double().reshape(-1).tolist())


def tensors(shape: tuple[int, int], k: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    """A base and k models like it."""
    base = torch.linspace(-1.0, 1.0, shape[0] * shape[1]).reshape(shape).to(dtype)
    models = [(base + 0.1 * torch.sin((2.0 + i) * 9.0 * base.float())).to(dtype) for i in range(k)]
    return base.to(device), [model.to(device) for model in models]


def calls(
    shape: tuple[int, int],
    k: int,
    dtype: torch.dtype,
    groups: str,
    backend: ModuleType = native,
    device: str = "cpu",
    descents: Iterable[SGD | Converge] = (SGD(lr=0.1, iterations=3), Converge(max_iterations=2)),
) -> int:
    """Every operator on tensors of this shape; how many numbers of the results are above 0.5."""
    base, models = tensors(shape, k, dtype, device)
    weights = torch.linspace(0.3, 1.0, k, dtype=torch.float64)
    gram = backend.gram(base, models, groups)
    count = use([gram])
    for optimizer in descents:
        for objective in (Objective(), Objective(similarity="squared", penalty="squared_l2")):
            count += use(backend.descend(gram, objective, optimizer))
            if groups != "tensor":
                count += use(backend.merge_rows(base, models, weights, objective, optimizer, groups, torch.bfloat16))
    every = weights[None].expand(len(gram), k).to(device)
    count += use([backend.combine(base, models, every, groups, dtype)])
    count += use([backend.multi_dot(base, models, base.flip(0), groups)])
    if backend is native:
        last = [base.numel() // (1 + i % 3) for i in range(k)]
        cut = ops.trim(base, models, [(end // 4, end) for end in last])
        for drop in (cut, ops.Bernoulli((0.5,) * k), ops.MagPrune((0.5,) * k, (0.2,) * k)):
            count += use([ops.sparse_norms(base, models, drop)])
            count += use([ops.sparse_merge(base, models, [1.0] * k, drop, consensus="sum", normalize=True)])
    for step in (Adam(iterations=2), SGD(iterations=2), SGD(momentum=0.0, iterations=2)):
        count += use(backend.adam_rows(base, models, Objective(penalty="l1", alpha=0.1), step, groups))
        compute = reference.compute_dtype(dtype)
        state = [torch.full(shape, 0.1, dtype=compute, device=device) for _ in range(3)]
        slope = torch.linspace(-1.0, 1.0, k + 1, dtype=torch.float64).to(device)
        count += use([backend.adam_step(base, models, *state, slope, step, 2, 0.1), *state])
    return count


def main() -> None:
    torch.set_num_threads(2)
    total = 0
    for index, shape in enumerate(SHAPES):
        for k in (1, 2, 5, 9):
            dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[(index + k) % 4]
            total += sum(calls(shape, k, dtype, groups) for groups in ("row", "column", "tensor"))
    a, b, c = (torch.ones(1000 + i)[i:] for i in range(3))
    for streaming in (False, True):
        measure.triad(a, b, c, 0.5, streaming)
        total += use([a])
    print("numbers above 0.5:", total)


if __name__ == "__main__":
    main()
