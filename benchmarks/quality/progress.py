"""Lines with the time since the start and, where the amount of work is known, the time that is left."""

from __future__ import annotations

import time

# Seconds for which the guess counts as if it had come true: one slow download must not change the time left tenfold.
TRUST = 300.0


class Progress:
    """Prints lines that begin with the seconds since the start. texts: how many an encoder has read, for the record."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._total, self._done, self._from = 0.0, 0.0, 0.0
        self.texts = 0

    def expect(self, units: float) -> None:
        """Say how many seconds the work will take, at a guess; before, no time left is shown."""
        self._total, self._from = units, self.seconds()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def did(self, units: float) -> None:
        """Note work that was done, in seconds of the same guess."""
        self._done += units

    def say(self, line: str) -> None:
        """Print one line at once, even into a pipe."""
        left = ""
        if self._total and self._done:
            slower = (self.seconds() - self._from + TRUST) / (self._done + TRUST)
            seconds = slower * max(self._total - self._done, 0.0)
            left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
        print(f"[{self.seconds():4.0f} s{left}] {line}", flush=True)
