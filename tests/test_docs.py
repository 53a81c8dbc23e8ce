"""What the documentation shows runs as it stands. Pages about other packages: tests/integrations."""

import json
import re
import shlex

import pytest
import torch
from torch import nn

from awd_fast.objective import OPTIMIZERS, Adam, Objective
from awd_fast.ops import library
from benchmarks.quality import quoted
from tests.adapter_folders import linear, write_adapter_folder
from tests.conftest import write_checkpoint
from tests.documents import ROOT, blocks, commands, run_python, text_of
from tests.test_cli import run

ELSEWHERE = {
    "README.md": "in part",
    "fusion_bench.md": "integrations/test_fusion_bench.py",
    "mergekit.md": "integrations/test_mergekit_docs.py",
    "migrating.md": "integrations/test_migrating.py",
    "operators.md": "test_docs.py",
    "peft.md": "integrations/test_peft.py",
    "transformers.md": "integrations/test_transformers.py",
    "adamerging.md": "test_adamerging.py",
}
"""Where the Python of the other pages is run."""


@pytest.fixture
def folders(tmp_path, monkeypatch, base_state, model_states):
    """The working directory of the README: B, M1, M2, two adapters of B, CONFIG.yml."""
    for name, state in zip(("B", "M1", "M2"), (base_state, *model_states), strict=False):
        write_checkpoint(tmp_path / name, state)
    module = "encoder.layer.0.attention.self.query"
    for index, name in enumerate(("ADAPTER1", "ADAPTER2")):
        write_adapter_folder(tmp_path / name, linear(module, 2, 6, 6, seed=index), target_modules=["query"], r=2)
    (tmp_path / "CONFIG.yml").write_text(blocks("README.md", "yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_with_code_is_run_somewhere():
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if "```python\n" in path.read_text()]
    assert set(pages) - {"tour.md"} == set(ELSEWHERE) - {"README.md"}
    for page in set(pages) - {"tour.md"}:
        assert page in (ROOT / "tests" / ELSEWHERE[page]).read_text(), page


def test_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python("tour.md")
    typed = commands("tour.md")
    assert len(typed) == 3
    for command in typed:
        ran(command)
    assert (tmp_path / "two" / "awd_fast.json").is_file()


def ran(command: str) -> None:
    """Runs what is typed as `awd-fast ...`."""
    program, *arguments = shlex.split(command)
    assert program == "awd-fast"
    code, _, error = run(*arguments)
    assert code == 0, f"{command}: {error}"


def test_the_python_of_the_readme_runs(folders, base_state, model_states):
    names = {"base_state_dict": base_state, "state_dict_1": model_states[0], "state_dict_2": model_states[1]}
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    models = {f"model_{k}": nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)) for k in (1, 2)}
    names |= {"task_vectors": torch.randn(3, 6, 8), "base_model": base} | models
    found = run_python("README.md", names, slice(2))  # what follows needs PEFT
    assert isinstance(found["merged"], nn.Module)
    assert (folders / "OUT" / "model.safetensors").is_file()


TYPED = [command for command in commands("README.md") if command.startswith("awd-fast ")]
NOT_HERE = ("--device cuda", "awd-fast bench", "awd-fast mergekit", "awd-fast fusion_bench", "--base BASE")
"""A GPU, a minute, packages that are not here, and what is only a form."""


@pytest.mark.parametrize("command", [command for command in TYPED if not any(part in command for part in NOT_HERE)])
def test_the_commands_of_the_readme_run(folders, command):
    ran(command)
    kept = any(word in command for word in ("inspect", "info", "--dry-run"))
    assert (folders / "OUT").is_dir() != kept


def test_the_readme_has_its_commands():
    assert len(TYPED) > 18
    for part in NOT_HERE:
        assert any(part in command for command in TYPED)


def test_the_examples_of_the_operators_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names = run_python("operators.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.npy"]
    assert str(names["similarity"].shape) == "torch.Size([64, 3, 3])"


def test_the_table_of_operators_is_that_of_the_schemas():
    """Every overload with its arguments in order, those of an objective, an optimiser or a drop under one name."""
    drop = ["thresholds", "limits", "densities", "epsilons", "seed"]
    documented = {}
    for cell in re.findall(r"^\| (`\w+[.(].*?) \| ", text_of("operators.md"), re.MULTILINE):
        spans = re.findall(r"`([^`]+)`", cell)
        name = re.match(r"\w+", spans[0])[0]
        (listed,) = [span[span.index("(") + 1 : -1] for span in spans if "(" in span]
        for overload in re.findall(r"\.([a-z]+)", " ".join(span.partition("(")[0] for span in spans)) or ["default"]:
            arguments = []
            for argument in listed.split(", "):
                word = argument.partition("=")[0]
                kind = OPTIMIZERS.get(overload) if word == "OPTIMIZER" else {"OBJECTIVE": Objective}.get(word)
                names = drop if word == "DROP" else [word] if kind is None else library.FIELDS[kind]
                arguments += ["adam_eps" if (kind, each) == (Adam, "eps") else each for each in names]
            if name == "adam_step":
                arguments.remove("iterations")
                arguments[4:4] = ["square"] * (overload == "adam")
            documented[f"{name}.{overload}".removesuffix(".default")] = arguments
    known = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("awd_fast::")]
    assert documented.keys() == {name.removeprefix("awd_fast::") for name in known}
    for name, arguments in documented.items():
        packet, _, overload = name.partition(".")
        schema = getattr(getattr(torch.ops.awd_fast, packet), overload or "default")._schema
        assert [argument.name for argument in schema.arguments] == arguments, name


@pytest.mark.parametrize("page", quoted.PAGES)
def test_pages_quote_what_the_study_found(page):
    results = json.loads(quoted.RESULTS.read_text())
    text = (quoted.ROOT / page).read_text()
    assert quoted.current(text, page, results) == text, "python -m benchmarks.quality.quoted"


def test_pages_link_to_files_that_are_there():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
            assert "://" in target or (path.parent / target).exists(), f"{path.name}: {target}"
