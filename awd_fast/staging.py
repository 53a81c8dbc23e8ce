"""The folder beside an output in which a merge is made, and how it becomes the output: whole, or not at all.

It holds the model to be, in `model`, and the journal. It has a name that follows from the output's, so that `resume`
finds it, and a lock, so that two merges never share it. It is kept where a merge with finished blocks was stopped, by a
signal, a full disk or a crash; an error of the input, which would come again, removes it.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from awd_fast import journal
from awd_fast.disk import sync_folder
from awd_fast.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
MODEL = "model"
REPLACED = "replaced"


def folder_for(out: Path) -> Path:
    """Where a merge into `out` is made."""
    return out.absolute().parent / f".{out.absolute().name}.awd-fast"


def unfinished(out: Path) -> Path | None:
    """The folder of a merge into `out` that could go on, or None."""
    folder = folder_for(out)
    return folder if (folder / journal.HEADER).is_file() else None


def complete(out: Path) -> bool:
    """Whether the model of the merge into `out` that is there has taken its place, and only the cleaning up is left."""
    folder = unfinished(out)
    return folder is not None and not (folder / MODEL).exists() and out.exists()


class Staging:
    """An output in the making. resumed: whether it is an unfinished one that goes on. ready: whether it is complete."""

    def __init__(self, out: Path, folder: Path, resumed: bool) -> None:
        self.out, self.folder, self.resumed, self.ready = out, folder, resumed, False
        self.model = folder / MODEL

    def begin(self, identity: dict[str, Any]) -> None:
        """Says that what lies in the folder can go on: see `awd_fast.journal.write_header`."""
        sync_folder(self.model)
        journal.write_header(self.folder, identity)

    @property
    def published(self) -> bool:
        """Whether the model has taken its place, and only the cleaning up was not done."""
        return self.resumed and complete(self.out)

    def publish(self) -> None:
        """Makes the model the output; an old one is set aside first, put back if that fails, and removed at the end."""
        with _uninterrupted():
            sync_folder(self.model)
            if not os.path.lexists(self.out):
                self.model.rename(self.out)
            else:
                aside = self.folder / REPLACED
                shutil.rmtree(aside, ignore_errors=True)
                self.out.rename(aside)
                try:
                    self.model.rename(self.out)
                except BaseException:
                    aside.rename(self.out)
                    raise
            sync_folder(self.out.absolute().parent)


@contextmanager
def staged(out: Path, resume: bool, overwrite: bool) -> Iterator[Staging]:
    """The staging of a merge into `out`, locked; an unfinished one of another process if `resume`.

    Raises InputError where another merge into `out` is under way, and where an unfinished one is there but neither
    `resume` nor `overwrite` says what should become of it.
    """
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    folder = folder_for(out)
    header = folder / journal.HEADER
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, out):
            if header.is_file() and not resume and not overwrite:
                raise InputError(
                    f"an unfinished merge into {out} lies in {folder}; "
                    "go on with it (--resume), or begin anew (--overwrite)"
                )
            staging = Staging(out, folder, header.is_file() and resume)
            try:
                if not staging.resumed:
                    _clear(folder, out)
                    staging.model.mkdir()
                yield staging
            except BaseException as error:
                lost = isinstance(error, InputError) and not staging.resumed and not staging.ready
                # Whatever came after the rename came too late to matter.
                if lost or complete(out) or not journal.records(folder):
                    header.unlink(missing_ok=True)
                raise
            header.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for made in missing:
                made.rmdir()  # which fails where anything is in it


def _clear(folder: Path, out: Path) -> None:
    """Removes all but the lock; first what makes it an unfinished merge, in case this is not finished either.

    An old output that a process which was killed between two renames has set aside is put back.
    """
    if (folder / REPLACED).exists() and not os.path.lexists(out):
        (folder / REPLACED).rename(out)
    (folder / journal.HEADER).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """The folder, made if it is not there, and locked; in the end removed, unless it holds an unfinished merge."""
    descriptor = _lock(folder, out)
    try:
        yield
    finally:
        if not (folder / journal.HEADER).is_file():
            with suppress(OSError):
                _clear(folder, out)  # the lock last: who begins anew meanwhile would lose files of the same names
                (folder / LOCK).unlink()
                folder.rmdir()
        os.close(descriptor)


def _lock(folder: Path, out: Path) -> int:
    """The descriptor of a lock that ends with this process, however it ends."""
    lock = folder / LOCK
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the one who held it has just removed the folder
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"another merge into {out} is under way, in {folder}; wait for it or end it") from None
        except OSError:
            return descriptor  # a file system without locks
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            return descriptor
        os.close(descriptor)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds back SIGINT, SIGTERM and SIGHUP: between two renames the old model would be nowhere."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
