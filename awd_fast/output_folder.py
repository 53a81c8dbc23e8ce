"""The folder that a merge writes: whether it may be made, and whether it fits."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from awd_fast import checkpoints, sidefiles, staging
from awd_fast.adapter_models import Model
from awd_fast.errors import InputError

REPORT = "awd_fast.json"


def check_output(out: Path, overwrite: bool, sources: Sequence[Model], resume: bool = False) -> None:
    """Raises InputError where `out` cannot be made, or exists and may not, or must not, be replaced.

    Only a folder that holds nothing but what a merge writes is replaced, and never one that holds an input.
    """
    parent = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError(f"the output folder {out} cannot be made: {parent} is not a folder")
    if not os.path.lexists(out) or (resume and staging.complete(out)):
        return
    if not overwrite:
        raise InputError(f"the output folder {out} exists; choose another, or give overwrite=True (--overwrite)")
    if not out.is_dir() or out.is_symlink():
        raise InputError(f"{out} is not a folder, so it is not overwritten")
    places = (out.absolute(), out.resolve())
    for source in sources:
        for file in source.files:
            if any(place in (*file.absolute().parents, *file.resolve().parents) for place in places):
                raise InputError(f"the output folder {out} holds the input {file}; choose another")
    for file in out.iterdir():
        if not file.is_file() or not (file.suffix == ".safetensors" or _is_written(file.name)):
            raise InputError(f"{out} holds {file.name}, which no merge writes, so it is not overwritten")
    if any(out.iterdir()) and not any(out.glob("*.safetensors")):
        raise InputError(f"{out} is not a model folder (it holds no safetensors), so it is not overwritten")


def _is_written(name: str) -> bool:
    return name in ("README.md", REPORT, checkpoints.INDEX) or sidefiles.is_side_file(name)


def check_space(out: Path, needed: int) -> None:
    """Raises OSError before any work where the output cannot fit on its disk."""
    parent = next(folder for folder in (out.absolute().parent, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"{parent} has {free / 1e6:.1f} MB free; the output needs {needed / 1e6:.1f} MB")
