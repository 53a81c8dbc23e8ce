"""The proof on a GPU, in one command and under nine minutes: build, all tests, compute-sanitizer, benchmark.

    python -m benchmarks.gpu_suite [--out FOLDER] [--seconds 520] [--stages build,tests,sanitizer,benchmark]
    python -m benchmarks.gpu_suite --rehearse      the same way on the CPU, in small: it proves the script, nothing else

It needs what the project installs, torch, triton, pybind11, pytest, nvcc and compute-sanitizer; no network. FOLDER (by
default that of the variable OUT, or build/gpu-suite) is given a log of each stage, <device>.csv and <device>.json with
the results, which benchmarks/results/ gets too, and suite.json with the facts of the machine and what came of each
stage. A stage that fails or runs out of time ends no other. Exit code 1 where anything failed, could not run, or was
skipped that could have run; 2 without a GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no torch; run the suite with the Python that has it (make gpu PYTHON=...)")

from benchmarks import gpu, gpu_jobs, harness
from benchmarks.gpu_jobs import PASSED, Job, Outcome

ROOT = harness.ROOT
STAGES = {"build": 170.0, "tests": 190.0, "sanitizer": 190.0, "benchmark": 160.0}
"""Seconds of each; the sanitizer runs beside the tests. What a stage leaves over is for those behind it."""
TOOLS = ("memcheck", "racecheck", "initcheck")
BACKENDS = ("cuda", "triton")
REHEARSED_TESTS = ("test_structure.py", "test_span.py")
LONGEST = ("test_cuda.py", "test_triton.py", "test_properties.py", "test_native.py", "test_wheel.py", "test_library.py")
"""Test files that are begun first, because they take long."""
SHARDS = {"test_triton.py": 8, "test_cuda.py": 4}
"""Files whose tests are dealt out among processes: on a GPU Triton compiles a kernel for nearly each of them."""
NO_GPU = "There is no GPU here that torch sees, so nothing was proved; --rehearse runs all stages in small on the CPU."
REHEARSAL = "A REHEARSAL on the CPU: it shows that the script runs, and nothing about a GPU."


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-suite")
    parser.add_argument("--out", type=Path, default=out, help="the folder of logs and results")
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything")
    parser.add_argument("--stages", default=",".join(STAGES), help="of " + ", ".join(STAGES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="processes at a time")
    parser.add_argument("--commit", help="of these sources, where git cannot tell")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in small")
    chosen = parser.parse_args(arguments)
    chosen.stages = chosen.stages.split(",")
    if not set(chosen.stages) <= set(STAGES):
        parser.error(f"--stages is {','.join(chosen.stages)}; expected some of {', '.join(STAGES)}")
    if chosen.jobs < 1 or chosen.seconds <= 0:
        parser.error("--jobs is at least 1, --seconds more than 0")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; gives the exit code."""
    chosen = options(arguments)
    if not torch.cuda.is_available() and not chosen.rehearse:
        print(NO_GPU, file=sys.stderr)
        return 2
    if chosen.commit:
        os.environ["AWD_FAST_COMMIT"] = chosen.commit
    start = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    known = gpu.facts("cpu" if chosen.rehearse else "cuda") | machine()
    if chosen.rehearse:
        print(REHEARSAL)
    print("\n".join(f"{name}: {value}" for name, value in known.items() if value), flush=True)
    record = harness.results_file(chosen.out, known["device"]).with_suffix(".json")
    record.unlink(missing_ok=True)  # of an earlier run, which sections would be added to
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run_stages(chosen, known, Path(scratch), start)
    told = {"facts": known, "rehearsal": chosen.rehearse, "seconds": round(time.monotonic() - start, 1)}
    told["afterwards"] = machine()  # the clocks that the benchmark left
    (chosen.out / "suite.json").write_text(
        json.dumps({**told, "stages": [vars(outcome) for outcome in outcomes]}, indent=1)
    )
    if record.exists():
        gpu.verdict(record)
        if not chosen.rehearse:
            keep(record)
    bad = [outcome for outcome in outcomes if outcome.status != PASSED]
    print("\n" + gpu_jobs.table(outcomes))
    for outcome in bad:
        print(f"{outcome.status.upper()} {outcome.stage} {outcome.name}: {outcome.detail}")
    if chosen.rehearse:
        print(REHEARSAL)
    print(f"{'FAILED' if bad else 'PASSED'} in {time.monotonic() - start:.0f} s; logs in {chosen.out}")
    return 1 if bad else 0


def run_stages(chosen: argparse.Namespace, known: dict[str, str], scratch: Path, start: float) -> list[Outcome]:
    """Every chosen stage within its time; the sanitizer's processes run beside the tests', in a row of their own."""
    outcomes: list[Outcome] = []
    rounds = (("build",), ("tests", "sanitizer"), ("benchmark",))
    for index, together in enumerate(rounds):
        reserved = sum(max(STAGES[name] for name in later) for later in rounds[index + 1 :])
        deadline = start + chosen.seconds - reserved * chosen.seconds / 520.0
        chains = [chain for name in together if name in chosen.stages for chain in plan(name, chosen, known, scratch)]
        for outcome in gpu_jobs.run(chains, deadline, chosen.jobs, chosen.out):
            outcomes.append(outcome)
            print(f"{time.monotonic() - start:5.0f} s  {outcome.line()}", flush=True)
    return outcomes


def plan(stage: str, chosen: argparse.Namespace, known: dict[str, str], scratch: Path) -> list[list[Job]]:
    """The jobs of a stage, in chains whose jobs follow each other; chains run side by side."""
    match stage:
        case "build":
            return build_jobs(chosen, known)
        case "tests":
            return test_jobs(chosen, scratch)
        case "sanitizer":
            return sanitizer_jobs(chosen)
        case _:
            return benchmark_jobs(chosen)


def build_jobs(chosen: argparse.Namespace, known: dict[str, str]) -> list[list[Job]]:
    """The extension in place, for this GPU alone; the emulation that tests/test_cuda.py runs too; Triton's kernels."""
    if chosen.rehearse:
        return [[Job("build", "extension", (sys.executable, "-c", "import torch, awd_fast._C"))]]
    settings = {
        "AWD_FAST_BUILD": "require",
        "AWD_FAST_CUDA": "require",
        "AWD_FAST_CUDA_ARCHS": known["instruction set"].removeprefix("sm_"),
        "AWD_FAST_JOBS": str(chosen.jobs),
    }
    extension = Job("build", "extension", (sys.executable, "setup.py", "build_ext", "--inplace"), settings)
    emulation = (sys.executable, "-c", "from tests import emulated; emulated.why_not() or emulated.build()")
    return [
        [extension, Job("build", "registers", (sys.executable, "-m", "benchmarks.gpu_jobs", "registers"))],
        [Job("build", "emulation", emulation, {"AWD_FAST_JOBS": str(chosen.jobs)})],
        # Triton keeps what it compiles: under the sanitizer it then has it already.
        [Job("build", "triton", (sys.executable, "-m", "tests.small_gpu_calls", "triton"))],
    ]


def test_jobs(chosen: argparse.Namespace, scratch: Path) -> list[list[Job]]:
    """A process for each test file, and several for those that take long."""
    files = sorted(file.name for file in (ROOT / "tests").glob("test_*.py"))
    if chosen.rehearse:
        files = [name for name in files if name in REHEARSED_TESTS]
    files.sort(key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST))
    jobs = []
    for name in files:
        count = SHARDS.get(name, 1)
        for index in range(count):
            label = name if count == 1 else f"{name} {index + 1} of {count}"
            report = scratch / f"{name}-{index}.xml"
            shard = ("-p", "benchmarks.gpu_shard") if count > 1 else ()
            command = (sys.executable, "-m", "pytest", f"tests/{name}", *shard, "-p", "no:cacheprovider", "-rs")
            command = (*command, *gpu_jobs.benchmark_options(), f"--junitxml={report}")
            settings = {"OMP_NUM_THREADS": "2", "AWD_FAST_SHARD": f"{index}/{count}"}
            jobs.append([Job("tests", label, command, settings, report, not chosen.rehearse)])
    return jobs


def sanitizer_jobs(chosen: argparse.Namespace) -> list[list[Job]]:
    """Each tool over a few small calls of every kernel, for a backend one after the other."""
    calls = (sys.executable, "-m", "tests.small_gpu_calls")
    if chosen.rehearse:
        return [[Job("sanitizer", "calls alone", (*calls, "native", "--device", "cpu"))]]
    # Allocations of their own, so that memory behind a tensor is not the next one's, nor written by an earlier one.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = shutil.which("compute-sanitizer") or "compute-sanitizer"
    chains = []
    for backend in BACKENDS:
        jobs = []
        for tool in TOOLS:
            command = (
                program,
                "--tool",
                tool,
                "--error-exitcode",
                str(gpu_jobs.SANITIZER_ERROR),
                "--print-limit",
                "50",
            )
            extra = ("--report-api-errors", "no") if tool == "memcheck" else ()
            jobs.append(Job("sanitizer", f"{tool} {backend}", (*command, *extra, *calls, backend), settings))
        chains.append(jobs)
    return chains


def benchmark_jobs(chosen: argparse.Namespace) -> list[list[Job]]:
    """A process for each section, so that a kernel that ends one leaves the others."""
    small = ("--rehearse", "--shape", "tiny_x3", "--rounds", "1") if chosen.rehearse else ()
    sections = [section for section in gpu.SECTIONS if not chosen.rehearse or section != "compiled"]
    command = (sys.executable, "-m", "benchmarks.gpu", "--results", str(chosen.out), "--add", *small)
    return [[Job("benchmark", section, (*command, "--sections", section)) for section in sections]]


def machine() -> dict[str, str]:
    """More about the GPU and the tools, in the words of nvidia-smi and nvcc."""
    asked = {
        "gpu, memory, SM clock, its maximum, power limit": (
            "nvidia-smi",
            "--query-gpu=name,memory.total,clocks.sm,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ),
        "nvcc": ("nvcc", "--version"),
        "compute-sanitizer": ("compute-sanitizer", "--version"),
    }
    found = {}
    for name, command in asked.items():
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run(command, capture_output=True, text=True)
        found[name] = (done.stdout.strip().splitlines() or [""])[-1]
    return found


def keep(record: Path) -> None:
    """Adds the results to those in benchmarks/results/: the CSV's rows, and the JSON of the last run."""
    rows, target = record.with_suffix(".csv"), harness.RESULTS / record.with_suffix(".csv").name
    if rows.exists() and rows.resolve() != target.resolve():
        lines = rows.read_text().splitlines(keepends=True)
        with target.open("a", encoding="utf-8") as out:
            out.writelines(lines if target.stat().st_size == 0 else lines[1:])
        shutil.copy(record, target.with_suffix(".json"))


if __name__ == "__main__":
    sys.exit(main())
