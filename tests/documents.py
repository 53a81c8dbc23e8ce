"""The code of the README and of the pages in docs/, to be run as it stands."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def text_of(page: str) -> str:
    return (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """What is typed in the blocks of the console, without comments; a line that goes on is one command."""
    lines = "".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line[2:]).strip() for line in lines if line.startswith("$ ")]


def run_python(page: str, names: dict[str, Any] | None = None, which: slice = slice(None)) -> dict[str, Any]:
    """Runs the blocks of Python of a page one after another, and gives their names."""
    found = {} if names is None else names
    for block in blocks(page, "python")[which]:
        exec(compile(block, page, "exec"), found)
    return found
