"""What happens to each tensor, decided and checked before any number is read.

A source is a base or a model, wherever it lies: a state dict or a checkpoint. The plan needs only names, shapes and
dtypes.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

import torch
from torch import Tensor

from awd_fast import solver
from awd_fast.errors import InputError
from awd_fast.ops import FLOATING, backends
from awd_fast.ops.foreign import unfit
from awd_fast.recipe import Recipe

Action = Literal["awd", "wudi", "task_arithmetic", "average", "base"]
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Storage that operators do not take: it is widened when read, and the result is rounded to it."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """How many bytes its elements take."""
        return self.count * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Source(Protocol):
    """A base or fine-tuned model: names with shapes and dtypes, and a way to read one tensor."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def where(self, name: str) -> str:
        """Names the place of a tensor for a message: the file, or the state dict."""
        ...

    def device(self, name: str) -> torch.device:
        """Where `read` gives a tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, whole."""
        ...

    def elements(self, name: str, begin: int, end: int, room: Tensor | None) -> Tensor:
        """Elements `begin` to `end` of a tensor in memory order, 1-D, in the dtype in which it is stored.

        A source on disk reads them to `room`, which has that size and dtype; one in memory gives a view.
        """
        ...

    def in_memory(self, name: str) -> bool:
        """Whether `elements` needs no room."""
        ...


class Labelled(Source, Protocol):
    """A source that messages and reports have a name for."""

    label: str


class StateDict:
    """A source in memory. label: how messages name it ("base", "models[0]")."""

    def __init__(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        if not isinstance(tensors, Mapping):
            raise InputError(f"{label} is {type(tensors).__name__}; expected a state dict (names to tensors)")
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise InputError(f"{label} has the name {name!r}; expected text")
            if not isinstance(tensor, Tensor):
                raise InputError(f"{label}: {name!r} is {type(tensor).__name__}; expected a tensor")
            reason = unfit(tensor)
            if reason is not None:
                raise InputError(f"{label}: {name!r} is {reason}")
        self.label, self._tensors = label, tensors
        self._flat: tuple[str, Tensor] | None = None  # the last tensor that is no vector in memory as it is
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def where(self, name: str) -> str:
        return self.label

    def device(self, name: str) -> torch.device:
        return self._tensors[name].device

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def elements(self, name: str, begin: int, end: int, room: Tensor | None) -> Tensor:
        tensor = self.read(name)
        if not tensor.is_contiguous():
            kept = self._flat  # which another thread may replace
            if kept is None or kept[0] != name:
                kept = self._flat = name, tensor.contiguous()  # once, not for each part of it
            tensor = kept[1]
        return tensor.view(-1)[begin:end]

    def in_memory(self, name: str) -> bool:
        return True


def common_dtype(sources: Sequence[Source], name: str) -> torch.dtype:
    """The dtype in which a tensor of all sources is merged: theirs, or float32 (float64) where storage differs.

    Numbers of 8 bits are merged in float32.
    """
    dtypes = {source.tensors[name].dtype for source in sources}
    dtypes = {torch.float32 if dtype in FLOAT8 else dtype for dtype in dtypes}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


@dataclass(frozen=True)
class Step:
    """One tensor of the output: its name, what happens to it, why, and its dtype in the base and in the output.

    selected: whether it is one of those that the method is for, rather than one of the others.
    """

    name: str
    action: Action
    reason: str
    info: TensorInfo
    dtype: torch.dtype
    selected: bool = True

    @property
    def written(self) -> int:
        """Bytes of the output's tensor."""
        return self.info.count * self.dtype.itemsize


def make_plan(base: Source, models: Sequence[Source], recipe: Recipe) -> list[Step]:
    """The steps of a merge in the order of the base's tensors.

    Raises InputError naming file and tensor where a tensor is missing or differs in shape or dtype, where a pattern of
    `include` matches nothing, or where nothing at all is left to merge.
    """
    check_machine(models, recipe)
    _check_extra(base, models, recipe)
    steps = [make_step(name, info, base, models, recipe) for name, info in base.tensors.items()]
    check_include([step.name for step in steps], recipe)
    if recipe.selects and not any(step.action == recipe.method for step in steps):
        raise nothing_selected(recipe)
    return steps


def check_machine(models: Sequence[object], recipe: Recipe) -> None:
    """Raises InputError where there is nothing to merge, or the device or the backend is not there."""
    if not models:
        raise InputError("no model was given; expected at least one fine-tuned model beside the base")
    _check_device(recipe.device)
    _check_backend(recipe)


def check_include(names: Collection[str], recipe: Recipe) -> None:
    """Raises InputError where a pattern of `include` matches none of the names of all tensors."""
    for pattern in recipe.include or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"include pattern {pattern!r} matches no tensor of the base")


def nothing_selected(recipe: Recipe) -> InputError:
    """What is said where a method of selected tensors would have none."""
    purpose = "to disentangle" if recipe.method == "awd" else f"for {recipe.method}"
    return InputError(f"no tensor is left {purpose}; by default these are the 2-D floating weights, see --include")


def _check_device(device: str) -> None:
    """A GPU that is asked for must be there."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise InputError(f"device is {device}, but torch {torch.__version__} sees no CUDA device here")
    count, index = torch.cuda.device_count(), torch.device(device).index
    if index is not None and index >= count:
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise InputError(f"device is {device}, but the only CUDA devices here are {known}")


def _check_backend(recipe: Recipe) -> None:
    """A backend asked for by name must be able to run this merge at all."""
    if recipe.backend is None:
        return
    reason = backends.unavailable(recipe.backend)
    if reason is not None:
        raise InputError(f"backend {recipe.backend} cannot run here: {reason}")
    if recipe.method == "awd":
        solver.require_backend(recipe.options, recipe.backend)


def _check_extra(base: Source, models: Sequence[Source], recipe: Recipe) -> None:
    """Tensors that only models have are dropped when missing="base", and an error otherwise."""
    if recipe.missing == "base":
        return
    for model in models:
        for name in model.tensors:
            if name not in base.tensors:
                raise InputError(
                    f"{model.where(name)} has the tensor {name!r} that the base lacks; "
                    "give missing=base (--missing base) to leave such tensors out"
                )


def make_step(name: str, info: TensorInfo, base: Source, models: Sequence[Source], recipe: Recipe) -> Step:
    """The step of one tensor of the base. Raises InputError as `make_plan` does of this tensor."""
    selected, reason = _selected(name, info, recipe)
    action = _action(selected, recipe)
    floating = info.dtype.is_floating_point
    for model in models:
        theirs = model.tensors.get(name)
        if theirs is None:
            if recipe.missing == "base":
                return Step(name, "base", "missing in a model", info, _output_dtype(info.dtype, recipe))
            raise InputError(
                f"{model.where(name)} lacks the tensor {name!r} of the base; "
                "give missing=base (--missing base) to keep the base's tensor"
            )
        if floating and action == "base":
            continue  # whatever the model has is not used
        if theirs.shape != info.shape:
            raise InputError(
                f"{model.where(name)}: tensor {name!r} has shape {list(theirs.shape)}; "
                f"expected {list(info.shape)} as in {base.where(name)}{_vocabulary_hint(info, theirs, recipe, name)}"
            )
        both_floating = theirs.dtype.is_floating_point and floating
        if theirs.dtype != info.dtype and not (both_floating and recipe.dtype is not None):
            hint = "; give --dtype to merge them in float32 all the same" if both_floating else ""
            raise InputError(
                f"{model.where(name)}: tensor {name!r} is {_name(theirs.dtype)}; "
                f"expected {_name(info.dtype)} as in {base.where(name)}{hint}"
            )
    if not floating:
        return Step(name, "base", f"{_name(info.dtype)}, the same in all models", info, info.dtype)
    if 0 in info.shape:
        return Step(name, "base", "empty", info, _output_dtype(info.dtype, recipe))
    if action != "base" and info.dtype not in (*FLOATING, *FLOAT8):
        raise InputError(f"{base.where(name)}: tensor {name!r} is {_name(info.dtype)}, which cannot be merged")
    return Step(name, action, reason, info, _output_dtype(info.dtype, recipe), selected)


def _vocabulary_hint(info: TensorInfo, theirs: TensorInfo, recipe: Recipe, name: str) -> str:
    """What to do where tables differ in their number of rows only, as those of different vocabularies do."""
    if len(info.shape) != 2 or info.shape[1:] != theirs.shape[1:] or _selected(name, info, recipe)[0]:
        return ""
    return (
        " (the same width, another number of rows: do the vocabularies differ?); "
        "give others=base (--others base) to keep the base's tensors that are not disentangled"
    )


def _action(selected: bool, recipe: Recipe) -> Action:
    if selected:
        return recipe.method
    if recipe.others == "base":
        return "base"
    return "average" if recipe.method == "average" else "task_arithmetic"


def named(name: str, recipe: Recipe) -> tuple[bool | None, str]:
    """Whether a tensor of this name is selected, or None where its dimensions decide; and why."""
    matches: Callable[[str], bool] = lambda pattern: fnmatchcase(name, pattern)  # noqa: E731
    excluded = next(filter(matches, recipe.exclude), None)
    if excluded is not None:
        return False, f"excluded by {excluded}"
    if recipe.include is None:
        return None, ""
    included = next(filter(matches, recipe.include), None)
    return included is not None, "not included" if included is None else f"included by {included}"


def _selected(name: str, info: TensorInfo, recipe: Recipe) -> tuple[bool, str]:
    selected, reason = named(name, recipe)
    return (len(info.shape) == 2, f"{len(info.shape)}-D weight") if selected is None else (selected, reason)


def _output_dtype(dtype: torch.dtype, recipe: Recipe) -> torch.dtype:
    if recipe.dtype is None or not dtype.is_floating_point:
        return dtype
    chosen: torch.dtype = getattr(torch, recipe.dtype)
    return chosen


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
