"""The models of a FusionBench model pool as sources of a merge, none of them whole in memory where files will do.

A pool loads a model as a module, or, with lazy loading, as a `LazyStateDict`. Where the module of the pretrained model
turns out to hold what its safetensors files hold, to the bit, the pool does nothing but read files: fine-tuned models
that are loaded in the same way, and have the same tensors, are read from theirs, piece by piece. Otherwise, as where
models are given as modules, the pool loads them all.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awd_fast.checkpoints import Checkpoint
from awd_fast.errors import InputError
from awd_fast.integrations import FUSION_BENCH, require
from awd_fast.plan import Labelled, StateDict, TensorInfo

require(*FUSION_BENCH)

from fusion_bench import LazyStateDict  # noqa: E402
from fusion_bench.modelpool import BaseModelPool  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

PRETRAINED = "_pretrained_"
_COMPARED = 1 << 22
"""Elements that are compared at a time."""


class Files:
    """A checkpoint on disk under the names of a module's tensors. stored: of each name, that of the files."""

    def __init__(self, label: str, checkpoint: Checkpoint, stored: Mapping[str, str]) -> None:
        self.label, self._checkpoint, self._stored = label, checkpoint, stored
        self.tensors: dict[str, TensorInfo] = {name: checkpoint.tensors[own] for name, own in stored.items()}

    def where(self, name: str) -> str:
        return self._checkpoint.where(self._stored.get(name, name))

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._stored[name])

    def elements(self, name: str, begin: int, end: int, room: Tensor | None) -> Tensor:
        return self._checkpoint.elements(self._stored[name], begin, end, room)

    def in_memory(self, name: str) -> bool:
        return False


@dataclass(frozen=True)
class Pool:
    """A pool whose pretrained model is loaded.

    base: what the pool gave for it. ties: of each name of its state dict, the first of the names that mean the same
    tensor. files: whether fine-tuned models are read from their files.
    """

    pool: Any
    base: Any
    ties: Mapping[str, str]
    files: bool

    @property
    def names(self) -> list[str]:
        """Of the fine-tuned models, in order."""
        return list(self.pool.model_names)

    @property
    def lazy(self) -> bool:
        return isinstance(self.base, LazyStateDict)

    @property
    def instances(self) -> bool:
        """Whether the models are in memory already, so that loading them costs nothing."""
        return bool(self.pool.has_instance_models)

    def source(self) -> Labelled:
        """The base's state dict."""
        if not self.lazy:
            return StateDict(PRETRAINED, self.base.state_dict())
        return _lazy(PRETRAINED, self.base)

    def model(self, name: str, wanted: Collection[str] | None = None) -> Any:
        """A fine-tuned model: a source of those of its tensors that are wanted, or the module that the pool loads."""
        if self.files and not self.lazy and _loading(self.pool, name) == _loading(self.pool, PRETRAINED):
            checkpoint = _files(self.pool, name)
            if checkpoint is not None and _holds(checkpoint, self.base, self.ties):
                stored = {own: first for own, first in self.ties.items() if wanted is None or own in wanted}
                return Files(name, checkpoint, stored)
        loaded = self.pool.load_model(name)
        return _lazy(name, loaded) if isinstance(loaded, LazyStateDict) else loaded

    def finished(self, merged: Mapping[str, Tensor], inplace: bool) -> nn.Module:
        """The pretrained model with these tensors in place of its own, or a copy of it; one with values, where lazy."""
        if not self.lazy and not self.instances:  # nobody else has the tensors of what was loaded here
            own = self.base.state_dict(keep_vars=True)
            for name in dict.fromkeys(self.ties.values()):
                own[name].data = merged[name].to(own[name].dtype)
            return self.base
        if not self.lazy:
            model: nn.Module = self.base if inplace else copy.deepcopy(self.base)
            model.load_state_dict(merged)
            return model
        model = copy.deepcopy(self.base.meta_module)
        found = model.load_state_dict(merged, strict=False, assign=True)
        if found.unexpected_keys:
            raise InputError(f"{PRETRAINED} has {found.unexpected_keys[0]!r}, which its module lacks")
        tie = getattr(model, "tie_weights", None)
        if callable(tie):
            tie()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                raise InputError(f"{PRETRAINED}: the files hold no {name!r}, which the module has")
        return model


def opened(modelpool: Any) -> Pool:
    """A pool with its pretrained model. modelpool: one of FusionBench's, or modules by name, "_pretrained_" among them.

    Raises InputError where there is no pretrained model, or no other.
    """
    if not isinstance(modelpool, BaseModelPool):
        if not isinstance(modelpool, Mapping):
            raise InputError(f"modelpool is {type(modelpool).__name__}; expected a model pool or a dict of modules")
        for name, model in modelpool.items():
            if isinstance(model, Mapping) and any(isinstance(value, Tensor) for value in model.values()):
                raise InputError(f"modelpool: {name!r} is a state dict; expected a module, or awd_fast.merge for these")
        modelpool = BaseModelPool(dict(modelpool))
    if not modelpool.has_pretrained:
        raise InputError(f"the model pool has no {PRETRAINED} model; expected the one that the others were tuned from")
    if not modelpool.model_names:
        raise InputError(f"the model pool has no model beside {PRETRAINED}; expected at least one fine-tuned model")
    base = modelpool.load_model(PRETRAINED)
    if isinstance(base, LazyStateDict):
        return Pool(modelpool, base, {name: name for name in base}, True)
    if not isinstance(base, nn.Module):
        raise InputError(f"the model pool loads {PRETRAINED} as {type(base).__name__}; expected a module")
    ties = _ties(base)
    return Pool(modelpool, base, ties, not modelpool.has_instance_models and _is_read(modelpool, base, ties))


def _ties(module: nn.Module) -> dict[str, str]:
    first: dict[Any, str] = {}
    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found[name] = first.setdefault(id(tensor), name)
    return found


def _files(pool: Any, name: str) -> Checkpoint | None:
    """The safetensors files of a model that is a local folder, if it is nothing but that."""
    try:
        path = pool.get_model_path(name)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError):
        return None
    folder = Path(path).expanduser() if isinstance(path, str) else None
    if folder is None or not folder.is_dir() or (folder / "adapter_config.json").exists():
        return None
    try:
        return Checkpoint(folder)
    except InputError:  # of another format, which the pool may know
        return None


def _loading(pool: Any, name: str) -> Any:
    """How a pool loads a model, but for the folder that it names; None where it is not one that only names a folder."""
    config = pool._models[name]
    if isinstance(config, str):
        return ()
    if not isinstance(config, (Mapping, DictConfig)):
        return None
    return {key: value for key, value in config.items() if key != "pretrained_model_name_or_path"}


def _holds(checkpoint: Checkpoint, base: nn.Module, ties: Mapping[str, str]) -> bool:
    """Whether files have the tensors of a module, with their shapes and dtypes."""
    state = base.state_dict()
    return all(
        isinstance(state[name], Tensor)
        and checkpoint.tensors.get(name) == TensorInfo(tuple(state[name].shape), state[name].dtype)
        for name in ties.values()
    )


def _is_read(pool: Any, base: nn.Module, ties: Mapping[str, str]) -> bool:
    """Whether the pretrained module holds its files' tensors under their names, bit for bit."""
    checkpoint = _files(pool, PRETRAINED)
    if checkpoint is None or _loading(pool, PRETRAINED) is None or not _holds(checkpoint, base, ties):
        return False
    state = base.state_dict()
    for name in dict.fromkeys(ties.values()):
        tensor = state[name]
        if tensor.device.type != "cpu":
            return False
        flat = tensor.contiguous().view(-1)
        for begin in range(0, tensor.numel(), _COMPARED):
            part = flat[begin : begin + _COMPARED]
            room = torch.empty_like(part)
            stored = checkpoint.elements(name, begin, begin + part.numel(), room)
            if not torch.equal(part.view(torch.uint8), stored.view(torch.uint8)):
                return False
    return True


def _lazy(label: str, state: Any) -> Labelled:
    """A LazyStateDict as a source: its files where it only reads them, or else its tensors, which it loads."""
    checkpoint = None
    if state._state_dict_cache is None and state._device == "cpu":
        try:
            checkpoint = Checkpoint(state._local_path)
        except InputError:
            checkpoint = None
    names = {name: name for name in state}
    if checkpoint is not None and all(name in checkpoint.tensors for name in names):
        dtypes = {checkpoint.tensors[name].dtype for name in names}
        if state._torch_dtype is None or dtypes == {state._torch_dtype}:
            return Files(label, checkpoint, names)
    return StateDict(label, {name: state[name] for name in names})
