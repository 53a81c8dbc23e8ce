"""Writing a merge of LoRA adapters as one adapter in PEFT's format, of the sum of their ranks.

Nothing is approximated: a sum of products of low rank is the product of the concatenated factors
(`awd_fast.lowrank.merged_factors`). The scale is 1, as alpha = r.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from awd_fast.adapter_config import CONFIG, by_pattern
from awd_fast.adapters import PREFIX, WEIGHTS, BoundAdapter, Placement, StoredAdapter
from awd_fast.errors import InputError


def write_adapter(
    folder: Path,
    adapters: Sequence[BoundAdapter],
    merged: Iterable[tuple[str, Tensor, Tensor]],
    full: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into an existing folder: see `adapter_state`.

    metadata: of the safetensors file. Raises OSError too, where the disk does not take it.
    """
    tensors, config = adapter_state(adapters, merged, full, dtype=dtype, base_model=base_model)
    try:
        save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt", **(metadata or {})})
        (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # as any new file here, not for its owner only
    except (SafetensorError, OSError) as error:
        raise OSError(f"{folder / WEIGHTS} could not be written: {error}") from error
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_state(
    adapters: Sequence[BoundAdapter],
    merged: Iterable[tuple[str, Tensor, Tensor]],
    full: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one adapter, on the CPU under the names that PEFT saves, and its configuration.

    adapters: the inputs, which give the names. merged: the base's tensor name, left [R, r] and right [r, C] with the
    merged task vector left @ right, for each tensor in the base's order; one of rank 0 is left out. full: by the base's
    names, all merged tensors that any of the inputs stores whole; kept in their dtype. dtype: of the factors, finite in
    it. base_model: what the configuration names as base, by default what the inputs agree on.

    Raises InputError where the inputs name a tensor differently, and where something is missing or does not fit.
    """
    places = _places(adapters)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, left, right in merged:
        if left.shape[1] == 0:
            continue
        if name not in places:
            raise InputError(f"merged factors were given for the tensor {name!r}, which no adapter changes")
        module = places[name].module
        ranks[module.name] = left.shape[1]
        tensors |= _stored(places[name], name, left, right, dtype)
    if not ranks:
        raise InputError("no merged factors were given; expected those of at least one tensor")
    whole = _whole(adapters, full or {})
    tensors |= {PREFIX + own: tensor.detach().cpu() for own, tensor in whole.items()}
    written = [place for place in places.values() if place.module.name in ranks]
    return tensors, _config([bound.adapter for bound in adapters], written, ranks, list(whole), base_model)


def _places(adapters: Sequence[BoundAdapter]) -> dict[str, Placement]:
    """Each changed tensor's place in the module tree, on which all adapters must agree."""
    places: dict[str, Placement] = {}
    first: dict[str, BoundAdapter] = {}
    for bound in adapters:
        for name, place in bound.placements.items():
            known = places.setdefault(name, place)
            origin = first.setdefault(name, bound)
            theirs, ours = _described(place, known), _described(known, place)
            if theirs != ours:
                raise InputError(
                    f"{bound.adapter.file} changes the tensor {name!r} as {theirs}; expected {ours} as in "
                    f"{origin.adapter.file}, for one adapter to hold both"
                )
    return places


def _described(place: Placement, other: Placement) -> str:
    """What a tensor is to an adapter; its layout only where that of another differs."""
    layout = "" if place.transposed == other.transposed else ", transposed" if place.transposed else ", not transposed"
    return f"{place.module.kind} {place.module.name}{layout}"


def _stored(place: Placement, name: str, left: Tensor, right: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A and B by their names in the file."""
    module = place.module
    rows, columns = (module.inputs, module.outputs) if place.transposed else (module.outputs, module.inputs)
    rank = left.shape[1]
    if left.shape != (rows, rank) or right.shape != (rank, columns):
        raise InputError(
            f"the merged factors of {name!r} are {list(left.shape)} and {list(right.shape)}; "
            f"expected [{rows}, r] and [r, {columns}]"
        )
    a, b = (left.T, right.T) if place.transposed else (right, left)
    keys = (
        ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    stored = {}
    for key, factor in zip(keys, (a, b), strict=True):
        # A copy of its own: safetensors does not store two views of the same memory.
        tensor = factor.detach().to("cpu", dtype, copy=True).contiguous()
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"the merged factors of {name!r} are not finite in {str(dtype).removeprefix('torch.')}; "
                "choose a smaller scale or a wider dtype"
            )
        stored[f"{PREFIX}{module.name}.{key}"] = tensor
    return stored


def _whole(adapters: Sequence[BoundAdapter], full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors stored whole, by their names in the adapters' model."""
    own: dict[str, str] = {}
    for bound in adapters:
        for name, theirs in bound.full.items():
            if own.setdefault(name, theirs) != theirs:
                raise InputError(
                    f"{bound.adapter.file} calls the tensor {name!r} {theirs!r}; expected {own[name]!r} as in another "
                    "adapter, for one adapter to hold both"
                )
            if name not in full:
                raise InputError(
                    f"{bound.adapter.file} stores the tensor {name!r} whole, and no merged tensor was given for it; "
                    "expected one, because PEFT does not open an adapter without it"
                )
    for name in full:
        if name not in own:
            raise InputError(f"a merged tensor was given for {name!r}, which no adapter stores whole")
    return {own[name]: tensor for name, tensor in full.items()}


def _config(
    adapters: Sequence[StoredAdapter],
    written: Sequence[Placement],
    ranks: Mapping[str, int],
    whole: Sequence[str],
    base_model: str | None,
) -> dict[str, Any]:
    r = Counter(ranks.values()).most_common(1)[0][0]
    patterns = _patterns(ranks, r)
    layouts = {place.transposed for place in written if place.module.kind == "linear"}
    flag = layouts.pop() if len(layouts) == 1 else adapters[0].config.fan_in_fan_out
    saved = dict.fromkeys(module for adapter in adapters for module in adapter.config.modules_to_save)
    kept = [module for module in saved if any(f".{module}." in f".{name}." for name in whole)]
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base_model or _agreed(adapters, lambda adapter: adapter.config.base_model),
        "revision": None if base_model else _agreed(adapters, lambda adapter: adapter.config.revision),
        "task_type": _agreed(adapters, lambda adapter: adapter.config.task_type),
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "modules_to_save": kept or None,
        "fan_in_fan_out": flag,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _agreed(adapters: Sequence[StoredAdapter], value: Callable[[StoredAdapter], str | None]) -> str | None:
    """What all adapters say, or None."""
    said = {value(adapter) for adapter in adapters}
    return said.pop() if len(said) == 1 else None


def _patterns(ranks: Mapping[str, int], r: int) -> dict[str, int]:
    """The modules whose rank is not r, as patterns. Full names, which old versions of PEFT look up too, if they do."""
    plain = {name: rank for name, rank in ranks.items() if rank != r}
    if all(by_pattern(plain, name, r) == rank for name, rank in ranks.items()):
        return plain
    return {f"^{re.escape(name)}": rank for name, rank in plain.items()}
