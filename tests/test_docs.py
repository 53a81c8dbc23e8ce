"""What the documentation shows runs as it stands."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from awd_fast.objective import OPTIMIZERS, Adam, Objective
from awd_fast.ops import library
from benchmarks.quality import quoted
from tests.test_cli import run

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def run_python(page: str) -> dict:
    """Runs the Python of a page, block after block, in the current folder. Gives the names that it leaves."""
    names: dict = {}
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)
    return names


def test_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python("tour.md")
    commands = [line[2:] for block in blocks("tour.md", "console") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "awd-fast"
        code, _, error = run(*arguments)
        assert code == 0, error
    assert (tmp_path / "two" / "awd_fast.json").is_file()


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
    for cell in re.findall(r"^\| (`\w+[.(].*?) \| ", (DOCS / "operators.md").read_text(), re.MULTILINE):
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
