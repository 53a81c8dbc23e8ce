"""Model folders: opening and reading safetensors checkpoints, and writing one, sharded as the base is."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.plan import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONVERT = (
    "only safetensors files are read, because a pickle can run code; convert it with "
    "transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".vocab", ".bpe"}
NOT_SIDE = {"README.md", "trainer_state.json", "awd_fast.json"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
        self.files, self.opened = _open_files(local)
        self.tensors: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        for file, names in self.files.items():
            for name in names:
                self.tensors[name] = _info(self.opened[file].handle, file, name)
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
        """One tensor; InputError where its bytes cannot be read."""
        file = self.file_of[name]
        try:
            tensor: Tensor = self.opened[file].handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{file}: tensor {name!r} cannot be read: {error}") from error
        return tensor


class _OpenFile:
    """A safetensors file that is open, and its text metadata."""

    def __init__(self, file: Path) -> None:
        try:
            self.handle = safe_open(str(file), framework="pt")
            self.text: dict[str, str] = dict(self.handle.metadata() or {})
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{file} is not a readable safetensors file: {error}") from error


def _open_files(local: Path) -> tuple[dict[Path, list[str]], dict[Path, _OpenFile]]:
    """Each file with the names of its tensors, and the open files."""
    if local.is_file():
        return _open_single(local)
    if (local / SINGLE).is_file():  # comes before an index, as in transformers
        return _open_single(local / SINGLE)
    index = local / INDEX
    if index.is_file():
        return _open_index(index)
    others = sorted(file for file in local.glob("*.safetensors") if file.is_file())
    if [file.name for file in others] == ["adapter_model.safetensors"]:
        raise InputError(f"{local} is a LoRA adapter, not a full model; merge it into its base model first")
    if len(others) == 1:
        return _open_single(others[0])
    if others:
        raise InputError(f"{local} holds {len(others)} safetensors files but no {INDEX}; expected {SINGLE} or an index")
    pickles = [file.name for pattern in _PICKLES for file in sorted(local.glob(pattern))]
    if pickles:
        raise InputError(f"{local} holds only {pickles[0]}; {CONVERT}")
    raise InputError(f"{local} holds no {SINGLE} and no {INDEX}")


def _open_single(file: Path) -> tuple[dict[Path, list[str]], dict[Path, _OpenFile]]:
    if file.suffix in {Path(pattern).suffix for pattern in _PICKLES}:
        raise InputError(f"{file} is a pickle; {CONVERT}")
    opened = _OpenFile(file)
    return {file: list(opened.handle.keys())}, {file: opened}


def _open_index(index: Path) -> tuple[dict[Path, list[str]], dict[Path, _OpenFile]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is not a readable index: {type(error).__name__}: {error}") from error
    files: dict[Path, list[str]] = {}
    for name, shard in pairs:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: shard {shard!r} of tensor {name!r} is not a plain .safetensors file name")
        files.setdefault(index.parent / shard, []).append(name)
    opened = {}
    for file, names in files.items():
        if not file.is_file():
            raise InputError(f"{index} names the shard {file.name}, which does not exist in {index.parent}")
        opened[file] = _OpenFile(file)
        held = set(opened[file].handle.keys())
        for name in names:
            if name not in held:
                raise InputError(f"{index} says that {file.name} holds the tensor {name!r}, but it does not")
    return files, opened


def _info(handle: Any, file: Path, name: str) -> TensorInfo:
    stored = handle.get_slice(name)
    dtype = _DTYPES.get(stored.get_dtype())
    if dtype is None:
        raise InputError(f"{file}: tensor {name!r} has the dtype {stored.get_dtype()}, which is not supported")
    return TensorInfo(tuple(stored.get_shape()), dtype)


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
        raise InputError(
            f"there is no file or folder {path}, and the Hub gave: {type(error).__name__}: {error}"
        ) from error


def local_path(path: str | Path) -> Path:
    """A path with its ~ replaced. Raises InputError where it names nobody's home, or is no path at all."""
    try:
        expanded = Path(path).expanduser()
        expanded.exists()
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a usable path: {error}") from error
    return expanded


def output_files(base: Checkpoint) -> dict[str, list[str]]:
    """The output's file names with their tensors: the base's own shards, or one file."""
    if base.sharded:
        return {file.name: names for file, names in base.files.items()}
    return {SINGLE: list(base.tensors)}


def write_file(folder: Path, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file. Raises OSError naming the file when the disk does not take it."""
    file = folder / name
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(file), metadata=dict(metadata))
        file.chmod(
            folder.stat().st_mode & 0o666
        )  # as any new file here; safetensors makes it readable by its owner only
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} could not be written: {error}") from error


def write_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """Writes the index of a sharded checkpoint."""
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_config(base: Checkpoint) -> dict[str, Any] | None:
    """The base's config.json, or None where it has none. Raises InputError where it is not readable."""
    if base.folder is None or not (base.folder / "config.json").is_file():
        return None
    file = base.folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not readable: {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds {type(config).__name__}; expected a mapping")
    return config


def is_side_file(name: str) -> bool:
    """True for the names of config, tokenizer, generation and licence files, which go with a model."""
    if name in NOT_SIDE or name.endswith(".index.json"):
        return False
    return Path(name).suffix in SIDE_SUFFIXES or name.upper().startswith(("LICENSE", "NOTICE"))


def copy_side_files(base: Checkpoint, folder: Path, config: dict[str, Any] | None) -> None:
    """Copies config, tokenizer and generation files from the base; a `config` takes the place of its config.json."""
    for file in sorted(base.folder.iterdir()) if base.folder is not None else []:
        if file.is_file() and is_side_file(file.name):
            shutil.copyfile(file, folder / file.name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def with_dtype(config: Any, dtype: str) -> Any:
    """The configuration with every stated dtype replaced, in nested parts too."""
    if isinstance(config, dict):
        stated = {key for key in ("torch_dtype", "dtype") if isinstance(config.get(key), str)}
        return {key: dtype if key in stated else with_dtype(value, dtype) for key, value in config.items()}
    return config
