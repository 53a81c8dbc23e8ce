"""Making an output: a full model, block by block, so that it can be gone on with; or one adapter, whole."""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from awd_fast import card, journal, measure, ranks, sidefiles, staging
from awd_fast.adapter_models import AdapterFolder, Model
from awd_fast.adapter_output import write_adapter
from awd_fast.blocks import Block, cut
from awd_fast.checkpoints import Checkpoint
from awd_fast.disk import sync_file
from awd_fast.errors import InputError
from awd_fast.journal import Journal, Record
from awd_fast.lora_merger import LoraMerger
from awd_fast.merging import make_merger
from awd_fast.output_folder import REPORT, check_output, check_space
from awd_fast.plan import Step
from awd_fast.progress import Progress
from awd_fast.ranks import Ranks
from awd_fast.recipe import Recipe
from awd_fast.report import Figures, Interference, MergeReport, Similarity, Tally
from awd_fast.shards import Shards
from awd_fast.staging import Staging
from awd_fast.version import __version__
from awd_fast.writer import Writer


def make_model(
    report: MergeReport,
    base: Checkpoint,
    models: Sequence[Model],
    plan: Sequence[Step],
    overwrite: bool,
    resume: bool,
    shown: Progress,
) -> None:
    """Writes the merge as a full model, and fills the report."""
    team, out, recipe = ranks.present(), report.path, report.recipe
    assert out is not None
    check_output(out, overwrite, [base, *models], resume)
    config = sidefiles.read_config(base)
    config = None if config is None or recipe.dtype is None else sidefiles.with_dtype(config, recipe.dtype)
    steps = {step.name: step for step in plan}
    files = {file: [steps[name] for name in names] for file, names in sidefiles.output_files(base).items()}
    with _stage(out, resume, overwrite, team) as stage:
        texts = {file: base.text_of(own[0].name) or {"format": "pt"} for file, own in files.items()}
        shards = Shards(stage.model, files, texts)
        _begin(stage, shards, identity(base, models, recipe), team)
        blocks = cut(plan, recipe)
        done = _verified(blocks, stage, shards, team)
        merger = make_merger(base, models, recipe, shown, team)
        mine = team.share(blocks, merger.indivisible)
        shown.begin("merging", merger.bytes_to_read(plan, mine, [block for block in mine if block in done]))
        merger.prepare(plan, mine)
        if not stage.published:
            with (
                closing(Journal(stage.folder, team.rank)) as noted,
                Writer(shards, noted, shown, recipe.buffers // 4) as writer,
                closing(merger.results([block for block in mine if block not in done])) as results,
            ):
                for result in results:
                    writer.put(result)
            shards.sync()
        team.wait()
        report.read_twice = merger.bytes_to_read_twice(blocks)
        report.tensors, report.shared = _tally(stage, blocks, recipe).report(plan), merger.shared
        for source in (base, *models):
            source.require_unchanged()
        shards.close()
        if team.rank == 0 and not stage.published:
            if base.sharded:
                sidefiles.write_index(stage.model, sidefiles.output_files(base), sum(step.written for step in plan))
            sidefiles.copy_side_files(base, stage.model, config)
            _finish(stage, report, overwrite, [base, *models])
        team.wait()


def make_adapter(
    report: MergeReport,
    base: Checkpoint,
    models: Sequence[AdapterFolder],
    plan: Sequence[Step],
    overwrite: bool,
    shown: Progress,
) -> None:
    """Writes the merge of adapters as one adapter, and fills the report. All processes compute, the first writes."""
    team, out, recipe = ranks.present(), report.path, report.recipe
    assert out is not None
    alone = team.rank == 0
    check_output(out, overwrite, [base, *models])
    team.wait()  # until all have looked
    tally = Tally()
    with staging.staged(out, False, overwrite) if alone else nullcontext() as stage:
        merger = LoraMerger(base, models, recipe, shown)
        full = merger.stored_whole(plan, tally)
        factors = merger.as_factors(plan, tally)
        if stage is None:
            for _ in factors:
                pass
        else:
            dtype = getattr(torch, recipe.dtype or "float32")
            named = {model.bound.adapter.config.base_model for model in models}
            base_model = base.path if len(named) > 1 or None in named else None
            bound = [model.bound for model in models]
            write_adapter(stage.model, bound, factors, full, dtype=dtype, base_model=base_model)
        report.tensors, report.shared = tally.report(plan), merger.shared
        sources: list[Model] = [base, *models]
        for source in sources:
            source.require_unchanged()
        if stage is not None:
            _finish(stage, report, overwrite, sources)
    team.wait()


def _finish(stage: Staging, report: MergeReport, overwrite: bool, sources: Sequence[Model]) -> None:
    """Adds card and report to the tensors, and has the folder take its place."""
    (stage.model / "README.md").write_text(card.model_card(report), encoding="utf-8")
    (stage.model / REPORT).write_text(report.json_text(), encoding="utf-8")
    for file in stage.model.iterdir():
        sync_file(file)
    stage.ready = True
    try:
        check_output(stage.out, overwrite, sources)  # again: another process may have made or filled it meanwhile
    except InputError as error:
        raise InputError(
            f"{error}; the finished merge is kept: with that out of the way, --resume puts it there"
        ) from error
    stage.publish()


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
            check_space(stage.out, shards.size)
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


def identity(base: Checkpoint, models: Sequence[Model], recipe: Recipe) -> dict[str, Any]:
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


def _tally(stage: Staging, blocks: Sequence[Block], recipe: Recipe) -> Tally:
    """What all processes noted of the blocks; of one that was done twice, the last."""
    tally = Tally()
    wanted = {(block.step.name, block.begin, block.end) for block in blocks}
    for record in journal.records(stage.folder):
        if (record.tensor, record.begin, record.end) in wanted:
            tally.add(record.tensor, record.begin, _figures(record, recipe), record.on_cpu)
    return tally


def _figures(record: Record, recipe: Recipe) -> Figures | None:
    kind = Interference if recipe.method == "wudi" else Similarity
    return None if record.figures is None else kind.from_figures(record.figures, record.groups)
