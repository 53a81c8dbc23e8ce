"""Installing from source: without PyTorch at build time, and without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "built without the compiled module"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs, and a torch that must not be imported."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("awd_fast", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    return copy


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python setup.py build` in `source`; both of its streams as stdout."""
    variables = {key: value for key, value in os.environ.items() if key not in ("AWD_FAST_BUILD", "CC", "CXX")}
    variables |= {"PYTHONPATH": str(source.parent / "poison"), **environment}
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


def test_a_required_module_that_fails_to_build_is_an_error(source):
    done = build(source, AWD_FAST_BUILD="require", **NO_COMPILER)
    assert done.returncode != 0


def test_broken_kernels_are_survived_unless_required(source):
    (source / "csrc" / "bindings.cpp").write_text("not C++\n")
    for other in (source / "csrc" / "cpu").glob("*.cpp"):
        other.write_text("\n")
    done = build(source)
    assert done.returncode == 0, done.stdout
    assert SENTENCE in done.stdout
    assert build(source, AWD_FAST_BUILD="require").returncode != 0


@pytest.mark.parametrize("mode", ["0", "off"])
def test_the_module_can_be_left_out(source, mode):
    done = build(source, AWD_FAST_BUILD=mode)
    assert done.returncode == 0, done.stdout
    assert SENTENCE in done.stdout
    assert not list((source / "built").rglob("*.so"))


def test_an_unknown_mode_is_named(source):
    done = build(source, AWD_FAST_BUILD="perhaps")
    assert done.returncode != 0
    assert "perhaps" in done.stdout
