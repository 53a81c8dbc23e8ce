"""What the operators are to reach, from the results of one run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from awd_fast import measure
from awd_fast.measure import Result
from benchmarks.cases import ADAM_300, NATIVE, SGD_ROWS, STEP_300, TASKS

CONVERGE_ROWS = "merge_rows row converge"


@dataclass(frozen=True)
class Target:
    """A number that is to be at least (or at most) `bound`; NaN where it was not measured."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def verdict(self) -> str:
        """In a word."""
        if math.isnan(self.value):
            return "not measured"
        reached = self.value >= self.bound if self.at_least else self.value <= self.bound
        return "reached" if reached else "missed"


def targets(operators: Sequence[Result], dtypes: Sequence[Result], memory: float) -> list[Target]:
    """From the results of the operators, those by dtype, and the peak memory over inputs and output."""
    limit = measure.memory_limit(operators)

    def seconds(operation: str, backend: str = NATIVE) -> float:
        found = measure.find(operators, operation, backend)
        return found.median if found else math.nan

    def share(operation: str) -> float:
        found = measure.find(operators, operation, NATIVE)
        return found.gigabytes / limit if found else math.nan

    def sixteen_bits(operation: str) -> float:
        found = [measure.find(dtypes, operation, NATIVE, dtype) for dtype in ("float32", "bfloat16")]
        return found[0].median / found[1].median if found[0] and found[1] else math.nan

    combine, sgd, step = seconds("combine"), seconds(SGD_ROWS), seconds("adam_step")
    return [
        Target("combine: share of the memory limit", share("combine"), 0.95),
        Target("gram row: share of the memory limit", share("gram row"), 0.80),
        Target("multi_dot row: share of the memory limit", share("multi_dot row"), 0.80),
        Target("merge_rows row sgd300: time over combine's", sgd / combine, 3.0, at_least=False),
        Target("merge_rows row converge: time over combine's", seconds(CONVERGE_ROWS) / combine, 1.5, at_least=False),
        Target("merge_rows row sgd300: times faster than batched autograd", seconds(SGD_ROWS, "autograd") / sgd, 1000),
        Target("adam_step: share of the memory limit", share("adam_step"), 0.80),
        Target("adam_step: times faster than autograd with fused Adam", seconds("adam_step", "autograd") / step, 30),
        Target(
            "adam_rows 300: times faster than adam_step x 300", seconds(ADAM_300, STEP_300) / seconds(ADAM_300), 3.0
        ),
        Target("combine in bfloat16: elements a second over float32's", sixteen_bits("combine"), 1.7),
        Target("merge_rows row sgd300 in bfloat16: elements a second over float32's", sixteen_bits(SGD_ROWS), 1.7),
        Target("awd_fast.merge: peak memory over inputs and output", memory, 1.05, at_least=False),
    ]


def target_table(found: Sequence[Target]) -> str:
    """As text."""
    rows = [("target", "bound", "measured", "verdict")]
    for target in found:
        sign = ">=" if target.at_least else "<="
        value = "" if math.isnan(target.value) else f"{target.value:.3g}"
        rows.append((target.name, f"{sign} {target.bound:g}", value, target.verdict))
    return measure.align(rows)


def dtype_table(results: Sequence[Result]) -> str:
    """Elements a second in and out of 16 bits, relative to float32."""
    rows: list[tuple[str, ...]] = [("operation", "float32", "bfloat16", "float16")]
    for operation in dict.fromkeys(result.case.operation for result in results if result.case.tasks):
        by_dtype = [measure.find(results, operation, NATIVE, dtype) for dtype in rows[0][1:]]
        plain = by_dtype[0]
        if plain is not None:
            rows.append((operation, *(f"{plain.median / one.median:.2f}x" if one else "" for one in by_dtype)))
    return measure.align(rows)


def task_table(results: Sequence[Result]) -> str:
    """Time for each K, and for an element of a model relative to K = 2."""
    rows: list[tuple[str, ...]] = [("operation", *(f"K = {k}" for k in TASKS))]
    for operation in dict.fromkeys(result.case.operation for result in results if result.case.tasks):
        by_k = {k: measure.find(results, operation, NATIVE, tasks=k) for k in TASKS}
        first = by_k[TASKS[0]]
        cells = []
        for k, one in by_k.items():
            relative = f" ({one.median / k / (first.median / TASKS[0]):.2f}x)" if one and first else ""
            cells.append(measure.duration(one.median) + relative if one else "")
        if any(cells):
            rows.append((operation, *cells))
    return measure.align(rows)
