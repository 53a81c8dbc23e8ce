"""The compiled module that is installed here, of this folder or a wheel: what it runs, links to, says of itself."""

import shutil
import subprocess
import sys

import pytest
import torch

from awd_fast import ops
from awd_fast.ops import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def printed(*command: str) -> str:
    """What a tool of binutils prints of the module."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    file = str(native._module().__file__)
    return subprocess.run([*command, file], capture_output=True, text=True, check=True).stdout


def test_the_fastest_backend_is_the_compiled_one():
    assert ops.backends.select("gram", None, [torch.ones(2, 3)]) is native
    assert any("instruction set" in line for line in native.machine())


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'sse9'"):
        native._module().choose_cpu_isa("sse9")


def test_one_openmp_runtime_is_loaded():
    """In a process of its own, since other packages (scikit-learn) bring theirs."""
    code = """
from awd_fast.ops import native
assert native.unavailable() is None
maps = open("/proc/self/maps").read().split("\\n")
print(len({line.split()[-1] for line in maps if "libgomp" in line}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("1" if native.build_info()["openmp"] else "0")


def test_one_module_serves_every_pytorch_and_machine():
    """It links neither to PyTorch, whose symbols change, nor to CUDA, which few machines have."""
    lines = [line for line in printed("readelf", "-d").splitlines() if "NEEDED" in line]
    needed = {line.split("[")[1].partition(".so")[0].partition("-linux")[0] for line in lines}
    assert needed
    assert needed <= {"libstdc++", "libm", "libgomp", "libgcc_s", "libc", "libpthread", "libdl", "librt", "ld"}


def test_it_offers_nothing_to_other_libraries():
    """A second CUDA runtime, such as the one of torch, must not be mixed up with the one that is linked in."""
    offered = [line.split()[-1] for line in printed("nm", "-D", "--defined-only").splitlines()]
    assert "PyInit__C" in offered
    assert [name for name in offered if "cuda" in name or "awd" in name] == []


def test_it_says_why_cuda_cannot_run():
    module = native._module()
    info, reason = native.build_info(), module.cuda_why_not()
    assert any((f"CUDA {info['cuda']} for" if info["cuda"] else reason) in line for line in native.machine())
    if info["cuda"] == "":
        assert reason.startswith("built without CUDA (")
        assert info["cuda_archs"] == []
    else:
        assert info["cuda_archs"]
        assert not torch.cuda.is_available() or reason == ""
    if reason:
        assert module.cuda_why_not_on(0)
