"""Merging model folders: opens them, merges tensor by tensor, and writes a folder that transformers loads.

The output appears whole or not at all: everything is written into a folder beside it, which is renamed at the end.
"""

import math
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from awd_fast import card, checkpoints
from awd_fast.checkpoints import Checkpoint
from awd_fast.errors import InputError
from awd_fast.merging import make_merger, progress_bar
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
    out = checkpoints.local_path(out_path)
    base, models, plan = open_and_plan(base_path, model_paths, recipe)
    check_output(out, overwrite, [base, *models])
    report = MergeReport(recipe, base.path, tuple(model.path for model in models), out)
    steps = {step.name: step for step in plan}
    files = checkpoints.output_files(base)
    config = checkpoints.read_config(base)
    config = None if config is None or recipe.dtype is None else checkpoints.with_dtype(config, recipe.dtype)
    _check_space(out, sum(_bytes(step) for step in plan))
    with staged(out) as folder, progress_bar(plan, recipe, progress, "merging") as bar:
        merger = make_merger(base, models, recipe, report)
        merger.prepare(plan, bar)
        with closing(merger.results([steps[name] for names in files.values() for name in names])) as results:
            for file, names in files.items():
                tensors: dict[str, Tensor] = {}
                for step, tensor in islice(results, len(names)):
                    tensors[step.name] = tensor
                    bar.update()
                metadata = base.opened[base.file_of[names[0]]].text
                checkpoints.write_file(folder, file, tensors, metadata or {"format": "pt"})
                del tensors, tensor  # before those of the next file
        if base.sharded:
            checkpoints.write_index(folder, files, sum(_bytes(step) for step in plan))
        checkpoints.copy_side_files(base, folder, config)
        (folder / "README.md").write_text(card.model_card(report), encoding="utf-8")
        (folder / REPORT).write_text(report.json_text(), encoding="utf-8")
        check_output(out, overwrite, [base, *models])  # again: another process may have made or filled it meanwhile
    return report


def inspect_checkpoints(
    base_path: str | Path, model_paths: Sequence[str | Path], *, progress: bool = False, **options: Any
) -> MergeReport:
    """The report of a merge without the merge: similarity before and after, per tensor and overall.

    Takes the options of `merge_checkpoints`; the method must be "awd". Tensors that are not disentangled are not read,
    and nothing is written. Raises InputError as `merge_checkpoints` does.
    """
    recipe = make_recipe(len(model_paths), **options)
    if recipe.method != "awd":
        raise InputError(f"method is {recipe.method}; an inspection shows what awd does")
    base, models, plan = open_and_plan(base_path, model_paths, recipe)
    report = MergeReport(recipe, base.path, tuple(model.path for model in models))
    merger = make_merger(base, models, recipe, report)
    with progress_bar(plan, recipe, progress, "inspecting") as bar:
        merger.prepare(plan, bar)
        with closing(merger.inspections(plan)) as inspections:
            for _ in inspections:
                bar.update()
    return report


def open_and_plan(
    base_path: str | Path, model_paths: Sequence[str | Path], recipe: Recipe
) -> tuple[Checkpoint, list[Checkpoint], list[Step]]:
    """Opens the checkpoints (headers only) and decides what happens to each tensor."""
    base = Checkpoint(base_path)
    models = [Checkpoint(path) for path in model_paths]
    for model in models:
        if set(model.files) == set(base.files):
            raise InputError(f"the model {model.path} is the base itself, so it has no task vector; leave it out")
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
    """Raises InputError where `out` cannot be made, or exists and may not, or must not, be replaced.

    Only a folder that holds nothing but what a merge writes is replaced, and never one that holds an input.
    """
    parent = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError(f"the output folder {out} cannot be made: {parent} is not a folder")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(f"the output folder {out} exists; choose another, or give overwrite=True (--overwrite)")
    if not out.is_dir() or out.is_symlink():
        raise InputError(f"{out} is not a folder, so it is not overwritten")
    places = (out.absolute(), out.resolve())
    for source in sources:
        for file in source.files:
            if any(place in (*file.absolute().parents, *file.resolve().parents) for place in places):
                raise InputError(f"the output folder {out} holds the input {file}; choose another")
    for file in out.iterdir():
        if not file.is_file() or not (file.suffix == ".safetensors" or _is_written(file.name)):
            raise InputError(f"{out} holds {file.name}, which no merge writes, so it is not overwritten")
    if any(out.iterdir()) and not any(out.glob("*.safetensors")):
        raise InputError(f"{out} is not a model folder (it holds no safetensors), so it is not overwritten")


def _is_written(name: str) -> bool:
    return name in ("README.md", REPORT, checkpoints.INDEX) or checkpoints.is_side_file(name)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, or vanishes when anything goes wrong."""
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    folder = out.parent / f".awd-fast-{secrets.token_hex(6)}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        _replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for made in missing:
                made.rmdir()
        raise


def _replace(folder: Path, out: Path) -> None:
    """Renames `folder` to `out`; an old `out` is set aside first, put back if that fails, and removed at the end."""
    with _uninterrupted():
        if not os.path.lexists(out):
            folder.rename(out)
            return
        aside = folder.with_suffix(".replaced")
        out.rename(aside)
        try:
            folder.rename(out)
        except BaseException:
            aside.rename(out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds back SIGINT, SIGTERM and SIGHUP: between two renames the old model would be nowhere."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _bytes(step: Step) -> int:
    return math.prod(step.info.shape) * step.dtype.itemsize


def _check_space(out: Path, needed: int) -> None:
    """Raises OSError before any work where the output cannot fit on its disk."""
    parent = next(folder for folder in (out.absolute().parent, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"{parent} has {free / 1e6:.1f} MB free; the output needs {needed / 1e6:.1f} MB")
