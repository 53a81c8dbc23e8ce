"""Merging model folders: opens them, merges block by block, and writes a folder that transformers loads.

The output appears whole or not at all, and what was done before a merge was stopped need not be done again: see
`awd_fast.staging` and `awd_fast.journal`.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from awd_fast import card, checkpoints, journal, measure, ranks, sidefiles, staging
from awd_fast.blocks import Block, cut
from awd_fast.checkpoints import Checkpoint
from awd_fast.errors import InputError
from awd_fast.journal import Journal, Record
from awd_fast.merging import make_merger
from awd_fast.plan import Step, make_plan
from awd_fast.progress import Shown
from awd_fast.ranks import Ranks
from awd_fast.recipe import Recipe, make_recipe
from awd_fast.report import MergeReport, Similarity, Tally, aligned
from awd_fast.shards import Shards
from awd_fast.staging import Staging
from awd_fast.version import __version__
from awd_fast.writer import Writer

REPORT = "awd_fast.json"


def merge_checkpoints(
    base_path: str | Path,
    model_paths: Sequence[str | Path],
    out_path: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    json_log: str | Path | None = None,
    **options: Any,
) -> MergeReport:
    """Merges fine-tuned checkpoints into one: `awd_fast.merge` from folder to folder, in bounded memory.

    base_path, model_paths: Hugging Face folders, single .safetensors files, or names on the Hub (extra `hub`).
    out_path: the folder to write: safetensors sharded as the base is, config, tokenizer and generation files from the
        base, a model card, and the report as awd_fast.json. It must not exist, unless `overwrite` allows to replace a
        model folder; it appears only when it is complete.
    resume: goes on with a merge into `out_path` that was stopped, by whatever; the result is the same to the bit. With
        none there, the merge begins anew.
    progress: show a progress bar. json_log: a file to write progress to, one JSON object per line: see
        `awd_fast.progress.Shown`.
    options: those of `awd_fast.merge`, by the same names; `optimizer` may also be "sgd", "adam" or "converge".

    Where torch.distributed is initialised, its processes share the work; all must see the same files, and the report is
    complete in all. Raises InputError in one sentence naming file and tensor for anything that does not fit, and
    OSError where the disk fails. An input is read once; tensors whose groups are larger than the `memory`, and a global
    group, twice; with Adam or an l1 penalty such a group must fit into the memory.
    """
    recipe = make_recipe(len(model_paths), **options)
    team = ranks.present()
    recipe = replace(recipe, device=team.device(recipe.device))
    out = checkpoints.local_path(out_path)
    base, models, plan = open_and_plan(base_path, model_paths, recipe)
    check_output(out, overwrite, [base, *models], resume)
    config = sidefiles.read_config(base)
    config = None if config is None or recipe.dtype is None else sidefiles.with_dtype(config, recipe.dtype)
    steps = {step.name: step for step in plan}
    files = {file: [steps[name] for name in names] for file, names in sidefiles.output_files(base).items()}
    report = MergeReport(recipe, base.path, tuple(model.path for model in models), out)
    alone = team.rank == 0
    with Shown(progress and alone, json_log if alone else None) as shown, _stage(out, resume, overwrite, team) as stage:
        texts = {file: base.text_of(own[0].name) or {"format": "pt"} for file, own in files.items()}
        shards = Shards(stage.model, files, texts)
        _begin(stage, shards, identity(base, models, recipe), team)
        blocks = cut(plan, recipe)
        done = _verified(blocks, stage, shards, team)
        merger = make_merger(base, models, recipe, shown, team)
        mine = team.share(blocks, merger.indivisible)
        left = [block for block in mine if block not in done]
        if not stage.published:
            own_done = [block for block in mine if block in done]
            shown.begin("merging", merger.bytes_to_read(plan, mine, own_done))
            merger.prepare(plan, mine)
            with (
                closing(Journal(stage.folder, team.rank)) as noted,
                Writer(shards, noted, shown, recipe.buffers // 4) as writer,
                closing(merger.results(left)) as results,
            ):
                for result in results:
                    writer.put(result)
            shards.sync()
        else:
            merger.prepare(plan, mine)  # for the report
        team.wait()
        report.read_twice = merger.bytes_to_read_twice(blocks)
        report.tensors, report.shared = _tally(stage, blocks).report(plan), merger.shared
        for source in (base, *models):
            source.require_unchanged()
        shards.close()
        if team.rank == 0 and not stage.published:
            if base.sharded:
                sidefiles.write_index(stage.model, sidefiles.output_files(base), sum(map(_bytes, plan)))
            sidefiles.copy_side_files(base, stage.model, config)
            (stage.model / "README.md").write_text(card.model_card(report), encoding="utf-8")
            (stage.model / REPORT).write_text(report.json_text(), encoding="utf-8")
            stage.ready = True
            check_output(out, overwrite, [base, *models])  # again: another process may have made or filled it meanwhile
            stage.publish()
        team.wait()
    return report


def _stage(out: Path, resume: bool, overwrite: bool, team: Ranks) -> Any:
    """The staging of the output: made and locked by the first process, and looked at by the others."""
    if team.rank == 0:
        return staging.staged(out, resume, overwrite)
    team.wait()  # until the first has made or checked it
    folder = staging.folder_for(out)
    return nullcontext(Staging(out, folder, (folder / journal.HEADER).is_file()))


def _begin(stage: Staging, shards: Shards, identity: dict[str, Any], team: Ranks) -> None:
    """Makes the files of a new merge, or checks those of one that goes on."""
    if team.rank == 0:
        if not stage.resumed:
            _check_space(stage.out, shards.size)
            shards.make()
            stage.begin(identity)
        else:
            journal.check_header(stage.folder, identity)
            if not stage.published and not shards.intact():
                raise InputError(
                    f"the files of the unfinished merge in {stage.folder} are damaged; begin anew (--overwrite)"
                )
        team.wait()
    team.wait()
    if team.rank > 0:
        journal.check_header(stage.folder, identity, ("changed",))  # machines may disagree about times


def identity(base: Checkpoint, models: Sequence[Checkpoint], recipe: Recipe) -> dict[str, Any]:
    """Everything that the bits of a merge depend on."""
    return {
        "awd_fast": __version__,
        "torch": str(torch.__version__),
        "machine": measure.instruction_set(),
        "device": recipe.device.partition(":")[0],
        "recipe": recipe.to_config("", [""] * len(models)),
        "base": base.identity(),
        "models": [model.identity() for model in models],
    }


def _verified(blocks: Sequence[Block], stage: Staging, shards: Shards, team: Ranks) -> set[Block]:
    """The blocks that were written, by their checksums; each process looks at its share of them."""
    noted = {(record.tensor, record.begin, record.end): record for record in journal.records(stage.folder)}
    found = [noted.get((block.step.name, block.begin, block.end)) for block in blocks]
    written = torch.zeros(len(blocks), dtype=torch.float64)
    for index, record in enumerate(found):
        if record is not None and index % team.count == team.rank:
            same = stage.published or shards.checksum(record.tensor, record.begin, record.end) == record.checksum
            written[index] = float(same)
    return {block for block, there in zip(blocks, team.sum(written).tolist(), strict=True) if there}


def _tally(stage: Staging, blocks: Sequence[Block]) -> Tally:
    """What all processes noted of the blocks; of one that was done twice, the last."""
    tally = Tally()
    wanted = {(block.step.name, block.begin, block.end) for block in blocks}
    for record in journal.records(stage.folder):
        if (record.tensor, record.begin, record.end) in wanted:
            tally.add(record.tensor, record.begin, _similarity(record), record.on_cpu)
    return tally


def _similarity(record: Record) -> Similarity | None:
    return None if record.figures is None else Similarity.from_figures(record.figures, record.groups)


def inspect_checkpoints(
    base_path: str | Path,
    model_paths: Sequence[str | Path],
    *,
    progress: bool = False,
    json_log: str | Path | None = None,
    **options: Any,
) -> MergeReport:
    """The report of a merge without the merge: similarity before and after, per tensor and overall.

    Takes the options of `merge_checkpoints`; the method must be "awd". Tensors that are not disentangled are not read,
    and nothing is written. Raises InputError as `merge_checkpoints` does.
    """
    recipe = make_recipe(len(model_paths), **options)
    if recipe.method != "awd":
        raise InputError(f"method is {recipe.method}; an inspection shows what awd does")
    base, models, plan = open_and_plan(base_path, model_paths, recipe)
    tally = Tally()
    with Shown(progress, json_log) as shown:
        merger = make_merger(base, models, recipe, shown)
        selected = cut([step for step in plan if step.action == "awd"], recipe)
        shown.begin("inspecting", merger.bytes_to_read(plan, selected, ()))
        merger.prepare(plan, selected)
        with closing(merger.inspections(plan)) as inspections:
            for index, (step, similarity, on_cpu) in enumerate(inspections):
                tally.add(step.name, index, similarity, on_cpu)
    paths = tuple(model.path for model in models)
    return MergeReport(recipe, base.path, paths, None, tally.report(plan), merger.shared)


def open_and_plan(
    base_path: str | Path, model_paths: Sequence[str | Path], recipe: Recipe
) -> tuple[Checkpoint, list[Checkpoint], list[Step]]:
    """Opens the checkpoints (headers only) and decides what happens to each tensor."""
    base = Checkpoint(base_path)
    models = [Checkpoint(path) for path in model_paths]
    for model in models:
        if set(model.files) == set(base.files):
            raise InputError(f"the model {model.path} is the base itself, so it has no task vector; leave it out")
        model.tie(base)
    for source in (base, *models):
        sidefiles.require_unquantised(source)
    return base, models, make_plan(base, models, recipe)


def describe_plan(base: Checkpoint, models: Sequence[Checkpoint], plan: Sequence[Step], recipe: Recipe) -> str:
    """What would happen to each tensor, what would be read, and which files would be written, as text."""
    rows: list[tuple[str, ...]] = [("tensor", "stored", "written", "action", "because")]
    for step in plan:
        written = str(step.dtype).removeprefix("torch.")
        rows.append((step.name, str(step.info), written, step.action, step.reason))
    count = len(sidefiles.output_files(base))
    files = "1 file" if count == 1 else f"{count} files and an index"
    merger, blocks = make_merger(base, models, recipe), cut(plan, recipe)
    read, twice = merger.bytes_to_read(plan, blocks, ()), merger.bytes_to_read_twice(blocks)
    again = f", {twice / 1e6:.1f} MB of these for the second time" if twice else ""
    return (
        f"{aligned(rows)}\n{files}, {sum(map(_bytes, plan)) / 1e6:.1f} MB of tensors; "
        f"{read / 1e6:.1f} MB to read{again}"
    )


def check_output(out: Path, overwrite: bool, sources: Sequence[Checkpoint], resume: bool = False) -> None:
    """Raises InputError where `out` cannot be made, or exists and may not, or must not, be replaced.

    Only a folder that holds nothing but what a merge writes is replaced, and never one that holds an input.
    """
    parent = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError(f"the output folder {out} cannot be made: {parent} is not a folder")
    if not os.path.lexists(out) or (resume and staging.complete(out)):
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
    return name in ("README.md", REPORT, checkpoints.INDEX) or sidefiles.is_side_file(name)


def _bytes(step: Step) -> int:
    return step.info.count * step.dtype.itemsize


def _check_space(out: Path, needed: int) -> None:
    """Raises OSError before any work where the output cannot fit on its disk."""
    parent = next(folder for folder in (out.absolute().parent, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"{parent} has {free / 1e6:.1f} MB free; the output needs {needed / 1e6:.1f} MB")
