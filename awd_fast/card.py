"""The model card of a merged checkpoint: what was merged, how, and what came of it in numbers."""

from pathlib import Path

import yaml

from awd_fast.recipe import Recipe
from awd_fast.report import MergeReport
from awd_fast.version import __version__

_TITLES = {
    "awd": "Adaptive Weight Disentanglement ([AWD](https://arxiv.org/abs/2411.18729))",
    "wudi": "[WUDI](https://arxiv.org/abs/2503.08099) in closed form",
    "task_arithmetic": "[Task Arithmetic](https://arxiv.org/abs/2212.04089)",
    "average": "weighted average",
}


def model_card(report: MergeReport) -> str:
    """The README.md of the output folder. The same merge gives the same text: it holds no date and no output path."""
    recipe = report.recipe
    front = {
        "base_model": [short_name(name) for name in (report.base, *report.models)],
        "library_name": "peft" if report.as_adapter else "transformers",
        "tags": ["merge", "awd-fast", recipe.method, *(["lora"] if report.as_adapter else [])],
    }
    counts = ", ".join(f"{count} by `{action}`" for action, count in report.counts().items())
    kinds = report.adapters or ("Fine-tuned model",) * len(report.models)
    option = " --as-adapter" if report.as_adapter else ""
    given = "adapter" if report.as_adapter else "model"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        "# Merged LoRA adapter" if report.as_adapter else "# Merged model",
        "",
        f"Merged with awd-fast {__version__} by {_TITLES[recipe.method]}.",
        "",
        f"- Base model: `{report.base}`",
        *(
            f"- {kind}: `{model}`, weight {weight:g}"
            for kind, model, weight in zip(kinds, report.models, recipe.weights, strict=True)
        ),
        f"- Tensors: {counts} (`base`: kept as the base has them)",
        *([f"- {report.summary()}"] if report.summary() else []),
        "",
        "## Recipe",
        "",
        f"`awd-fast merge CONFIG.yml --out DIR{option}` with this configuration gives this {given} (paths as they were "
        "given):",
        "",
        "```yaml",
        config_text(recipe, report.base, report.models).strip(),
        "```",
        "",
    ]
    if report.figures is not None:
        title = "Similarity" if report.interference is None else "Interference"
        lines += [f"## {title} per tensor", "", "```text", report.table(), "```", ""]
    return "\n".join(lines)


def config_text(recipe: Recipe, base: str, models: tuple[str, ...]) -> str:
    """The recipe as a YAML configuration with mergekit's keys."""
    return yaml.safe_dump(recipe.to_config(base, models), sort_keys=False)


def short_name(path: str) -> str:
    """A Hub name as it is, and of a local path the last part."""
    return (Path(path).resolve().name or path) if Path(path).expanduser().exists() else path
