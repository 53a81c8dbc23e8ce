"""Safetensors files, read and written at any place: headers, where a tensor's bytes lie, and nothing in memory.

The `safetensors` library decides whether a file is valid; what is added here is where in it the numbers are.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from awd_fast.disk import OpenFiles, read_into
from awd_fast.documents import parse_json
from awd_fast.errors import InputError
from awd_fast.plan import TensorInfo

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""In the order in which `safetensors` lays tensors out, the widest first, so that all are aligned."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREFIX = 8
"""Bytes before the header, which hold its length."""
LONGEST_NAME = 500
"""Characters of a tensor's name. The longest of models that are in use have some 150."""
_NAME_HINT = f"; expected at most {LONGEST_NAME}"
MOST_DIMENSIONS = 64
"""Of a tensor, as PyTorch's operators take them."""


class TensorFile:
    """A safetensors file of which the header has been read.

    tensors: shape and dtype of each, in the order in which their bytes lie. text: the file's metadata. Raises
    InputError naming the file where it is not valid, or holds a dtype that is not supported.
    """

    def __init__(self, path: Path, files: OpenFiles) -> None:
        self.path, self._files = path, files
        try:
            with safe_open(str(path), framework="pt") as handle:
                self.text: dict[str, str] = dict(handle.metadata() or {})
                names = set(handle.keys())
            self._stat = os.stat(path)
            with files.use(path) as descriptor:
                header = self._header(descriptor)
            entries = parse_json(header)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable safetensors file: {error}") from error
        self._digest = hashlib.sha256(header).hexdigest()
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        found = [self._entry(name, entries.get(name)) for name in names]
        for name, (begin, end), info in sorted(found, key=lambda entry: (entry[1], entry[0])):
            if end - begin != info.size or _PREFIX + len(header) + end > self._stat.st_size:
                raise InputError(f"{path}: tensor {name!r} is {info}, but has {end - begin} bytes in the file")
            self.tensors[name] = info
            self._offsets[name] = _PREFIX + len(header) + begin

    def _header(self, descriptor: int) -> bytes:
        prefix = bytearray(_PREFIX)
        read_into(descriptor, memoryview(prefix), 0, self.path)
        length = int.from_bytes(prefix, "little")
        if length > self._stat.st_size - _PREFIX:  # before there is room for it: the file may have been changed
            raise ValueError(f"its header has {length} bytes, the file {self._stat.st_size}")
        header = bytearray(length)
        read_into(descriptor, memoryview(header), _PREFIX, self.path)
        return bytes(header)

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, int], TensorInfo]:
        """The checked entry of a tensor; what `safetensors` itself checks is not checked again."""
        if len(name) > LONGEST_NAME:
            raise InputError(
                f"{self.path}: the tensor {name[:50]!r}... has a name of {len(name)} characters{_NAME_HINT}"
            )
        try:
            stored, (begin, end), shape = entry["dtype"], entry["data_offsets"], tuple(entry["shape"])
            dtype = DTYPES.get(stored)
        except (KeyError, TypeError, ValueError):  # serde, in `safetensors`, takes a list for named fields
            raise InputError(
                f"{self.path}: tensor {name!r} is not written as fields; expected dtype, shape and data_offsets"
            ) from None
        if dtype is None:
            raise InputError(f"{self.path}: tensor {name!r} has the dtype {stored}, which is not supported")
        if len(shape) > MOST_DIMENSIONS:
            raise InputError(
                f"{self.path}: tensor {name!r} has {len(shape)} dimensions; expected at most {MOST_DIMENSIONS}"
            )
        if (
            math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 1 << 63
        ):  # an empty one: no file is so large
            raise InputError(
                f"{self.path}: tensor {name!r} has a dimension that is too large: its shape is {list(shape)}"
            )
        return name, (begin, end), TensorInfo(shape, dtype)

    def read(self, name: str, begin: int, target: Tensor) -> None:
        """Fills `target`, contiguous and of the stored dtype, with the elements from `begin` on. Raises OSError."""
        view = target.reshape(-1).view(torch.uint8).numpy().data
        offset = self._offsets[name] + begin * target.itemsize
        with self._files.use(self.path) as descriptor:
            read_into(descriptor, view, offset, f"{self.path}: tensor {name!r}")

    def identity(self) -> dict[str, Any]:
        """What tells this file from another of its name: size, time of the last change, hash of the header."""
        return {"size": self._stat.st_size, "changed": self._stat.st_mtime_ns, "header": self._digest}

    def require_unchanged(self) -> None:
        """Raises InputError where the file is not the one that was opened."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise InputError(f"{self.path} can no longer be read: {error.strerror}") from error
        kept = (self._stat.st_size, self._stat.st_mtime_ns, self._stat.st_ino)
        if (now.st_size, now.st_mtime_ns, now.st_ino) != kept:
            raise InputError(f"{self.path} was changed while it was read; merge again when nothing writes to it")


@dataclass(frozen=True)
class Layout:
    """A safetensors file to be written: its first bytes, where each tensor's bytes begin, and its size."""

    head: bytes
    offsets: Mapping[str, int]
    size: int


def lay_out(tensors: Mapping[str, TensorInfo], text: Mapping[str, str]) -> Layout:
    """The layout that `safetensors.torch.save_file` gives, by dtype and name; the metadata sorted by key."""
    order = list(_NAMES)
    ordered = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(text.items()))} if text else {}
    offsets, end = {}, 0
    for name, info in ordered:
        offsets[name] = end
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.size],
        }
        end += info.size
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % _PREFIX)
    head = len(written).to_bytes(_PREFIX, "little") + written
    return Layout(head, {name: len(head) + at for name, at in offsets.items()}, len(head) + end)
