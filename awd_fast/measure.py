"""How speed is measured: cases that are checked first, timed in interleaved rounds, and compared with the memory.

`awd-fast bench` and the repository's benchmarks both use it. The memory limit is STREAM's triad a = b + s c over arrays
far larger than the caches, 12 bytes an element as STREAM counts them, with plain stores (which read each line before
they write it: 16 bytes of traffic) or with non-temporal ones. The better of the two is what memory can do.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.ops import backends, native

TRIAD, COPY = "triad", "copy"
LIMITS = (TRIAD, COPY)  # what says what memory can do: on a CPU, on a GPU
PLAIN, NON_TEMPORAL = "plain stores", "non-temporal stores"
TRIAD_SCALE = 3.0
BUSY = "busy machine"
PREEMPTED = 30.0  # times a second, for all threads together; a machine of its own has a few


class CannotRunError(Exception):
    """Why a case cannot be run here, in words: it is skipped, which is not wrong."""


Timed = tuple[float, int, int]
"""Seconds, minor page faults and preemptions of one run."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to time.

    run: does it once; what it returns lives until the clock has stopped, so that every output has memory of its own.
    check: a sentence on what is wrong with its results, or None; raises CannotRunError where it cannot run here.
    moved: bytes that one operation must move between memory and CPU, counted; 0 where memory does not limit it.
    repeats: operations in what is reported, for each that is run: a part is timed and scaled up. `note` says so.
    most_rounds: for what takes long.
    peer: the backend of the same operation that it is compared with.
    """

    operation: str
    backend: str
    run: Callable[[], object]
    check: Callable[[], str | None]
    moved: float = 0.0
    repeats: float = 1.0
    most_rounds: int = 1000
    dtype: str = "float32"
    tasks: int = 0
    peer: str = ""
    note: str = ""


@dataclass(frozen=True)
class Result:
    """A case with its times in seconds (`repeats` counted in), or with why there are none.

    faults: the median of the page faults in a run; pages that the system hands out during a run are a cost of the
    allocator, not of the operation. preempted: how often, in the median run, a thread lost its core to another process.
    """

    case: Case
    seconds: tuple[float, ...] = ()
    faults: int = 0
    preempted: int = 0
    wrong: str | None = None
    skipped: str | None = None

    @property
    def median(self) -> float:
        """Seconds; NaN where nothing was timed."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def fastest(self) -> float:
        """Seconds; NaN where nothing was timed."""
        return min(self.seconds, default=math.nan)

    @property
    def busy(self) -> bool:
        """True where other processes took the cores so often that the times say little."""
        return self.preempted > PREEMPTED * self.median / self.case.repeats

    @property
    def gigabytes(self) -> float:
        """Counted bytes over the median time, in 1e9 bytes a second; NaN where none are counted."""
        return self.case.moved / self.median / 1e9 if self.case.moved and self.seconds else math.nan


def measure(
    cases: Sequence[Case],
    rounds: int,
    budget: float = 3.0,
    say: Callable[[str], None] = lambda line: None,
    timed: Callable[[Callable[[], object]], Timed] | None = None,
) -> list[Result]:
    """Checks every case, then times those that are right, one run of each in turn, in `rounds` rounds.

    Neighbours on the machine and its clock then disturb all alike. A case that has run for `budget` seconds is left
    out of the later rounds. say: is given a line for each case that is checked, with what came of it. timed: the clock,
    which makes one run; by default that of the host, and on a GPU one that knows when the GPU has finished.
    """
    clock = _timed if timed is None else timed
    results: dict[int, Result] = {}
    times: dict[int, list[Timed]] = {}
    for index, case in enumerate(cases):
        name = f"{case.operation} ({case.backend})"
        try:
            wrong = case.check()
        except Exception as error:
            # A backend that does not take a call says so (`backends.select`); one that fails is wrong.
            if isinstance(error, CannotRunError) or (isinstance(error, InputError) and "cannot run" in str(error)):
                results[index] = Result(case, skipped=str(error))
                say(f"skipped {name}: {error}")
                continue
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong is not None:
            results[index] = Result(case, wrong=wrong)
            say(f"WRONG {name}: {wrong}")
            continue
        say(f"checked {name}")
        times[index] = []
        case.run()  # warms its buffers and the code
    for _ in range(rounds):
        for index, past in times.items():
            spent = sum(seconds for seconds, _, _ in past)
            if len(past) < cases[index].most_rounds and spent < budget:
                past.append(clock(cases[index].run))
    for index, past in times.items():
        seconds, faults, preempted = zip(*past, strict=True)
        results[index] = Result(
            cases[index],
            tuple(one * cases[index].repeats for one in seconds),
            int(statistics.median(faults)),
            int(statistics.median(preempted)),
        )
    return [results[index] for index in range(len(cases))]


def _timed(run: Callable[[], object]) -> Timed:
    faults, preempted = _disturbances()
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    more_faults, more_preempted = _disturbances()
    del kept
    return seconds, more_faults - faults, more_preempted - preempted


def _disturbances() -> tuple[int, int]:
    """Minor page faults and involuntary context switches of this process so far; 0 where they are not counted."""
    try:
        import resource
    except ImportError:
        return 0, 0
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_nivcsw


def triad(a: Tensor, b: Tensor, c: Tensor, scale: float, streaming: bool) -> None:
    """a = b + scale * c for dense float32 tensors of one size, in the compiled module, on torch's number of threads.

    streaming: with non-temporal stores, where the CPU has them.
    """
    native._module().triad(
        a=a.data_ptr(),
        b=b.data_ptr(),
        c=c.data_ptr(),
        scale=scale,
        count=a.numel(),
        streaming=streaming,
        threads=torch.get_num_threads(),
    )


def triad_cases(count: int) -> list[Case]:
    """The memory limit over three arrays of `count` float32: both compiled variants, or torch's without the module."""
    a, b, c = torch.empty(count), torch.full((count,), 2.0), torch.full((count,), 0.25)

    def case(backend: str, run: Callable[[], object], note: str) -> Case:
        def check() -> str | None:
            a.fill_(torch.nan)
            run()
            return None if bool((a == 2.0 + TRIAD_SCALE * 0.25).all()) else "a is not b + s c"

        return Case(operation=TRIAD, backend=backend, run=run, check=check, moved=12.0 * count, note=note)

    if backends.unavailable("native") is not None:
        return [case("PyTorch", lambda: torch.add(b, c, alpha=TRIAD_SCALE, out=a), "no compiled module")]
    return [
        case(PLAIN, lambda: triad(a, b, c, TRIAD_SCALE, False), ""),
        case(NON_TEMPORAL, lambda: triad(a, b, c, TRIAD_SCALE, True), ""),
    ]


def memory_limit(results: Sequence[Result]) -> float:
    """What memory can do, in 1e9 bytes a second: the best triad or copy among `results`; NaN without one."""
    timed = (result.gigabytes for result in results if result.case.operation in LIMITS and result.seconds)
    return max(timed, default=math.nan)


def note(result: Result) -> str:
    """The case's note, and a warning where the machine was busy."""
    return "; ".join(filter(None, [result.case.note, BUSY if result.busy else ""]))


def summary(results: Sequence[Result]) -> str:
    """The memory limit in words, and a warning where the machine was busy."""
    copied = any(result.case.operation == COPY for result in results)
    what = "a copy, read and written" if copied else "the better triad at 12 bytes an element"
    line = f"memory limit: {memory_limit(results):.1f} GB/s, {what}"
    plain = find(results, TRIAD, PLAIN)
    if plain is not None:
        rate = plain.gigabytes
        line += f"; plain stores {rate:.1f}, or {rate * 4 / 3:.1f} with write-allocate (16 bytes)"
    busy = sum(result.busy for result in results)
    if busy:
        line += f"\nother processes used the cores in {busy} of {len(results)} cases: their times say little"
    return line


def find(
    results: Sequence[Result], operation: str, backend: str, dtype: str = "float32", tasks: int = 0
) -> Result | None:
    """The result of that operation, where it was timed. tasks: K, or 0 for the first."""
    for result in results:
        case = result.case
        same = (case.operation, case.backend, case.dtype) == (operation, backend, dtype)
        if same and result.seconds and tasks in (0, case.tasks):
            return result
    return None


def device() -> str:
    """The CPU in words: its model and the number of cores of the process's machine."""
    import os

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def instruction_set() -> str:
    """What the compiled operators run, or "none" without them."""
    return "none" if backends.unavailable("native") is not None else str(native.build_info()["instruction_set"])


def duration(seconds: float) -> str:
    """A time with three digits and a unit that suits it."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000.0:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 1000.0 else f"{seconds:.0f} s"


def table(results: Sequence[Result]) -> str:
    """The results as text: time, bytes, share of the memory limit, ratio against the peer, page faults, note."""
    limit = memory_limit(results)
    heads = (
        "operation",
        "backend",
        "dtype",
        "K",
        "time",
        "MB",
        "GB/s",
        "% of limit",
        "against",
        "faults",
        "preempted",
        "note",
    )
    rows: list[tuple[str, ...]] = [heads]
    for result in results:
        case, reason = result.case, result.wrong or result.skipped
        first = (case.operation, case.backend, case.dtype, str(case.tasks or ""))
        if reason is not None:
            rows.append((*first, "WRONG" if result.wrong else "skipped", *[""] * 6, reason))
            continue
        counted = bool(case.moved)
        peer = find(results, case.operation, case.peer, case.dtype, case.tasks) if case.peer else None
        rows.append(
            (
                *first,
                duration(result.median),
                f"{case.moved / 1e6:.0f}" if counted else "",
                f"{result.gigabytes:.1f}" if counted else "",
                f"{100.0 * result.gigabytes / limit:.0f}" if counted and not math.isnan(limit) else "",
                f"{peer.median / result.median:.3g}x {case.peer}" if peer else "",
                str(result.faults),
                str(result.preempted),
                note(result),
            )
        )
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns: the first is the head; a column whose cells are all numbers is set to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = [not all(row[column][:1].isdigit() or not row[column] for row in rows[1:]) for column in range(len(widths))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
