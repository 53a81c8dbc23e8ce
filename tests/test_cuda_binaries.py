"""What nvcc made of the kernels, read without a GPU: registers and spills from ptxas, loads from the disassembly."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import build_cuda

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90", "100")
KERNELS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.stem != "device")


def objects() -> Path | str:
    """The folder of the build's objects for all of ARCHS, or why there is none."""
    try:
        build_cuda.find_nvcc(os.environ)
    except build_cuda.Unavailable as error:
        return str(error)
    wanted = {f"sm_{arch}" for arch in ARCHS}
    for folder in sorted((ROOT / "build").glob("cuda-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        report = folder / "combine.ptxas.txt"
        if report.exists() and wanted <= set(re.findall(r"for '(sm_\d+)'", report.read_text())):
            return folder
    return "the CUDA operators were not built for sm_80, sm_90 and sm_100 here (make lint does)"


FOLDER = objects()
built = pytest.mark.skipif(isinstance(FOLDER, str), reason=str(FOLDER))


def disassembler() -> str | None:
    """cuobjdump, from the toolkit or from Triton's package."""
    spec = importlib.util.find_spec("triton")
    places = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends" / "nvidia" / "bin"]
    return shutil.which("cuobjdump") or next((str(p / "cuobjdump") for p in places if (p / "cuobjdump").exists()), None)


def functions(kernel: str, arch: str) -> dict[str, list[str]]:
    """The instructions of each function of an object: opcode and operands."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump, neither of a toolkit nor of Triton")
    assert isinstance(FOLDER, Path)
    command = [tool, "-sass", "-arch", f"sm_{arch}", str(FOLDER / f"{kernel}.o")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for part in text.split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", part)
    return found


@built
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_objects_are_those_of_the_sources(kernel, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert isinstance(FOLDER, Path)
    assert build_cuda.up_to_date(FOLDER / f"{kernel}.o"), "older than its sources; run make lint"


@built
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_spills_to_local_memory(kernel):
    assert isinstance(FOLDER, Path)
    text = (FOLDER / f"{kernel}.ptxas.txt").read_text()
    compiled = re.findall(r"Compiling entry function '(\S+)' for '(sm_\d+)'(.*?)(?=Compiling entry|\Z)", text, re.S)
    assert {arch for _, arch, _ in compiled} >= {f"sm_{arch}" for arch in ARCHS}
    for name, arch, report in compiled:
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
        assert len(spills) >= 2
        assert set(spills) == {"0"}, f"{name} for {arch} spills {spills} bytes"


STREAMING = {
    "gram": ("gram_rows", "gram_columns"),
    "combine": ("combine_rows", "combine_tiles"),
    "adam_step": ("step_elements", "step_products"),
    "merge_rows": ("merge_units",),
}


@built
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", STREAMING)
def test_streams_are_read_and_written_sixteen_bytes_at_a_time(kernel, arch):
    """Evict-first packets of 128 bits; narrower ones are for what does not begin at a multiple of 16 bytes."""
    code = functions(kernel, arch)
    for prefix in STREAMING[kernel]:
        named = {name: lines for name, lines in code.items() if f"{len(prefix)}{prefix}" in name}
        assert named, f"{prefix} is not in {sorted(code)}"
        for name, lines in named.items():
            wide = [line for line in lines if re.match(r"LDG\.E\.EF(\.\w+)*\.128", line)]
            narrow = [line for line in lines if re.match(r"LDG\.E\.EF", line) and ".128" not in line]
            assert len(wide) >= 2, f"{name}: {len(wide)} loads of 16 bytes"
            assert not narrow, f"{name}: {narrow[:3]}"
            if prefix in ("combine_rows", "combine_tiles", "step_elements", "merge_units"):
                assert [line for line in lines if re.match(r"STG\.E\.EF(\.\w+)*\.128", line)], (
                    f"{name} stores no packet"
                )


@built
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_have_an_order(kernel, arch):
    """No atomics, float or other, and no reductions in memory."""
    for name, lines in functions(kernel, arch).items():
        atomics = [line for line in lines if re.match(r"(ATOM|ATOMG|ATOMS|RED|REDG|UREDG)\b", line)]
        assert not atomics, f"{name}: {atomics[:3]}"


@built
@pytest.mark.parametrize("arch", ARCHS)
def test_rows_are_multiplied_by_the_tensor_cores_in_float64(arch):
    for kernel, prefix in (("gram", "gram_rows"), ("merge_rows", "merge_units")):
        for name, lines in functions(kernel, arch).items():
            if prefix in name:
                assert any(line.startswith("DMMA") for line in lines), name
