"""LoRA adapters in PEFT's folder format as inputs: opening, checking, and binding them to a base's tensors.

An `Adapter` is what lies on disk; `Adapter.bind` says which tensors of a base it changes, and how. The task vector of
such a tensor is scale * left @ right (`awd_fast.lowrank.Factors`), in the layout of the base's tensor:

    stored                           base's tensor          left           right
    lora_A [r, in], lora_B [out, r]  [out, in]              B              A
    the same                         [in, out] (Conv1D)     A'             B'
    lora_embedding_A [r, vocabulary],
    lora_embedding_B [dim, r]        [vocabulary, dim]      A'             B'
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from awd_fast.adapter_config import CONFIG, AdapterConfig, read_config
from awd_fast.checkpoints import resolve
from awd_fast.disk import OpenFiles
from awd_fast.errors import InputError
from awd_fast.lowrank import Factors
from awd_fast.ops import FLOATING
from awd_fast.plan import TensorInfo
from awd_fast.tensor_files import TensorFile

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?\.")
_COPY = ".base_layer.weight"

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class Module:
    """The factors of one module as they are stored. a, b: the names of A [rank, inputs] and B [outputs, rank]."""

    name: str
    kind: Kind
    a: str
    b: str
    inputs: int
    outputs: int
    rank: int
    scale: float


def is_adapter(folder: Path) -> bool:
    """Whether a local folder (or file) is an adapter rather than a model; it need not be a good one."""
    if folder.is_file():
        return folder.name == WEIGHTS
    return any((folder / name).is_file() for name in (CONFIG, WEIGHTS)) and not any(
        (folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
    )


class Store(Protocol):
    """Where the tensors of an adapter lie: a file, or memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, begin: int, room: Tensor) -> None:
        """Elements of a tensor from `begin` on in memory order, as many as the room, of its dtype, takes."""
        ...


class StoredAdapter:
    """A LoRA adapter under the names and with the configuration that PEFT saves, wherever its tensors lie.

    path: as the user gave it. file: what messages call it. modules: the factors by module name. full: tensors stored
    whole, by their name in the model, with the name in the store. copies: base tensors that PEFT stores beside the
    factors of an embedding, likewise. Raises InputError where the adapter is not plain LoRA, or its tensors contradict
    its configuration.
    """

    def __init__(self, path: str, file: str | Path, config: AdapterConfig, opened: Store) -> None:
        self.path, self.file, self.config = path, file, config
        self.stored = {name: opened.tensors[name] for name in sorted(opened.tensors)}
        self.store = opened
        self.full: dict[str, str] = {}
        self.copies: dict[str, str] = {}
        factors: dict[tuple[str, Kind], dict[str, str]] = defaultdict(dict)
        for name in self.stored:
            self._sort(name, factors)
        self.modules = {key[0]: self._module(*key, sides) for key, sides in factors.items()}
        if len(self.modules) < len(factors):
            raise InputError(f"{self.file} holds linear and embedding factors for one module; expected one kind")
        if not self.modules and not self.full:
            raise InputError(f"{self.file} holds no LoRA factors; expected lora_A and lora_B of at least one module")

    def read(self, name: str) -> Tensor:
        """One tensor by its name in the file, as stored. Raises InputError where it is not finite, and OSError."""
        info = self.stored[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.store.read(name, 0, tensor)
        finite = torch.isfinite(tensor if tensor.dtype in FLOATING else tensor.float())  # float8 has no isfinite
        if not finite.all():
            count = int((~finite).sum())
            raise InputError(f"{self.file}: tensor {name!r} holds {count} NaN or Inf values; expected finite ones")
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor, as stored."""
        info = self.stored[name]
        rows = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        self.store.read(name, start * math.prod(info.shape[1:]), rows)
        return rows

    def bind(self, base: Mapping[str, TensorInfo], where: str = "the base") -> "BoundAdapter":
        """The adapter on a base with these tensors; `where` names the base in messages.

        A module is the base's tensor of the same name, else the only one whose dotted name ends with it or that it
        ends with, for models saved with or without a head around them. Raises InputError where there is none or more
        than one, or where shapes do not fit.
        """
        return BoundAdapter(self, base, where)

    def _sort(self, stored: str, factors: dict[tuple[str, Kind], dict[str, str]]) -> None:
        """Notes what a stored tensor is."""
        name = stored.removeprefix(PREFIX)
        kinds: tuple[tuple[Kind, re.Pattern[str]], ...] = (("linear", _LINEAR), ("embedding", _EMBEDDING))
        for kind, pattern in kinds:
            match = pattern.fullmatch(name)
            if match is not None:
                sides = factors[match["module"], kind]
                if match["side"] in sides:
                    raise InputError(
                        f"{self.file} holds both {sides[match['side']]!r} and {stored!r}; "
                        "expected one adapter in the file"
                    )
                sides[match["side"]] = stored
                return
        if re.search(r"\.lora_magnitude_vector(\.|$)", name):
            raise InputError(f"{self.file}: tensor {stored!r} belongs to DoRA; expected plain LoRA")
        if re.search(r"\.lora_(embedding_)?B(\.[^.]+)?\.bias$", name):
            raise InputError(
                f"{self.file}: tensor {stored!r} is a bias of LoRA factors (lora_bias); expected plain LoRA"
            )
        if name.endswith(_COPY):
            self._keep(self.copies, name.removesuffix(_COPY) + ".weight", stored)
        elif ".lora_" not in f".{name}" and self._is_whole(stored, name):
            self._keep(self.full, _SAVED.sub(".", name), stored)
        elif name.endswith(".bias"):
            raise InputError(f"{self.file}: tensor {stored!r} is a trained bias; expected an adapter with bias 'none'")
        else:
            raise InputError(
                f"{self.file}: tensor {stored!r} is neither a LoRA factor nor part of modules_to_save; expected "
                "lora_A, lora_B, lora_embedding_A or lora_embedding_B"
            )

    def _is_whole(self, stored: str, name: str) -> bool:
        """Whether a tensor is part of a module that was trained whole, or a resized embedding, which PEFT adds."""
        if _SAVED.search(name) or self.config.stores_whole(name):
            return True
        return name.endswith(".weight") and self.stored[stored].dtype.is_floating_point

    def _keep(self, where: dict[str, str], name: str, stored: str) -> None:
        if name in where:
            raise InputError(f"{self.file} holds both {where[name]!r} and {stored!r}; expected one of them")
        where[name] = stored

    def _module(self, name: str, kind: Kind, sides: Mapping[str, str]) -> Module:
        """The checked factors of one module. sides: the names of A and B in the file."""
        for side, other in (("A", "B"), ("B", "A")):
            if side not in sides:
                part = "lora_embedding_" if kind == "embedding" else "lora_"
                raise InputError(f"{self.file} holds {sides[other]!r} but no {part}{side} of the module {name!r}")
        for stored in sides.values():
            info = self.stored[stored]
            if info.dtype not in FLOATING:
                raise InputError(f"{self.file}: tensor {stored!r} is {info}; expected an unquantised floating dtype")
            if len(info.shape) != 2 or 0 in info.shape:
                raise InputError(
                    f"{self.file}: tensor {stored!r} is {info}; expected two dimensions (of a linear layer or an "
                    "embedding, not a convolution) that are not 0"
                )
        a, b = (self.stored[sides[side]].shape for side in ("A", "B"))
        if a[0] != b[1]:
            raise InputError(
                f"{self.file}: {sides['A']!r} is {list(a)} and {sides['B']!r} is {list(b)}; expected [r, inputs] and "
                "[outputs, r]"
            )
        rank = self.config.rank(name)
        if a[0] != rank:  # alpha / r would be wrong
            raise InputError(
                f"{self.file}: {sides['A']!r} is {list(a)}, of rank {a[0]}; expected rank {rank} as {CONFIG} says"
            )
        return Module(name, kind, sides["A"], sides["B"], a[1], b[0], rank, self.config.scale(name))


class Adapter(StoredAdapter):
    """A LoRA adapter on disk: the folder that PEFT's save_pretrained writes, its weights file, or a name on the Hub.

    Only headers are read on opening. Raises InputError where nothing readable is there, and as `StoredAdapter`.
    """

    def __init__(self, path: str | Path) -> None:
        local = resolve(str(path))
        if local.is_file() and local.name != WEIGHTS:
            raise InputError(f"{local} is a file; expected an adapter's folder, or the file {WEIGHTS} in it")
        self.folder = local.parent if local.is_file() else local
        file = self.folder / WEIGHTS
        config = read_config(self.folder / CONFIG)
        self.opened = _open(file)
        super().__init__(str(path), file, config, self.opened)


@dataclass(frozen=True)
class Placement:
    """A module at a tensor of the base. transposed: the tensor is stored [inputs, outputs]."""

    module: Module
    transposed: bool


class BoundAdapter:
    """An adapter on a base: placements by the base's tensor names, in the base's order.

    full: the tensors stored whole, by the base's names (one that the base lacks keeps its own), with their names in the
    adapter's model. Of these it is also a source (`awd_fast.plan.Source`).
    """

    def __init__(self, adapter: StoredAdapter, base: Mapping[str, TensorInfo], where: str) -> None:
        self.adapter, self._base, self._where = adapter, base, where
        wanted = {f"{module}.weight" for module in adapter.modules}
        self._by_suffix = _with_suffix(base, wanted | set(adapter.full) | set(adapter.copies))
        found: dict[str, Placement] = {}
        for module in adapter.modules.values():
            name = self._find(f"{module.name}.weight", f"the module {module.name!r}")
            if name is None:
                raise InputError(
                    f"{adapter.file} changes the module {module.name!r}, but {where} has no tensor "
                    f"{module.name + '.weight'!r}, with or without a prefix"
                )
            if name in found:
                raise InputError(
                    f"{adapter.file}: the modules {found[name].module.name!r} and {module.name!r} both mean the tensor "
                    f"{name!r} of {where}; expected one"
                )
            found[name] = Placement(module, self._transposed(module, name))
        self._require_clear_layout(found)
        self.placements = {name: found[name] for name in base if name in found}
        self.full = self._named(adapter.full)
        self._copies = self._named(adapter.copies)
        for name in self.full:
            if name in self.placements:
                raise InputError(f"{adapter.file} holds the tensor {name!r} whole and as LoRA factors; expected one")
        for name, own in self._copies.items():
            stored = adapter.copies[own]
            if name not in base or base[name].shape != adapter.stored[stored].shape:
                expected = f"expected {list(base[name].shape)} as in {where}" if name in base else f"{where} lacks it"
                raise InputError(f"{adapter.file}: tensor {stored!r} is {adapter.stored[stored]}; {expected}")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors stored whole."""
        return {name: self.adapter.stored[self.adapter.full[own]] for name, own in self.full.items()}

    def where(self, name: str) -> str:
        """The file, for a message."""
        return str(self.adapter.file)

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    def read(self, name: str) -> Tensor:
        """A tensor that is stored whole."""
        return self.adapter.read(self.adapter.full[self.full[name]])

    def rank(self, name: str) -> int:
        """The rank of the task vector of a base's tensor; 0 where the adapter does not change it by factors."""
        return self.placements[name].module.rank if name in self.placements else 0

    def factors(self, name: str) -> Factors:
        """The task vector of a 2-D tensor of the base, in its layout and the stored dtypes; rank 0 where it is zero."""
        placement = self.placements.get(name)
        if placement is None:
            return Factors.zero(self._base[name].shape)
        module = placement.module
        a, b = self.adapter.read(module.a), self.adapter.read(module.b)
        stored = Factors(b, a, module.scale)
        return stored.T if placement.transposed else stored

    @property
    def copied(self) -> Iterable[str]:
        """The base's tensors of which `require_base` has a copy to compare with."""
        return self._copies.keys()

    def require_base(self, name: str, rows: Tensor, start: int = 0, column: int = 0) -> None:
        """Raises InputError where the adapter was stored with other values of a base's tensor than these rows of it.

        start, column: where they begin. PEFT stores an embedding's own weights beside its factors, which mean nothing
        on another base.
        """
        if name not in self._copies:
            return
        stored = self.adapter.copies[self._copies[name]]
        copy = self.adapter.read_rows(stored, start, start + len(rows))[:, column : column + rows.shape[1]]
        if not torch.equal(rows.detach().to("cpu", copy.dtype), copy):
            raise InputError(
                f"{self.adapter.file}: tensor {stored!r} differs from {name!r} of {self._where}; expected "
                "an adapter of this base"
            )

    def _named(self, stored: Mapping[str, str]) -> dict[str, str]:
        """Names of tensors by the base's names for them, or by themselves where the base has none."""
        named: dict[str, str] = {}
        for name in stored:
            target = self._find(name, f"the tensor {stored[name]!r}") or name
            if target in named:
                raise InputError(
                    f"{self.adapter.file}: {stored[named[target]]!r} and {stored[name]!r} both mean the tensor "
                    f"{target!r} of {self._where}; expected one"
                )
            named[target] = name
        return named

    def _find(self, name: str, what: str) -> str | None:
        """The base's tensor of this name, give or take a prefix."""
        if name in self._base:
            return name
        found = [*self._by_suffix.get(name, ()), *(each for each in _shorter(name) if each in self._base)]
        if len(found) > 1:
            listed = ", ".join(repr(each) for each in found[:3]) + (", ..." if len(found) > 3 else "")
            raise InputError(f"{self.adapter.file}: {what} may mean any of {listed} in {self._where}; expected one")
        return found[0] if found else None

    def _transposed(self, module: Module, name: str) -> bool:
        """Whether the base's tensor is [inputs, outputs]; by the configuration where it is square."""
        shape, plain = self._base[name].shape, (module.outputs, module.inputs)
        if module.kind == "embedding":
            fits, transposed = shape == plain[::-1], True
        elif shape == plain == plain[::-1]:
            fits, transposed = True, self.adapter.config.fan_in_fan_out
        else:
            # PEFT goes by the layer's type, and writes one flag for all; the shape knows better.
            fits, transposed = shape in (plain, plain[::-1]), shape != plain
        if not fits:
            product = f"{list(self.adapter.stored[module.b].shape)} x {list(self.adapter.stored[module.a].shape)}"
            raise InputError(
                f"{self.adapter.file}: the factors of {module.name!r} are {product}; expected ones that fit the tensor "
                f"{name!r}, {list(shape)}, of {self._where}"
            )
        return transposed

    def _require_clear_layout(self, found: Mapping[str, Placement]) -> None:
        """Refuses square tensors where other tensors show that the configuration's flag is not true of all layers."""
        flag = self.adapter.config.fan_in_fan_out
        linear = [place for place in found.values() if place.module.kind == "linear"]
        square = [place for place in linear if place.module.inputs == place.module.outputs]
        other = next((place for place in linear if place.transposed != flag), None)
        if square and other is not None:
            raise InputError(
                f"{self.adapter.file}: fan_in_fan_out is {str(flag).lower()}, which the shape of {other.module.name!r} "
                f"contradicts, so that the layout of the square {square[0].module.name!r} is not known; expected "
                "an adapter of layers of one kind"
            )


def _open(file: Path) -> TensorFile:
    if not file.is_file():
        if (file.parent / PICKLE).is_file():
            raise InputError(
                f"{file.parent} holds only {PICKLE}, and only safetensors files are read, because a pickle can run "
                "code; convert it with PEFT: PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise InputError(f"{file.parent} holds no {WEIGHTS}; expected a folder that PEFT's save_pretrained wrote")
    return TensorFile(file, OpenFiles())


def _with_suffix(names: Iterable[str], wanted: set[str]) -> dict[str, list[str]]:
    """The names that end with each of the wanted dotted names, other than themselves."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for suffix in _shorter(name):
            if suffix in wanted:
                found[suffix].append(name)
    return found


def _shorter(name: str) -> Iterator[str]:
    """The ends of a dotted name, of two parts at least."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, len(parts) - 1))
