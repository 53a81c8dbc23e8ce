"""The command line with blocks so small that tiny tensors have many, and with what goes wrong in tests.

python -m tests.small_blocks JSON merge ...   with the keys numbers (of a block), silence (seconds), pause (seconds for
a block), fail ({"call": "pread" or "pwrite", "after": N, "errno": E}: that call of `os` fails after N of them).
"""

import json
import os
import sys
import time
from typing import Any

from awd_fast import blocks, cli, disk, ranks, stream


def arrange(wanted: dict[str, Any]) -> None:
    """Makes this process so."""
    blocks.NUMBERS = wanted.get("numbers", blocks.NUMBERS)
    ranks.SILENCE = wanted.get("silence", ranks.SILENCE)
    ranks.BEAT = min(ranks.BEAT, ranks.SILENCE / 4)
    if "pause" in wanted:
        slow(wanted["pause"])
    if "fail" in wanted:
        fail(**wanted["fail"])


def slow(pause: float) -> None:
    """Every block takes so many seconds more."""
    rounded = stream.StreamMerger._rounded

    def slowly(self: Any, *given: Any) -> Any:
        time.sleep(pause)
        return rounded(self, *given)

    stream.StreamMerger._rounded = slowly  # type: ignore[method-assign]


def fail(call: str, after: int, errno: int) -> None:
    """A call of the system fails from some time on."""
    name = "_read" if call == "pread" else "_write"
    done, calls = getattr(disk, name), iter(range(after))

    def failing(*given: Any) -> int:
        if next(calls, None) is None:
            raise OSError(errno, os.strerror(errno))
        return int(done(*given))

    setattr(disk, name, failing)


if __name__ == "__main__":
    arrange(json.loads(sys.argv.pop(1)))
    cli.main()
