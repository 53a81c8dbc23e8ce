"""Processes that merge folders, with their time and memory: awd-fast, mergekit, cat and cp.

Memory is the kernel's own peak of resident pages (VmHWM), and the anonymous part of them (RssAnon) as often as it is
looked at: pages of mapped input files count in the first, and the system can take those back. ru_maxrss is not used: a
child inherits that of the process that started it.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness import ALLOCATOR, ROOT

MERGEKIT = "mergekit==0.1.5"
OPTIONS = ("--preset", "rows", "--scale", "0.3")  # what the committed figures were measured with
PERIOD = 0.01  # seconds between two looks at a process's memory
START_UP = "import torch, awd_fast; awd_fast.merge_checkpoints"


class ProcessFailed(Exception):
    """What a process wrote as it failed: its last line."""


@dataclass(frozen=True)
class Run:
    """One run. seconds: of the whole process; work: after its imports. peak, anonymous: bytes; NaN where not known."""

    seconds: float
    work: float = math.nan
    peak: float = math.nan
    anonymous: float = math.nan
    faults: int = 0
    preempted: int = 0
    printed: str = ""


def environment(python_path: bool = True) -> dict[str, str]:
    """As users have it: no settings of the allocator, and no downloads. python_path: with this checkout's awd_fast."""
    kept = {name: value for name, value in os.environ.items() if name not in (*ALLOCATOR, "PYTHONPATH")}
    here = {"PYTHONPATH": str(ROOT)} if python_path else {}
    return kept | here | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def run(command: Sequence[str], python_path: bool = True) -> Run:
    """Runs a process to its end. Raises ProcessFailed where its exit code is not 0."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment(python_path))
        seen = Memory(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            seconds = time.perf_counter() - start
            seen.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        printed, wrong = (file.read().decode("utf-8", "replace") for file in (out, errors))
    if process.returncode != 0:
        raise ProcessFailed((wrong.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    counts = (usage.ru_minflt, usage.ru_nivcsw)
    return Run(seconds, math.nan, seen.peak, seen.anonymous, *counts, printed)


class Memory(threading.Thread):
    """Looks at a process's memory until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.file, self.over = f"/proc/{pid}/status", threading.Event()
        self.peak = self.anonymous = math.nan
        self.start()

    def run(self) -> None:
        while True:
            self.look()
            if self.over.wait(PERIOD):
                return

    def look(self) -> None:
        """The figures in bytes; a process that has ended has none, and the last ones stay."""
        try:
            with open(self.file, encoding="ascii") as file:
                lines = dict(line.split(":", 1) for line in file)
            peak, anonymous = (1024.0 * int(lines[name].split()[0]) for name in ("VmHWM", "RssAnon"))
        except (OSError, KeyError, ValueError):
            return
        self.peak = peak
        self.anonymous = anonymous if math.isnan(self.anonymous) else max(self.anonymous, anonymous)

    def stop(self) -> None:
        self.over.set()
        self.join()


def start_up() -> Run:
    """A process that imports torch and all that a merge imports, and does nothing."""
    return run([sys.executable, "-c", START_UP])


def read_and_copy(inputs: Sequence[Path], sizes: Sequence[Path], out: Path) -> Run:
    """cat of all inputs to /dev/null, then cp of files as large as the output; `out` is a folder to make."""
    read = run(["sh", "-c", 'exec cat "$@" > /dev/null', "cat", *map(str, inputs)])
    out.mkdir(parents=True)
    written = run(["cp", *map(str, sizes), str(out)])
    both = read.seconds + written.seconds
    return Run(both, both, max(read.peak, written.peak), faults=read.faults + written.faults)


def read_and_sync(inputs: Sequence[Path], sizes: Sequence[Path], out: Path) -> Run:
    """The same bytes through a process's own memory and to the disk, as any merge must move them: dd with fsync.

    cat and cp leave the bytes of a warm page cache where they are, and the output in memory.
    """
    script = 'for file in "$@"; do dd if="$file" of=/dev/null bs=4M status=none || exit 1; done'
    read = run(["sh", "-c", script, "dd", *map(str, inputs)])
    out.mkdir(parents=True)
    copy = 'dd if="$file" of="$out/${file##*/}" bs=4M conv=fsync status=none'
    script = f'out=$1; shift; for file in "$@"; do {copy} || exit 1; done'
    written = run(["sh", "-c", script, "dd", str(out), *map(str, sizes)])
    both = read.seconds + written.seconds
    return Run(both, both, max(read.peak, written.peak), faults=read.faults + written.faults)


def awd_fast(base: Path, models: Sequence[Path], out: Path, method: str, log: Path) -> Run:
    """`awd-fast merge` by rows, the authors' options, and, from its log, its time after the imports."""
    command = [sys.executable, "-m", "awd_fast", "merge", "--base", str(base), "--out", str(out), "--method", method]
    command += [*OPTIONS, *(f"--model={model}" for model in models)]
    log.unlink(missing_ok=True)
    whole = run([*command, "--json-log", str(log)])
    return replace(whole, work=last_event(log.read_text()))


def last_event(text: str) -> float:
    """The seconds of the last line of a log in JSON lines, which says that the merge is done."""
    last = json.loads(text.strip().splitlines()[-1])
    if last.get("event") != "done":
        raise ProcessFailed(f"the log ends with the event {last.get('event')!r}; expected 'done'")
    return float(last["seconds"])


def materialise(base: Path, adapters: Sequence[Path], work: Path, out: Path) -> Run:
    """What one does without adapters as inputs: full models made of them, then a merge of those, in one process."""
    command = [sys.executable, "-m", "benchmarks.folder_lora", "--base", str(base), "--work", str(work)]
    found = run([*command, "--out", str(out), *(f"--adapter={adapter}" for adapter in adapters)])
    return replace(found, work=json.loads(found.printed)["seconds"])


def mergekit_config(base: Path, models: Sequence[Path], method: str, weight: float) -> str:
    """A configuration in JSON, which is YAML as well. ties keeps half of each task vector."""
    own: dict[str, float] = {"weight": weight} | ({"density": 0.5} if method == "ties" else {})
    config = {
        "merge_method": method,
        "base_model": str(base.resolve()),
        "models": [{"model": str(model.resolve()), "parameters": own} for model in models],
        "parameters": {"normalize": method == "ties"},
        "dtype": "float32",
    }
    return json.dumps(config, indent=2)


def mergekit(venv: Path, config: Path, out: Path) -> Run:
    """`mergekit-yaml` as a whole process, without a model card: that looks for the models on the network."""
    command = [str(venv / "bin" / "mergekit-yaml"), str(config), str(out), "--no-write-model-card", "--quiet"]
    return run([*command, "--no-copy-tokenizer"], python_path=False)


def install_mergekit(venv: Path) -> bool:
    """mergekit in an environment of its own, with the project's constraints, and whether it had to be made now."""
    if (venv / "bin" / "mergekit-yaml").exists():
        return False
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([sys.executable, "-m", "venv", str(venv)], python_path=False)
    run([*pip, "-c", str(ROOT / "constraints.txt"), MERGEKIT, "torch"], python_path=False)
    return True
