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
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that looks like one on the Hub is not asked for

import torch

from benchmarks.fuzz_cases import KINDS, Violation
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


class TooSlow(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def choose(seed: int, case: int) -> tuple[str, random.Random]:
    """The kind of a case, and the generator for it: they depend on nothing else."""
    generator = random.Random(f"{seed}:{case}")
    kinds = list(KINDS)
    return generator.choices(kinds, [KINDS[kind][1] for kind in kinds])[0], generator


def run_case(good: Good, seed: int, case: int) -> tuple[str, str, str | None]:
    """One case: its kind, its outcome, and the traceback of a violation."""
    kind, generator = choose(seed, case)
    before, started = _reset_peak(), time.process_time()
    sizes = 0
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
    grown = _peak() - before
    if grown > ROOM and trace is None:
        sizes = max(good.folder.stat().st_size, _largest(seed, case))
        if grown > ROOM + TIMES * sizes:
            outcome, trace = "VIOLATION: memory", f"{grown} bytes for a file of {sizes}"
    return kind, outcome, trace


def _largest(seed: int, case: int) -> int:
    """Bytes of the file that a case is about."""
    from benchmarks.fuzz_files import adapter, safetensors, state

    kind, generator = choose(seed, case)
    if kind == "safetensors":
        role = generator.choice(("base", "m0", "m1"))
        return len(safetensors(state(("base", "m0", "m1").index(role)), generator))
    return len(safetensors(adapter(), generator)) if kind == "adapter weights" else 100_000


def _reset_peak() -> int:
    """Forgets how much memory the process has had; what it has now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
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
    try:
        ctypes.CDLL(None).mallopt(-8, 1)  # one heap: a thread's own takes 64 MB of addresses
    except (OSError, AttributeError):
        pass
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
        if found[2] is not None:
            _keep(folder, seed, case, found[2])
            shutil.rmtree(folder)
            folder.mkdir()
            good = Good.make(folder)
            os.chdir(folder)
        to.send((case, *found))
    to.send(None)


def _keep(folder: Path, seed: int, case: int, trace: str) -> None:
    """Keeps a violation's traceback, and the file if it can be made again."""
    kept = _failures() / f"{seed}-{case}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    command = f"python -m benchmarks.fuzz --seed {seed} --only {case}"
    (kept / "traceback.txt").write_text(f"{command}\n{trace}\n", encoding="utf-8", errors="backslashreplace")


def _failures() -> Path:
    return Path(os.environ.get("AWD_FAST_FUZZ", Path(tempfile.gettempdir()) / "awd-fast-fuzz"))


def fuzz(seed: int, cases: range, seconds: float = float("inf")) -> tuple[Counter[tuple[str, str]], list[int]]:
    """Runs cases in workers; how often each kind had each outcome, and the cases that violate what is promised."""
    counts: Counter[tuple[str, str]] = Counter()
    bad: list[int] = []
    context, started, at = multiprocessing.get_context("fork"), time.monotonic(), cases.start
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
        while at < cases.stop and time.monotonic() - started < seconds:
            end = min(at + BATCH, cases.stop)
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(sender, Path(place) / "work", seed, range(at, end)))
            worker.start()
            sender.close()
            while time.monotonic() - started < seconds:
                message = _received(receiver)
                if message is None or isinstance(message, str):
                    break
                case, kind, outcome, trace = message
                counts[kind, outcome] += 1
                bad += [case] if trace is not None else []
                at = case + 1
            else:
                message = None
            if message is None and at < end or message is not None:
                worker.kill()
            worker.join()
            if message is not None:  # the worker died, or hangs
                kind = choose(seed, at)[0]
                word = f"VIOLATION: {message}" if message != "ended" else f"VIOLATION: exit code {worker.exitcode}"
                counts[kind, word] += 1
                bad.append(at)
                _keep(Path(place), seed, at, word)
                at += 1
    return counts, bad


def _received(receiver: Connection) -> tuple[int, str, str, str | None] | str | None:
    """The next message of a worker, None at its end, or what happened to it."""
    if not receiver.poll(STUCK):
        return f"nothing for {STUCK:g} s"
    try:
        message: tuple[int, str, str, str | None] | None = receiver.recv()
    except EOFError:
        return "ended"
    return message


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
    try:
        import huggingface_hub  # noqa: F401  once, and not in each worker
    except ImportError:
        pass
    cases = range(given.cases) if given.only is None else range(given.only, given.only + 1)
    started = time.monotonic()
    counts, bad = fuzz(given.seed, cases, given.time)
    print(table(counts))
    print(f"\nseed {given.seed}: {sum(counts.values())} cases in {time.monotonic() - started:.0f} s, {len(bad)} violations")
    for case in bad[:40]:
        kept = _failures() / f"{given.seed}-{case}" / "traceback.txt"
        print(f"violation: {kept}")
        if given.only is not None:
            print(kept.read_text(encoding="utf-8"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
