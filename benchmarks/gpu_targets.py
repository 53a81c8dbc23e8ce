"""What the operators are to reach on a GPU, from the results of one run, and what counting says they will.

The counts are of bytes and operations of one model shape; with the rates below, seen on an H200 or printed in its data
sheet, they give times. They are no measurements: no GPU has run the operators yet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from awd_fast import measure
from awd_fast.measure import Result
from awd_fast.objective import SGD, Adam
from benchmarks import peers
from benchmarks.cases import ADAM_300, SGD_ROWS
from benchmarks.gpu_cases import LONG, STEP, STREAM
from benchmarks.shapes import Shape
from benchmarks.targets import Target

CUDA, TRITON = "cuda", "triton"
OPERATORS = ("gram row", "combine", "descend sgd300", SGD_ROWS, STEP, ADAM_300)
"""Of both backends."""
ITERATIONS = 300


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU: bytes a second that a copy moves (read and written), the rest per multiprocessor and clock."""

    copy: float = 4.3e12
    processors: int = 132
    clock: float = 1.755e9
    float64: int = 64  # multiply-adds
    conversions: int = 16  # from float32 to float64
    tensor_cores: float = 33.5e12  # float64 multiply-adds a second of all of them

    @property
    def cycles(self) -> float:
        """Of all multiprocessors together, a second."""
        return self.processors * self.clock


H200 = Gpu()


@dataclass(frozen=True)
class Prediction:
    """What was counted for a target, in words, and what follows; `value` is in the target's unit, NaN without one."""

    counted: str
    predicted: str
    value: float = math.nan


def targets(results: Sequence[Result], first: str = CUDA, second: str = TRITON) -> list[Target]:
    """From the results of all sections. first, second: the backends in the places of CUDA and Triton."""
    limit = measure.memory_limit(results)

    def seconds(operation: str, backend: str = first) -> float:
        found = measure.find(results, operation, backend)
        return found.median if found else math.nan

    def share(operation: str) -> float:
        found = measure.find(results, operation, first)
        return found.gigabytes / limit if found else math.nan

    merged = measure.find(results, SGD_ROWS, first)
    copied = merged.case.moved / (limit * 1e9) if merged else math.nan
    step = seconds(STEP)
    found = [
        Target("combine: share of a copy's bandwidth", share("combine"), 0.90),
        Target("gram row: share of a copy's bandwidth", share("gram row"), 0.85),
        Target("streaming Adam, an iteration: share of a copy's bandwidth", share(STEP), 0.90),
        Target(
            "fused rows, 300 SGD iterations: time over a copy of the same bytes", seconds(SGD_ROWS) / copied, 2.0, False
        ),
        Target(
            "fused rows: times faster than batched autograd", seconds(SGD_ROWS, "autograd") / seconds(SGD_ROWS), 2000
        ),
        Target("streaming Adam: times faster than eager autograd, fused Adam", seconds(STEP, "autograd") / step, 10),
        Target("streaming Adam: times faster than the same compiled", seconds(STEP, "compiled") / step, 3),
        Target(
            "resident Adam rows, 300 iterations: times faster than streaming",
            seconds(f"{STREAM} {LONG}") / seconds(ADAM_300),
            5,
        ),
    ]
    return found + [
        Target(f"Triton's {name}: time over CUDA's", seconds(name, second) / seconds(name), 1.25, at_least=False)
        for name in OPERATORS
    ]


class Traffic(TorchDispatchMode):
    """Counts the bytes of every operation's tensors, read or written, as if no cache held any; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        shared = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        is_view = any(t.untyped_storage().data_ptr() in shared for t in results) and not func._schema.is_mutable
        if not is_view:
            # An expanded tensor is read once: the memory behind it counts, not its shape.
            self.moved += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in leaves)
        return found


def autograd_traffic(optimizer: SGD | Adam, rows: int, tasks: int, columns: int = 4096) -> float:
    """Bytes an element of d that an iteration of batched autograd moves, counted while it runs on the CPU."""
    generator = torch.Generator().manual_seed(0)
    peer = peers.autograd(torch.randn(rows, tasks, columns, generator=generator), optimizer)
    peer.step(2)  # the state of the optimiser is there then
    with Traffic() as traffic:
        peer.step(1)
    return traffic.moved / (rows * columns)


def predictions(shape: Shape, gpu: Gpu = H200) -> list[Prediction]:
    """For each of `targets`, in order; float32."""
    elements, k = shape.elements, shape.tasks
    rows = shape.layers * sum(height for height, _ in shape.weights)
    combined, read, stepped = (4.0 * elements * n for n in (k + 2, k + 1, k + 7))
    fused = 4.0 * elements * (2 * (k + 1) + 1)
    copy = combined / gpu.copy

    products = 64.0 * elements / gpu.tensor_cores
    converted = k * elements / (gpu.conversions * gpu.cycles)
    # 28 pairs, 8 norms, the products with the basis and the step of a group of eight models.
    instructions = 419.0 * rows * ITERATIONS
    iterated = instructions / (gpu.float64 * gpu.cycles)
    streamed = stepped / gpu.copy
    # k products with the factors, k with d, and two of d itself, on elements that registers hold as float64; then about
    # 600 cycles of sums across the block and of K x K work for each row, which two blocks on a multiprocessor share.
    multiplied = (2.0 * k + 2.0) * elements * ITERATIONS / (gpu.float64 * gpu.cycles)
    waited = 600.0 * rows * ITERATIONS / (2.0 * gpu.cycles)
    streaming = ITERATIONS * streamed / 0.9
    sgd = autograd_traffic(SGD(), 4, k) * elements
    adam = autograd_traffic(Adam(), 1, k) * elements

    return [
        Prediction(
            f"{k + 2} numbers an element, {gigabytes(combined)}",
            f"{ms(copy)} if the bytes alone limit it: up to 100 %",
            1.0,
        ),
        Prediction(
            f"{k + 1} numbers an element, {gigabytes(read)}; {64e-9 * elements:.1f} G multiply-adds of float64 on "
            f"tensor cores, {1e-9 * k * elements:.2f} G conversions",
            f"{ms(read / gpu.copy)}; arithmetic {ms(products)} and conversions {ms(converted)}, hidden: up to 100 %",
            1.0,
        ),
        Prediction(f"{4 * (k + 7)} B an element, {gigabytes(stepped)}", f"{ms(streamed)}: up to 100 %", 1.0),
        Prediction(
            f"{2 * k + 3} numbers an element, {gigabytes(fused)}, the data twice; 419 instructions of float64 a group "
            f"and iteration, {1e-9 * instructions:.1f} G",
            f"{fused / combined:.2f} x ({ms(fused / gpu.copy)}) if the iterations' {ms(iterated)} hide behind the "
            f"bytes, {(fused / gpu.copy + iterated) / copy:.1f} x if none do: 2.0 to 2.3 x, the target is at the edge",
            fused / combined,
        ),
        Prediction(
            f"{sgd / elements / 4:.0f} numbers an element and iteration of autograd, {gigabytes(sgd)}",
            f"{ITERATIONS * sgd / gpu.copy:.1f} s against {2.0e3 * copy:.1f} to {2.3e3 * copy:.1f} ms: "
            f"{ITERATIONS * sgd / gpu.copy / (2.3 * copy):,.0f} to {ITERATIONS * sgd / gpu.copy / (2.0 * copy):,.0f} x",
            ITERATIONS * sgd / gpu.copy / (2.0 * copy),
        ),
        Prediction(
            f"{adam / elements / 4:.0f} numbers an element and iteration of autograd, {gigabytes(adam)}",
            f"{adam / stepped * 0.9:.0f} x or more: a product of so long vectors may fill few multiprocessors",
            adam / stepped * 0.9,
        ),
        Prediction("what the compiler fuses is not counted", "not predicted"),
        Prediction(
            f"{2 * k + 2} multiply-adds of float64 an element and iteration, "
            f"{1e-12 * (2 * k + 2) * elements * ITERATIONS:.2f} T; 600 cycles a row and iteration, two rows at a time",
            f"{ms(multiplied)} and {ms(waited)}, 60 to 80 ms, against {ms(streaming)}: "
            f"{streaming / 0.080:.0f} to {streaming / (multiplied + waited):.0f} x",
            streaming / (multiplied + waited),
        ),
        *(_of_triton(name, k) for name in OPERATORS),
    ]


def _of_triton(name: str, k: int) -> Prediction:
    """Triton has no fused pass: it reads the data twice too, but waits for the iterations between the passes."""
    if name != SGD_ROWS:
        return Prediction("the same bytes", "not predicted")
    return Prediction(f"{2 * k + 3} numbers an element as well, in three passes", "not predicted; above 1 by design")


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def gigabytes(count: float) -> str:
    return f"{count * 1e-9:.1f} GB"


def bound(target: Target) -> str:
    """In words: a share in percent, everything else as a factor."""
    sign = ">=" if target.at_least else "<="
    return f"{sign} {target.bound:.0%}" if "share" in target.name else f"{sign} {target.bound:,g} x"


def value(target: Target) -> str:
    """The measured value in the same unit."""
    if math.isnan(target.value):
        return "not measured"
    return f"{target.value:.1%}" if "share" in target.name else f"{target.value:,.3g} x"


def verdicts(found: Sequence[Target]) -> str:
    """The targets as text."""
    rows = [("target", "bound", "measured", "verdict")]
    return measure.align(rows + [(one.name, bound(one), value(one), one.verdict) for one in found])


def prediction_table(shape: Shape, gpu: Gpu = H200, results: Sequence[Result] = ()) -> str:
    """Markdown for docs/performance.md: targets, what was measured, what was counted and predicted."""
    lines = ["| target | bound | measured | counted | predicted |", "|---|---|---|---|---|"]
    for target, one in zip(targets(results), predictions(shape, gpu), strict=True):
        lines.append(f"| {target.name} | {bound(target)} | {value(target)} | {one.counted} | {one.predicted} |")
    return "\n".join(lines)
