"""Tensors to a device and results back, so that copies, kernels and the host's own work overlap.

A `Conveyor` carries out `Work` in order. Each has tensors to bring (`loads`), a function that computes on the device,
and results to take back. While the device computes work n, a thread reads and uploads n + 1 and the host takes n - 1:

    read n+1 -> upload n+1        host memory -> staging buffer -> a slab of device memory     (thread, upload lane)
    compute n                                                                                  (compute lane)
    download n-1 -> host          device memory -> staging buffer -> host memory               (download lane)

Staging buffers are few, small, fixed and pinned, because only from pinned memory a GPU copies by itself; two slabs of
device memory, for n and n + 1, are used in turn. What may happen when is said by events alone, never by the order in
which the host happens to do things:

- a staging buffer is written again when the copy from it is complete (the host waits for that copy's event),
- a slab is written again behind the event of the computation that read it, and read behind the events of its uploads,
- results are copied behind the event of their computation, and kept until the host has waited for that copy.

A `Link` is what knows the device: `CudaLink` here; the tests have one that carries jobs out as late as events allow.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Lane = Literal["upload", "compute", "download"]
ALIGNMENT = 256
"""Bytes to whose multiple every tensor in a slab begins, as those of torch's own allocator."""
STAGING_BYTES = 32 << 20
"""Of one staging buffer: long enough that a copy runs at the bus's full speed, short enough to pin without regret."""
STAGING_BUFFERS = 3
"""In each direction: one is filled or emptied by the host while the others are on their way."""


class Event(Protocol):
    """A point in a lane's work."""


class Link(Protocol):
    """A device with three lanes, each of which carries out its jobs in order, and beside each other and the host."""

    device: torch.device

    def do(self, lane: Lane, job: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        """Has a lane do `job` behind everything it was given before and behind the events; its completion as an event.

        The job itself, in Python, may run at once: what it asks of the device is what waits.
        """
        ...

    def wait(self, event: Event) -> None:
        """The host waits for an event."""
        ...

    def finish(self) -> None:
        """The host waits for all lanes; jobs that have not begun may be dropped."""
        ...

    def host_buffer(self, size: int) -> Tensor:
        """uint8 [size] on the host from and to which the device copies without it."""
        ...

    def device_buffer(self, size: int) -> Tensor:
        """uint8 [size] of device memory, for use on the lane whose job asks for it and behind its events on others."""
        ...

    def holds(self, device: torch.device) -> bool:
        """Whether tensors that say they are on `device` lie on this one already."""
        ...

    def free(self) -> int:
        """Bytes of device memory that could still be had."""
        ...


class CudaLink:
    """A GPU. Its compute lane is the current stream of the thread that makes the link, the others are side streams.

    So tensors that the caller has computed on the GPU are read, and results that stay there are made, in the order of
    the caller's own work.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._streams: dict[Lane, Any] = {
            "upload": torch.cuda.Stream(self.device),
            "compute": torch.cuda.current_stream(self.device),
            "download": torch.cuda.Stream(self.device),
        }

    def do(self, lane: Lane, job: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        stream = self._streams[lane]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):  # makes the stream's device the current one too
            job()
        done: Event = stream.record_event()
        return done

    def wait(self, event: Any) -> None:
        event.synchronize()

    def finish(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def holds(self, device: torch.device) -> bool:
        return device == self.device

    def free(self) -> int:
        # What torch holds but does not use is not free to the driver, but to us.
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + int(unused)


def connect(device: str) -> Link | None:
    """The link to a device by name ("cuda", "cuda:1"), or None for "cpu", where nothing needs to be moved."""
    return None if device == "cpu" else CudaLink(torch.device(device))


@dataclass(frozen=True)
class Load:
    """A tensor to bring: `read` gives it, perhaps in another dtype, and is called in the reading thread."""

    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def size(self) -> int:
        """Bytes on the device."""
        return _bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Work:
    """Something to compute. run: from the loads in order, on the device, to the results in order, without waiting.

    results: shapes and dtypes of what `run` returns, contiguous. done: called on the host with the results there, which
    are new tensors, in the order of the works.
    """

    loads: Sequence[Load]
    results: Sequence[tuple[tuple[int, ...], torch.dtype]]
    run: Callable[[list[Tensor]], list[Tensor]]
    done: Callable[[list[Tensor]], Any]


class _Slab:
    """Device memory for one work's loads, reused by every second work."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.read: list[Event] = []  # of the computation that read what lies in it


@dataclass
class _Loaded:
    """A work's tensors on their way: the slab they lie in, the events of the last copies, and views once they are."""

    slab: _Slab
    places: list[tuple[Load, Tensor | None, int]]  # with a tensor that lies on the device already, or the offset
    events: list[Event]

    def tensors(self) -> list[Tensor]:
        """The loads on the device, for a job behind the events."""
        found = []
        for load, resident, at in self.places:
            if resident is not None:
                found.append(resident.to(load.dtype).reshape(load.shape))
            else:
                assert self.slab.memory is not None
                found.append(self.slab.memory[at : at + load.size].view(load.dtype).view(load.shape))
        return found


@dataclass
class _Launched:
    """A work that the device has been given."""

    work: Work
    event: Event
    results: list[Tensor] = field(default_factory=list)


@dataclass
class _Staging:
    """One staging buffer and the copy that it last took part in."""

    memory: Tensor
    copied: Event | None = None


class Conveyor:
    """Carries out works in order over a link. To be used once, as a context, which ends with nothing under way."""

    def __init__(self, link: Link, staging: int = STAGING_BYTES) -> None:
        self.link = link
        self._staging = max(staging // ALIGNMENT, 1) * ALIGNMENT
        self._up: list[_Staging] = []
        self._down: list[_Staging] = []
        self._slabs = (_Slab(), _Slab())
        self._reader = ThreadPoolExecutor(1, "awd-fast-reader")
        self._largest = 0

    def __enter__(self) -> "Conveyor":
        return self

    def __exit__(self, *_: object) -> None:
        # Buffers may go only when no copy is on its way from or to them, whatever went wrong.
        self._reader.shutdown(wait=True, cancel_futures=True)
        self.link.finish()

    def carry(self, works: Sequence[Work]) -> Iterator[Any]:
        """What `done` of each work returns, in order. What a step of it raises ends the iteration."""
        self._largest = max((packed(load.size for load in work.loads) for work in works), default=0)
        # A small merge pins no more than it needs: to pin memory takes longer than to copy to it.
        longest = max([self._largest, *(packed(_bytes(*result) for result in work.results) for work in works)])
        self._staging = min(self._staging, max(longest, ALIGNMENT))
        ahead: Future[_Loaded] | None = None
        behind: _Launched | None = None
        for index, work in enumerate(works):
            loaded = ahead.result() if ahead is not None else self._load(work, self._slabs[0])
            # Before the launch, which may take the host long; the slab of the work before is read by now, or will be
            # waited for by the upload lane.
            following = works[index + 1 : index + 2]
            ahead = self._reader.submit(self._load, following[0], self._slabs[(index + 1) % 2]) if following else None
            launched = self._launch(work, loaded)
            if behind is not None:
                yield self._take(behind)
            behind = launched
        if behind is not None:
            yield self._take(behind)

    def _load(self, work: Work, slab: _Slab) -> _Loaded:
        """Reads the loads and sends them to a slab, through staging buffers in turn."""
        read = [(load, load.read().detach()) for load in work.loads]
        places: list[tuple[Load, Tensor | None, int]] = []
        moved: list[tuple[int, Load, Tensor]] = []
        end = 0
        for load, tensor in read:
            if self.link.holds(tensor.device):
                places.append((load, tensor, 0))
                continue
            places.append((load, None, end))
            moved.append((end, load, tensor.reshape(-1)))
            end = _aligned(end + load.size)
        events: list[Event] = []
        if moved:
            events.append(self.link.do("upload", lambda: self._reserve(slab, end), slab.read))
        for begin in range(0, end, self._staging):
            events = [self._upload(slab, begin, min(begin + self._staging, end), moved)]
        return _Loaded(slab, places, events)

    def _reserve(self, slab: _Slab, size: int) -> None:
        """Makes the slab large enough, at first for the largest of all works."""
        if slab.memory is None or len(slab.memory) < size:
            slab.memory = None  # first, so that old and new need not lie in memory together
            slab.memory = self.link.device_buffer(max(size, self._largest))

    def _upload(self, slab: _Slab, begin: int, end: int, moved: Sequence[tuple[int, Load, Tensor]]) -> Event:
        """Sends bytes `begin` to `end` of a slab: those parts of tensors that lie there."""
        buffer = self._next(self._up)
        for at, load, flat in moved:
            low, high = max(at, begin), min(at + load.size, end)
            if low < high:
                part = flat[(low - at) // load.dtype.itemsize : (high - at) // load.dtype.itemsize]
                buffer.memory[low - begin : high - begin].view(load.dtype).copy_(part)

        def copy() -> None:
            assert slab.memory is not None
            slab.memory[begin:end].copy_(buffer.memory[: end - begin], non_blocking=True)

        buffer.copied = self.link.do("upload", copy)
        return buffer.copied

    def _next(self, ring: list[_Staging]) -> _Staging:
        """The staging buffer that was used longest ago, once its copy is complete; a new one while there are few."""
        if len(ring) < STAGING_BUFFERS:
            ring.append(_Staging(self.link.host_buffer(self._staging)))
        else:
            ring.append(ring.pop(0))
        buffer = ring[-1]
        if buffer.copied is not None:
            self.link.wait(buffer.copied)
        return buffer

    def _launch(self, work: Work, loaded: _Loaded) -> _Launched:
        results: list[Tensor] = []
        event = self.link.do("compute", lambda: results.extend(work.run(loaded.tensors())), loaded.events)
        loaded.slab.read = [event]
        return _Launched(work, event, results)

    def _take(self, launched: _Launched) -> Any:
        """The results on the host: a piece of them is on its way while the host copies the one before."""
        targets = [torch.empty(shape, dtype=dtype) for shape, dtype in launched.work.results]
        places = []
        end = 0
        for index, target in enumerate(targets):
            places.append((end, index, target.view(-1).view(torch.uint8)))
            end = _aligned(end + target.numel() * target.itemsize)
        ranges = [(begin, min(begin + self._staging, end)) for begin in range(0, end, self._staging)]
        under_way: list[tuple[_Staging, int, int]] = []
        for begin, stop in ranges:
            under_way.append((self._download(launched, begin, stop, places), begin, stop))
            if len(under_way) == STAGING_BUFFERS - 1:
                self._receive(*under_way.pop(0), places)
        for waiting in under_way:
            self._receive(*waiting, places)
        if not ranges:
            self.link.wait(launched.event)
        launched.results.clear()
        return launched.work.done(targets)

    def _download(
        self, launched: _Launched, begin: int, end: int, places: Sequence[tuple[int, int, Tensor]]
    ) -> _Staging:
        """Sends bytes `begin` to `end` of the results, laid end to end, towards the host."""
        buffer = self._next(self._down)

        def copy() -> None:
            for at, index, target in places:
                low, high = max(at, begin), min(at + len(target), end)
                if low < high:
                    source = launched.results[index].reshape(-1).view(torch.uint8)
                    buffer.memory[low - begin : high - begin].copy_(source[low - at : high - at], non_blocking=True)

        buffer.copied = self.link.do("download", copy, [launched.event])
        return buffer

    def _receive(self, buffer: _Staging, begin: int, end: int, places: Sequence[tuple[int, int, Tensor]]) -> None:
        assert buffer.copied is not None
        self.link.wait(buffer.copied)
        for at, _, target in places:
            low, high = max(at, begin), min(at + len(target), end)
            if low < high:
                target[low - at : high - at].copy_(buffer.memory[low - begin : high - begin])


def packed(sizes: Iterable[int]) -> int:
    """Bytes that tensors of these sizes take when each begins at a multiple of `ALIGNMENT`."""
    return sum(map(_aligned, sizes))


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
