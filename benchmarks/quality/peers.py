"""Merges by mergekit and FusionBench, called from these packages in an environment of their own.

    python -m benchmarks.quality.peers                                make the environment and list the methods
    python -m benchmarks.quality.peers --base B --models M1 M2 ...    run every method, or those of --methods

Nothing of theirs is imported here: `peer_worker.py` runs in their Python, one process for each merge. A merge is kept
under a key of everything that decides it, so the second run of a study takes its files.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.data import cache_folder
from benchmarks.quality.peer_methods import LEFT_OUT, METHODS, Method, Scale

HERE = Path(__file__).parent
CONSTRAINTS = HERE / "peer_constraints.txt"
WORKER = HERE / "peer_worker.py"

# What is installed; the versions of these and of all that they need stand in CONSTRAINTS.
REQUIREMENTS = ("torch", "mergekit", "fusion-bench", "transformers", "safetensors")

# Written as the last step of making the environment; without it the environment is made again.
MARKER = "complete"


class PeerError(RuntimeError):
    """The peers' environment could not be made, or a peer could not merge."""


@dataclass(frozen=True)
class PeerMerge:
    """One merge on disk.

    file: safetensors file with the merged tensors, names and shapes those of the base, at the scale that was asked for.
    seconds: of the merge alone; of mergekit, which reads, merges and writes tensor by tensor, of all three. loading and
    writing: seconds that FusionBench needs besides. process_seconds: from the start of the process to its end, imports
    and all. changed: number of dimensions -> (tensors that differ from the base, tensors). relative_update: length of
    (merged - base) relative to that of the sum of all task vectors. cached: whether it was taken from an earlier run;
    the seconds are those of that run.
    """

    file: Path
    scale_kind: Scale
    seconds: float
    loading: float
    writing: float
    process_seconds: float
    changed: dict[int, tuple[int, int]]
    relative_update: float
    cached: bool


def last_words(text: str, lines: int = 3) -> str:
    """The last lines that say something, in one line."""
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(kept[-lines:]) or "nothing"


def environment_folder() -> Path:
    """Where the peers' environment is or will be, named after the pins and the Python that it is made with."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = CONSTRAINTS.read_text() + " ".join(REQUIREMENTS) + version
    return cache_folder() / f"peers-{hashlib.sha256(pins.encode()).hexdigest()[:16]}"


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def peers_python(report: Callable[[str], None] = print) -> Path:
    """The Python that has mergekit and FusionBench; makes its environment on the first call, which takes minutes.

    report: called with one line before work that takes time. Needs a package index on the first call only. Raises
    PeerError with the last words of venv or pip.
    """
    folder = environment_folder()
    if (folder / MARKER).is_file():
        return python_of(folder)
    report(f"making the environment of mergekit and FusionBench in {folder} (1.8 GB, a minute or more)")
    started = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made elsewhere and renamed, so that two studies that start together do not install into one folder. Scripts like
    # `pip` keep the old path; only `python` is used.
    work = Path(tempfile.mkdtemp(prefix="unfinished-peers-", dir=folder.parent))
    try:
        _step([sys.executable, "-m", "venv", str(work)], "make a virtual environment")
        python = str(python_of(work))
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        _step([*install, "--constraint", str(CONSTRAINTS), *REQUIREMENTS], "install mergekit and FusionBench")
        _step([python, "-m", "pip", "check", "--disable-pip-version-check"], "install packages that fit together")
        (work / MARKER).write_text(f"{time.perf_counter() - started:.0f} s\n")
        if not (folder / MARKER).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(f"made the environment of the peers in {time.perf_counter() - started:.0f} s")
    return python_of(folder)


def _step(command: Sequence[str], what: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        words = last_words(finished.stdout + finished.stderr, lines=5)
        raise PeerError(f"could not {what} for the peers (exit status {finished.returncode}): {words}")


def merged(
    method: Method,
    base_folder: Path,
    model_folders: Sequence[Path],
    work_folder: Path,
    *,
    scale: float = 1.0,
    seed: int = 0,
    timeout: float | None = None,
    report: Callable[[str], None] = print,
) -> PeerMerge:
    """The merge of these models by a method of a peer, from `work_folder` if it was made before.

    Each takes as much disk as one model; a folder or its `model.safetensors` may be deleted at any time.

    base_folder, model_folders: Hugging Face folders of one architecture, each with one `model.safetensors`; the models
    need not be checkpoints, only base plus something. Their order matters to sequential and to random methods.
    scale: the method's own; base + s * (merge at 1 - base) gives all others where `method.scale` is "linear". A method
    of kind "other" is run once for each; one of kind "none" has 1 only. seed: of the random numbers. timeout: seconds.
    Raises PeerError with the peer's last words if it fails or takes longer, or if a merge is not finite or has other
    tensors than the base; ValueError for a scale that the method lacks.
    """
    options = method.at(scale)
    folder = work_folder / f"{method.name}-{key(method, options, base_folder, model_folders, seed)}"
    if all((folder / name).is_file() for name in ("report.json", "model.safetensors")):
        return _read(method, folder, cached=True)
    python = peers_python(report)
    work_folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="unfinished-", dir=work_folder)).absolute()
    try:
        job = {
            "peer": method.peer,
            "algorithm": method.algorithm,
            "options": options,
            "rename": dict(method.rename),
            "only_changed": method.only_changed,
            "seed": seed,
            "base": str(base_folder.absolute()),
            "models": [str(model.absolute()) for model in model_folders],
            "output": str(work),
        }
        (work / "job.json").write_text(json.dumps(job, indent=1) + "\n")
        seconds = _run([str(python), str(WORKER), str(work / "job.json")], method, work / "log.txt", timeout)
        report_file = work / "report.json"
        told = json.loads(report_file.read_text())
        report_file.write_text(json.dumps({**told, "process_seconds": seconds}, indent=1) + "\n")
        shutil.rmtree(work / "scratch", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _read(method, folder, cached=False)


def _run(command: Sequence[str], method: Method, log: Path, timeout: float | None) -> float:
    """Seconds that the process took; what it says goes into `log`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # mergekit visits tensors in the order of a set of names: without a fixed hash its random masks differ every time.
    environment |= {"PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    try:
        with log.open("w") as file:
            finished = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        words = last_words(log.read_text(errors="replace"), lines=1)
        raise PeerError(f"{method.name} was stopped after {timeout:.0f} s; its last words: {words}") from None
    if finished.returncode != 0:
        words = last_words(log.read_text(errors="replace"), lines=1)
        raise PeerError(f"{method.name} could not merge (exit status {finished.returncode}); its last words: {words}")
    return time.perf_counter() - started


def _read(method: Method, folder: Path, cached: bool) -> PeerMerge:
    report = json.loads((folder / "report.json").read_text())
    seconds = report["seconds"]
    return PeerMerge(
        file=folder / "model.safetensors",
        scale_kind=method.scale,
        seconds=seconds["merging"],
        loading=seconds["loading"],
        writing=seconds["writing"],
        process_seconds=report["process_seconds"],
        changed={int(dimensions): (count[0], count[1]) for dimensions, count in report["changed"].items()},
        relative_update=report["relative_update"],
        cached=cached,
    )


def key(method: Method, options: dict[str, Any], base: Path, models: Sequence[Path], seed: int) -> str:
    """16 hexadecimal digits of everything that decides a merge: method, options, seed, versions, worker, inputs.

    Inputs count by content, not by path or time. Raises FileNotFoundError if a folder lacks a file.
    """
    everything = {
        "algorithm": [method.peer, method.algorithm],
        "options": options,
        "rename": dict(method.rename),
        "only_changed": method.only_changed,
        "seed": seed,
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in (CONSTRAINTS, WORKER)],
        "inputs": [
            digest(folder / name) for folder in (base, *models) for name in ("model.safetensors", "config.json")
        ],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def digest(file: Path) -> str:
    """SHA-256 of a file, read once for each size and time of change."""
    status = file.stat()
    return _digest(file.absolute(), status.st_size, status.st_mtime_ns)


@functools.cache
def _digest(file: Path, size: int, changed: int) -> str:
    sha256 = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            sha256.update(part)
    return sha256.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the environment and print what can be run; with folders, run methods on them and print times."""
    parser = argparse.ArgumentParser(description="Merges by mergekit and FusionBench.")
    parser.add_argument("--base", type=Path, help="Hugging Face folder of the base")
    parser.add_argument("--models", type=Path, nargs="+", help="folders of the fine-tuned models")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--work", type=Path, default=cache_folder() / "peer-merges", help="where merges are kept")
    given = parser.parse_args(arguments)
    if given.base is None or not given.models:
        print(peers_python())
        for method in METHODS.values():
            print(f"{method.name:32} {method.title:36} scale: {method.scale}")
        for name, reason in LEFT_OUT.items():
            print(f"left out: {name}: {reason}")
        return
    for name in given.methods:
        method = METHODS[name]
        scale = 1.0 if method.scale == "none" else given.scale
        try:
            made = merged(method, given.base, given.models, given.work, scale=scale)
        except PeerError as error:
            print(f"{name}: {error}", flush=True)
            continue
        changed = ", ".join(f"{done} of {count} {rank}-D" for rank, (done, count) in sorted(made.changed.items()))
        print(
            f"{name:32} scale {scale:<4} merge {made.seconds:7.1f} s, process {made.process_seconds:7.1f} s, "
            f"update {made.relative_update:.3f} of the sum, changed {changed}{' (cached)' if made.cached else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
