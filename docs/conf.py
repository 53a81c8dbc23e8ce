"""Sphinx: the pages of this folder, and the reference from the docstrings. `make docs` builds it."""

import re

import awd_fast

project = "awd_fast"
author = "The awd_fast authors"
version = release = awd_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
html_theme = "furo"
html_title = f"awd_fast {version}"
exclude_patterns = ["_build"]

NAMED = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)")


def plain(text: str) -> str:
    """Words of a docstring as reStructuredText: `x` is code, and nothing else is markup."""
    pieces = re.split(r"`+([^`]+)`+", text)
    escaped = [re.sub(r"([\\*_|`])", r"\\\1", piece) for piece in pieces[::2]]
    code = [f"``{piece}``" for piece in pieces[1::2]] + [""]
    return "".join(piece for pair in zip(escaped, code, strict=True) for piece in pair)


def from_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are sentences, lines that begin with the names of parameters, and formulas that are indented."""
    found, last = [], ""
    for line in lines:
        named = NAMED.fullmatch(line)
        if named:
            kind, new = "named", f"- ``{named[1]}``: {plain(named[2])}"
        elif not line.strip():
            kind, new = "", ""
        elif not line.startswith("    "):
            kind, new = "words", plain(line)
        elif last in ("named", "more"):
            kind, new = "more", f"  {plain(line.strip())}"
        else:
            kind, new = "formula", f"| ``{line.strip()}``"
        if kind != last and not (kind == "more" and last == "named"):
            found.append("")
        found.append(new)
        last = kind
    lines[:] = [*found, ""]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", from_docstring)
