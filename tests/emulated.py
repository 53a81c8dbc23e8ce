"""The CUDA operators on the CPU: their sources compiled by a C++ compiler, each thread of a block a fiber.

`running()` lets `awd_fast.ops.cuda` work on tensors of the CPU through them. What runs there is the source of the
kernels, the tables of parameters and the Python layer; what does not is the GPU: its timing, its memory, its rounding
of estimates.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from awd_fast.ops import cuda

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-math-errno", "-Wno-unknown-pragmas"]


def why_not() -> str | None:
    """Why there can be no emulation here, or None."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "the sources of the kernels are not here"
    if compiler() is None:
        return "no C++ compiler"
    return None if importlib.util.find_spec("pybind11") else "no pybind11"


def compiler() -> str | None:
    """The C++ compiler."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build() -> Path:
    """The compiled module, in build/emulation-<hash of its sources>."""
    sources = sorted(
        p
        for folder in (ROOT / "csrc", EMULATION)
        for p in folder.rglob("*")
        if p.suffix in (".cu", ".cuh", ".h", ".cpp")
    )
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = ROOT / "build" / f"emulation-{digest}"
    module = folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it, and then this one waits for its module
        if not module.exists():
            compile_module(module, sources)
    return module


def compile_module(module: Path, sources: list[Path]) -> None:
    """As `build` says."""
    import pybind11

    folder = module.parent
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    kernels = [p for p in sources if p.suffix == ".cu" and p.stem != "device"]
    inputs = [*kernels, ROOT / "csrc" / "cuda_bindings.cpp", EMULATION / "module.cpp"]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        extra = ["-include", str(EMULATION / "emulation.h")] if source.suffix == ".cu" else include
        command = [compiler() or "c++", "-x", "c++", *FLAGS, '-DAWD_WITH_CUDA="emulated"', *extra]
        done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(int(os.environ.get("AWD_FAST_JOBS") or 2)) as pool:
        objects = list(pool.map(compiled, inputs))
    whole = folder / f"whole-{os.getpid()}"
    subprocess.run([compiler() or "c++", "-shared", "-o", str(whole), *map(str, objects)], check=True)
    whole.rename(module)


@functools.cache
def load() -> ModuleType:
    """The module, built where needed."""
    spec = importlib.util.spec_from_file_location("_emulated", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def running(module: ModuleType) -> Iterator[None]:
    """Within it `awd_fast.ops.cuda` takes tensors of the CPU; what it allocates is full of NaN."""

    @contextmanager
    def launching(device: torch.device) -> Iterator[tuple[int, int]]:
        yield 0, 0

    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.nan if made.is_floating_point() else -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_module", lambda: module)
        patch.setattr(cuda, "_launching", launching)
        patch.setattr(cuda, "DEVICE", "cpu")
        patch.setattr(cuda, "unavailable", lambda: None)
        patch.setattr(cuda.torch, "empty", poisoned)
        yield
