"""Jobs on the CPU: threads read what the next ones need while others compute, in bounded memory.

Each job is computed by few threads, or one, beside others, rather than by all cores together: a team of threads waits
for its slowest member at the end of every operation, and beside threads that read and write one is always late.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from awd_fast.plan import Source

READERS = 2
"""Threads that read: one cannot keep a disk busy that takes several requests, nor copy as fast as memory can."""
WORKERS = 4
"""Jobs that are computed at a time, at most; where there are more cores, each has several."""
AHEAD = 2
"""Jobs that are read beside those that are computed."""
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

    run: from the tensors, in order, to the job's results, beside other jobs. then: from these to what the caller is
    given, in the order of the jobs, in the caller's thread. fresh: it is run only when all jobs before are done.
    beside: bytes of memory that it needs beside what is read.
    """

    reads: Sequence[Read]
    run: Callable[[list[Tensor]], Any]
    beside: int = 0
    then: Callable[[Any], Any] | None = None
    fresh: bool = False

    @cached_property
    def cost(self) -> int:
        """Bytes of memory while it is under way."""
        return sum(read.cost for read in self.reads) + self.beside


class _Pool:
    """Memory to read to, which is used again: new pages cost more time than what is read to them."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        fitting = [room for room in self._free if size <= len(room) <= size + size // 4]
        room = min(fitting, key=len) if fitting else torch.empty(size, dtype=torch.uint8)
        self._free = [other for other in self._free if other is not room]
        return room

    def give(self, room: Tensor) -> None:
        self._free = [*self._free, room][-(WORKERS + AHEAD) :]

    def trim(self, size: int) -> None:
        """Lets go of memory until no more than `size` bytes are kept."""
        while self._free and sum(map(len, self._free)) > size:
            self._free.pop(0)


class _Cancelled(BaseException):
    """Ends a job whose results nobody waits for any more."""


class _Running:
    """The threads in which jobs run, and a way to end them: one may take minutes in Python's own loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[int] = set()
        self._over = False

    def run(self, job: Callable[[], Any]) -> Any:
        """What a job returns. Raises _Cancelled where it was ended."""
        thread = threading.get_ident()
        with self._lock:
            if self._over:
                raise _Cancelled
            self._threads.add(thread)
        try:
            return job()
        finally:
            with self._lock:
                self._threads.discard(thread)
            with suppress(_Cancelled):
                for _ in range(1000):  # where one that was sent a moment ago arrives
                    pass

    def cancel(self) -> None:
        """Ends all jobs at their next step in Python."""
        with self._lock:
            self._over = True
            for thread in self._threads:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Cancelled))


class _UnderWay:
    """A job whose elements are being read, to memory that is its own meanwhile; computed from `begin` on."""

    def __init__(self, job: Job, room: Tensor, readers: ThreadPoolExecutor) -> None:
        self.job, self.room = job, room
        self._reads: list[Future[Tensor]] = []
        self._results: Future[Any] | None = None
        end = 0
        for read in job.reads:
            own = None if read.source.in_memory(read.name) else room[end : end + read.size]
            self._reads.append(readers.submit(_read, read, own))
            end += read.room

    def begin(self, workers: ThreadPoolExecutor, running: _Running) -> None:
        self._results = workers.submit(running.run, self._compute)

    @torch.no_grad()
    def _compute(self) -> Any:
        return self.job.run([future.result() for future in self._reads])

    def end(self) -> Any:
        """The results, when they are there."""
        assert self._results is not None
        results = self._results.result()
        self._reads.clear()
        return results if self.job.then is None else self.job.then(results)


def threads_of_a_job() -> int:
    """How many threads PyTorch's operations use in a job."""
    cores = torch.get_num_threads()
    return cores // min(cores, WORKERS)


def carry_out(jobs: Iterable[Job], memory: int) -> Generator[tuple[Job, Any], None, None]:
    """Each job with its results, in order, while the next are read. To be closed by whoever stops before the end.

    memory: bytes for the jobs that are under way together; a single one that needs more goes alone. What reading,
    `run` or `then` raises ends it. Meanwhile PyTorch's operations in the caller's thread use as few threads as a job's.
    """
    cores, each = torch.get_num_threads(), threads_of_a_job()
    count = min(cores, WORKERS)
    under_way: deque[_UnderWay] = deque()
    pool, running = _Pool(), _Running()
    readers = ThreadPoolExecutor(READERS, "awd-fast-reader")
    workers = ThreadPoolExecutor(count, "awd-fast-worker", torch.set_num_threads, (each,))
    torch.set_num_threads(each)

    def finish() -> tuple[Job, Any]:
        done = under_way.popleft()
        results = done.end()
        pool.give(done.room)
        return done.job, results

    try:
        for job in jobs:
            while under_way and (
                len(under_way) >= count + AHEAD or sum(other.job.cost for other in under_way) + job.cost > memory
            ):
                yield finish()
            pool.trim(memory - sum(other.job.cost for other in under_way) - job.cost)
            following = _UnderWay(job, pool.take(sum(read.room for read in job.reads)), readers)
            try:
                while job.fresh and under_way:
                    yield finish()
            finally:
                under_way.append(following)
            following.begin(workers, running)
        while under_way:
            yield finish()
    finally:
        running.cancel()
        # What is still being read must not be written to memory that is gone.
        readers.shutdown(wait=True, cancel_futures=True)
        workers.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(cores)


def one_by_one(jobs: Iterable[Job]) -> Generator[tuple[Job, Any], None, None]:
    """Each job with its results, in order, in the caller's thread, with all the threads that PyTorch's operations have.

    For who has a single tensor at a time, whose elements lie in memory: nothing could be read ahead, and to start
    threads for each would take longer than most tensors do.
    """
    for job in jobs:
        rooms = [
            None if read.source.in_memory(read.name) else torch.empty(read.size, dtype=torch.uint8)
            for read in job.reads
        ]
        with torch.no_grad():
            results = job.run([_read(read, room) for read, room in zip(job.reads, rooms, strict=True)])
        yield job, results if job.then is None else job.then(results)


def _read(read: Read, room: Tensor | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        stored = read.source.tensors[read.name].dtype
        target = None if room is None else room.view(stored)
        found = read.source.elements(read.name, read.begin, read.end, target)
        return found.detach().to("cpu", read.dtype).view(read.shape)
