"""What merging folders took, in rounds: the table, the targets, and the results as rows of a CSV file."""

import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from awd_fast import measure
from awd_fast.errors import InputError
from awd_fast.measure import Case, Result
from benchmarks.folder_runs import ProcessFailed, Run
from benchmarks.targets import Target

BASELINE = (measure.COPY, "cat + cp")
DISK = (measure.COPY, "dd + fsync")
START = ("import", "torch and awd_fast")
OURS = ("merge awd", "awd-fast")
PLAIN = ("merge task_arithmetic", "awd-fast")
MERGEKIT = ("merge task_arithmetic", "mergekit")
TIES = ("merge ties", "mergekit")
FULL_MODELS = ("merge awd", "full models first")
WORK = ", after imports"
ADAPTER = "is a LoRA adapter, not a full model"  # what awd-fast says where it takes none

Key = tuple[str, str]


@dataclass(frozen=True)
class Contestant:
    """Something to run. run: writes into the folder it is given. wrong: of that folder. moved: bytes read and written.

    most: runs at most, the first of them checked; 0 for as many as there are rounds, after one that is not timed.
    """

    key: Key
    run: Callable[[Path], Run]
    wrong: Callable[[Path], str | None] = lambda out: None
    moved: float = 0.0
    most: int = 0


@dataclass(frozen=True)
class Line:
    """Runs of one contestant, as seconds of the whole process or after its imports, or why there are none."""

    key: Key
    seconds: tuple[float, ...] = ()
    peak: float = math.nan
    anonymous: float = math.nan
    moved: float = 0.0
    faults: int = 0
    preempted: int = 0
    wrong: str | None = None
    skipped: str | None = None

    @property
    def median(self) -> float:
        """Seconds; NaN where there is no run."""
        return statistics.median(self.seconds) if self.seconds else math.nan


def measured(contestants: Sequence[Contestant], rounds: int, scratch: Path, say: Callable[[str], None]) -> list[Line]:
    """Checks every contestant, then times those that are right, one run of each in turn."""
    runs: dict[Key, list[Run]] = {one.key: [] for one in contestants}
    reasons: dict[Key, str] = {}

    def attempt(one: Contestant, checked: bool, kept: bool) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            found = one.run(scratch / "out")
            wrong = one.wrong(scratch / "out") if checked else None
        except (ProcessFailed, InputError) as error:
            wrong = f"it failed: {error}"
        if wrong is not None:
            reasons[one.key] = wrong
            runs[one.key].clear()
        elif kept:
            runs[one.key].append(found)
        shutil.rmtree(scratch, ignore_errors=True)
        say(f"{'; '.join(one.key)}: {wrong or ('timed' if kept else 'checked')}")

    for one in contestants:
        if not one.most:
            attempt(one, checked=True, kept=False)
    for _ in range(rounds):
        for one in contestants:
            if one.key not in reasons and (not one.most or len(runs[one.key]) < one.most):
                attempt(one, checked=bool(one.most) and not runs[one.key], kept=True)
    return [line for one in contestants for line in lines(one, runs[one.key], reasons.get(one.key))]


def lines(one: Contestant, runs: Sequence[Run], reason: str | None) -> list[Line]:
    """Of the whole process, and after its imports where that was measured."""
    if reason is not None:
        absent = ADAPTER in reason
        return [Line(one.key, wrong=None if absent else reason, skipped=reason if absent else None)]
    peak, anonymous = (biggest([getattr(run, name) for run in runs]) for name in ("peak", "anonymous"))
    counts = [int(statistics.median(getattr(run, name) for run in runs)) for name in ("faults", "preempted")]
    whole = Line(one.key, tuple(run.seconds for run in runs), peak, anonymous, one.moved, *counts)
    if one.key in (BASELINE, DISK) or any(math.isnan(run.work) for run in runs):
        return [whole]
    after = (one.key[0], one.key[1] + WORK)
    return [whole, Line(after, tuple(run.work for run in runs), peak, anonymous, one.moved, *counts)]


def biggest(values: Sequence[float]) -> float:
    """The maximum of those that are known; NaN where none is."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def find(found: Sequence[Line], key: Key) -> Line:
    """The line of that name, or one without figures."""
    return next((line for line in found if line.key == key), Line(key))


def table(found: Sequence[Line]) -> str:
    """As text: medians, ratios to cat + cp and to the whole process of awd-fast, memory."""
    rows: list[tuple[str, ...]] = [
        ("operation", "by", "median s", "/ cat+cp", "/ awd-fast", "GB/s", "peak MB", "anonymous MB", "runs", "note")
    ]
    copied, ours = find(found, BASELINE).median, find(found, OURS).median
    for line in found:
        reason = f"WRONG: {line.wrong}" if line.wrong else f"skipped: {line.skipped}" if line.skipped else ""
        busy = measure.BUSY if line.seconds and result(line, "", 0).busy else ""
        rows.append(
            (
                *line.key,
                number(line.median, ".3f"),
                number(line.median / copied, ".2f"),
                number(line.median / ours, ".2f"),
                number(line.moved / line.median / 1e9 if line.moved else math.nan, ".2f"),
                number(line.peak / 1e6, ".0f"),
                number(line.anonymous / 1e6, ".0f"),
                str(len(line.seconds)),
                reason or busy,
            )
        )
    return measure.align(rows)


def number(value: float, digits: str) -> str:
    """A number as text; nothing for NaN."""
    return "" if math.isnan(value) else format(value, digits)


def verdicts(case: str, found: Sequence[Line]) -> list[Target]:
    """What merging folders is to reach; there is no target for adapters."""
    copied, ours, work = (find(found, key).median for key in (BASELINE, OURS, (OURS[0], OURS[1] + WORK)))
    above = (find(found, OURS).peak - find(found, START).peak) / 2**30
    if case == "110m":
        return [
            Target("110m: time after imports over cat + cp", work / copied, 2.5, at_least=False),
            Target(
                "110m: times faster than mergekit's task_arithmetic, whole processes",
                find(found, MERGEKIT).median / ours,
                3,
            ),
            Target("110m: times faster than mergekit's ties, whole processes", find(found, TIES).median / ours, 40),
        ]
    if case == "llm":
        return [
            Target("llm: peak resident memory above the imports', GiB", above, 1.5, at_least=False),
            Target("llm: bytes a second of cat + cp over those after imports", work / copied, 1.5, at_least=False),
            Target(
                "llm: bytes a second of dd with fsync over those after imports",
                work / find(found, DISK).median,
                1.5,
                at_least=False,
            ),
        ]
    return []


def result(line: Line, dtype: str, tasks: int) -> Result:
    """As `benchmarks.harness` writes it to a CSV file, the memory in the note."""
    memory = f"peak {line.peak / 1e6:.0f} MB" if not math.isnan(line.peak) else ""
    memory += f", {line.anonymous / 1e6:.0f} MB anonymous" if not math.isnan(line.anonymous) else ""
    case = Case(
        operation=line.key[0],
        backend=line.key[1],
        run=lambda: None,
        check=lambda: None,
        moved=line.moved,
        dtype=dtype,
        tasks=tasks,
        note=memory,
    )
    return Result(case, line.seconds, line.faults, line.preempted, line.wrong, line.skipped)
