"""Lines with the time since the start and, where the amount of work is known, the time that is left."""

from __future__ import annotations

import time


class Progress:
    """Prints lines that begin with the seconds since the start. texts: how many an encoder has read, for the record."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._total, self._done = 0.0, 0.0
        self.texts = 0

    def expect(self, units: float) -> None:
        """Say how much work there is, in units of any size; before, no time left is shown."""
        self._total = units

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def did(self, units: float) -> None:
        """Note work that was done."""
        self._done += units

    def say(self, line: str) -> None:
        """Print one line at once, even into a pipe."""
        left = ""
        if self._total and self._done:
            seconds = self.seconds() * max(self._total - self._done, 0.0) / self._done
            left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
        print(f"[{self.seconds():4.0f} s{left}] {line}", flush=True)
