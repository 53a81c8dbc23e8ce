"""Writing results while the next are computed: a thread that writes and notes, and one that brings it to the disk."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from awd_fast.journal import Journal, Record
from awd_fast.merger import Result
from awd_fast.progress import Progress
from awd_fast.shards import Shards

SYNCED = 64 << 20
"""Bytes of a file after which they are sent to the disk, so that it does not begin to write when all is done."""


class Writer:
    """Writes results to shards and notes them in a journal, in a thread of its own. A context, which waits for it.

    backlog: bytes of results that may wait; `put` waits while there are more, and raises what writing raised.
    """

    def __init__(self, shards: Shards, journal: Journal, progress: Progress, backlog: int) -> None:
        self._shards, self._journal, self._progress, self._backlog = shards, journal, progress, backlog
        self._writing = ThreadPoolExecutor(1, "awd-fast-writer")
        self._syncing = ThreadPoolExecutor(1, "awd-fast-sync")
        self._waiting: deque[tuple[int, Future[Any]]] = deque()
        self._size = 0
        self._unsynced: dict[str, int] = {}
        self._sync: Future[None] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                while self._waiting:
                    self._oldest()
                if self._sync is not None:
                    self._sync.result()
        finally:
            # What was computed is written even where the next could not be: it need not be computed again.
            self._writing.shutdown(wait=True)
            self._syncing.shutdown(wait=True)

    def put(self, result: Result) -> None:
        """Has a result written."""
        size = result.tensor.nbytes
        self._waiting.append((size, self._writing.submit(self._write, result)))
        self._size += size
        while self._waiting and (self._size > self._backlog or self._waiting[0][1].done()):
            self._oldest()

    def _oldest(self) -> None:
        size, future = self._waiting.popleft()
        future.result()
        self._size -= size

    def _write(self, result: Result) -> None:
        block, similarity = result.block, result.similarity
        name = block.step.name
        checksum = self._shards.write(name, block.begin, result.tensor)
        figures, groups = (None, 0) if similarity is None else (similarity.to_figures(), similarity.groups)
        self._journal.add(Record(name, block.begin, block.end, checksum, figures, groups, result.on_cpu))
        self._progress.wrote(result.tensor.nbytes)
        file = self._shards.file_of(name)
        self._unsynced[file] = self._unsynced.get(file, 0) + result.tensor.nbytes
        if self._unsynced[file] > SYNCED and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()
            self._unsynced[file] = 0
            self._sync = self._syncing.submit(self._shards.sync, file)
