"""Merging model folders: opens them, merges block by block, and writes a folder that transformers loads.

The output appears whole or not at all, and what was done before a merge was stopped need not be done again: see
`awd_fast.staging` and `awd_fast.journal`.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from awd_fast import adapters, checkpoints, ranks, sidefiles
from awd_fast.adapter_models import AdapterFolder, Model, adapters_of, describe_adapter, plan_adapters
from awd_fast.blocks import cut
from awd_fast.checkpoints import Checkpoint
from awd_fast.errors import InputError
from awd_fast.making import make_adapter, make_model
from awd_fast.merging import make_merger
from awd_fast.plan import Step, make_plan
from awd_fast.progress import Shown
from awd_fast.recipe import Recipe, make_recipe
from awd_fast.report import MergeReport, Tally, aligned


def merge_checkpoints(
    base_path: str | Path,
    model_paths: Sequence[str | Path],
    out_path: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    as_adapter: bool = False,
    progress: bool = False,
    json_log: str | Path | None = None,
    **options: Any,
) -> MergeReport:
    """Merges fine-tuned checkpoints into one: `awd_fast.merge` from folder to folder, in bounded memory.

    base_path, model_paths: Hugging Face folders, single .safetensors files, or names on the Hub (extra `hub`). The
        models may be LoRA adapters in PEFT's format, all of them: only their factors and the base are read.
    out_path: the folder to write: safetensors sharded as the base is, config, tokenizer and generation files from the
        base, a model card, and the report as awd_fast.json. It must not exist, unless `overwrite` allows to replace a
        model folder; it appears only when it is complete.
    resume: goes on with a merge into `out_path` that was stopped, by whatever; the result is the same to the bit. With
        none there, the merge begins anew.
    as_adapter: writes the merge of LoRA adapters as one adapter, of the sum of their ranks, instead of a full model; in
        `dtype`, by default float32. Such a merge is too short to be gone on with.
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
    out, first = checkpoints.local_path(out_path), team.rank == 0
    with Shown(progress and first, json_log if first else None) as shown:
        base, models, plan = open_and_plan(base_path, model_paths, recipe, as_adapter)
        report = MergeReport(recipe, base.path, tuple(model.path for model in models), out)
        report.adapters, report.as_adapter = tuple(model.describe() for model in adapters_of(models)), as_adapter
        if as_adapter:
            adapted = [model for model in models if isinstance(model, AdapterFolder)]
            make_adapter(report, base, adapted, plan, overwrite, shown)
        else:
            make_model(report, base, models, plan, overwrite, resume, shown)
    return report


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
        shown.begin("inspecting", merger.bytes_to_inspect(plan, selected))
        merger.prepare(plan, selected)
        with closing(merger.inspections(plan)) as inspections:
            for index, (step, similarity, on_cpu) in enumerate(inspections):
                tally.add(step.name, index, similarity, on_cpu)
    paths = tuple(model.path for model in models)
    kinds = tuple(model.describe() for model in adapters_of(models))
    return MergeReport(recipe, base.path, paths, None, tally.report(plan), merger.shared, adapters=kinds)


def open_and_plan(
    base_path: str | Path, model_paths: Sequence[str | Path], recipe: Recipe, as_adapter: bool = False
) -> tuple[Checkpoint, Sequence[Model], list[Step]]:
    """Opens the checkpoints (headers only) and decides what happens to each tensor."""
    base = Checkpoint(base_path)
    if _are_adapters(model_paths):
        sidefiles.require_unquantised(base)
        adapted = [AdapterFolder(path, base, base.path) for path in model_paths]
        return base, adapted, plan_adapters(base, adapted, recipe, as_adapter)
    if as_adapter:
        raise InputError("the models are full models, whose merge is no adapter; leave as_adapter (--as-adapter) out")
    models = [Checkpoint(path) for path in model_paths]
    for model in models:
        if set(model.files) == set(base.files):
            raise InputError(f"the model {model.path} is the base itself, so it has no task vector; leave it out")
        model.tie(base)
    for source in (base, *models):
        sidefiles.require_unquantised(source)
    return base, models, make_plan(base, models, recipe)


def _are_adapters(paths: Sequence[str | Path]) -> bool:
    """Whether the models are LoRA adapters. Raises InputError where some are, and others are not."""
    found = {str(path): adapters.is_adapter(checkpoints.resolve(str(path))) for path in paths}
    if len(set(found.values())) > 1:
        one = next(path for path, adapter in found.items() if adapter)
        other = next(path for path, adapter in found.items() if not adapter)
        raise InputError(
            f"{one} is a LoRA adapter and {other} is a full model; expected models of one kind: merge the adapter into "
            "its base model first (PEFT's merge_and_unload)"
        )
    return any(found.values())


def describe_plan(
    base: Checkpoint, models: Sequence[Model], plan: Sequence[Step], recipe: Recipe, as_adapter: bool = False
) -> str:
    """What would happen to each tensor, what would be read, and which files would be written, as text."""
    rows: list[tuple[str, ...]] = [("tensor", "stored", "written", "action", "because")]
    for step in plan:
        written = str(step.dtype).removeprefix("torch.")
        rows.append((step.name, str(step.info), written, step.action, step.reason))
    table = "\n".join(filter(None, [aligned(rows), recipe.scales()]))
    if as_adapter:
        return f"{table}\n{describe_adapter(adapters_of(models), plan)}"
    count = len(sidefiles.output_files(base))
    files = "1 file" if count == 1 else f"{count} files and an index"
    merger, blocks = make_merger(base, models, recipe), cut(plan, recipe)
    read, twice = merger.bytes_to_read(plan, blocks, ()), merger.bytes_to_read_twice(blocks)
    again = f", {twice / 1e6:.1f} MB of these for the second time" if twice else ""
    return (
        f"{table}\n{files}, {sum(step.written for step in plan) / 1e6:.1f} MB of tensors; "
        f"{read / 1e6:.1f} MB to read{again}"
    )
