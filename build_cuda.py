"""Compiles csrc/cuda/*.cu for setup.py with nvcc, and says in words why that cannot be done.

nvcc is AWD_FAST_NVCC, else that of CUDA_HOME or CUDA_PATH, else the one on PATH. Objects stay in build/cuda-<hash of
the flags>/, where a later build finds those whose sources are unchanged, with what ptxas said of registers and spills.
docs/building.md describes the variables.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ARCHS = "80;86;89;90;100;120"
OLDEST = (12, 1)  # whose kernels take more than 4 KB of arguments
FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas", "-v")
# nvcc reads these by itself, so they are flags that no command shows.
NVCC_READS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")


class Unavailable(Exception):
    """Why the CUDA operators cannot be built, as a phrase."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that answered, what it compiles for (the newest last) and its static runtime."""

    nvcc: str
    version: str
    archs: tuple[str, ...]
    cudart: Path

    def flags(self) -> list[str]:
        """Machine code for every architecture, and PTX of the newest for the GPUs that come after it."""
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        return [*FLAGS, *codes, f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}"]


def find_nvcc(environment: Mapping[str, str]) -> str:
    """Its path. Raises Unavailable where there is none."""
    named = environment.get("AWD_FAST_NVCC", "").strip()
    if named:
        found = shutil.which(named, path=environment.get("PATH"))
        if found is None:
            raise Unavailable(f"AWD_FAST_NVCC is {named}, which is no program")
        return found
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        found = shutil.which("nvcc", path=os.path.join(environment.get(variable) or os.devnull, "bin"))
        if found:
            return found
    found = shutil.which("nvcc", path=environment.get("PATH"))
    if found is None:
        raise Unavailable("no nvcc was found")
    return found


def find_toolkit(environment: Mapping[str, str]) -> Toolkit:
    """The toolkit to build with. Raises Unavailable where there is none, SystemExit on a list that is no list."""
    wanted = wanted_archs(environment)
    nvcc = find_nvcc(environment)
    version = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
    if version is None:
        raise Unavailable(f"{nvcc} is no nvcc")
    if tuple(map(int, version[1].split("."))) < OLDEST:
        raise Unavailable(f"{nvcc} is of CUDA {version[1]}; the kernels' arguments need 12.1 or newer")
    known = set(re.findall(r"compute_(\d+)", ask(nvcc, "--list-gpu-arch")))
    archs = tuple(arch for arch in wanted if arch.rstrip("af") in known)
    unknown = ", ".join(f"sm_{arch}" for arch in wanted if arch not in archs)
    if unknown:
        print(f"awd_fast: {nvcc} {version[1]} does not know {unknown}, left out of the build.", file=sys.stderr)
    if not archs:
        raise Unavailable(f"{nvcc} {version[1]} knows none of the architectures {', '.join(wanted)}")
    return Toolkit(nvcc, version[1], archs, find_cudart(nvcc))


def wanted_archs(environment: Mapping[str, str]) -> list[str]:
    """AWD_FAST_CUDA_ARCHS, from the oldest to the newest."""
    text = environment.get("AWD_FAST_CUDA_ARCHS", "").strip() or ARCHS
    archs = [arch for arch in re.split(r"[;,\s]+", text) if arch]
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise SystemExit(f"AWD_FAST_CUDA_ARCHS is {text!r}; expected numbers with semicolons between, as in {ARCHS}")
    return sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def find_cudart(nvcc: str) -> Path:
    """libcudart_static.a where this nvcc would link it from, which a wrapper script's own place does not tell."""
    dry = ask(nvcc, "--dryrun", "any.cu")
    folders = [Path(folder) for folder in re.findall(r'"?-L([^"\s]+)', "".join(re.findall(r"LIBRARIES=.*", dry)))]
    top = re.search(r"^#\$ TOP=(.*?)\s*$", dry, re.MULTILINE)
    if top is not None:
        folders += [Path(top[1], "lib64"), Path(top[1], "lib"), *sorted(Path(top[1]).glob("targets/*/lib"))]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return (folder / "libcudart_static.a").resolve()
    raise Unavailable(f"libcudart_static.a is missing from the toolkit of {nvcc}")


def ask(nvcc: str, *options: str) -> str:
    """What nvcc prints. Raises Unavailable where it does not run."""
    try:
        done = subprocess.run([nvcc, *options], capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{nvcc} does not run: {error.strerror}") from None
    if done.returncode:
        raise Unavailable(f"{shlex.join([nvcc, *options])} failed with exit code {done.returncode}")
    return done.stdout + done.stderr


def up_to_date(built: Path) -> bool:
    """Whether no file that `built` was compiled from has changed since, by the compiler's list beside it (.d)."""
    try:
        made = built.stat().st_mtime_ns
        listed = built.with_suffix(".d").read_text().replace("\\\n", " ").partition(": ")[2]
        return all(Path(name).stat().st_mtime_ns < made for name in shlex.split(listed))
    except OSError:  # one is missing
        return False


def compile_objects(toolkit: Toolkit, sources: Sequence[str], build: Path, jobs: int) -> list[Path]:
    """The objects of `sources`, compiled anew where they are not up to date. Raises Unavailable where one fails."""
    flags = toolkit.flags()
    settings = [toolkit.nvcc, toolkit.version, *flags, *(os.environ.get(name, "") for name in NVCC_READS)]
    folder = build / f"cuda-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{Path(source).stem}.o" for source in sources}
    stale = [source for source in sources if not up_to_date(objects[source])]
    # The architectures of a file are compiled side by side too: one file may take longer than all others together.
    flags.append(f"--threads={1 if jobs == 1 else max(2, jobs // max(1, len(stale)))}")
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(lambda source: _compile(toolkit, flags, source, objects[source]), stale))
    return list(objects.values())


def _compile(toolkit: Toolkit, flags: Sequence[str], source: str, built: Path) -> None:
    partial = built.with_suffix(".partial.o")  # an interrupted nvcc leaves no object that looks finished
    command = [toolkit.nvcc, "-c", *flags, "-MMD", "-MF", str(built.with_suffix(".d")), source, "-o", str(partial)]
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise Unavailable(f"nvcc failed on {source}")
    built.with_suffix(".ptxas.txt").write_text(done.stdout)
    partial.replace(built)
