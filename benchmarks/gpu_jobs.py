"""The processes of `benchmarks.gpu_suite`: side by side, each with its time, and what their output says."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from xml.etree import ElementTree

from awd_fast import measure
from benchmarks import harness

PASSED, FAILED, OUT_OF_TIME, CANNOT_RUN = "passed", "failed", "out of time", "cannot run"
SANITIZER_ERROR = 99
OURS = re.compile(r"awd::|awd_fast|triton_")
"""In what compute-sanitizer says of an error: a kernel or a file of ours, not one of PyTorch."""
ALLOWED_SKIPS = (
    "this machine has a GPU",
    "there is a CUDA device",
    "this CPU has no ",
    "a small file system needs",
    "not built for sm_80, sm_90 and sm_100",  # machine code is looked at where it is built for all of them
)
"""Skips that a machine with a GPU may have; any other is a test that could have run."""
LOG = Lock()


@dataclass(frozen=True)
class Job:
    """A process. report: the JUnit file that it writes. strict: whether tests may be skipped only for ALLOWED_SKIPS."""

    stage: str
    name: str
    command: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    report: Path | None = None
    strict: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a job: a status, how long it took, and a sentence."""

    stage: str
    name: str
    status: str
    seconds: float
    detail: str = ""

    def line(self) -> str:
        return (
            f"{self.status} {self.stage} {self.name} ({self.seconds:.0f} s){': ' if self.detail else ''}{self.detail}"
        )


def run(chains: Sequence[Sequence[Job]], deadline: float, workers: int, out: Path) -> Iterator[Outcome]:
    """The outcomes as they come. Output goes to <out>/<stage>.log; deadline: of time.monotonic()."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        # The longest chain first: its jobs wait for each other.
        waiting = [pool.submit(run_chain, chain, deadline, out) for chain in sorted(chains, key=len, reverse=True)]
        for done in as_completed(waiting):
            yield from done.result()


def run_chain(chain: Sequence[Job], deadline: float, out: Path) -> list[Outcome]:
    """Jobs in a row; one that fails does not keep the next from being tried."""
    return [run_job(job, deadline, out) for job in chain]


def run_job(job: Job, deadline: float, out: Path) -> Outcome:
    """The process until it ends or the deadline has passed, with all that it started."""
    start = time.monotonic()
    left = deadline - start
    if left <= 0:
        return Outcome(job.stage, job.name, OUT_OF_TIME, 0.0, "there was no time left to begin it")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **job.settings}
    try:
        process = subprocess.Popen(
            job.command,
            cwd=harness.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it started can be ended with it
        )
    except OSError as error:
        return Outcome(job.stage, job.name, CANNOT_RUN, 0.0, f"{job.command[0]} does not start: {error.strerror}")
    late = False
    try:
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    seconds = time.monotonic() - start
    with LOG, (out / f"{job.stage}.log").open("a", encoding="utf-8") as log:
        log.write(f"\n##### {job.name}: {' '.join(job.command)}\n{output}\n##### {job.name}: {seconds:.1f} s\n")
    if late:
        return Outcome(job.stage, job.name, OUT_OF_TIME, seconds, last_line(output))
    status, detail = judged(job, process.returncode, output)
    return Outcome(job.stage, job.name, status, seconds, detail)


def judged(job: Job, code: int, output: str) -> tuple[str, str]:
    """A status and a sentence, from how a process ended and what it wrote."""
    if job.stage == "sanitizer":
        return sanitized(code, output)
    if job.report is not None and job.report.exists():
        return tested(code, ElementTree.parse(job.report).getroot(), job.strict)
    return (PASSED, "") if code == 0 else (FAILED, f"exit code {code}; {last_line(output)}")


def last_line(output: str) -> str:
    """The last line that says something."""
    return next((line.strip()[:300] for line in reversed(output.splitlines()) if line.strip()), "it wrote nothing")


def tested(code: int, report: ElementTree.Element, strict: bool) -> tuple[str, str]:
    """Of a test file: how many tests ran, which failed, what was skipped for which reason."""
    cases = list(report.iter("testcase"))
    failed = [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped: Counter[str] = Counter()
    for case in cases:
        skip = case.find("skipped")
        if skip is not None:
            skipped[skip.get("message", "")] += 1
    count = f"{len(cases) - len(failed) - skipped.total()} passed"
    reasons = [f"{number} skipped ({reason})" for reason, number in skipped.items()]
    if failed:
        return FAILED, f"{len(failed)} failed: {', '.join(failed[:20])}; {'; '.join([count, *reasons])}"
    needless = [reason for reason in skipped if not any(allowed in reason for allowed in ALLOWED_SKIPS)]
    if strict and needless:
        return FAILED, f"{'; '.join([count, *reasons])}; skipped, though there is a GPU"
    # 5: no test was selected, which is nothing wrong.
    return (PASSED if code in (0, 5) else FAILED), "; ".join([count, *reasons])


def sanitized(code: int, output: str) -> tuple[str, str]:
    """Of a run under compute-sanitizer (or without it): what it found in our kernels, and elsewhere."""
    if "Device not supported" in output:
        return CANNOT_RUN, "compute-sanitizer does not support this device here"
    blocks = [
        block for block in re.split(r"(?m)^========= (?=\S)", output)[1:] if "    at " in block or " at " in block
    ]
    blocks = [block for block in blocks if not block.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK"))]
    ours = [block for block in blocks if OURS.search(block)]
    elsewhere = f"{len(blocks) - len(ours)} errors in kernels that are not ours" if len(blocks) > len(ours) else ""
    if ours:
        return FAILED, f"{len(ours)} errors, the first: {' '.join(ours[0].replace('=========', ' ').split())[:300]}"
    if code == 0 or (code == SANITIZER_ERROR and blocks):
        return PASSED, elsewhere
    return FAILED, f"exit code {code}; {last_line(output)}"


def benchmark_options() -> list[str]:
    """What pytest needs to be told where pytest-benchmark, which pyproject.toml gives an option, is missing."""
    return [] if importlib.util.find_spec("pytest_benchmark") else ["-o", "addopts=-q --strict-markers"]


def table(outcomes: Sequence[Outcome]) -> str:
    """Stage by stage: how many processes, how many of them passed, and the longest."""
    rows = [("stage", "processes", "passed", "seconds of the longest")]
    for stage in dict.fromkeys(outcome.stage for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.stage == stage]
        passed = sum(outcome.status == PASSED for outcome in own)
        rows.append((stage, str(len(own)), str(passed), f"{max(outcome.seconds for outcome in own):.0f}"))
    return measure.align(rows)


def registers(build: Path) -> str:
    """What ptxas said of each kernel in the newest build: its name, registers, spills."""
    folders = sorted(build.glob("cuda-*"), key=lambda folder: folder.stat().st_mtime)
    texts = [file.read_text() for file in sorted(folders[-1].glob("*.ptxas.txt"))] if folders else []
    kernel = re.compile(r"Compiling entry function '(\S+)'|(\d+) bytes spill stores|Used (\d+) registers")
    lines, name, spilled = [], "", ""
    for entry, spill, used in (found for text in texts for found in kernel.findall(text)):
        if entry:
            name = entry
        elif spill:
            spilled = spill
        else:
            lines.append(f"{used:>4} registers {spilled:>5} bytes spilled  {name}")
    return "\n".join(lines) or "no reports of ptxas"


if __name__ == "__main__":
    if sys.argv[1:] != ["registers"]:
        raise SystemExit("python -m benchmarks.gpu_jobs registers")
    print(registers(harness.ROOT / "build"))
