"""What the documentation shows runs as it stands."""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.quality import quoted
from tests.test_cli import run

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("tour.md", "python"):
        exec(compile(block, "tour.md", "exec"), names)
    commands = [line[2:] for block in blocks("tour.md", "console") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "awd-fast"
        code, _, error = run(*arguments)
        assert code == 0, error
    assert (tmp_path / "two" / "awd_fast.json").is_file()


@pytest.mark.parametrize("page", quoted.PAGES)
def test_pages_quote_what_the_study_found(page):
    results = json.loads(quoted.RESULTS.read_text())
    text = (quoted.ROOT / page).read_text()
    assert quoted.current(text, page, results) == text, "python -m benchmarks.quality.quoted"
