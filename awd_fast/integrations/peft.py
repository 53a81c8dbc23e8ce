"""AWD over LoRA adapters of a loaded PeftModel, from their factors: the counterpart of PEFT's `add_weighted_adapter`.

An adapter of a model is seen as the folder that PEFT would save of it, so that everything that is read, checked and
merged is what `awd_fast.merge_checkpoints(..., as_adapter=True)` does on disk. No task vector is made, and of the base
nothing is read but the originals of what adapters store whole: its layers may be quantised.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from awd_fast.adapter_models import AdapterModel, plan_adapters
from awd_fast.adapter_output import adapter_state
from awd_fast.errors import InputError
from awd_fast.held_adapters import HeldAdapter
from awd_fast.integrations import require
from awd_fast.lora_merger import LoraMerger
from awd_fast.plan import StateDict, TensorInfo
from awd_fast.progress import Shown
from awd_fast.recipe import make_recipe
from awd_fast.report import MergeReport, Tally

if TYPE_CHECKING:
    from peft import PeftModel

_ROOT = "base_model.model."
_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")
_OWN = re.compile(r"\.(lora_[^.]*|modules_to_save)\.")


@torch.no_grad()
def add_weighted_adapter(
    model: "PeftModel",
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    *,
    progress: bool = False,
    **options: Any,
) -> MergeReport:
    """Adds the merge of LoRA adapters to a PeftModel, by AWD where PEFT's own method adds a weighted sum.

    model: a `peft.PeftModel`, on any device, whose layers may be quantised. adapters: the names of the adapters to
        merge, of LoRA; their ranks, alphas, target modules and rank stabilisation may differ. weights: one number for
        each, as in `awd_fast.merge`; None is 1 for each. adapter_name: of the new adapter.
    progress: show a progress bar.
    options: those of `awd_fast.merge` by the same names (method, scale, include, groups, similarity, penalty,
        optimizer, ...); `optimizer` may also be "sgd", "adam" or "converge". Names of tensors are those of the model
        without adapters. Methods are "awd", "wudi", "task_arithmetic" and "average". dtype: of the new adapter,
        float32, bfloat16, float16 or float64; by default the adapters', or float32 where these differ.

    The new adapter computes scale * sum_i w_i (t_i - d), t_i = s_i B_i A_i of `adapters[i]`, exactly: its factors A
    [r, inputs] and B [outputs, r] have the sum of the ranks that a module has in the adapters, and alpha = r, as with
    PEFT's combination_type="cat". What adapters store whole (`modules_to_save`) is merged as tensors of full models.
    It is `awd_fast.merge_checkpoints(..., as_adapter=True)` of the saved adapters, but for a scale that was set on a
    layer (`set_scale`, `scale_layer`), which counts here and is not saved. The new adapter is frozen and not active:
    `model.set_adapter(adapter_name)` makes it so, and `model.save_pretrained` saves it. Nothing else of the model
    changes, and nothing at all where anything is raised.

    Returns the report of the merge, with the similarity before and after.

    Raises InputError in one sentence for what does not fit: no PeftModel, unknown adapters, a name that is taken, what
    is no plain LoRA (DoRA, PiSSA, trained biases, ...), an option that leaves the adapters' span (Adam, l1), NaN or
    Inf; and PEFT that is not installed, which is an ImportError too.
    """
    require("peft", "0.18", "1")
    import peft

    _require(peft, model, adapters, adapter_name)
    recipe = make_recipe(len(adapters), weights=weights, **options)
    configs = {name: _config(model, name) for name in adapters}
    base = _Base(peft, model)
    held = {name: _held(peft, model, name, config) for name, config in configs.items()}
    models = [AdapterModel(held[name], base, "the model") for name in adapters]
    plan = plan_adapters(base, models, recipe, as_adapter=True)
    tally = Tally()
    with Shown(progress) as shown:
        merger = LoraMerger(base, models, recipe, shown)
        full = merger.stored_whole(plan, tally)
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else _common_dtype(models)
        merged = merger.as_factors(plan, tally)
        state, config = adapter_state([each.bound for each in models], merged, full, dtype=dtype)
    _add(peft, model, adapter_name, state, config, dtype)
    report = MergeReport(recipe, "base", tuple(adapters), None, tally.report(plan), merger.shared)
    report.adapters, report.as_adapter = tuple(each.describe() for each in models), True
    return report


def _require(peft: Any, model: Any, adapters: Any, adapter_name: Any) -> None:
    """Raises InputError where the arguments do not name adapters of a model, and a new one."""
    if not isinstance(model, peft.PeftModel):
        raise InputError(f"model is {type(model).__name__}; expected a peft.PeftModel, as get_peft_model gives")
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise InputError(f"adapters is {adapters!r}; expected a list of names of adapters")
    known = model.peft_config
    for name in adapters:
        if not isinstance(name, str) or name not in known:
            raise InputError(f"the model has no adapter {name!r}; expected one of {', '.join(map(repr, known))}")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise InputError(f"adapter_name is {adapter_name!r}; expected a text without dots")
    if adapter_name in known:
        raise InputError(f"the model has an adapter {adapter_name!r} already; expected a new name")


def _config(model: Any, name: str) -> dict[str, Any]:
    """What PEFT would write as adapter_config.json, parsed."""
    given: dict[str, Any] = json.loads(json.dumps(model.peft_config[name].to_dict(), default=_plain))
    return given


def _plain(value: Any) -> Any:
    """A value of a configuration that JSON does not know: a set as a list, another as text, to be refused by name."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _held(peft: Any, model: Any, name: str, config: dict[str, Any]) -> HeldAdapter:
    label = f"adapter {name!r}"
    scales = {path: layer.scaling[name] for path, layer in _layers(peft, model) if name in layer.scaling}
    if config.get("peft_type") == "LORA":
        # Not the embeddings that PEFT saves beside factors: they are those of this very model.
        state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    else:
        state = {}  # the configuration is refused
    held = HeldAdapter(label, config, state, scales)
    for path in scales:
        if path not in held.modules:
            raise InputError(
                f"{label}: PEFT does not give its factors of the module {path!r}, as it would not save them; is an "
                "adapter named as a part of that name? expected other names of adapters"
            )
    return held


def _layers(peft: Any, model: Any) -> Iterator[tuple[str, Any]]:
    """The layers with LoRA by their names in the model without adapters."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            yield path.removeprefix(_ROOT), module


class _Base:
    """The model without adapters as a source of a merge: names and shapes, and values where they are asked for."""

    def __init__(self, peft: Any, model: Any) -> None:
        every = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        self._held: dict[str, Tensor] = {
            _WRAPPED.sub("", name.removeprefix(_ROOT)): tensor for name, tensor in every if not _OWN.search(name)
        }
        self.tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._held.items()}
        for path, layer in _layers(peft, model):
            stored = self.tensors.get(f"{path}.weight")
            packed = stored is None or not stored.dtype.is_floating_point
            if packed and not isinstance(layer.get_base_layer(), nn.MultiheadAttention):  # which has no such weight
                # What the factors are added to, however a quantised layer stores it.
                shape = (layer.out_features, layer.in_features)
                self.tensors[f"{path}.weight"] = TensorInfo(shape, torch.float32)

    def where(self, name: str) -> str:
        return "the model"

    def device(self, name: str) -> torch.device:
        return self._held[name].device

    def read(self, name: str) -> Tensor:
        return self._state(name).read(name)

    def elements(self, name: str, begin: int, end: int, room: Tensor | None) -> Tensor:
        return self._state(name).elements(name, begin, end, room)

    def in_memory(self, name: str) -> bool:
        return True

    def _state(self, name: str) -> StateDict:
        return StateDict(self.where(name), {name: self._held[name]})  # which refuses what has no values


def _common_dtype(models: Sequence[AdapterModel]) -> torch.dtype:
    """The dtype of all factors, or float32."""
    found = {
        model.bound.adapter.stored[stored].dtype
        for model in models
        for module in model.bound.adapter.modules.values()
        for stored in (module.a, module.b)
    }
    return found.pop() if len(found) == 1 else torch.float32


def _add(
    peft: Any, model: Any, name: str, state: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Adds an adapter as PEFT adds a trained one, frozen and not active; the model is as it was where that fails."""
    before = {id(parameter): (parameter, parameter.requires_grad) for parameter in model.parameters()}
    modules = {id(module) for module in model.modules()}
    active = list(model.active_adapters)
    config = {**config, "target_modules": _targets(model, config["target_modules"])}
    try:
        model.add_adapter(name, peft.LoraConfig(**config))
        added = model.peft_config[name]
        if added.modules_to_save:  # PEFT adds the names of a task's head, which are there already
            added.modules_to_save = list(dict.fromkeys(added.modules_to_save))
        for own, parameter in model.named_parameters():
            if id(parameter) not in before:
                parameter.requires_grad_(False)
                if ".lora_" in own:
                    parameter.data = parameter.data.to(dtype)
        for _, layer in _layers(peft, model):
            for part in layer.modules():
                if id(part) not in modules:
                    part.training = layer.training
        loaded = peft.set_peft_model_state_dict(model, state, adapter_name=name)
        missing = [key for key in loaded.missing_keys if re.search(rf"\.{re.escape(name)}(\.|$)", key)]
        for key in (*loaded.unexpected_keys, *missing):
            raise InputError(
                f"PEFT did not load {key!r} of the merged adapter {name!r}; expected a name that is no part of "
                "those of modules"
            )
    except BaseException:
        with suppress(Exception):
            model.delete_adapter(name)
        raise
    finally:
        if list(model.active_adapters) != active:
            model.base_model.set_adapter(active)
        for parameter, required in before.values():
            parameter.requires_grad_(required)


def _targets(model: Any, names: Sequence[str]) -> list[str] | str:
    """These modules alone: as a pattern where PEFT would take another one, whose name ends with one of theirs, too."""
    wanted = set(names)
    for path, _ in model.named_modules():
        own = path.removeprefix(_ROOT)
        if own not in wanted and any(own[dot + 1 :] in wanted for dot, letter in enumerate(own) if letter == "."):
            return "|".join(map(re.escape, names))
    return list(names)
