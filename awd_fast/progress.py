"""How far a merge is: bytes read, bytes per second, time left and the tensor at hand, for people and for machines."""

import json
import sys
import time
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from awd_fast.errors import InputError

INTERVAL = 0.5
"""Seconds between two lines of a log."""


class Progress:
    """Nothing is shown: what counts bytes need not ask whether anybody looks.

    As a context it ends with "done", or with "failed" where an exception leaves it.
    """

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        return None

    def begin(self, what: str, total: int) -> None:
        """Work begins for which `total` bytes will be read."""

    def read(self, count: int, tensor: str) -> None:
        """So many more bytes were read and used for a tensor."""

    def wrote(self, count: int) -> None:
        """So many more bytes were written."""


class Shown(Progress):
    """A bar on standard error that appears after a second, and a log of one JSON object per line, as asked for.

    log: a file, or "-" for standard output; InputError where it cannot be written. Its lines have the fields event
    ("begin", "progress", "done" or "failed"), what, seconds (since this was made), bytes_read, bytes_total,
    bytes_written, bytes_per_second, seconds_left (null while unknown), tensor; "failed" has error too.
    """

    def __init__(self, bar: bool, log: str | Path | None = None) -> None:
        self._log, self._closes = _opened(log)
        self._bar: tqdm[Any] = tqdm(
            disable=not bar, total=0, unit="B", unit_scale=True, delay=1.0, file=sys.stderr, dynamic_ncols=True
        )
        self._started = self._begun = self._noted = time.monotonic()
        self._what, self._total, self._read, self._written, self._tensor = "", 0, 0, 0, ""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._bar.close()
        if self._log is None:
            return
        if error is None:
            self._note("done")
        else:
            self._note("failed", error=str(error) or type(error).__name__)
        if self._closes:
            self._log.close()

    def begin(self, what: str, total: int) -> None:
        self._begun = time.monotonic()
        self._what, self._total = what, total
        self._bar.reset(total)
        self._bar.set_description_str(what, refresh=False)
        self._note("begin")

    def read(self, count: int, tensor: str) -> None:
        self._read, self._tensor = self._read + count, tensor
        self._bar.set_postfix_str(tensor[-40:], refresh=False)
        self._bar.update(count)
        if self._log is not None and time.monotonic() - self._noted > INTERVAL:
            self._note("progress")

    def wrote(self, count: int) -> None:
        self._written += count

    def _note(self, event: str, **more: str) -> None:
        if self._log is None:
            return
        self._noted = time.monotonic()
        seconds = self._noted - self._begun
        speed = self._read / seconds if seconds > 0 else 0.0
        left = (self._total - self._read) / speed if speed > 0 else None
        line = {
            "event": event,
            "what": self._what,
            "seconds": round(self._noted - self._started, 4),
            "bytes_read": self._read,
            "bytes_total": self._total,
            "bytes_written": self._written,
            "bytes_per_second": round(speed),
            "seconds_left": None if left is None else round(max(left, 0.0), 1),
            "tensor": self._tensor,
            **more,
        }
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        except (OSError, ValueError):  # a full disk, a pipe that nobody reads: no reason to lose a merge
            self._log = None


def _opened(log: str | Path | None) -> tuple[IO[str] | None, bool]:
    """The file to write to, and whether it is ours to close."""
    if log is None:
        return None, False
    if str(log) == "-":
        return sys.stdout, False
    try:
        return open(log, "w", encoding="utf-8"), True
    except OSError as error:
        raise InputError(f"the log {log} cannot be written: {error.strerror}") from error
