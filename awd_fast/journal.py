"""What a merge has finished, kept beside its output, so that it can go on after anything that ends a process.

A file holds one line per record, each with its own checksum, so that a line that was cut off by a crash is known. Every
process of a merge writes a file of its own. A record is written after the bytes that it vouches for, and holds their
checksum: what a power cut took from them is noticed, whatever order a disk has written in.
"""

import base64
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awd_fast.errors import InputError

FORMAT = 1
HEADER = "begun.json"


@dataclass(frozen=True)
class Record:
    """Elements `begin` to `end` of an output tensor that were written, and their CRC-32.

    figures: float64 [2 K^2 + 5] of a `awd_fast.report.Similarity` of `groups` groups, or [5] of an `Interference`, or
    None. on_cpu: see `awd_fast.report.TensorReport`.
    """

    tensor: str
    begin: int
    end: int
    checksum: int
    figures: Tensor | None = None
    groups: int = 0
    on_cpu: bool = False

    def line(self) -> bytes:
        """The record as a line of a journal."""
        plain: dict[str, Any] = {"tensor": self.tensor, "begin": self.begin, "end": self.end, "crc": self.checksum}
        if self.figures is not None:
            plain["figures"] = base64.b64encode(self.figures.contiguous().numpy().tobytes()).decode()
            plain["groups"] = self.groups
        if self.on_cpu:
            plain["on_cpu"] = True
        text = json.dumps(plain, separators=(",", ":")).encode()
        return b"%08x %s\n" % (zlib.crc32(text), text)

    @classmethod
    def of_line(cls, line: bytes) -> "Record | None":
        """The record of a line, or None where the line is not whole."""
        checksum, _, text = line.partition(b" ")
        try:
            if int(checksum, 16) != zlib.crc32(text):
                return None
            plain = json.loads(text)
        except ValueError:
            return None
        figures = None
        if "figures" in plain:
            figures = torch.frombuffer(bytearray(base64.b64decode(plain["figures"])), dtype=torch.float64)
        kept = (plain["tensor"], plain["begin"], plain["end"], plain["crc"])
        return cls(*kept, figures, plain.get("groups", 0), plain.get("on_cpu", False))


class Journal:
    """The journal of one process of a merge, in a folder that the others share. Raises OSError naming the file."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.file = folder / f"done-{rank}.jsonl"
        self._descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if os.fstat(self._descriptor).st_size > 0:
            self._append(b"\n")  # ends the line at which the last process may have been stopped

    def add(self, record: Record) -> None:
        """Notes what was finished."""
        self._append(record.line())

    def _append(self, line: bytes) -> None:
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):  # the disk is full: the rest of the line would meet the next one
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
                raise OSError(28, os.strerror(28))
        except OSError as error:
            raise OSError(error.errno, f"{self.file} could not be written: {error.strerror}") from error

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def records(folder: Path) -> list[Record]:
    """What all processes of a merge have noted; a line that is not whole counts for nothing."""
    found = []
    for file in sorted(folder.glob("done-*.jsonl")):
        found += [Record.of_line(line) for line in file.read_bytes().split(b"\n") if line]
    return [record for record in found if record is not None]


def write_header(folder: Path, identity: dict[str, Any]) -> None:
    """Notes what is merged and how, when a merge begins."""
    file = folder / HEADER
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps({"format": FORMAT} | identity, indent=1), encoding="utf-8")
    os.replace(temporary, file)


def check_header(folder: Path, identity: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
    """Raises InputError where the merge that was begun in a folder is another one, naming what differs.

    ignored: the last parts of the names of what may differ.
    """
    try:
        begun = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} is not an unfinished merge that could go on ({error}); begin anew (--overwrite)"
        ) from error
    now = json.loads(json.dumps({"format": FORMAT} | identity))
    different = sorted(name for name in _differences(begun, now) if name.rpartition(".")[2] not in ignored)
    if different:
        raise InputError(
            f"the unfinished merge in {folder} is another one: {', '.join(different[:3])} changed; "
            "give what it was begun with, or begin anew (--overwrite)"
        )


def _differences(one: Any, other: Any, path: str = "") -> Iterable[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, both in enumerate(zip(one, other, strict=True)):
            yield from _differences(*both, f"{path}[{index}]")
    elif one != other:
        yield path
