"""Runs the tests of this folder with the packages that they are about: `python -m tests.integrations` (any of pytest's
arguments may follow), which is `make test-integrations`.

The environment is that of the peers (`benchmarks/quality/peers.py`, made on the first call), which stays as it is: a
small one in build/integrations takes its packages from there, and has awd_fast installed besides, without a compiled
module of its own: the folder's is used.
"""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.quality import peers

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "integrations"


def environment() -> Path:
    """The Python of the small environment, made where it is not there or belongs to other peers."""
    theirs = peers.peers_python()
    site = next(theirs.parent.parent.glob("lib/python*/site-packages"))
    made = FOLDER / peers.environment_folder().name
    python = peers.python_of(made)
    if not (made / peers.MARKER).is_file():
        step("make an environment", sys.executable, "-m", "venv", "--clear", str(made))
        own = next(made.glob("lib/python*/site-packages"))
        (own / "peers.pth").write_text(f"{site}\n")
        pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input")
        step("install setuptools", *pip, "--constraint", str(ROOT / "constraints.txt"), "setuptools", "pybind11")
        # Of what PEFT needs, all is there.
        step("install PEFT", *pip, "--no-deps", "--constraint", str(ROOT / "constraints.txt"), "peft")
        # What awd_fast needs is there already, so that nothing is resolved, and nothing compiled.
        step("install awd_fast", *pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        (made / peers.MARKER).touch()
    return python


def step(what: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "AWD_FAST_BUILD": "0"})
    if done.returncode != 0:
        raise SystemExit(f"could not {what}: {peers.last_words(done.stdout + done.stderr, lines=5)}")


def main() -> int:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder = Path(__file__).resolve().parent
    # The options of pyproject.toml are those of plugins that are not installed here.
    command = [str(environment()), "-m", "pytest", "-o", "addopts=-q --strict-markers", str(folder), *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
