"""Model folders as sources of a merge: finding, opening and reading safetensors checkpoints."""

import functools
import hashlib
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awd_fast.disk import OpenFiles
from awd_fast.documents import parse_json
from awd_fast.errors import InputError
from awd_fast.plan import TensorInfo
from awd_fast.tensor_files import TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONVERT = (
    "only safetensors files are read, because a pickle can run code; convert it with "
    "transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)
GGUF = (
    "GGUF holds a model that was converted, and mostly quantised, for llama.cpp; merge the safetensors checkpoints "
    "that it was made from, and convert the result"
)
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".vocab", ".bpe"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_COMPARED = 1 << 22
"""Elements of a tensor that are compared at a time."""
_STARTS = 1 << 10
"""Elements by which two tensors are told apart before they are read whole."""


class Checkpoint:
    """A model on disk as a source of a merge: a Hugging Face folder or one .safetensors file.

    path: as the user gave it. folder: where config and tokenizer lie, or None for a lone file. files: each file with
    the names of its tensors. Only headers are read on opening; InputError names the file that cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        local = resolve(self.path)
        named = local.is_file() and local.name == SINGLE and (local.parent / "config.json").exists()
        self.folder = local if local.is_dir() else (local.parent if named else None)
        self._open = OpenFiles()
        self.files, self.opened = _open_files(local, self._open)
        self.tensors: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        self._stored_as: dict[str, str] = {}
        for file, names in self.files.items():
            for name in names:
                self.tensors[name] = self.opened[file].tensors[name]
                self.file_of[name] = file
        if not self.tensors:
            raise InputError(f"{local} holds no tensors")

    @property
    def sharded(self) -> bool:
        return len(self.files) > 1

    def where(self, name: str) -> str:
        """The file of a tensor, or the whole checkpoint where it has none."""
        return str(self.file_of.get(name, self.path))

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    def read(self, name: str) -> Tensor:
        """One tensor. Raises OSError naming file and tensor where its bytes cannot be read."""
        info = self.tensors[name]
        room = torch.empty(info.shape, dtype=info.dtype)
        self.elements(name, 0, info.count, room.view(-1))
        return room

    def elements(self, name: str, begin: int, end: int, room: Tensor | None) -> Tensor:
        assert room is not None
        self.opened[self.file_of[name]].read(self._stored_as.get(name, name), begin, room)
        return room

    def in_memory(self, name: str) -> bool:
        return False

    def text_of(self, name: str) -> dict[str, str]:
        """The metadata of the file that holds a tensor."""
        return self.opened[self.file_of[name]].text

    def identity(self) -> dict[str, Any]:
        """What tells these files from others, by name: see `TensorFile.identity`."""
        return {file.name: opened.identity() for file, opened in self.opened.items()}

    def require_unchanged(self) -> None:
        """Raises InputError where a file is no longer the one that was opened."""
        for opened in self.opened.values():
            opened.require_unchanged()

    def tie(self, base: "Checkpoint") -> None:
        """Matches the names of tied weights, which a model may store once or under each of its names, to the base's.

        A name that only the base has stands for the tensor that, in the base, is the same to the bit; a name that only
        this model has, for one that is the same here, is passed over.
        """
        shared = [name for name in self.tensors if name in base.tensors]
        missing = [name for name in base.tensors if name not in self.tensors]
        extra = [name for name in self.tensors if name not in base.tensors]
        alike = [name for name in shared if self.tensors[name] == base.tensors[name]]
        for name in self._twins(extra, shared):
            del self.tensors[name]
        for name, twin in base._twins(missing, alike).items():
            self.tensors[name], self.file_of[name] = self.tensors[twin], self.file_of[twin]
            self._stored_as[name] = twin

    def _twins(self, names: list[str], among: list[str]) -> dict[str, str]:
        """For each of the matrices named, the one other that equals it in shape, dtype and every bit, if there is one.

        A constant has none: two of zeros prove nothing. Each tensor is read once at most, however many are alike.
        """
        names = [name for name in names if len(self.tensors[name].shape) >= 2 and 0 not in self.tensors[name].shape]
        wanted = {self.tensors[name] for name in names}
        places: dict[object, list[str]] = defaultdict(list)
        for other in among:
            if self.tensors[other] in wanted:
                places[self._start(other)].append(other)
        digest = functools.cache(self._digest)
        found = {}
        for name in names:
            near = places.get(self._start(name), [])
            same = [other for other in near if digest(other) is not None and digest(other) == digest(name)]
            if len(same) == 1:
                found[name] = same[0]
        return found

    def _start(self, name: str) -> tuple[TensorInfo, bytes]:
        """A tensor's shape, dtype and first bytes."""
        info = self.tensors[name]
        count = min(info.count, _STARTS)
        first = self.elements(name, 0, count, torch.empty(count, dtype=info.dtype))
        return info, first.view(torch.uint8).numpy().tobytes()

    def _digest(self, name: str) -> bytes | None:
        """A hash of a tensor's bytes, or None where all elements are the same."""
        info, constant, digest = self.tensors[name], True, hashlib.blake2b()
        first = self.elements(name, 0, 1, torch.empty(1, dtype=info.dtype)).view(torch.uint8)
        for begin in range(0, info.count, _COMPARED):
            size = min(begin + _COMPARED, info.count) - begin
            part = self.elements(name, begin, begin + size, torch.empty(size, dtype=info.dtype)).view(torch.uint8)
            digest.update(part.numpy().data)
            constant = constant and bool((part.view(size, -1) == first).all())
        return None if constant else digest.digest()


Opened = tuple[dict[Path, list[str]], dict[Path, TensorFile]]
"""Each file with the names of its tensors, and the open files."""


def _open_files(local: Path, files: OpenFiles) -> Opened:
    if local.is_file():
        return _open_single(local, files)
    if (local / SINGLE).is_file():  # comes before an index, as in transformers
        return _open_single(local / SINGLE, files)
    index = local / INDEX
    if index.is_file():
        return _open_index(index, files)
    others = sorted(file for file in local.glob("*.safetensors") if file.is_file())
    if [file.name for file in others] == ["adapter_model.safetensors"]:
        raise InputError(f"{local} is a LoRA adapter, not a full model; merge it into its base model first")
    if len(others) == 1:
        return _open_single(others[0], files)
    if others:
        raise InputError(f"{local} holds {len(others)} safetensors files but no {INDEX}; expected {SINGLE} or an index")
    for patterns, advice in ((("*.gguf",), GGUF), (_PICKLES, CONVERT)):
        found = [file.name for pattern in patterns for file in sorted(local.glob(pattern))]
        if found:
            raise InputError(f"{local} holds only {found[0]}; {advice}")
    raise InputError(f"{local} holds no {SINGLE} and no {INDEX}")


def _open_single(file: Path, files: OpenFiles) -> Opened:
    if file.suffix in {Path(pattern).suffix for pattern in _PICKLES}:
        raise InputError(f"{file} is a pickle; {CONVERT}")
    if file.suffix == ".gguf":
        raise InputError(f"{file} is not a safetensors file; {GGUF}")
    opened = TensorFile(file, files)
    return {file: list(opened.tensors)}, {file: opened}


def _open_index(index: Path, opener: OpenFiles) -> Opened:
    try:
        document = parse_json(index.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{index} is not a readable index: {error}") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} is not a readable index: expected weight_map, a mapping of tensors to files")
    files: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: shard {shard!r} of tensor {name!r} is not a plain .safetensors file name")
        files.setdefault(index.parent / shard, []).append(name)
    opened = {}
    for file, names in files.items():
        if not _is_file(file):
            raise InputError(f"{index} names the shard {file.name}, which does not exist in {index.parent}")
        opened[file] = TensorFile(file, opener)
        for name in names:
            if name not in opened[file].tensors:
                raise InputError(f"{index} says that {file.name} holds the tensor {name!r}, but it does not")
    for file, names in files.items():
        place = {name: index for index, name in enumerate(opened[file].tensors)}
        names.sort(key=place.__getitem__)
    return files, opened


def _is_file(file: Path) -> bool:
    """Whether there is such a file; there is none whose name no file can have."""
    try:
        return file.is_file()
    except (OSError, ValueError):
        return False


def resolve(path: str) -> Path:
    """The local folder or file of a checkpoint, downloaded where it is the name of one on the Hugging Face Hub.

    A name is "owner/model" or "owner/model@revision". Raises InputError where there is nothing.
    """
    local = local_path(path)
    if local.exists():
        if not local.is_dir() and not local.is_file():
            raise InputError(f"{path} is neither a file nor a folder")
        return local
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", path)
    if named is None or path.startswith("."):
        raise InputError(f"there is no file or folder {path}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"there is no file or folder {path}, and reading it from the Hub needs huggingface_hub: "
            "pip install 'awd-fast[hub]'"
        ) from None
    wanted = ["*.safetensors", INDEX, *(f"*{suffix}" for suffix in sorted(SIDE_SUFFIXES))]
    try:
        return Path(snapshot_download(named[1], revision=named[2], allow_patterns=wanted))
    except Exception as error:  # the Hub client raises many kinds; each means that the name cannot be had
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"there is no file or folder {path}, and the Hub gave: {reason}") from error


def local_path(path: str | Path) -> Path:
    """A path with its ~ replaced. Raises InputError where it names nobody's home, or is no path at all."""
    try:
        expanded = Path(path).expanduser()
        expanded.exists()
    except (RuntimeError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} is not a usable path: {reason}") from error
    return expanded
