"""Merging loaded models: `merge_models`, of any `torch.nn.Module`s whose parameters have the same names and shapes.

Nothing here knows an architecture, or needs transformers. What is merged are parameters by their names; a model that
hides its weights from those, because they are quantised, sharded or elsewhere, is refused.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from awd_fast.errors import InputError
from awd_fast.merging import merge_states
from awd_fast.ops.foreign import foreign
from awd_fast.plan import Labelled, StateDict, Step, make_plan
from awd_fast.recipe import Recipe, make_recipe
from awd_fast.report import MergeReport

Model = TypeVar("Model", bound=nn.Module)

_WRAPPERS = {
    "DistributedDataParallel": "give the model inside, its .module",
    "OptimizedModule": "give the model that was compiled, its ._orig_mod",
    "FullyShardedDataParallel": "its parameters are sharded; gather them first",
}
_PACKED = re.compile(r"(^|\.)(qweight|qzeros|weight_packed|W_q)$")
"""Buffers and parameters in which GPTQ, AWQ, compressed-tensors and HQQ keep weights."""


def merge_models(
    base_model: Model,
    models: Sequence[nn.Module],
    *,
    inplace: bool = False,
    device: str | torch.device | None = None,
    progress: bool = False,
    on_report: Callable[[MergeReport], Any] | None = None,
    **options: Any,
) -> Model:
    """Merges loaded models into a new one: `awd_fast.merge` of their parameters, theta_0 + scale * sum_i w_i (t_i - d).

    base_model: any `torch.nn.Module`, as a transformers model of whatever kind, on any device or several. models:
        modules that were fine-tuned from it, whose parameters have the same names, shapes and dtypes; they may lie on
        other devices, and are not changed.
    inplace: whether the base itself becomes the merge, instead of a copy of it: its parameters are written once all
        are computed, so that the base is as it was where anything is raised.
    device: where to compute, "cpu" or "cuda:1"; by default the GPU on which all of the base lies, or else the CPU.
    progress, on_report, options: those of `awd_fast.merge` by the same names (method, scale, weights, include, exclude,
        others, missing, groups, optimizer, ...). dtype: of the merged parameters, instead of the base's.

    The result has the base's class, configuration, devices, dtypes, buffers, hooks, training mode and `requires_grad`;
    a copy has no gradients. What the base ties is one parameter, under the first of its names, and stays tied; models
    must hold the same under all of them. Buffers, as the running means of a batch norm, are not merged: the base's are
    kept, and those of the state dict must have the same names and shapes everywhere.

    Beside the models this takes the memory of one more, the result's; in place as well, until it is written.

    Raises InputError in one sentence naming model and tensor for what does not fit: other names, shapes or dtypes, NaN
    and Inf, weights that are quantised, sharded, offloaded or on the meta device, adapters of PEFT, which
    `awd_fast.integrations.peft` merges, and wrappers.
    """
    if isinstance(models, nn.Module) or not isinstance(models, Sequence):
        raise InputError(f"models is {type(models).__name__}; expected a list of torch.nn.Module")
    recipe = make_recipe(len(models), **options, device=place_of(base_model) if device is None else device)
    base = Held("base_model", base_model)
    held = [Held(f"models[{index}]", model) for index, model in enumerate(models)]
    return merge_held(base, held, recipe, inplace=inplace, progress=progress, on_report=on_report)


def merge_held(
    base: "Held[Model]",
    models: "Sequence[Held[Any] | Labelled]",
    recipe: Recipe,
    *,
    inplace: bool = False,
    only: Callable[[str], bool] = lambda name: True,
    progress: bool = False,
    on_report: Callable[[MergeReport], Any] | None = None,
) -> Model:
    """`merge_models` of models that were looked at, or of sources that have at least the base's parameters.

    only: which parameters are merged, by name; the others stay the base's.
    """
    modules = [one for one in models if isinstance(one, Held)]
    for one in modules:
        if one.module is base.module:
            raise InputError(f"{one.label} is the base itself, so it has no task vector; leave it out")
        _require_like(base, one, recipe)

    def chosen(held: "Held[Any]") -> StateDict:
        return StateDict(held.label, {name: t for name, t in held.named(base.ties).items() if only(name)})

    source = chosen(base)
    sources: list[Labelled] = [chosen(one) if isinstance(one, Held) else one for one in models]
    plan = make_plan(source, sources, recipe)
    if inplace:
        _require_own(base, modules, plan)
    merged = merge_states(source, sources, recipe, plan, progress, on_report)
    kept = (first for first in dict.fromkeys(base.ties.values()) if first not in merged)
    merged |= {first: base.parameters[first].detach().clone() for first in kept}
    named = {name: merged[first] for name, first in base.ties.items()}
    return _written(base.module, named) if inplace else _copied(base.module, named)


def place_of(model: Any) -> str:
    """The GPU on which all parameters lie, or the CPU."""
    found = {parameter.device for parameter in model.parameters()} if isinstance(model, nn.Module) else set()
    return str(found.pop()) if len(found) == 1 and next(iter(found)).type == "cuda" else "cpu"


@dataclass(frozen=True)
class _Place:
    """What a tensor's values are known by: two parameters of one place are tied, whether they are one object or not."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _place(tensor: Tensor) -> Any:
    if tensor.numel() == 0:
        return id(tensor)
    return _Place(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


class Held(Generic[Model]):
    """A model whose parameters can be merged. Raises InputError where they cannot.

    parameters: by all their names. buffers: those of the state dict. ties: of each name of a parameter, the first of
    the names that mean the same values.
    """

    def __init__(self, label: str, module: Model) -> None:
        if not isinstance(module, nn.Module):
            hint = "; state dicts are merged by awd_fast.merge" if isinstance(module, dict) else ""
            raise InputError(f"{label} is {type(module).__name__}; expected a torch.nn.Module{hint}")
        self.label, self.module = label, module
        _require_open(label, module)
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.buffers = dict(_buffers(module))
        for name, tensor in (*self.parameters.items(), *self.buffers.items()):
            self._require_plain(name, tensor)
        first: dict[Any, str] = {}
        self.ties = {name: first.setdefault(_place(tensor), name) for name, tensor in self.parameters.items()}

    def named(self, ties: dict[str, str]) -> dict[str, Tensor]:
        """The parameters without the further names of what the base ties, for which they must be the same."""
        for name, first in ties.items():
            if name == first or name not in self.parameters or first not in self.parameters:
                continue
            one, other = self.parameters[first], self.parameters[name]
            if self.ties[name] != self.ties[first] and not torch.equal(one, other.to(one.device)):
                raise InputError(
                    f"the base ties {first!r} and {name!r}, but {self.label} has different values there; "
                    "expected the same"
                )
        return {name: tensor for name, tensor in self.parameters.items() if ties.get(name, name) == name}

    def _require_plain(self, name: str, tensor: Tensor) -> None:
        kind = type(tensor).__name__
        if tensor.device.type == "meta":
            raise InputError(
                f"{self.label}: {name!r} is on the meta device, without values; expected a model that is loaded "
                "whole, not offloaded"
            )
        reason = foreign(tensor)
        if reason is not None:
            raise InputError(f"{self.label}: {name!r} is {reason}")
        if hasattr(tensor, "ds_status"):
            raise InputError(f"{self.label}: {name!r} is sharded among processes ({kind}); gather the model first")
        packed = isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())
        if packed or tensor.is_quantized or _PACKED.search(name):
            raise InputError(
                f"{self.label}: {name!r} is quantised ({kind}, {str(tensor.dtype).removeprefix('torch.')}); expected "
                "floating weights: load the model without quantisation"
            )
        if type(tensor) not in (Tensor, nn.Parameter):
            raise InputError(
                f"{self.label}: {name!r} is a {kind}; expected a plain tensor, not one of a quantised, sharded or "
                "uninitialised layer"
            )


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of the state dict by name."""
    for path, each in module.named_modules(remove_duplicate=False):
        for name, buffer in each._buffers.items():
            if buffer is not None and name not in each._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _require_open(label: str, module: nn.Module) -> None:
    """Raises InputError where the weights of a model are not what its parameters show."""
    for path, each in module.named_modules():
        kind, where = type(each), f"{label}.{path}" if path else label
        if kind.__name__ in _WRAPPERS:
            raise InputError(f"{where} is a {kind.__name__}; {_WRAPPERS[kind.__name__]}")
        if re.match(r"torch\.(ao\.)?nn\.(intrinsic\.)?quantized\b", kind.__module__):
            raise InputError(f"{where} is a quantised {kind.__name__}; expected floating weights")
        if getattr(each, "peft_config", None) is not None or getattr(each, "_hf_peft_config_loaded", False):
            raise InputError(
                f"{where} has adapters of PEFT; merge these (awd_fast.integrations.peft.add_weighted_adapter), or put "
                "them into the weights first (merge_and_unload)"
            )
        config = getattr(each, "config", None)
        quantised = getattr(each, "hf_quantizer", None) or getattr(config, "quantization_config", None)
        if quantised is not None:
            method = getattr(each, "quantization_method", None) or type(quantised).__name__
            raise InputError(
                f"{where} is quantised ({getattr(method, 'value', method)}); expected floating weights: load the model "
                "without quantisation"
            )


def _require_like(base: Held[Any], other: Held[Any], recipe: Recipe) -> None:
    """Raises InputError where the buffers of a model are not those of the base; the plan compares parameters."""
    for one, its in ((base, other), (other, base)):
        for name in one.buffers:
            if name not in its.buffers and recipe.missing == "error":
                raise InputError(
                    f"{its.label} lacks the buffer {name!r} of {one.label}; expected the same model, or missing='base'"
                )
    for name, buffer in base.buffers.items():
        theirs = other.buffers.get(name)
        if theirs is not None and theirs.shape != buffer.shape:
            raise InputError(
                f"{other.label}: buffer {name!r} has shape {list(theirs.shape)}; expected {list(buffer.shape)} as in "
                f"{base.label}"
            )


def _require_own(base: Held[Any], models: Sequence[Held[Any]], plan: Sequence[Step]) -> None:
    """Raises InputError where the base cannot be written to, or a model would change with it."""
    for name, parameter in base.parameters.items():
        if parameter.is_inference():
            raise InputError(
                f"{base.label}: {name!r} was made in inference mode, and cannot be written to; expected inplace=False"
            )
    changed = (base.parameters[step.name] for step in plan if step.action != "base")
    memory = {parameter.untyped_storage().data_ptr() for parameter in changed}
    for model in models:
        for name, parameter in model.parameters.items():
            if parameter.numel() and parameter.untyped_storage().data_ptr() in memory:
                raise InputError(
                    f"{model.label}: {name!r} shares its memory with the base, so that it would change too; expected "
                    "a model of its own, or inplace=False"
                )


def _written(module: Model, merged: dict[str, Tensor]) -> Model:
    """The module itself with these parameters."""
    with torch.no_grad():
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.dtype == merged[name].dtype:
                parameter.copy_(merged[name])
            else:
                parameter.data = _laid_out(merged[name], parameter)
    return module


def _copied(module: Model, merged: dict[str, Tensor]) -> Model:
    """A copy of a module with these parameters; its own are never copied."""
    made: dict[int, nn.Parameter] = {}
    named: dict[str, nn.Parameter] = {}
    for name, old in module.named_parameters(remove_duplicate=False):
        if id(old) not in made:
            made[id(old)] = nn.Parameter(_laid_out(merged[name], old), old.requires_grad)
            made[id(old)].__dict__.update(old.__dict__)  # as the marks that transformers leaves
        named[name] = made[id(old)]
    memo: dict[int, Any] = dict(made)
    try:
        copied = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"base_model cannot be copied ({type(error).__name__}: {error}); expected a model that copy.deepcopy "
            "copies, or give inplace=True"
        ) from error
    with torch.no_grad():
        for name, parameter in copied.named_parameters(remove_duplicate=False):
            if parameter is not named[name]:  # of a module that copies in a way of its own
                parameter.data = named[name].data
    return copied


def _laid_out(merged: Tensor, like: Tensor) -> Tensor:
    """The merged tensor with the memory layout of a parameter."""
    return merged if merged.stride() == like.stride() else torch.empty_like(like, dtype=merged.dtype).copy_(merged)
