"""Reading and writing files at given places, from several threads, without mapping them into memory.

A mapped page counts as resident and turns a disk error into a signal that ends the process; a read returns an error.
"""

import ctypes
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OPEN = 8
"""Files of one source, or of the output, kept open at a time: all shards of many models would exceed what a process may
have, which is often 1024 and on some systems 256. Tensors come in order, so that few shards are in use."""


class OpenFiles:
    """Descriptors of files that are used again and again; those used longest ago are closed beyond `OPEN`.

    flags: of `os.open`.
    """

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags | getattr(os, "O_BINARY", 0)
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, tuple[int, list[object]]] = OrderedDict()  # with its present users

    @contextmanager
    def use(self, file: Path) -> Iterator[int]:
        """A descriptor, which stays open meanwhile. Raises OSError."""
        user = object()
        with self._lock:
            if file not in self._open:
                self._open[file] = (os.open(file, self._flags), [])
            descriptor, users = self._open[file]
            users.append(user)
            self._open.move_to_end(file)
            unused = [old for old, (_, busy) in self._open.items() if not busy]
            self._close(unused[: max(len(self._open) - OPEN, 0)])
        try:
            yield descriptor
        finally:
            with self._lock:
                users.remove(user)

    def _close(self, files: list[Path]) -> None:
        for file in files:
            os.close(self._open.pop(file)[0])

    def close(self) -> None:
        """Closes all that nobody uses."""
        with self._lock:
            self._close([file for file, (_, busy) in self._open.items() if not busy])

    def __del__(self) -> None:
        self.close()


def read_into(descriptor: int, target: memoryview, offset: int, what: object) -> None:
    """Fills `target` (bytes) from a place in a file. Raises OSError naming `what` where that fails or the file ends."""
    done = 0
    while done < len(target):
        try:
            count = _read(descriptor, target[done:], offset + done)
        except OSError as error:
            raise OSError(error.errno, f"{what} could not be read: {error.strerror}") from error
        if count == 0:
            raise OSError(f"{what} ends {len(target) - done} bytes early: it was cut short after it was opened")
        done += count


def write_from(descriptor: int, source: memoryview, offset: int, what: object) -> None:
    """Writes all of `source` (bytes) to a place in a file. Raises OSError naming `what`."""
    done = 0
    while done < len(source):
        try:
            done += _write(descriptor, source[done:], offset + done)
        except OSError as error:
            raise OSError(error.errno, f"{what} could not be written: {error.strerror}") from error


if hasattr(os, "preadv"):

    def _read(descriptor: int, target: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [target], offset)

    def _write(descriptor: int, source: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, source, offset)

else:  # Windows: a descriptor has one position, for all threads
    _POSITION = threading.Lock()

    def _read(descriptor: int, target: memoryview, offset: int) -> int:
        with _POSITION:
            os.lseek(descriptor, offset, os.SEEK_SET)
            found = os.read(descriptor, len(target))
        target[: len(found)] = found
        return len(found)

    def _write(descriptor: int, source: memoryview, offset: int) -> int:
        with _POSITION:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, source)


def reserve(descriptor: int, size: int, what: object) -> None:
    """Gives a file its size and, where the file system can, the room on the disk. Raises OSError naming `what`."""
    try:
        if hasattr(os, "posix_fallocate") and size > 0:
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # which a file system may give
                    raise
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise OSError(error.errno, f"{what} could not be written: {error.strerror}") from error


def keep_freed_memory() -> None:
    """Has glibc keep memory that is freed: by default, tensors of megabytes are new pages every time.

    For processes of one's own only: it changes how all of it allocates. Elsewhere, and on other systems, nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    if not mallopt(mmap_threshold, 1 << 30):
        mallopt(mmap_threshold, 1 << 25)  # all that glibc before 2.35 takes; left alone, it would stay at 128 KiB
    mallopt(trim_threshold, 1 << 30)


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in a folder reach the disk, where the system lets one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which says that this file system has nothing to do for it
            raise
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    """Waits until a file is on the disk. Raises OSError naming it."""
    try:
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, f"{file} could not be written: {error.strerror}") from error
