"""Merging state dicts in memory: `merge`, and who carries out a merge on which device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awd_fast import transfer
from awd_fast.adapter_models import adapters_of
from awd_fast.batches import BatchMerger
from awd_fast.blocks import cut
from awd_fast.lora_merger import LoraMerger
from awd_fast.merger import Merger
from awd_fast.objective import Converge, Groups, Optimizer, Penalty, Similarity
from awd_fast.plan import Labelled, Source, StateDict, Step, make_plan
from awd_fast.progress import Progress, Shown
from awd_fast.ranks import Ranks
from awd_fast.recipe import DEFAULT_EXCLUDE, Method, Missing, Others, Recipe, make_recipe
from awd_fast.report import MergeReport, Tally
from awd_fast.stream import StreamMerger


def make_merger(
    base: Source,
    models: Sequence[Source],
    recipe: Recipe,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    alone: bool = False,
) -> Merger:
    """What carries out the recipe: block by block on the CPU, in batches on a GPU; adapters from their factors.

    alone: see `awd_fast.stream.StreamMerger`; of use on the CPU only.
    """
    if adapters_of(models):
        return LoraMerger(base, models, recipe, progress, ranks)
    link = transfer.connect(recipe.device)
    if link is None:
        return StreamMerger(base, models, recipe, progress, ranks, alone=alone)
    return BatchMerger(base, models, recipe, link, progress, ranks)


@torch.no_grad()
def merge(
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    *,
    method: Method = "awd",
    scale: float | None = None,
    weights: Sequence[float] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    others: Others = "task_arithmetic",
    others_scale: float | None = None,
    missing: Missing = "error",
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    device_memory: float | None = None,
    memory: float | None = None,
    progress: bool = False,
    on_report: Callable[[MergeReport], Any] | None = None,
    groups: Groups = "row",
    similarity: Similarity = "squared",
    penalty: Penalty = "l2",
    alpha: float = 1e-6,
    optimizer: Optimizer | str = Converge(),  # noqa: B008  frozen
    eps: float = 1e-8,
    ridge: float = 0.1,
    columns: int = 0,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Merges fine-tuned state dicts into one: theta = theta_0 + scale * sum_i w_i (t_i - d), t_i = theta_i - theta_0.

    base, models: state dicts with the same names, shapes and dtypes; they are not changed.
    method: "awd" (arXiv 2411.18729); "task_arithmetic" (arXiv 2212.04089), which is the same with d = 0;
        "wudi" (arXiv 2503.08099) in closed form, theta = theta_0 + scale * tau with the tau of `awd_fast.wudi`, where a
        weight of 0 leaves a model out, and a good scale is larger than for the others;
        "average", the weighted mean of the models, without `scale`.
    scale: lambda. By default min(1, 1.25 / sqrt(K)) for K models with a weight that is not 0, with which the update is
        about 1.25 times as long as one task vector; 1 for wudi (`awd_fast.defaults.scale` says more).
    weights: w_i, one per model, default 1; a negative one negates (forgets) that task.
    include, exclude: shell patterns on tensor names. By default 2-D weights are disentangled; embeddings, biases,
        norms, pooler and task heads are not (`DEFAULT_EXCLUDE`). Patterns of `exclude` win.
    others: what happens to the remaining floating tensors: "task_arithmetic", with the same scale and weights (with
        method="average" they are averaged), or "base", kept as they are. others_scale: their scale instead of `scale`,
        by default the same, and scale / sqrt(K) for wudi; not used by "average".
    missing: "error", or "base": tensors that not every state dict has are kept as the base has them.
    dtype: of the result's floating tensors, default each as the base's. Arithmetic is float32 at least.
    device: where to compute, "cpu", "cuda" or "cuda:1". Tensors that are not there are brought in batches; each tensor
        of the result is on the device of the base's. device_memory: of a GPU to use, in GB, default a third of what is
        free; larger models and tensors merge all the same, in pieces. memory: of the CPU beside the state dicts and the
        result, in GB; by default what it takes.
    progress: show a progress bar. on_report: called with the `MergeReport` at the end.
    groups: as in `disentangle`, or "global": one group over all disentangled tensors.
    similarity, penalty, alpha, optimizer, eps, backend: as in `disentangle`; not used by the other methods.
    ridge: of wudi, above 0: how much of Task Arithmetic's update is kept, most where task vectors leave inputs out;
        with 0 there would be no unique update. columns: of wudi, input features (columns) of a weight that are solved
        together, 0 for all; with fewer a wide weight takes less memory and time, and what inputs of different blocks
        have in common is left out of the objective. Neither is used by the other methods.

    Tensors that are not floating are copied, and must be the same everywhere. Raises InputError in one sentence naming
    the state dict and the tensor for anything that does not fit, NaN and Inf included.
    """
    recipe = make_recipe(
        len(models),
        method=method,
        scale=scale,
        weights=weights,
        include=include,
        exclude=exclude,
        others=others,
        others_scale=others_scale,
        missing=missing,
        dtype=dtype,
        device=device,
        device_memory=device_memory,
        memory=memory,
        groups=groups,
        similarity=similarity,
        penalty=penalty,
        alpha=alpha,
        optimizer=optimizer,
        eps=eps,
        ridge=ridge,
        columns=columns,
        backend=backend,
    )
    source = StateDict("base", base)
    sources = [StateDict(f"models[{index}]", model) for index, model in enumerate(models)]
    return merge_states(source, sources, recipe, make_plan(source, sources, recipe), progress, on_report)


@torch.no_grad()
def merge_states(
    source: Labelled,
    sources: Sequence[Labelled],
    recipe: Recipe,
    plan: Sequence[Step],
    progress: bool = False,
    on_report: Callable[[MergeReport], Any] | None = None,
) -> dict[str, Tensor]:
    """Carries out the plan of a merge. source: the base. Gives new tensors, on the base's devices."""
    blocks = cut(plan, recipe)
    tally = Tally()
    with Shown(progress) as shown:
        merger = make_merger(source, sources, recipe, shown)
        shown.begin("merging", merger.bytes_to_read(plan, blocks, ()))
        merger.prepare(plan, blocks)
        result = merger.put_together(blocks, tally)
    if on_report is not None:
        models_named = tuple(model.label for model in sources)
        on_report(MergeReport(recipe, source.label, models_named, None, tally.report(plan), merger.shared))
    return result
