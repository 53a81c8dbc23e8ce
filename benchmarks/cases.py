"""What is timed for a shape: the operators in every backend, what a user could write instead, dtypes, and K."""

from dataclasses import replace

import torch
from torch import Tensor

from awd_fast import bench, measure, ops
from awd_fast.bench import DESCENTS, Parameters
from awd_fast.checks import exact_vectors, first_wrong, gentle, wrong_combination
from awd_fast.measure import Case, Result
from awd_fast.objective import SGD, Adam, Objective
from awd_fast.ops import backends
from benchmarks import peers
from benchmarks.shapes import Shape

NATIVE, REFERENCE = "native", "reference"
SGD_ROWS = "merge_rows row sgd300"
ADAM_300, STEP_300 = "adam_rows 300", "adam_step x 300"
PEER = {"combine": "PyTorch", SGD_ROWS: "autograd", "adam_step": "autograd", ADAM_300: STEP_300}
"""What an operation is compared with; the reference otherwise."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TASKS = (2, 4, 8, 16, 32)
MOST_BYTES = 8e9  # of the data of a section; of larger shapes only some layers
TRIAD_BYTES = 1.5e9  # of the three arrays at most, many times any cache
COMPARED = 10  # iterations of a peer that are compared with the reference's


def triad(data: Parameters) -> list[Case]:
    """The memory limit over three arrays that are together as large as the models, or large enough."""
    return measure.triad_cases(max(1, int(min(bench.read_bytes(data), TRIAD_BYTES)) // 12))


def operators(data: Parameters) -> list[Case]:
    """Every operator on the whole shape, and the reference and the peers on a layer of it."""
    cases = triad(data)
    if backends.unavailable(NATIVE) is None:
        for case in bench.operator_cases(data, NATIVE, REFERENCE):
            cases.append(replace(case, peer=PEER.get(case.operation, case.peer)))
        cases += [bench.merge_case(data, NATIVE, name, "row", merge=bench.three_calls) for name in DESCENTS]
    cases += [task_arithmetic(data), *bench.operator_cases(data, REFERENCE)]
    layer, layers = data.first_layer(), len(data.bases) // data.layer
    slow = [descent_peer(layer, name) for name in peers.PEERS]
    slow += [adam_peer(layer, name) for name in ("autograd", "compiled")]
    return cases + [bench.scaled_up(case, layers) for case in slow]


def task_arithmetic(data: Parameters) -> Case:
    """`combine` with one scale, as one would write it."""

    def run() -> object:
        return [peers.task_arithmetic(base, models, 0.3) for base, models in data.pairs()]

    def check() -> str | None:
        weights = torch.full((1, data.tasks), 0.3, dtype=torch.float64)
        pairs = data.part().pairs()
        found = [(peers.task_arithmetic(base, models, 0.3), base, models) for base, models in pairs]
        return first_wrong([wrong_combination(merged, b, m, weights, "tensor") for merged, b, m in found])

    return Case(
        operation="combine",
        backend="PyTorch",
        run=run,
        check=check,
        moved=bench.combine_bytes(data),
        tasks=data.tasks,
        note="Task Arithmetic as one would write it",
    )


def trajectory(t: Tensor, optimizer: SGD | Adam) -> float:
    """The reference's loss after COMPARED iterations, in float64."""
    options = replace(optimizer, iterations=COMPARED)
    if isinstance(options, SGD):
        return float(ops.descend(t.double() @ t.double().mT, Objective(), options, backend=REFERENCE)[1][-1])
    return float(ops.descend_elements(t.double(), Objective(), options)[1][-1])


def wrong_peer(name: str, t: Tensor, optimizer: SGD | Adam) -> str | None:
    """The loss after COMPARED iterations against the reference's, within 1e-4; it must have moved by more than that."""
    peer = peers.PEERS[name](t, optimizer)
    before = peer.loss()
    peer.step(COMPARED)
    found, exact = peer.loss(), trajectory(t, optimizer)
    if not abs(found - exact) <= 1e-4 * exact:
        return f"the loss after {COMPARED} iterations is {found:.7g}; expected {exact:.7g}"
    return None if abs(before - exact) > 1e-3 * exact else f"the loss does not move from {before:.7g}"


def descent_peer(data: Parameters, name: str, timed: int = 1) -> Case:
    """300 iterations on the rows of every tensor of a layer, `timed` of them timed."""
    running: list[peers.Peer] = []

    def check() -> str | None:
        optimizer = DESCENTS["sgd300"]
        for base, models in data.part().pairs():
            t = exact_vectors(base, models, "row")
            tried = gentle(optimizer, t @ t.mT)
            assert isinstance(tried, SGD)
            wrong = wrong_peer(name, t.float(), tried)
            if wrong is not None:
                return wrong
        for base, models in data.pairs():
            running.append(peers.PEERS[name](exact_vectors(base, models, "row").float(), SGD()))
        return None

    def run() -> None:
        for peer in running:
            peer.step(timed)

    case = Case(operation=SGD_ROWS, backend=name, run=run, check=check, tasks=data.tasks, peer=NATIVE)
    case = bench.part_timed(case, timed, 300)
    return replace(case, peer="", note=f"{case.note}, without the merge")


def adam_peer(data: Parameters, name: str) -> Case:
    """One iteration of torch.optim.Adam(fused=True) on one group over all tensors of a layer."""
    running: list[peers.Peer] = []

    def check() -> str | None:
        pairs = data.pairs()
        t = torch.cat([exact_vectors(base, models, "tensor").float() for base, models in pairs], dim=2)
        wrong = wrong_peer(name, t, Adam())
        if wrong is None:
            running.append(peers.PEERS[name](t, Adam()))
        return wrong

    def run() -> None:
        running[0].step(1)

    return Case(operation="adam_step", backend=name, run=run, check=check, tasks=data.tasks)


def three_hundred(result: Result) -> Result:
    """300 iterations of `adam_step`, from the time of one: what rows that stay near the CPU are compared with."""
    case = result.case
    backend = STEP_300 if case.backend == NATIVE else f"{case.backend}, {STEP_300}"
    note = "; ".join(filter(None, ["1 of 300 iterations timed, one global group", case.note]))
    many = replace(case, operation=ADAM_300, backend=backend, moved=300.0 * case.moved, peer="", note=note)
    return replace(result, case=many, seconds=tuple(300.0 * seconds for seconds in result.seconds))


def fitting(shape: Shape, size: float) -> tuple[Shape, str]:
    """As many of the layers as MOST_BYTES hold with `size` bytes an element, and a note where they are not all."""
    layers = max(1, min(shape.layers, int(MOST_BYTES / (size * shape.elements / shape.layers))))
    return replace(shape, layers=layers), "" if layers == shape.layers else f"{layers} of {shape.layers} layers alone"


def dtypes(shape: Shape) -> list[Case]:
    """The operators that read and write stored dtypes, each in and out."""
    shape, note = fitting(shape, sum(dtype.itemsize for dtype in DTYPES) * (shape.tasks + 1.0))
    data = shape.parameters()
    cases = []
    for dtype in DTYPES:
        stored = data if dtype == data.dtype else data.to(dtype)
        cases += [bench.gram_case(stored, NATIVE, "row"), bench.combine_case(stored, NATIVE)]
        cases.append(bench.multi_dot_case(stored, NATIVE, "row"))
        cases += [bench.merge_case(stored, NATIVE, name, "row") for name in DESCENTS]
    return [*triad(data), *(replace(case, note=note) for case in cases)]


def tasks(shape: Shape) -> list[Case]:
    """The same for more and more models."""
    shape, note = fitting(shape, torch.float32.itemsize * (max(TASKS) + 1.0))
    data = shape.parameters(max(TASKS))
    cases = []
    for k in TASKS:
        first = data.first_tasks(k)
        cases += [bench.gram_case(first, NATIVE, "row"), bench.combine_case(first, NATIVE)]
        cases.append(bench.merge_case(first, NATIVE, "sgd300", "row"))
    return [*triad(data.first_tasks(8)), *(replace(case, note=note) for case in cases)]
