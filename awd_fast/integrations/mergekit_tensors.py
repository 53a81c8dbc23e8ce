"""Tensors as mergekit gives them, merged: one alone, many in memory, or all of a checkpoint as one group."""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from awd_fast import merging
from awd_fast.blocks import blocks_of, cut
from awd_fast.errors import InputError
from awd_fast.merger import Merger
from awd_fast.plan import Source, StateDict, Step, TensorInfo, check_machine, make_plan, make_step
from awd_fast.recipe import Recipe
from awd_fast.report import MergeReport, Tally
from awd_fast.stream import StreamMerger

LOG = logging.getLogger("awd_fast.mergekit")


def label(key: Hashable) -> str:
    """How messages name an input: by its path, or as `awd_fast.merge` does where it has none."""
    return f"models[{key}]" if isinstance(key, int) else str(key)


class Notes:
    """Says once of a merge that an optimiser made the loss of a tensor worse."""

    def __init__(self) -> None:
        self._said = False

    def look(self, recipe: Recipe, plan: Sequence[Step], tally: Tally, merger: Merger) -> None:
        """Logs the report's warning, if it has one."""
        if self._said:
            return
        report = MergeReport(recipe, "base", (), None, tally.report(plan), merger.shared)
        warning = report.warning()
        if warning is not None:
            self._said = True
            LOG.warning("%s: %s", plan[0].name if len(plan) == 1 else "all tensors", warning)


@torch.no_grad()
def merge_one(name: str, base: Source, models: Sequence[Source], recipe: Recipe, notes: Notes) -> Tensor:
    """The merge of one tensor that all these sources have, or, of models, lack; on the device of the base's.

    Its result is that of `awd_fast.merge` of all tensors, unless the group is global.
    """
    step = make_step(name, base.tensors[name], base, models, recipe)
    merger, blocks, tally = merging.make_merger(base, models, recipe, alone=True), blocks_of(step, recipe), Tally()
    if step.action == recipe.method:
        merger.prepare([step], blocks)
    merged = merger.put_together(blocks, tally)[name]
    notes.look(recipe, [step], tally, merger)
    return merged


@torch.no_grad()
def merge_many(base: StateDict, models: Sequence[StateDict], recipe: Recipe, complete: bool) -> dict[str, Tensor]:
    """The merge of many tensors in memory. complete: whether they are all, so that one at least must be selected."""
    check_machine(models, recipe)
    if complete:
        plan = make_plan(base, models, recipe)
    else:
        plan = [make_step(name, info, base, models, recipe) for name, info in base.tensors.items()]
    merger, blocks, tally = merging.make_merger(base, models, recipe), cut(plan, recipe), Tally()
    merger.prepare(plan, blocks)
    merged = merger.put_together(blocks, tally)
    Notes().look(recipe, plan, tally, merger)
    return merged


@dataclass(frozen=True)
class Stored:
    """A tensor that can be had from a checkpoint. read: gives it, not yet in `dtype`, the one in which it is merged."""

    read: Callable[[], Tensor]
    dtype: torch.dtype
    shape: tuple[int, ...]


class Loaded:
    """A model as a source whose tensors mergekit's loaders give, one at a time, while none is held."""

    def __init__(self, key: Hashable, stored: Mapping[str, Stored]) -> None:
        self.label, self._stored = label(key), stored
        self.tensors = {name: TensorInfo(found.shape, found.dtype) for name, found in stored.items()}
        self._last: tuple[str, Tensor] | None = None

    def where(self, name: str) -> str:
        return self.label

    def hold(self, name: str, tensor: Tensor | None) -> None:
        """Takes this tensor instead of the loader's, or, with None, lets go of any."""
        self._last = None if tensor is None else (name, tensor.detach())

    def device(self, name: str) -> torch.device:
        return self._last[1].device if self._last is not None and self._last[0] == name else torch.device("cpu")

    def read(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:  # read once for all its blocks
            self._last = name, self._stored[name].read().to(self._stored[name].dtype).contiguous()
        return self._last[1]

    def elements(self, name: str, begin: int, end: int, room: Tensor | None) -> Tensor:
        return self.read(name).reshape(-1)[begin:end]

    def in_memory(self, name: str) -> bool:
        return True


class WholeModel:
    """All tensors of a merge as one group, which is solved in a pass of its own when the first of them is asked for.

    sources: makes the base and the models; called once, in the thread that asks first.
    """

    def __init__(self, recipe: Recipe, sources: Callable[[], tuple[Loaded, list[Loaded]]], notes: Notes) -> None:
        self.recipe, self._sources, self._notes = recipe, sources, notes
        self._lock = threading.Lock()
        self._solved: tuple[StreamMerger, dict[str, Step]] | None = None

    @torch.no_grad()
    def merge(self, name: str, base: Tensor, models: Sequence[Tensor]) -> Tensor:
        """The merged tensor, on the device of the base's; its elements are computed on the CPU."""
        with self._lock:  # a thread for each GPU may ask
            if self._solved is None:
                self._solved = self._solve()
            merger, steps = self._solved
            if name not in steps or steps[name].info.shape != tuple(base.shape):
                raise InputError(f"tensor {name!r} is not what the first pass over all tensors read under this name")
            with _held(name, [(merger.base, base), *zip(merger.models, models, strict=True)]):
                blocks = blocks_of(steps[name], self.recipe)
                return merger.put_together(blocks, Tally())[name]

    def _solve(self) -> tuple[StreamMerger, dict[str, Step]]:
        base, models = self._sources()
        plan = make_plan(base, models, self.recipe)
        LOG.info("first pass over %d tensors, which make one group", len(plan))
        merger = StreamMerger(base, models, self.recipe, alone=True)
        merger.prepare(plan, cut(plan, self.recipe))
        self._notes.look(self.recipe, plan, Tally(), merger)
        return merger, {step.name: step for step in plan}


@contextmanager
def _held(name: str, tensors: Sequence[tuple[Any, Tensor]]) -> Iterator[None]:
    try:
        for source, tensor in tensors:
            source.hold(name, tensor)
        yield
    finally:
        for source, _ in tensors:
            source.hold(name, None)


@dataclass(frozen=True, eq=False)
class Planned:
    """What was decided of a tensor before any was read; it travels with mergekit's task of that tensor.

    models: the keys of all models, in the order of the weights. whole: where the group is global.
    """

    recipe: Recipe
    models: tuple[Hashable, ...]
    notes: Notes
    whole: WholeModel | None = None

    def merge(self, name: str, base: tuple[Hashable, Tensor], given: Mapping[Hashable, Tensor]) -> Tensor:
        """The merged tensor. given: the models' by key; one that lacks it has none."""
        key, own = base
        if self.whole is not None and all(model in given for model in self.models):
            return self.whole.merge(name, own, [given[model] for model in self.models])
        models = [StateDict(label(model), {name: given[model]} if model in given else {}) for model in self.models]
        recipe = self.recipe if own.device.type == "cpu" else replace(self.recipe, device=str(own.device))
        return merge_one(name, StateDict(label(key), {name: own}), models, recipe, self.notes)
