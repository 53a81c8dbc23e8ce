"""What Triton compiles the kernels to, for GPUs that are not here: no spills, wide loads, no atomics, exact rounding.

The launches are those that the operators make. A process of its own compiles them, because this one may have chosen
Triton's interpreter, and reads the binaries with the tools that come with Triton.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ARCHITECTURES = ("80", "90", "100")
AMD = "gfx942"
TOOLS = ("cuobjdump", "nvdisasm")


def toolbox() -> Path | None:
    """Where Triton keeps NVIDIA's tools."""
    found = importlib.util.find_spec("triton")
    if found is None or not found.origin:
        return None
    folder = Path(found.origin).parent / "backends" / "nvidia" / "bin"
    return folder if all((folder / name).exists() for name in TOOLS) else None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    """What a process without Triton's interpreter sees of each kernel, for each target."""
    names = [*(ARCHITECTURES if toolbox() else ()), AMD]
    kept = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "tests.triton_binaries", *names]
    done = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, dict]] = json.loads(done.stdout.splitlines()[-1])
    for target, kernels in found.items():
        for name, one in kernels.items():
            print(target, name, one["registers"], "registers", one["stack"], "bytes of stack")
    return found


@pytest.fixture(params=ARCHITECTURES)
def binaries(request: pytest.FixtureRequest, compiled: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """What was seen of each kernel of one architecture of NVIDIA's."""
    if toolbox() is None:
        pytest.skip("Triton came without cuobjdump and nvdisasm")
    return compiled[request.param]


def test_all_dtypes_are_compiled_for_one_architecture(compiled):
    """For the others each kernel is, at one dtype."""
    if toolbox() is None:
        pytest.skip("Triton came without cuobjdump and nvdisasm")
    assert [len(compiled[name]) for name in ARCHITECTURES] == [16, 8, 8]


def test_every_kernel_is_compiled(binaries):
    kinds = {name.split()[0] for name in binaries}
    assert kinds == {
        "gram_kernel",
        "combine_kernel",
        "multi_dot_kernel",
        "descend_kernel",
        "step_kernel",
        "resident_kernel",
        "streaming_kernel",
    }


def test_nothing_is_spilled(binaries):
    for name, one in binaries.items():
        local = {kind: count for kind, count in one["counts"].items() if kind.startswith(("STL", "LDL"))}
        assert (one["stack"], one["local"], local) == (0, 0, {}), name
        assert one["registers"] <= 255


def test_models_are_read_sixteen_bytes_at_a_time(binaries):
    """What is narrower: the addresses and numbers of the table, the weights of rows, and of a Gram matrix the base."""
    for name, one in binaries.items():
        counts = one["counts"]
        wide, values = counts.get("LDG.E.128", 0), sum(counts.get(f"LDG.E{kind}", 0) for kind in ("", ".U16", ".S16"))
        if name.startswith("descend"):
            continue
        bytes_of_one = 2 if "bfloat16" in name else 4
        if name.startswith("gram"):
            assert wide == 8 * 32 * bytes_of_one // (32 * 16), name
            assert values == 1, name
        elif name.startswith("combine"):
            assert wide >= 9 * 1024 * bytes_of_one // (128 * 16), name
            assert values <= 8 * 2, name
        else:
            assert wide >= 9, name
            assert values == 0, name


def test_no_sum_is_atomic(binaries):
    for name, one in binaries.items():
        assert not [kind for kind in one["counts"] if kind.startswith(("RED", "ATOM"))], name


def test_sixteen_bit_results_are_rounded_to_nearest(binaries):
    for name in (name for name in binaries if name.startswith("combine_kernel") and name.endswith("bfloat16")):
        rounding = binaries[name]["rounding"]
        assert rounding
        assert all(kind.startswith("cvt.rn.bf16") for kind in rounding), name


def test_amd_binaries_spill_nothing_and_have_no_atomics(compiled):
    assert len(compiled[AMD]) == 11
    for name, one in compiled[AMD].items():
        assert (one["stack"], one["vgpr_spill_count"], one["sgpr_spill_count"], one["counts"]) == (0, 0, 0, {}), name
