"""The output's safetensors files: made at their full size first, then written at any place, in any order."""

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from awd_fast.disk import OpenFiles, read_into, reserve, write_from
from awd_fast.plan import Step, TensorInfo
from awd_fast.tensor_files import Layout, lay_out


class Shards:
    """The files of a checkpoint in a folder, by name with their tensors.

    Room for everything is reserved on the disk before anything is computed. Raises OSError naming the file.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Sequence[Step]], texts: Mapping[str, Mapping[str, str]]
    ) -> None:
        self.folder = folder
        self._layouts: dict[str, Layout] = {}
        self._file_of: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file, steps in files.items():
            infos = {step.name: TensorInfo(step.info.shape, step.dtype) for step in steps}
            self._layouts[file] = lay_out(infos, texts[file])
            self._file_of |= dict.fromkeys(infos, file)
            self._dtypes |= {name: info.dtype for name, info in infos.items()}
        self._open = OpenFiles(os.O_RDWR)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(layout.size for layout in self._layouts.values())

    def make(self) -> None:
        """Makes the files, with their headers and room for the tensors."""
        for name, layout in self._layouts.items():
            file = self.folder / name
            with open(file, "xb") as made:
                reserve(made.fileno(), layout.size, file)
                write_from(made.fileno(), memoryview(layout.head), 0, file)

    def write(self, name: str, begin: int, tensor: Tensor) -> int:
        """Writes elements of a tensor from `begin` on; their CRC-32."""
        data = _bytes(tensor)
        file, offset = self._place(name, begin)
        with self._open.use(file) as descriptor:
            write_from(descriptor, data, offset, file)
        return zlib.crc32(data)

    def checksum(self, name: str, begin: int, end: int) -> int:
        """The CRC-32 of elements of a tensor as they are in the file."""
        found = torch.empty(end - begin, dtype=self._dtypes[name])
        file, offset = self._place(name, begin)
        with self._open.use(file) as descriptor:
            read_into(descriptor, _bytes(found), offset, file)
        return zlib.crc32(_bytes(found))

    def intact(self) -> bool:
        """Whether all files are there with their sizes and headers."""
        for name, layout in self._layouts.items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != layout.size:
                return False
            with open(file, "rb") as made:
                if made.read(len(layout.head)) != layout.head:
                    return False
        return True

    def sync(self, only: str | None = None) -> None:
        """Waits until what was written, to one file or to all, is on the disk."""
        for name in self._layouts if only is None else [only]:
            with self._open.use(self.folder / name) as descriptor:
                try:
                    os.fsync(descriptor)
                except OSError as error:
                    raise OSError(
                        error.errno, f"{self.folder / name} could not be written: {error.strerror}"
                    ) from error

    def file_of(self, name: str) -> str:
        """The file of a tensor."""
        return self._file_of[name]

    def close(self) -> None:
        """Closes the files."""
        self._open.close()

    def _place(self, name: str, begin: int) -> tuple[Path, int]:
        file = self._file_of[name]
        return self.folder / file, self._layouts[file].offsets[name] + begin * self._dtypes[name].itemsize


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory, which must be in one piece on the CPU."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
