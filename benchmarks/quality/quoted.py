"""Puts the committed figures of the study into the pages that quote them: `python -m benchmarks.quality.quoted`.

Each stands between two comments of a page, so that the tests can see whether it is still what the study found.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import ADAPTED, TASK_ARITHMETIC
from benchmarks.quality.report import markdown, percent
from benchmarks.quality.study import Mean

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality" / "results.json"

# What a page quotes: its rows, by the names that the report has for them.
PAGES: dict[str, Sequence[str]] = {
    "README.md": (
        "pretrained",
        "individual",
        "average",
        TASK_ARITHMETIC,
        "TIES, density 0.2 (mergekit)",
        "AWD global (paper)",
        "AWD rows, squared, Converge",
        "WUDI, ridge 0.1",
        "Iso-C, embeddings averaged (FusionBench)",
        "TSV-M, embeddings averaged (FusionBench)",
        "AWD rows + AdaMerging, by tensor",
    ),
    "docs/choosing.md": (
        "pretrained",
        "individual",
        "average",
        TASK_ARITHMETIC,
        "Task Arithmetic at 1.25 / sqrt(K)",
        "AWD global (paper)",
        "AWD rows (authors' later code)",
        "AWD rows, squared, Converge",
        "AWD rows, squared, Converge at 1.25 / sqrt(K)",
        "WUDI, ridge 0.1",
        "WUDI, ridge 0.1 at scale 1",
        "AWD rows, squared, flat spectrum",
        "WUDI, ridge 0.1, flat spectrum",
        "TIES, density 0.2 (mergekit)",
        "DARE TIES, density 0.5 (mergekit)",
        "Breadcrumbs, density 0.9 (mergekit)",
        "Iso-C, embeddings averaged (FusionBench)",
        "TSV-M, embeddings averaged (FusionBench)",
        "AdaMerging, by task",
        "AWD rows + AdaMerging, by task",
        "AdaMerging, by tensor",
        "AWD rows + AdaMerging, by tensor",
    ),
}
PLACE = re.compile(r"(<!-- figures of make quality -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def _read(written: dict[str, float | None]) -> Mean:
    return Mean(**{name: math.nan if value is None else value for name, value in written.items()})


def table(results: dict[str, Any], names: Sequence[str]) -> str:
    """Markdown: what each seed's validation texts chose, accuracy, and gain over Task Arithmetic."""
    rows = [["method", "chosen", "accuracy", "above Task Arithmetic"]]
    for name in names:
        found = results["eight"][name]
        scales = [f"{scale:g}" for scale in found["chosen"] if scale is not None]
        gain = "" if name == TASK_ARITHMETIC else percent(_read(found["gain"]), signed=True)
        chosen = (", ".join(scales) or "-") + (" steps" if found["block"] == ADAPTED else "")
        rows.append([name, chosen, percent(_read(found["accuracy"])), gain])
    return markdown(rows)


def current(text: str, page: str, results: dict[str, Any]) -> str:
    """The text of a page with the figures of `results` in their place."""
    found, count = PLACE.subn(lambda match: f"{match[1]}{table(results, PAGES[page])}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"{page} has {count} places for figures, expected 1")
    return found


def main() -> int:
    """Rewrite the pages. Returns the exit status."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(current(text, page, results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
