"""The house rules that a machine can check: imports point down, files stay short, importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "awd_fast"
LAYERS = (
    ("version", "errors"),
    ("objective", "disk", "documents", "threads"),
    ("defaults",),
    ("recipe", "statistics", "adapter_config", "lowrank", "wudi"),
    ("converge",),
    ("ops",),
    ("streaming", "transfer"),
    ("solver",),
    ("plan", "measure", "checks"),
    ("disentangling", "report", "tensor_files", "blocks", "prefetch"),
    ("optimizer", "parts", "card", "checkpoints", "shards", "progress", "ranks", "journal"),
    ("merger", "sidefiles", "staging", "adapters"),
    ("block_jobs", "writer", "adapter_output", "adapter_models", "held_adapters"),
    ("wudi_jobs", "mixture"),
    ("stream",),
    ("device_merger", "lora_merger", "adamerging"),
    ("batches",),
    ("merging",),
    ("modules",),
    ("config", "plots", "bench"),
    ("output_folder",),
    ("making",),
    ("pipeline",),
    ("integrations",),
    ("cli",),
    ("__main__",),
)
"""From the bottom up; a module may import only from layers below its own."""


def level(module: str) -> int:
    top = module.removeprefix("awd_fast").removeprefix(".").split(".")[0]
    return next(index for index, names in enumerate(LAYERS) if top in names)


def imported(file: Path) -> set[str]:
    """The package's modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = node.module == "awd_fast"
            names |= {f"awd_fast.{alias.name}" for alias in node.names} if package else {node.module}
    return {name for name in names if name.startswith("awd_fast.") and not name.startswith("awd_fast._")}


MODULES = sorted(file for file in PACKAGE.glob("*.py") if file.name != "__init__.py")
FOLDERS = sorted(file for folder in ("ops", "integrations") for file in (PACKAGE / folder).glob("*.py"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_imports_point_down(file):
    for name in imported(file):
        assert level(name) < level(f"awd_fast.{file.stem}"), f"{file.stem} imports {name}"


@pytest.mark.parametrize("file", FOLDERS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_modules_of_a_folder_import_nothing_above_it(file):
    for name in imported(file):
        assert level(name) <= level(f"awd_fast.{file.parent.name}"), f"{file.parent.name}/{file.name} imports {name}"


def test_files_stay_short():
    root = PACKAGE.parent
    files = [p for folder in ("awd_fast", "csrc", "tests", "benchmarks") for p in (root / folder).rglob("*")]
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh")
    long = {str(p.relative_to(root)): len(p.read_text().splitlines()) for p in files if p.suffix in suffixes}
    assert {name: lines for name, lines in long.items() if lines > 420} == {}


def test_importing_the_package_does_no_work():
    code = "import sys, awd_fast; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'yaml', 'click')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_core_imports_no_package_that_it_is_integrated_with():
    code = (
        "import sys, awd_fast.cli, awd_fast.pipeline; sys.exit(any(n in sys.modules for n in ('mergekit', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    import awd_fast

    for name in awd_fast.__all__:
        assert getattr(awd_fast, name) is not None
    assert callable(awd_fast.merge)
    assert callable(awd_fast.disentangle)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = awd_fast.nonsense
