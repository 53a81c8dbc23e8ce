"""Around the measurements: the allocator's settings, the facts of this machine and version, results as CSV rows."""

import csv
import datetime
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from awd_fast import measure
from awd_fast.measure import Result
from awd_fast.version import __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc gives memory of more than 32 MB back to the system when it is freed, and its pages are cleared and mapped anew
on the next use: that costs an operator's output more time than to write it, on either side of a comparison. With these
settings freed memory stays with the process. They are environment variables that glibc reads at the start, so the
harness starts itself again; the page faults that it prints show whether they took effect (glibc 2.36: no faults after
the first round, and 16384 for each 64 MB tensor without them)."""

COLUMNS = (
    "date",
    "commit",
    "device",
    "instruction set",
    "threads",
    "torch",
    "python",
    "awd_fast version",
    "shape",
    "dtype",
    "K",
    "operation",
    "backend",
    "median_s",
    "min_s",
    "rounds",
    "bytes",
    "GB/s",
    "share",
    "note",
)


def keep_freed_memory(module: str) -> None:
    """Starts `python -m module` again with the allocator's settings, unless they are there."""
    if all(os.environ.get(name) == value for name, value in ALLOCATOR.items()):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **ALLOCATOR})


def commit() -> str:
    """The short hash of the sources, with +dirty where they were changed.

    Outside git, as in a copy on another machine, what AWD_FAST_COMMIT says, or "unknown".
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("AWD_FAST_COMMIT") or "unknown"


def facts() -> dict[str, str]:
    """What a row says about where and with what it was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "device": measure.device(),
        "instruction set": measure.instruction_set(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "awd_fast version": __version__,
    }


def results_file(folder: Path, device: str | None = None) -> Path:
    """`folder`/<device>.csv, by default of this CPU."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", (device or measure.device()).lower()).strip("-") + ".csv")


def rows(results: Sequence[Result], shape: str, known: dict[str, str]) -> list[dict[str, str]]:
    """A CSV row for every result that was timed; the shares are those of the memory limit among `results`."""
    limit = measure.memory_limit(results)

    def text(value: float, digits: str) -> str:
        return "" if math.isnan(value) else format(value, digits)

    return [
        {
            **known,
            "shape": shape,
            "dtype": result.case.dtype,
            "K": str(result.case.tasks or ""),
            "operation": result.case.operation,
            "backend": result.case.backend,
            "median_s": f"{result.median:.6g}",
            "min_s": f"{result.fastest:.6g}",
            "rounds": str(len(result.seconds)),
            "bytes": text(result.case.moved or math.nan, ".0f"),
            "GB/s": text(result.gigabytes, ".2f"),
            "share": text(result.gigabytes / limit, ".3f"),
            "note": measure.note(result),
        }
        for result in results
        if result.seconds
    ]


def append(file: Path, new: Sequence[dict[str, str]], columns: Sequence[str] = COLUMNS) -> None:
    """Adds rows to a CSV file, which begins with the names of the columns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    empty = not file.exists() or file.stat().st_size == 0
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        if empty:
            writer.writeheader()
        writer.writerows(new)
