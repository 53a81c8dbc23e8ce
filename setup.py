"""Builds the compiled module awd_fast._C where a C++17 compiler is at hand; the package works without it.

Environment: AWD_FAST_BUILD=0 (or off) leaves the module out; AWD_FAST_BUILD=require makes a failed build an error. By
default a failure is one printed sentence and a package that runs on its PyTorch reference. CXX and CC name the
compiler, AWD_FAST_JOBS the number of files compiled at a time (2). PyTorch is not needed to build.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-ignored-attributes"]
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", *WARNINGS]
MODES = {"": "auto", "auto": "auto", "1": "auto", "on": "auto", "0": "off", "off": "off", "require": "require"}


def explain(reason: str) -> None:
    """Say in one sentence why there is no compiled module."""
    print(
        f"awd_fast: built without the compiled module ({reason}); it runs on its slower PyTorch reference.",
        file=sys.stderr,
        flush=True,
    )


def files(pattern: str) -> list[str]:
    """Files below csrc/, relative to this one, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


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


def extension_arguments(required: bool) -> dict[str, Any]:
    """The arguments of `setup` that build the module. Raises ImportError without pybind11."""
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

    class BuildExtension(build_ext):
        """A failure is explained and survived, unless the module is required."""

        def build_extension(self, ext: Pybind11Extension) -> None:
            if self.compiler.compiler_type == "unix":
                openmp = openmp_flags(self.compiler.compiler_so_cxx)
                ext.extra_compile_args += [*FLAGS, *openmp]
                ext.extra_link_args += openmp
            try:
                super().build_extension(ext)
            except Exception as error:
                if required:
                    raise
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # one of an earlier build
                print(error, file=sys.stderr)
                explain("compiling it failed, see above")

    ParallelCompile("AWD_FAST_JOBS", default=2).install()
    module = Pybind11Extension("awd_fast._C", files("*.cpp"), cxx_std=17, depends=files("*.h"), optional=not required)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def main() -> None:
    """Read AWD_FAST_BUILD and call `setup`."""
    wanted = os.environ.get("AWD_FAST_BUILD", "").strip().lower()
    if wanted not in MODES:
        raise SystemExit(f"AWD_FAST_BUILD is {wanted!r}; expected one of 0, off, 1, on, auto, require")
    mode = MODES[wanted]
    arguments: dict[str, Any] = {}
    if mode == "off":
        explain(f"AWD_FAST_BUILD={wanted}")
    else:
        try:
            arguments = extension_arguments(required=mode == "require")
        except ImportError as error:
            if mode == "require":
                raise
            explain(str(error))
    setup(**arguments)


if __name__ == "__main__":
    main()
