"""What is timed on a GPU: every operator over a whole model in one call, and what one would write in PyTorch.

The cases run on any device with any backend, so that a rehearsal on the CPU goes the same way. A check looks at the
results of the call over the whole model, made in memory full of NaN, and compares them on the device with the formula
in float64; descents are followed on one tensor of each shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from awd_fast import bench, ops, statistics, streaming
from awd_fast.bench import OBJECTIVE, SQUARED, Parameters
from awd_fast.checks import (
    exact_vectors,
    first_wrong,
    gentle,
    wrong_combination,
    wrong_gram,
    wrong_multi_dot,
    wrong_shift,
)
from awd_fast.measure import COPY, Case, Result
from awd_fast.objective import SGD, Adam, Groups
from awd_fast.ops import backends, reference
from benchmarks import peers
from benchmarks.cases import ADAM_300, COMPARED, SGD_ROWS, descent_peer, wrong_peer
from benchmarks.gpu_clock import poisoned

SGD_300 = SGD(iterations=300)
STEP, STREAM = "adam_step", "adam_stream"
SHORT, LONG = 10, 300  # iterations whose times are subtracted: what is not an iteration drops out
COPIED = 1 << 31  # bytes that the copy reads, many times any cache, and writes
GRAPHED = ("cuda",)  # see gpu_clock.Graphed: Triton's calls read tables of the host's memory


def copy(device: str, size: int = COPIED) -> Case:
    """What the memory can do: a copy of `size` bytes, read and written."""
    source = torch.arange(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)

    def check() -> str | None:
        target.fill_(-1)
        target.copy_(source)
        return None if torch.equal(target, source) else "the copy is not what was copied"

    def run() -> object:
        return target.copy_(source)

    moved = 2.0 * source.numel() * 4
    return Case(operation=COPY, backend="PyTorch", run=run, check=check, moved=moved, note="device to device")


def firsts(data: Parameters) -> list[int]:
    """The index of the first tensor of each shape."""
    found: dict[torch.Size, int] = {}
    for index, base in enumerate(data.bases):
        found.setdefault(base.shape, index)
    return list(found.values())


def common_step(data: Parameters, groups: Groups) -> SGD:
    """A step that suits the norms of every tensor: where steps are too long, rounding decides the trajectory."""
    pairs = data.pairs()
    tried = [gentle(SGD_300, reference.gram(*pairs[index], groups)) for index in firsts(data)]
    return replace(SGD_300, lr=min(one.lr for one in tried if isinstance(one, SGD)))


def case_of(
    data: Parameters,
    operation: str,
    backend: str,
    run: Callable[[], object],
    check: Callable[[], str | None],
    moved: float = 0.0,
) -> Case:
    """A case whose check runs in memory full of NaN."""

    def checked() -> str | None:
        with poisoned():
            return check()

    dtype = str(data.dtype).removeprefix("torch.")
    return Case(
        operation=operation, backend=backend, run=run, check=checked, moved=moved, dtype=dtype, tasks=data.tasks
    )


def gram(data: Parameters, backend: str, groups: Groups) -> Case:
    """All Gram matrices of a model."""

    def run() -> list[Tensor]:
        return ops.gram_many(data.pairs(), groups, backend=backend)

    def check() -> str | None:
        pairs = zip(run(), data.pairs(), strict=True)
        return first_wrong([wrong_gram(found, base, models, groups) for found, (base, models) in pairs])

    return case_of(data, f"gram {groups}", backend, run, check, bench.read_bytes(data))


def multi_dot(data: Parameters, backend: str, groups: Groups) -> Case:
    """The products of all task vectors of a model with gradients like the base."""
    gradients = [base.flip(0).contiguous() for base in data.bases]

    def run() -> list[Tensor]:
        return ops.multi_dot_many(data.pairs(), gradients, groups, backend=backend)

    def check() -> str | None:
        every = zip(run(), data.pairs(), gradients, strict=True)
        return first_wrong([wrong_multi_dot(found, b, m, g, groups) for found, (b, m), g in every])

    return case_of(data, f"multi_dot {groups}", backend, run, check, bench.combine_bytes(data))  # which writes as much


def combine(data: Parameters, backend: str) -> Case:
    """base + sum_j w_rj t_j of a model, with weights for every row."""
    generator = torch.Generator().manual_seed(1)
    rows = [0.3 * torch.rand(len(base), data.tasks, generator=generator).double() for base in data.bases]
    weights = [factors.to(data.bases[0].device) for factors in rows]

    def run() -> list[Tensor]:
        return ops.combine_many(data.pairs(), weights, "row", backend=backend)

    def check() -> str | None:
        every = zip(run(), data.pairs(), weights, strict=True)
        return first_wrong([wrong_combination(found, b, m, factors, "row") for found, (b, m), factors in every])

    return case_of(data, "combine", backend, run, check, bench.combine_bytes(data))


def descend(data: Parameters, backend: str) -> Case:
    """300 iterations of SGD on the Gram matrices of all rows of a model."""
    grams = torch.cat([reference.gram(base, models, "row") for base, models in data.pairs()])

    def run() -> object:
        return ops.descend(grams, OBJECTIVE, SGD_300, backend=backend)

    def check() -> str | None:
        tried = gentle(SGD_300, grams)
        for objective in (OBJECTIVE, SQUARED):
            found, history = ops.descend(grams, objective, tried, backend=backend)
            wrong = bench.wrong_descent(grams, found, history, objective, tried, backend)
            if wrong is not None:
                return f"{objective.similarity}: {wrong}"
        return None

    return case_of(data, "descend sgd300", backend, run, check)


def merge(data: Parameters, backend: str, groups: Groups) -> Case:
    """The whole merge of a model with 300 iterations of SGD."""
    weights = torch.full((data.tasks,), 0.3, dtype=torch.float64)

    def run() -> object:
        return ops.merge_rows_many(data.pairs(), weights, OBJECTIVE, SGD_300, groups, backend=backend)

    def check() -> str | None:
        tried, followed = common_step(data, groups), firsts(data)
        for objective in (OBJECTIVE, SQUARED):
            found = ops.merge_rows_many(data.pairs(), weights, objective, tried, groups, backend=backend)
            for index, ((base, models), result) in enumerate(zip(data.pairs(), found, strict=True)):
                merged, g, coefficients, history = result
                plain = statistics.merge_weights(weights.to(coefficients.device), coefficients)
                reasons = [
                    wrong_gram(g, base, models, groups),
                    wrong_combination(merged, base, models, plain, groups),
                ]
                if index in followed:
                    exact = reference.gram(base, models, groups)
                    reasons.append(bench.wrong_descent(exact, coefficients, history, objective, tried, backend))
                wrong = first_wrong(reasons)
                if wrong is not None:
                    return f"{objective.similarity}, tensor {index}: {wrong}"
        return None

    return case_of(data, f"merge_rows {groups} sgd300", backend, run, check, bench.combine_bytes(data))


def adam_rows(data: Parameters, backend: str) -> Case:
    """300 iterations of Adam on the rows of every tensor."""
    case = bench.adam_rows_case(data, backend)
    return case_of(data, ADAM_300, backend, case.run, case.check, case.moved)


def stream(data: Parameters, backend: str, iterations: int) -> Case:
    """Iterations of Adam on one group over all tensors, with the Gram matrix and the state that they begin with."""

    def run() -> object:
        return streaming.descend(data.pairs(), OBJECTIVE, Adam(iterations=iterations), backend)

    def check() -> str | None:
        options, few = Adam(iterations=COMPARED), data.few()
        found = streaming.descend(few.pairs(), SQUARED, options, backend)
        vectors = torch.cat([exact_vectors(base, models, "tensor") for base, models in few.pairs()], dim=2)
        exact, losses = ops.descend_elements(vectors, SQUARED, options)
        shift = torch.cat([one.flatten() for one in found.shifts])
        gap = (found.history.cpu() - losses.cpu()).abs().max() / losses.cpu().abs().max()
        off = None if float(gap) <= 1e-3 else f"the loss differs by {float(gap):.3g} of itself"
        return wrong_shift(shift, exact) or off

    most = 5 if iterations == LONG else 1000
    return replace(case_of(data, f"{STREAM} {iterations}", backend, run, check), most_rounds=most)


def step(data: Parameters, backend: str) -> Case:
    """One iteration of the same, tensor by tensor: what a backend without a call for all iterations launches."""
    device = data.bases[0].device
    states = [[torch.zeros(base.shape, device=device) for _ in range(3)] for base in data.bases]
    slope = torch.full((data.tasks + 1,), 1e-3, dtype=torch.float64, device=device)

    def run() -> object:
        every = zip(data.pairs(), states, strict=True)
        return [ops.adam_step(b, m, d, v, s, slope, Adam(), 3, backend=backend) for (b, m), (d, v, s) in every]

    return case_of(data, STEP, backend, run, stream(data, backend, SHORT).check, bench.adam_step_bytes(data))


def operators(data: Parameters, backend: str) -> list[Case]:
    """Every operator of a backend over the whole model. CUDA's iterations of Adam are one call, as a merge makes it."""
    cases = [gram(data, backend, groups) for groups in ("row", "column", "tensor")]
    cases += [multi_dot(data, backend, groups) for groups in ("row", "column")]
    cases += [combine(data, backend), descend(data, backend)]
    cases += [merge(data, backend, groups) for groups in ("row", "column")]
    cases.append(adam_rows(data, backend))
    whole = hasattr(backends.module(backend), "descend_stream") or backend == "reference"
    return cases + ([stream(data, backend, n) for n in (SHORT, LONG)] if whole else [step(data, backend)])


def iteration(results: Sequence[Result], backend: str, data: Parameters) -> Result | None:
    """One iteration of Adam on one global group: what LONG - SHORT more of them take, divided by their number."""
    by_name = {result.case.operation: result for result in results if result.case.backend == backend and result.seconds}
    short, long = by_name.get(f"{STREAM} {SHORT}"), by_name.get(f"{STREAM} {LONG}")
    if short is None or long is None:
        return None
    seconds = tuple((one - short.median) / (LONG - SHORT) for one in long.seconds)
    note = f"{LONG} iterations less {SHORT}, over {LONG - SHORT}; one global group"
    case = replace(long.case, operation=STEP, moved=bench.adam_step_bytes(data), note=note)
    return Result(case, seconds)


def global_peer(data: Parameters, name: str) -> Case:
    """One iteration of torch.optim.Adam(fused=True) on one group over all tensors.

    It is checked on few rows of each shape: its products of millions of float32 numbers are too rough for the check.
    """
    running: list[peers.Peer] = []

    def vectors(part: Parameters) -> Tensor:
        pairs = part.pairs()
        return torch.cat([torch.stack([(m - base).flatten() for m in models]) for base, models in pairs], dim=1)[None]

    def check() -> str | None:
        wrong = wrong_peer(name, vectors(data.few()), Adam())
        if wrong is None:
            running.append(peers.PEERS[name](vectors(data), Adam()))
        return wrong

    def run() -> None:
        running[0].step(1)

    return Case(operation=STEP, backend=name, run=run, check=check, tasks=data.tasks, note="one global group")


def row_peer(data: Parameters, name: str) -> Case:
    """300 iterations of SGD on the rows of every tensor, one of which is timed on all tensors."""
    case = descent_peer(data, name)
    assert case.operation == SGD_ROWS
    return case
