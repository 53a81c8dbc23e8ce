"""Merging model folders: opens them, merges tensor by tensor, and writes a folder that transformers loads.

The output appears whole or not at all: everything is written into a folder beside it, which is renamed at the end.
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from awd_fast import card, checkpoints
from awd_fast.checkpoints import Checkpoint
from awd_fast.errors import InputError
from awd_fast.merging import Merger, progress_bar
from awd_fast.plan import Step, make_plan
from awd_fast.recipe import Recipe, make_recipe
from awd_fast.report import MergeReport, aligned

REPORT = "awd_fast.json"


def merge_checkpoints(
    base_path: str | Path,
    model_paths: Sequence[str | Path],
    out_path: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> MergeReport:
    """Merges fine-tuned checkpoints into one: `awd_fast.merge` from folder to folder, a tensor at a time.

    base_path, model_paths: Hugging Face folders, single .safetensors files, or names on the Hub (extra `hub`).
    out_path: the folder to write: safetensors sharded as the base is, config, tokenizer and generation files from the
        base, a model card, and the report as awd_fast.json. It must not exist, unless `overwrite` allows to replace a
        model folder; it appears only when it is complete.
    options: those of `awd_fast.merge`, by the same names; `optimizer` may also be "sgd", "adam" or "converge".

    Raises InputError in one sentence naming file and tensor for anything that does not fit, and OSError where the
    disk fails; neither leaves anything behind. Groups "global" with SGD or Converge read the disentangled tensors
    twice; with Adam or an l1 penalty their task vectors must fit into memory together.
    """
    recipe = make_recipe(len(model_paths), **options)
    out = Path(out_path).expanduser()
    base, models, plan = open_and_plan(base_path, model_paths, recipe)
    check_output(out, overwrite, [base, *models])
    report = MergeReport(recipe, base.path, tuple(model.path for model in models), out)
    steps = {step.name: step for step in plan}
    files = checkpoints.output_files(base)
    _check_space(out, sum(_bytes(step) for step in plan))
    with staged(out, overwrite) as folder, progress_bar(plan, progress, "merging") as bar:
        merger = Merger(base, models, plan, recipe, report)
        for file, names in files.items():
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors[name] = merger.merged(steps[name]).cpu()
                bar.update()
            metadata = base.opened[base.file_of[names[0]]].text
            checkpoints.write_file(folder, file, tensors, metadata or {"format": "pt"})
        if base.sharded:
            checkpoints.write_index(folder, files, sum(_bytes(step) for step in plan))
        checkpoints.copy_side_files(base, folder, recipe.dtype)
        (folder / "README.md").write_text(card.model_card(report))
        (folder / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n")
    return report


def inspect_checkpoints(
    base_path: str | Path, model_paths: Sequence[str | Path], *, progress: bool = False, **options: Any
) -> MergeReport:
    """The report of a merge without the merge: similarity before and after, per tensor and overall.

    Takes the options of `merge_checkpoints` and raises what it raises; nothing is written.
    """
    recipe = make_recipe(len(model_paths), **options)
    base, models, plan = open_and_plan(base_path, model_paths, recipe)
    report = MergeReport(recipe, base.path, tuple(model.path for model in models))
    merger = Merger(base, models, plan, recipe, report)
    with progress_bar(plan, progress, "inspecting") as bar:
        for step in plan:
            merger.inspected(step)
            bar.update()
    return report


def open_and_plan(
    base_path: str | Path, model_paths: Sequence[str | Path], recipe: Recipe
) -> tuple[Checkpoint, list[Checkpoint], list[Step]]:
    """Opens the checkpoints (headers only) and decides what happens to each tensor."""
    base = Checkpoint(base_path)
    models = [Checkpoint(path) for path in model_paths]
    return base, models, make_plan(base, models, recipe)


def describe_plan(base: Checkpoint, plan: Sequence[Step]) -> str:
    """What would happen to each tensor, and which files would be written, as text."""
    rows: list[tuple[str, ...]] = [("tensor", "stored", "written", "action", "because")]
    for step in plan:
        written = str(step.dtype).removeprefix("torch.")
        rows.append((step.name, str(step.info), written, step.action, step.reason))
    count = len(checkpoints.output_files(base))
    files = "1 file" if count == 1 else f"{count} files and an index"
    return f"{aligned(rows)}\n{files}, {sum(map(_bytes, plan)) / 1e6:.1f} MB of tensors"


def check_output(out: Path, overwrite: bool, sources: Sequence[Checkpoint]) -> None:
    """Raises InputError where `out` exists and may not, or must not, be replaced."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(f"the output folder {out} exists; choose another, or give overwrite=True (--overwrite)")
    target = out.resolve()
    for source in sources:
        for file in source.files:
            if target in file.resolve().parents:
                raise InputError(f"the output folder {out} holds the input {file}; choose another")
    if not out.is_dir() or out.is_symlink():
        raise InputError(f"{out} is not a folder, so it is not overwritten")
    if any(out.iterdir()) and not (any(out.glob("*.safetensors")) or (out / "config.json").exists()):
        raise InputError(f"{out} is not a model folder (no config.json, no safetensors), so it is not overwritten")


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, or vanishes when anything goes wrong."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    folder.mkdir()
    try:
        yield folder
        _replace(folder, out, overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _replace(folder: Path, out: Path, overwrite: bool) -> None:
    """Renames `folder` to `out`; an old `out` is set aside first, and put back if the renaming fails."""
    if not os.path.lexists(out):
        folder.rename(out)
        return
    if not overwrite:
        raise InputError(f"the output folder {out} appeared while merging; nothing was written")
    aside = folder.with_suffix(".replaced")
    out.rename(aside)
    try:
        folder.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _bytes(step: Step) -> int:
    return math.prod(step.info.shape) * step.dtype.itemsize


def _check_space(out: Path, needed: int) -> None:
    """Raises OSError before any work where the output cannot fit on its disk."""
    parent = next(folder for folder in (out.absolute().parent, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"{parent} has {free / 1e6:.1f} MB free; the output needs {needed / 1e6:.1f} MB")
