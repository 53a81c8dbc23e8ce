"""Builds the compiled module awd_fast._C where a C++17 compiler is at hand; the package works without it.

Environment: AWD_FAST_BUILD=0 (or off) leaves the module out; AWD_FAST_BUILD=require makes a failed build an error. By
default a failure is one printed sentence and a package that runs on its PyTorch reference. AWD_FAST_CUDA says the same
of the CUDA operators in the module, which need nvcc: see build_cuda.py. CXX and CC name the compiler, AWD_FAST_JOBS the
number of files compiled at a time (2). PyTorch is not needed to build. docs/building.md describes all variables.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not look here

import build_cuda  # noqa: E402

BUILD = Path("build")  # objects are kept here, since pip gives setuptools a new temporary folder each time
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-ignored-attributes"]
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", *WARNINGS]
MODES = {"": "auto", "auto": "auto", "1": "auto", "on": "auto", "0": "off", "off": "off", "require": "require"}


def mode(variable: str) -> str:
    """auto, off or require, as the environment says."""
    wanted = os.environ.get(variable, "").strip().lower()
    if wanted not in MODES:
        raise SystemExit(f"{variable} is {wanted!r}; expected one of 0, off, 1, on, auto, require")
    return MODES[wanted]


def explain(
    reason: str, what: str = "compiled module", instead: str = "it runs on its slower PyTorch reference"
) -> None:
    """Say in one sentence why something was left out."""
    print(f"awd_fast: built without the {what} ({reason}); {instead}.", file=sys.stderr, flush=True)


def files(pattern: str) -> list[str]:
    """Files below csrc/, relative to this one, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def jobs() -> int:
    """How many files are compiled at a time."""
    return int(os.environ.get("AWD_FAST_JOBS") or 2)


def openmp_flags(compiler: list[str]) -> list[str]:
    """["-fopenmp"] where this compiler command has OpenMP; without it the operators run on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "check.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, "-fopenmp", str(source), "-o", str(Path(folder, "check"))]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return []
    return ["-fopenmp"]


def cuda_arguments() -> dict[str, Any]:
    """What the extension is given for the CUDA operators: macros, objects, link arguments; macros that say why not.

    Only a required failure is an error: the operators on the CPU must not be lost because nvcc fails.
    """
    wanted = mode("AWD_FAST_CUDA")
    try:
        if wanted == "off":
            raise build_cuda.Unavailable("AWD_FAST_CUDA is off")
        if sys.platform != "linux":
            raise build_cuda.Unavailable("it is built on Linux only")
        toolkit = build_cuda.find_toolkit(os.environ)
        objects = build_cuda.compile_objects(toolkit, files("*.cu"), BUILD, jobs())
    except build_cuda.Unavailable as error:
        if wanted == "require":
            raise SystemExit(f"AWD_FAST_CUDA=require: {error}") from None
        explain(str(error), "CUDA operators", "those on the CPU are there")
        return {"define_macros": [("AWD_WITHOUT_CUDA", json.dumps(str(error)))]}
    return {
        "define_macros": [
            ("AWD_WITH_CUDA", f'"{toolkit.version}"'),
            ("AWD_CUDA_ARCHS", f'"{";".join(toolkit.archs)}"'),
        ],
        "extra_objects": [*map(str, objects), str(toolkit.cudart)],
        # Calls of the static runtime must not end in the shared one that torch has loaded.
        "extra_link_args": ["-Wl,--exclude-libs,ALL", "-lrt", "-ldl", "-lpthread"],
    }


def remember(configuration: list[Any]) -> str:
    """The file that is newer than the module once the configuration changed; csrc/*.cpp are then compiled again.

    They are the bindings, which alone know whether there are CUDA operators.
    """
    kept, text = BUILD / "configuration.txt", repr(configuration)
    if not kept.exists() or kept.read_text() != text:
        for built in BUILD.glob("cpu-*/csrc/*.o"):
            built.unlink()
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text)
    return str(kept)


def extension_arguments(required: bool) -> dict[str, Any]:
    """The arguments of `setup` that build the module. Raises ImportError without pybind11."""
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

    class BuildExtension(build_ext):
        """A failure is explained and survived, unless the module is required."""

        def build_extension(self, ext: Pybind11Extension) -> None:
            if self.compiler.compiler_type == "unix":
                self.configure(ext)
            try:
                super().build_extension(ext)
            except Exception as error:
                if required:
                    raise
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # one of an earlier build
                print(error, file=sys.stderr)
                explain("compiling it failed, see above")

        def configure(self, ext: Pybind11Extension) -> None:
            """Flags, the CUDA operators, and a folder for objects that the next build finds again."""
            compiler = self.compiler.compiler_so_cxx
            openmp = openmp_flags(compiler)
            ext.extra_compile_args += [*FLAGS, *openmp, "-MMD"]
            ext.extra_link_args += openmp
            for name, values in cuda_arguments().items():
                getattr(ext, name).extend(values)
            flags = [compiler, ext.extra_compile_args]
            self.build_temp = str(BUILD / f"cpu-{hashlib.sha256(repr(flags).encode()).hexdigest()[:12]}")
            includes = [*ext.include_dirs, *self.compiler.include_dirs]
            ext.depends.append(remember([flags, includes, ext.define_macros, ext.extra_objects, ext.extra_link_args]))

    def changed(built: str, source: str) -> bool:
        return not build_cuda.up_to_date(Path(built))

    ParallelCompile("AWD_FAST_JOBS", default=2, needs_recompile=changed).install()
    depends = [name for pattern in ("*.h", "*.cu", "*.cuh") for name in files(pattern)]
    module = Pybind11Extension("awd_fast._C", files("*.cpp"), cxx_std=17, depends=depends, optional=not required)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def main() -> None:
    """Read AWD_FAST_BUILD and call `setup`."""
    wanted = mode("AWD_FAST_BUILD")
    required = "require" in (wanted, mode("AWD_FAST_CUDA"))
    arguments: dict[str, Any] = {}
    if wanted == "off":
        explain(f"AWD_FAST_BUILD={os.environ['AWD_FAST_BUILD']}")
    else:
        try:
            arguments = extension_arguments(required)
        except ImportError as error:
            if required:
                raise
            explain(str(error))
    setup(**arguments)


if __name__ == "__main__":
    main()
