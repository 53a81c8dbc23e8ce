"""A device without a device, for the tests of `awd_fast.transfer`: every job is done as late as its events allow.

What a real GPU does at some time that nobody knows, this one does at the worst possible or at a random one. A buffer
that is written again too early, or read before it was written, then holds other numbers than it should: those of
another tensor, or the NaN that every buffer is made with.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from awd_fast.transfer import Lane


class Job:
    """A job of a lane, and the event of its completion."""

    def __init__(self, lane: Lane, job: Callable[[], None], after: Sequence["Job"]) -> None:
        self.lane, self.job, self.after = lane, job, list(after)
        self.done = False


class LaggingLink:
    """A link whose device is the host's memory.

    seed: None does jobs only when the host waits for them, a number does some at random moments, "eager" all at once,
    "hasty" uploads at once and others late, when the reading thread has had the time to go ahead.
    resident: whether tensors of the host count as lying on the device. ignores: a lane whose events are not heeded, to
    see that the tests would notice.
    """

    def __init__(
        self,
        seed: int | str | None = None,
        memory: int = 1 << 30,
        resident: bool = False,
        ignores: Lane | None = None,
        waits: bool = True,
    ) -> None:
        self.device = torch.device("cpu")
        self.memory, self.resident, self.ignores, self.waits = memory, resident, ignores, waits
        at_once: dict[object, tuple[Lane, ...]] = {"eager": ("upload", "compute", "download"), "hasty": ("upload",)}
        self.at_once = at_once.get(seed, ())
        self.pause = 0.003 if seed == "hasty" else 0.0
        self.random = random.Random(seed) if isinstance(seed, int) else None
        self.lock = threading.RLock()
        self.queues: dict[Lane, list[Job]] = {"upload": [], "compute": [], "download": []}
        self.counts: dict[str, int] = {"upload": 0, "compute": 0, "download": 0, "waited": 0}
        self.host_buffers: list[int] = []
        self.device_buffers: list[int] = []

    def do(self, lane: Lane, job: Callable[[], None], after: Sequence[Job] = ()) -> Job:
        with self.lock:
            made = Job(lane, job, [] if lane == self.ignores else after)
            self.queues[lane].append(made)
            self.counts[lane] += 1
            if lane in self.at_once:
                self._complete(made)
            if self.random is not None:
                for _ in range(self.random.randrange(3)):
                    waiting = [queue[0] for queue in self.queues.values() if queue]
                    if waiting:
                        self._complete(self.random.choice(waiting))
            return made

    def wait(self, event: Job) -> None:
        if event.lane == "download":
            time.sleep(self.pause)
        with self.lock:
            self.counts["waited"] += not event.done
            if self.waits or event.lane == "download":
                self._complete(event)

    def _complete(self, event: Job) -> None:
        """Does a job, and before it those of its lane that came before and those of its events."""
        queue = self.queues[event.lane]
        while not event.done:
            first = queue[0]
            for needed in first.after:
                self._complete(needed)
            if queue and queue[0] is first:  # a job may have been done meanwhile, as one that another waited for
                first.job()
                first.done = True
                queue.pop(0)

    def finish(self) -> None:
        with self.lock:
            for queue in self.queues.values():
                queue.clear()

    def host_buffer(self, size: int) -> Tensor:
        self.host_buffers.append(size)
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def device_buffer(self, size: int) -> Tensor:
        self.device_buffers.append(size)
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def holds(self, device: torch.device) -> bool:
        return self.resident

    def free(self) -> int:
        return self.memory
