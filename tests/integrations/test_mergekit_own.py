"""mergekit's own tests, from its source distribution, pass with `accelerate()` on as they do without."""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.quality.data import cache_folder

PLUGIN = """
from awd_fast.integrations.mergekit_accelerate import accelerate, accelerated

accelerate()
assert accelerated()
"""


@pytest.fixture(scope="module")
def distribution() -> Path:
    """The folder of mergekit's source distribution, downloaded once, by the version that is installed."""
    name = f"mergekit-{version('mergekit')}"
    kept = cache_folder() / "packages" / name
    if not kept.is_dir():
        work = kept.with_suffix(".unfinished")
        shutil.rmtree(work, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "mergekit", "--no-build-isolation", "--dest", str(work), name.replace("-", "==")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"{name} cannot be downloaded: {done.stderr.strip()[-300:]}")
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        (work / name).rename(kept)
        shutil.rmtree(work)
    return kept


def failed(tests: Path, folder: Path, *options: str) -> set[str]:
    """The tests that do not pass."""
    variables = os.environ | {"PYTHONPATH": str(folder)}  # and not this project's root, whose tests are called so too
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-rfE", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True, env=variables, check=False)
    assert " passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    return {line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))}


def test_all_pass_as_they_do_without(distribution: Path, tmp_path: Path) -> None:
    shutil.copytree(distribution / "tests", tmp_path / "tests")
    if not (tmp_path / "tests" / "common.py").exists():
        shutil.copyfile(Path(__file__).with_name("mergekit_helpers.py"), tmp_path / "tests" / "common.py")
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "accelerated_mergekit.py").write_text(PLUGIN)
    found = failed(tmp_path / "tests", tmp_path, "-p", "accelerated_mergekit")
    assert found == (failed(tmp_path / "tests", tmp_path) if found else set())
