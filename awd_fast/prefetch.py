"""Reading ahead on the CPU: while one job is computed, threads read what the next ones need, in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from awd_fast.plan import Source

READERS = 2
"""Threads that read: one cannot keep a disk busy that takes several requests, nor copy as fast as memory can."""
AHEAD = 3
"""Jobs that are read ahead at most, the one that is computed among them."""
_ALIGNMENT = 256


@dataclass(frozen=True)
class Read:
    """Elements `begin` to `end` of a source's tensor, to be seen as `shape`, in a dtype that need not be the stored."""

    source: Source
    name: str
    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def size(self) -> int:
        """Bytes as they are stored."""
        return (self.end - self.begin) * self.source.tensors[self.name].dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes that are needed to read to: none where the elements lie in memory."""
        return 0 if self.source.in_memory(self.name) else -(-self.size // _ALIGNMENT) * _ALIGNMENT

    @property
    def cost(self) -> int:
        """Bytes of memory until the job is done, with a copy in another dtype."""
        stored = self.source.tensors[self.name].dtype
        widened = 0 if stored == self.dtype else (self.end - self.begin) * self.dtype.itemsize
        return self.room + widened


@dataclass(frozen=True)
class Job:
    """Something to compute from elements of sources, in the order of the jobs.

    run: from the tensors, in order, to the job's results. beside: bytes of memory that it needs beside what is read.
    """

    reads: Sequence[Read]
    run: Callable[[list[Tensor]], Any]
    beside: int = 0

    @cached_property
    def cost(self) -> int:
        """Bytes of memory while it is under way."""
        return sum(read.cost for read in self.reads) + self.beside


class _Pool:
    """Memory to read to, which is used again: new pages cost more time than what is read to them."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        fitting = [room for room in self._free if size <= len(room) <= 2 * size]
        room = min(fitting, key=len) if fitting else torch.empty(size, dtype=torch.uint8)
        self._free = [other for other in self._free if other is not room]
        return room

    def give(self, room: Tensor) -> None:
        self._free = [*self._free, room][-AHEAD:]

    def trim(self, size: int) -> None:
        """Lets go of memory until no more than `size` bytes are kept."""
        while self._free and sum(map(len, self._free)) > size:
            self._free.pop(0)


def carry_out(jobs: Iterable[Job], memory: int) -> Generator[tuple[Job, Any], None, None]:
    """Each job with its results, in order, while the next are read. To be closed by whoever stops before the end.

    memory: bytes for the jobs that are under way together; a single one that needs more goes alone. What reading or
    `run` raises ends it.
    """
    waiting: deque[tuple[Job, Tensor, list[Future[Tensor]]]] = deque()
    pool, under_way = _Pool(), 0
    readers = ThreadPoolExecutor(READERS, "awd-fast-reader")
    try:
        for job in jobs:
            while waiting and (len(waiting) >= AHEAD or under_way + job.cost > memory):
                done = waiting.popleft()
                yield done[0], _finish(*done, pool)
                under_way -= done[0].cost
                del done
            pool.trim(memory - under_way - job.cost)
            room = pool.take(sum(read.room for read in job.reads))
            waiting.append((job, room, _start(job, room, readers)))
            under_way += job.cost
        while waiting:
            done = waiting.popleft()
            yield done[0], _finish(*done, pool)
            del done
    finally:
        # What is still being read must not be written to memory that is gone.
        readers.shutdown(wait=True, cancel_futures=True)


def _start(job: Job, room: Tensor, readers: ThreadPoolExecutor) -> list[Future[Tensor]]:
    futures, end = [], 0
    for read in job.reads:
        futures.append(
            readers.submit(_read, read, None if read.source.in_memory(read.name) else room[end : end + read.size])
        )
        end += read.room
    return futures


def _read(read: Read, room: Tensor | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        stored = read.source.tensors[read.name].dtype
        target = None if room is None else room.view(stored)
        found = read.source.elements(read.name, read.begin, read.end, target)
        return found.detach().to("cpu", read.dtype).view(read.shape)


def _finish(job: Job, room: Tensor, futures: list[Future[Tensor]], pool: _Pool) -> Any:
    results = job.run([future.result() for future in futures])
    pool.give(room)
    return results
