"""What goes with a model's tensors: config, tokenizer and generation files, and the index of its shards."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awd_fast.checkpoints import INDEX, SIDE_SUFFIXES, SINGLE, Checkpoint
from awd_fast.documents import parse_json
from awd_fast.errors import InputError

NOT_SIDE = {"README.md", "trainer_state.json", "awd_fast.json"}


def output_files(base: Checkpoint) -> dict[str, list[str]]:
    """The output's file names with their tensors: the base's own shards, or one file."""
    if base.sharded:
        return {file.name: names for file, names in base.files.items()}
    return {SINGLE: list(base.tensors)}


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
        config = parse_json(file.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable: {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds {type(config).__name__}; expected a mapping")
    return config


def require_unquantised(source: Checkpoint) -> None:
    """Raises InputError for a model whose config says that its tensors are codes rather than numbers."""
    try:
        config = read_config(source) or {}
    except InputError:
        return  # of a model it is not used, and that of the base is read again
    quantised = config.get("quantization_config")
    if quantised:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise InputError(
            f"{source.path} is quantised{f' ({how})' if how else ''}: its tensors are codes, whose sums mean nothing; "
            "merge the models that it was made from, or save it dequantised"
        )


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
