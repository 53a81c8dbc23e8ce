"""Spoilt inputs by the ten thousand: `python -m benchmarks.fuzz [--cases 100000] [--seed 0] [--time SECONDS]`.

Files of every kind that the package reads are spoilt, opened, and merged where they open. Each case must end in one
clear sentence (`awd_fast.InputError`, or OSError for the machine) or in a right result, within two seconds of processor
time and without memory beyond a constant and some times the file's size. The cases run in forked workers, so that a
crash is a finding too. A case that violates this is kept in a folder with its traceback; `--only CASE` runs it again.
"""

import argparse
import ctypes
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that looks like one on the Hub is not asked for

import torch

from benchmarks.fuzz_cases import KINDS
from benchmarks.fuzz_checks import Violation
from benchmarks.fuzz_files import Good

SECONDS = 2.0
"""Of processor time for one case."""
STUCK = 60.0
"""Seconds after which a worker that says nothing is ended."""
ROOM = 64 << 20
"""Bytes that a case may take, beside `TIMES` what the files in its folder have."""
TIMES = 24
"""Of a file's size: a header of lists becomes Python's and Rust's objects, 8 to 32 bytes for each two characters."""
ADDRESSES = 2 << 30
"""Bytes of address space that a worker may take more than it begins with, threads and their heaps included."""
BATCH = 4000


@dataclass(frozen=True)
class Case:
    """What became of a case: its kind, its outcome, the traceback of a violation, and what it took.

    memory: bytes by which the process grew meanwhile. size: of the spoilt file.
    """

    kind: str
    outcome: str
    trace: str | None = None
    seconds: float = 0.0
    memory: int = 0
    size: int = 0


@dataclass
class Tally:
    """What became of all cases. bad: the numbers of those that violate what is promised."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[int] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[int, int, int] = (0, 0, -1)

    def add(self, number: int, case: Case) -> None:
        self.counts[case.kind, case.outcome] += 1
        if case.trace is not None:
            self.bad.append(number)
        self.slowest = max(self.slowest, (case.seconds, number))
        self.largest = max(self.largest, (case.memory, case.size, number))


class TooSlow(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def choose(seed: int, case: int) -> tuple[str, random.Random]:
    """The kind of a case, and the generator for it: they depend on nothing else."""
    generator = random.Random(f"{seed}:{case}")
    kinds = list(KINDS)
    return generator.choices(kinds, [KINDS[kind][1] for kind in kinds])[0], generator


def run_case(good: Good, seed: int, case: int) -> Case:
    """Runs one case."""
    kind, generator = choose(seed, case)
    before, started = _reset_peak(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        outcome, trace = KINDS[kind][0](good, generator), None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, TooSlow):
            outcome = f"VIOLATION: more than {SECONDS:g} s"
        elif isinstance(error, Violation):
            outcome = "VIOLATION: " + str(error)[:60]
        else:
            outcome = f"VIOLATION: of the harness, {type(error).__name__}"
        trace = f"after {time.process_time() - started:.2f} s\n{traceback.format_exc()[-6000:]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - started
    grown, size = max(_peak() - before, 0), sum(len(data) for _, data in good.spoilt)
    if grown > ROOM + TIMES * size and trace is None:
        outcome, trace = "VIOLATION: memory", f"{grown} bytes for a file of {size}"
    return Case(kind, outcome, trace, seconds, grown, size)


def _reset_peak() -> int:
    """Forgets how much memory the process has had; what it has now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak("VmRSS:")


def _peak(field: str = "VmHWM:") -> int:
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) << 10 for line in status if line.startswith(field)), 0)
    except OSError:
        return 0


def work(to: Connection, folder: Path, seed: int, cases: range) -> None:
    """A worker: runs cases and says what became of each."""
    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # one heap: a thread's own takes 64 MB of addresses
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _too_slow)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    good = Good.make(folder)
    os.chdir(folder)
    for case in cases:
        found = run_case(good, seed, case)
        if found.trace is not None:
            _keep(seed, case, found.trace, good.spoilt)
            shutil.rmtree(folder)
            folder.mkdir()
            good = Good.make(folder)
            os.chdir(folder)
        to.send(found)


def _keep(seed: int, case: int, trace: str, files: Sequence[tuple[Path, bytes]] = ()) -> None:
    """Keeps a violation: how to run it again, its traceback and the spoilt files."""
    kept = _failures() / f"{seed}-{case}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    command = f"python -m benchmarks.fuzz --seed {seed} --only {case}"
    (kept / "traceback.txt").write_text(f"{command}\n{trace}\n", encoding="utf-8", errors="backslashreplace")
    for file, data in files:
        (kept / file.name).write_bytes(data)


def _failures() -> Path:
    return Path(os.environ.get("AWD_FAST_FUZZ", Path(tempfile.gettempdir()) / "awd-fast-fuzz"))


def fuzz(seed: int, cases: range, seconds: float = float("inf")) -> Tally:
    """Runs cases in workers."""
    tally = Tally()
    context, end, at = multiprocessing.get_context("fork"), time.monotonic() + seconds, cases.start
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
        while at < cases.stop and time.monotonic() < end:
            receiver, sender = context.Pipe(duplex=False)
            batch = range(at, min(at + BATCH, cases.stop))
            worker = context.Process(target=work, args=(sender, Path(place) / "work", seed, batch))
            worker.start()
            sender.close()
            for at in batch:
                found = _received(receiver, worker)
                lost = isinstance(found, str)
                if isinstance(found, str):
                    found = Case(choose(seed, at)[0], f"VIOLATION: {found}", found)
                    _keep(seed, at, found.outcome)
                tally.add(at, found)
                if lost or time.monotonic() > end:
                    break
            worker.kill()
            worker.join()
            receiver.close()
            at += 1
    return tally


def _received(receiver: Connection, worker: BaseProcess) -> Case | str:
    """What a worker says of its next case, or what happened to it, after which it is no more."""
    if not receiver.poll(STUCK):
        worker.kill()
        worker.join()
        return f"nothing for {STUCK:g} s"
    try:
        case: Case = receiver.recv()
    except EOFError:
        worker.join()
        return f"the process ended with {worker.exitcode}"
    return case


def table(counts: Counter[tuple[str, str]]) -> str:
    """The counts as a Markdown table."""
    lines = ["| input | outcome | cases |", "|---|---|---:|"]
    order = {kind: index for index, kind in enumerate(KINDS)}
    for (kind, outcome), count in sorted(counts.items(), key=lambda item: (order[item[0][0]], -item[1])):
        lines.append(f"| {kind} | {outcome} | {count:,} |")
    return "\n".join([*lines, f"| all | | {sum(counts.values()):,} |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", type=float, default=float("inf"), metavar="SECONDS", help="end after that long")
    parser.add_argument("--only", type=int, metavar="CASE", help="run one case again")
    given = parser.parse_args()
    with suppress(ImportError):
        import huggingface_hub  # noqa: F401  once, and not in each worker
    cases = range(given.cases) if given.only is None else range(given.only, given.only + 1)
    started = time.monotonic()
    tally = fuzz(given.seed, cases, given.time)
    print(table(tally.counts))
    took, total = time.monotonic() - started, sum(tally.counts.values())
    print(f"\nseed {given.seed}: {total:,} cases in {took:.0f} s, {len(tally.bad)} violations")
    print(f"the slowest, case {tally.slowest[1]}, took {tally.slowest[0]:.2f} s of processor time")
    memory, size, case = tally.largest
    print(f"the largest, case {case}, took {memory / 1e6:.1f} MB for a file of {size / 1e6:.2f} MB")
    for case in tally.bad[:40]:
        kept = _failures() / f"{given.seed}-{case}" / "traceback.txt"
        print(f"violation: {kept}")
        if given.only is not None:
            print(kept.read_text(encoding="utf-8"))
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
