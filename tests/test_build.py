"""Installing from source: without PyTorch at build time, without a compiler, without nvcc."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "built without the compiled module"


def copy_source(to: Path) -> None:
    """What a build needs."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("awd_fast", "csrc", "hydra_plugins"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignored)
    for name in ("setup.py", "build_cuda.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, to / name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs, and a torch that must not be imported."""
    copy = tmp_path / "source"
    copy_source(copy)
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    return copy


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python setup.py build` in `source`; both of its streams as stdout."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("AWD_FAST", "CC", "CXX"))}
    variables |= {"AWD_FAST_CUDA": "0"} | {"PYTHONPATH": str(source.parent / "poison"), **environment}
    command = [sys.executable, "setup.py", "build", "--build-lib", "built"]
    return subprocess.run(
        command, cwd=source, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def test_without_a_compiler_the_package_runs_on_the_reference(source):
    done = build(source, **NO_COMPILER)
    assert done.returncode == 0, done.stdout
    assert SENTENCE in done.stdout
    built = source / "built"
    assert (built / "awd_fast" / "ops" / "native.py").exists()
    assert not list(built.rglob("*.so"))
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]  # of an editable installation
import torch
from awd_fast import ops
from awd_fast.ops import backends
print(backends.unavailable("native"))
print(ops.gram(None, [torch.ones(1, 4), torch.ones(1, 4)]).tolist())
"""
    environment = {**os.environ, "PYTHONPATH": str(built)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=source.parent, env=environment, capture_output=True, text=True, check=True
    )
    reason, result = run.stdout.splitlines()
    assert "not built" in reason
    assert "pip install" in reason
    assert result == "[[[4.0, 4.0], [4.0, 4.0]]]"


@pytest.mark.parametrize("variable", ["AWD_FAST_BUILD", "AWD_FAST_CUDA"])
def test_a_required_module_that_fails_to_build_is_an_error(source, variable):
    shutil.rmtree(source / "csrc" / "cuda")  # minutes of nvcc
    done = build(source, **{variable: "require"}, **NO_COMPILER)
    assert done.returncode != 0


def test_broken_kernels_are_survived_unless_required(source):
    (source / "csrc" / "bindings.cpp").write_text("not C++\n")
    for other in (source / "csrc" / "cpu").glob("*.cpp"):
        other.write_text("\n")
    done = build(source)
    assert done.returncode == 0, done.stdout
    assert SENTENCE in done.stdout
    assert build(source, AWD_FAST_BUILD="require").returncode != 0


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("env") is None, reason="needs env and g++")
def test_openmp_is_probed_with_the_whole_compiler_command():
    """As in CXX="ccache g++"."""
    code = "import sys, setup; print(setup.openmp_flags(sys.argv[1:]))"
    commands = ["g++"], ["env", "g++"], ["env", "no-such-compiler"]
    found = [
        subprocess.run(
            [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for command in commands
    ]
    assert found[1] == found[0]
    assert found[2].strip() == "[]"


@pytest.mark.parametrize("environment", [{"AWD_FAST_BUILD": "0"}, {}], ids=["without module", "with module"])
def test_a_source_distribution_is_whole(source, environment):
    names = ("tests", "docs", "benchmarks", "Makefile", "constraints.txt")
    names += ("CHANGELOG.md", "CONTRIBUTING.md")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        else:
            shutil.copy(ROOT / name, source / name)
    (source / "awd_fast" / "_C.so").write_text("of an earlier build\n")
    variables = {key: value for key, value in os.environ.items() if key != "AWD_FAST_BUILD"}
    code = "import setuptools.build_meta as build; build.build_sdist('made')"
    subprocess.run([sys.executable, "-c", code], cwd=source, env={**variables, **environment}, check=True)
    with tarfile.open(next((source / "made").glob("*.tar.gz"))) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    for name in (*names, "csrc", "build_cuda.py", "MANIFEST.in"):
        path = ROOT / name
        wanted = [path] if path.is_file() else [at for at in path.rglob("*") if at.is_file()]
        wanted = [at for at in wanted if at.suffix != ".pyc"]
        assert wanted
        assert {str(at.relative_to(ROOT)) for at in wanted} <= found
    assert {"csrc/schedule.h", "csrc/cpu/gram_kernel.h", "csrc/cuda/device.cu", "awd_fast/_C.pyi"} <= found
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("mode", ["0", "off"])
def test_the_module_can_be_left_out(source, mode):
    done = build(source, AWD_FAST_BUILD=mode)
    assert done.returncode == 0, done.stdout
    assert SENTENCE in done.stdout
    assert not list((source / "built").rglob("*.so"))


@pytest.mark.parametrize("variable", ["AWD_FAST_BUILD", "AWD_FAST_CUDA"])
def test_an_unknown_mode_is_named(source, variable):
    done = build(source, **{variable: "perhaps"})
    assert done.returncode != 0
    assert f"{variable} is 'perhaps'" in done.stdout
