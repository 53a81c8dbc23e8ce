"""LoRA adapters as the models of a merge: sources like full models, and the plan of a merge of them.

A tensor that an adapter changes by factors is never read here: `awd_fast.lora_merger` takes the factors themselves. To
all else an adapter is a model that has the tensors it stores whole, and the base's where it stores nothing.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awd_fast.adapters import Adapter, BoundAdapter, StoredAdapter
from awd_fast.blocks import blocks_of, matrix
from awd_fast.checkpoints import Checkpoint
from awd_fast.errors import InputError
from awd_fast.plan import Source, Step, TensorInfo, make_plan
from awd_fast.recipe import Recipe


class AdapterModel:
    """An adapter on a base as a source of a merge; `where` names the base in messages.

    tensors: the base's, and those that the adapter stores whole in their place or beside them.
    """

    def __init__(self, adapter: StoredAdapter, base: Source, where: str) -> None:
        self.path, self._base = adapter.path, base
        self.bound: BoundAdapter = adapter.bind(base.tensors, where)
        self.tensors: dict[str, TensorInfo] = {**base.tensors, **self.bound.tensors}

    def where(self, name: str) -> str:
        return self.bound.where(name) if self.stores(name) else self._base.where(name)

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    def read(self, name: str) -> Tensor:
        return self.bound.read(name) if self.stores(name) else self._base.read(name)

    def elements(self, name: str, begin: int, end: int, room: Tensor | None) -> Tensor:
        if not self.stores(name):
            return self._base.elements(name, begin, end, room)
        assert room is not None
        self.bound.adapter.store.read(self.bound.adapter.full[self.bound.full[name]], begin, room)
        return room

    def in_memory(self, name: str) -> bool:
        return not self.stores(name) and self._base.in_memory(name)

    def stores(self, name: str) -> bool:
        """Whether the adapter stores a tensor whole."""
        return name in self.bound.full

    def changes(self, name: str) -> bool:
        """Whether the adapter changes a tensor of the base by factors."""
        return name in self.bound.placements

    def describe(self) -> str:
        """What it is, in words."""
        ranks = sorted({place.module.rank for place in self.bound.placements.values()})
        if not ranks:
            return "LoRA adapter"
        return f"LoRA adapter of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")


class AdapterFolder(AdapterModel):
    """An adapter on disk on a base. files: see `Checkpoint`."""

    def __init__(self, path: str | Path, base: Source, where: str) -> None:
        adapter = Adapter(path)
        super().__init__(adapter, base, where)
        self._opened = adapter.opened
        self._config = Path(adapter.config.file)
        self._checksum = self._config_checksum()
        self.files: dict[Path, list[str]] = {self._opened.path: list(self._opened.tensors)}

    def identity(self) -> dict[str, Any]:
        """What tells these files from others, by name."""
        return {self._opened.path.name: self._opened.identity(), self._config.name: self._checksum}

    def require_unchanged(self) -> None:
        """Raises InputError where a file is no longer the one that was opened."""
        self._opened.require_unchanged()
        if self._config_checksum() != self._checksum:
            raise InputError(f"{self._config} was changed while it was read; merge again when nothing writes to it")

    def _config_checksum(self) -> int:
        try:
            return zlib.crc32(self._config.read_bytes())
        except OSError as error:
            raise InputError(f"{self._config} can no longer be read: {error.strerror}") from error


Model = Checkpoint | AdapterFolder


def adapters_of(models: Sequence[Source]) -> list[AdapterModel]:
    """The models that are adapters: all of them, or none."""
    return [model for model in models if isinstance(model, AdapterModel)]


def by_factors(step: Step, models: Sequence[AdapterModel]) -> bool:
    """Whether a step merges task vectors that are given by factors."""
    return step.action != "base" and any(model.changes(step.name) for model in models)


def describe_adapter(models: Sequence[AdapterModel], plan: Sequence[Step]) -> str:
    """What the merge of adapters is as one adapter, in words."""
    changed = [step for step in plan if by_factors(step, models)]
    ranks = sorted({_merged_rank(step, models) for step in changed})
    whole = sum(any(model.stores(step.name) for model in models) for step in plan)
    spread = " to ".join(map(str, dict.fromkeys((*ranks[:1], *ranks[-1:]))))
    return (
        f"1 adapter: {len(changed)} tensors by factors"
        + (f" of rank {spread}" if ranks else "")
        + (f", {whole} tensors whole" if whole else "")
    )


def _merged_rank(step: Step, models: Sequence[AdapterModel]) -> int:
    total = sum(model.bound.rank(step.name) for model in models)
    return min(total, step.info.shape[1]) if step.action == "wudi" else total


def plan_adapters(base: Source, models: Sequence[AdapterModel], recipe: Recipe, as_adapter: bool) -> list[Step]:
    """The steps of a merge of adapters: `make_plan`, but that what no adapter changes is kept as the base has it.

    Raises InputError as `make_plan` does, and for what cannot be done with factors. as_adapter: whether the result is
    to be an adapter.
    """
    if recipe.device != "cpu":
        raise InputError(f"device is {recipe.device}, but adapters are merged on the CPU; leave it out (--device cpu)")
    leaves = recipe.method == "awd" and not recipe.options.spans
    if leaves and as_adapter:
        raise InputError(
            f"{_outside(recipe)}, so that the merge is no adapter; use SGD or Converge with a Euclidean penalty, or "
            "write a full model"
        )
    if recipe.method == "wudi" and recipe.columns and as_adapter:
        raise InputError(
            f"columns is {recipe.columns}, so that wudi's update is no adapter of the sum of the ranks; expected 0, "
            "all columns together, or a full model (leave out --as-adapter)"
        )
    steps = [_kept_if_unchanged(step, models) for step in make_plan(base, models, recipe)]
    if recipe.selects and not any(step.action == recipe.method for step in steps):
        purpose = "to be disentangled" if recipe.method == "awd" else f"for {recipe.method}"
        raise InputError(
            f"no adapter changes a tensor that is {purpose}; by default these are the 2-D floating weights "
            "without embeddings and heads, see --include and --exclude"
        )
    for step in steps:
        if by_factors(step, models):
            _require_one_kind(step, models)
            if leaves and step.action == "awd":
                _require_rows(step, recipe)
    return steps


def _kept_if_unchanged(step: Step, models: Sequence[AdapterModel]) -> Step:
    if any(model.changes(step.name) or model.stores(step.name) for model in models):
        return step
    return replace(step, action="base", reason="no adapter changes it")


def _require_one_kind(step: Step, models: Sequence[AdapterModel]) -> None:
    whole = next((model for model in models if model.stores(step.name)), None)
    if whole is not None:
        other = next(model for model in models if model.changes(step.name))
        raise InputError(
            f"{whole.where(step.name)} stores the tensor {step.name!r} whole, and {other.bound.adapter.file} changes "
            "it by factors; expected all adapters to do the same; exclude it and give others=base (--others base) to "
            "keep the base's"
        )


def _require_rows(step: Step, recipe: Recipe) -> None:
    """Elements of d are iterated on for rows that lie in a block alone."""
    rows_alone = recipe.options.groups == "row" and (matrix(step)[0] > 1 or len(blocks_of(step, recipe)) == 1)
    if not rows_alone:
        raise InputError(
            f"{_outside(recipe)}, which for adapters works with row groups only; "
            "use SGD or Converge with a Euclidean penalty (none, l2, squared_l2), or row groups"
        )


def _outside(recipe: Recipe) -> str:
    optimizer, penalty = type(recipe.options.optimizer).__name__, recipe.options.objective.penalty
    return f"{optimizer} with penalty {penalty} leaves the span of the adapters' task vectors"
