"""The wheel, in an environment that has nothing else; and when nvcc is missing, broken or not needed again."""

import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from awd_fast.ops import native
from tests.test_build import ROOT, copy_source

DEVELOPMENT = Path(torch.__file__).parent.parent
CUDA_VARIABLES = ("AWD_FAST_NVCC", "AWD_FAST_CUDA", "AWD_FAST_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH")


def without_cuda() -> dict[str, str]:
    """An environment to build in."""
    variables = {key: value for key, value in os.environ.items() if key not in CUDA_VARIABLES}
    return variables | {"AWD_FAST_CUDA": "0", "AWD_FAST_BUILD": "require", "AWD_FAST_JOBS": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, without CUDA, with the objects of this folder where they are still right."""
    if native.unavailable() is not None:
        pytest.skip(str(native.unavailable()))
    folder = tmp_path_factory.mktemp("wheel")
    copy_source(folder / "tree")
    code = "import setuptools.build_meta as build; build.build_sdist('.')"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "tree", env=without_cuda(), check=True)
    with tarfile.open(next((folder / "tree").glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("awd_fast-*"))
    for objects in (ROOT / "build").glob("cpu-*"):
        shutil.copytree(objects, source / "build" / objects.name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(folder)], cwd=source, env=without_cuda(), check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def interpreter(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python in an environment of its own, with the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(command, check=True)
    return python


def run(python: Path, code: str, path: str = "") -> str:
    """What it prints, in a folder that has no package."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(python), "-c", code]
    done = subprocess.run(
        command, cwd=python.parent, env=variables | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_wheel_has_all_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [*(ROOT / "awd_fast").rglob("*"), *(ROOT / "hydra_plugins").rglob("*")]
    modules = {str(file.relative_to(ROOT)) for file in files if file.suffix in (".py", ".pyi", ".yaml")}
    (compiled,) = (name for name in names if name.endswith(".so"))
    assert compiled.startswith("awd_fast/_C.")
    assert names == {*modules, compiled, "awd_fast/py.typed"}


def test_without_pytorch_the_package_and_its_module_are_imported(interpreter):
    code = """
import importlib.util
assert importlib.util.find_spec("torch") is None
import awd_fast, awd_fast._C
print(awd_fast.__version__, awd_fast._C.build_info()["cuda_archs"], awd_fast._C.cuda_why_not(), sep="\\n")
"""
    version, archs, reason = run(interpreter, code).splitlines()
    assert version
    assert archs == "[]"
    assert reason == "built without CUDA (AWD_FAST_CUDA is off)"


def test_the_installed_wheel_merges(interpreter):
    code = """
import sys, torch, awd_fast
from awd_fast.ops import backends
assert awd_fast.__file__.startswith(sys.prefix), awd_fast.__file__
assert backends.unavailable("native") is None
states = [{"w": torch.full((4, 6), float(k)) + torch.eye(4, 6) * k * k} for k in range(4)]
merged = awd_fast.merge(states[0], states[1:], backend="native")
print(list(merged), bool(merged["w"].isfinite().all()))
"""
    assert run(interpreter, code, str(DEVELOPMENT)).strip() == "['w'] True"


FAKE_NVCC = """#!/bin/sh
echo "$*" >> "{folder}/calls.txt"
case "$*" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.99" ;;
--list-gpu-arch) printf "compute_80\\ncompute_90\\n" ;;
--dryrun*) printf '#$ TOP={folder}\\n#$ LIBRARIES=  "-L{folder}/nowhere"\\n' >&2 ;;
*)
    [ -e "{folder}/broken" ] && echo "no GPU for you" && exit 1
    while [ $# -gt 0 ]; do
        case "$1" in -MF) list=$2 ;; -o) object=$2 ;; *.cu) source=$2 ; source=$1 ;; esac
        shift
    done
    echo "$object : $source {folder}/shared.cuh" > "$list"
    echo "ptxas info: Used 4 registers"
    : > "$object" ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a toolkit whose nvcc knows sm_80 and sm_90 and writes down how it is called, in use."""
    for variable in CUDA_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(FAKE_NVCC.format(folder=tmp_path))
    nvcc.chmod(0o755)
    (tmp_path / "lib64").mkdir()
    for name in ("lib64/libcudart_static.a", "shared.cuh", "calls.txt", "kernel.cu"):
        (tmp_path / name).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compilations(fake: Path) -> int:
    return sum("-c " in line for line in (fake / "calls.txt").read_text().splitlines())


def macros(setup) -> dict[str, str]:
    return dict(setup.cuda_arguments()["define_macros"])


def test_objects_are_compiled_again_only_where_something_changed(fake):
    import build_cuda

    toolkit = build_cuda.find_toolkit(os.environ)
    assert (toolkit.version, toolkit.archs) == ("12.4", ("80", "90"))
    assert toolkit.cudart == fake / "lib64" / "libcudart_static.a"
    assert toolkit.flags()[-1] == "-gencode=arch=compute_90,code=compute_90"

    def make(toolkit=toolkit) -> int:
        time.sleep(0.02)  # files of one tick of the clock could be in either order
        before = compilations(fake)
        (built,) = build_cuda.compile_objects(toolkit, ["kernel.cu"], Path("build"), jobs=1)
        assert "Used 4 registers" in built.with_suffix(".ptxas.txt").read_text()
        return compilations(fake) - before

    assert [make(), make()] == [1, 0]
    (fake / "shared.cuh").touch()
    assert [make(), make()] == [1, 0]
    narrow = build_cuda.Toolkit(toolkit.nvcc, toolkit.version, ("80",), toolkit.cudart)
    assert [make(narrow), make(narrow), make()] == [1, 0, 0]
    (fake / "shared.cuh").unlink()  # then the compiler should say what is missing
    assert make() == 1


def test_with_nvcc_the_module_is_told_of_cuda(fake, monkeypatch, capsys):
    import setup

    monkeypatch.setattr(setup, "files", lambda pattern: ["kernel.cu"])
    monkeypatch.setenv("AWD_FAST_CUDA_ARCHS", "120, 90")
    found = setup.cuda_arguments()
    assert dict(found["define_macros"]) == {"AWD_WITH_CUDA": '"12.4"', "AWD_CUDA_ARCHS": '"90"'}
    assert found["extra_objects"][-1].endswith("libcudart_static.a")
    assert "does not know sm_120, left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"AWD_FAST_CUDA": "0"}, "AWD_FAST_CUDA is off"),
        ({"CUDA_HOME": "", "PATH": "/nowhere"}, "no nvcc was found"),
        ({"AWD_FAST_NVCC": "/bin/false"}, "/bin/false --version failed with exit code 1"),
        ({"AWD_FAST_NVCC": "/bin/true"}, "/bin/true is no nvcc"),
        ({"AWD_FAST_NVCC": "./shared.cuh"}, "shared.cuh does not run: Exec format error"),
        ({"AWD_FAST_NVCC": "/nowhere/nvcc"}, "AWD_FAST_NVCC is /nowhere/nvcc, which is no program"),
        ({"AWD_FAST_CUDA_ARCHS": "120"}, "knows none of the architectures 120"),
        ({"no": "library"}, "libcudart_static.a is missing from the toolkit"),
        ({"a": "broken kernel"}, "nvcc failed on kernel.cu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cuda_lacks_is_said_and_survived_unless_required(fake, monkeypatch, capsys, variables, reason):
    import setup

    monkeypatch.setattr(setup, "files", lambda pattern: ["kernel.cu"])
    if "no" in variables:
        (fake / "lib64" / "libcudart_static.a").unlink()
    if "a" in variables:
        (fake / "broken").touch()
    (fake / "shared.cuh").chmod(0o755)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert reason in macros(setup)["AWD_WITHOUT_CUDA"]
    said = capsys.readouterr().err
    assert said.count("awd_fast: built without the CUDA operators (") == 1
    assert reason in said
    assert ("no GPU for you" in said) == ("a" in variables)
    if "AWD_FAST_CUDA" not in variables:
        monkeypatch.setenv("AWD_FAST_CUDA", "require")
        with pytest.raises(SystemExit, match="AWD_FAST_CUDA=require: "):
            setup.cuda_arguments()


@pytest.mark.parametrize("text", ["sm_90", "9.0", ";"])
def test_a_list_of_architectures_that_is_none_is_named(fake, monkeypatch, text):
    import setup

    monkeypatch.setenv("AWD_FAST_CUDA_ARCHS", text)
    with pytest.raises(SystemExit, match=f"AWD_FAST_CUDA_ARCHS is '{text}'; expected"):
        setup.cuda_arguments()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_module_is_built_where_nvcc_fails(fake):
    """With bindings that say only why; the real ones take a minute to compile."""
    source = fake / "source"
    copy_source(source)
    shutil.rmtree(source / "csrc" / "cpu")
    (source / "csrc" / "sparse_bindings.cpp").unlink()
    (source / "csrc" / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        'PYBIND11_MODULE(_C, module) { module.def("why", [] { return AWD_WITHOUT_CUDA; }); }\n'
    )
    variables = without_cuda() | {"AWD_FAST_CUDA": "auto", "AWD_FAST_NVCC": "/bin/false"}
    command = [sys.executable, "setup.py", "build", "--build-lib", "built"]
    done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True, check=True)
    assert "awd_fast: built without the CUDA operators (" in done.stderr
    (module,) = (source / "built" / "awd_fast").glob("_C*.so")
    code = f"import sys; sys.path.insert(0, {str(module.parent)!r}); import _C; print(_C.why())"
    why = subprocess.run([sys.executable, "-c", code], cwd=fake, capture_output=True, text=True, check=True).stdout
    assert "failed" in why
