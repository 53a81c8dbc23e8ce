"""A GPU's clock: events around what runs there, graphs that leave out the launches, results that begin as NaN.

On the CPU, where the tests and a rehearsal are, the same calls run and the host's clock times them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from awd_fast.measure import Case, Timed

LEAD = 2.0  # the GPU is kept busy for this many times the time in which the host sends a run's work
LEAST_LEAD, MOST_LEAD = 0.5e-3, 0.25  # seconds
CYCLES = 2.0e9  # of a second, at least, so that a wait lasts at least what is asked for


class Clock:
    """Seconds that a device needs for a run, whatever it had to do before.

    ahead: the GPU first waits while the host sends the run's work, so that what is timed is the device's work alone;
    otherwise the host's time to send it counts as far as the device waits for it.
    """

    def __init__(self, device: str, ahead: bool = True) -> None:
        self.device, self.ahead = torch.device(device), ahead
        self._sending: dict[int, float] = {}  # seconds of the host, by run

    def __call__(self, run: Callable[[], object]) -> Timed:
        if self.device.type != "cuda":
            began = time.perf_counter()
            kept = run()
            seconds = time.perf_counter() - began
            del kept
            return seconds, 0, 0
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if self.ahead:
            wait = min(max(LEAD * self._sent(run), LEAST_LEAD), MOST_LEAD)
            torch.cuda._sleep(int(wait * CYCLES))
        start.record()
        kept = run()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3, 0, 0

    def _sent(self, run: Callable[[], object]) -> float:
        """How long the host needs to send a run's work, from one more run before the first that is timed."""
        if id(run) not in self._sending:
            start = time.perf_counter()
            kept = run()
            self._sending[id(run)] = time.perf_counter() - start
            torch.cuda.synchronize()
            del kept
        return self._sending[id(run)]


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it new results are full of NaN, so that an element that is left out cannot pass for an earlier one."""
    empty = torch.empty

    def made(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    torch.empty = made
    try:
        yield
    finally:
        torch.empty = empty


def tensors_of(value: object) -> list[Tensor]:
    """Those in nested lists and tuples, and in the fields of what has them, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in tensors_of(one)]
    return tensors_of(list(vars(value).values())) if hasattr(value, "__dict__") else []


def differing(found: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    """How many tensors are not the same bits."""
    pairs = zip(found, expected, strict=True)
    return sum(not torch.equal(a.nan_to_num(), b.nan_to_num()) or a.shape != b.shape for a, b in pairs)


@dataclass
class Graphed:
    """A case whose run is captured in a CUDA graph when it has been checked: a replay costs one launch.

    A run that cannot be captured is timed as it is, and the note says why. Only what keeps no memory of the host for
    the device to read may be captured: a replay reads that memory again, whatever is there by then.
    """

    case: Case
    allowed: bool
    replay: Callable[[], object] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        self.plain = self.case
        self.case = replace(self.case, run=self._run, check=self._check)

    def _run(self) -> object:
        return self.plain.run() if self.replay is None else self.replay()

    def _check(self) -> str | None:
        wrong = self.plain.check()
        if wrong is not None or not self.allowed:
            return wrong
        try:
            expected = tensors_of(self.plain.run())
            replay, outputs = captured(self.plain.run)
        except RuntimeError as error:
            self.note = f"no graph: {str(error).splitlines()[0]}"
            return None
        for tensor in outputs:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        replay()
        torch.cuda.synchronize()
        different = differing(outputs, expected)
        if different:
            return f"{different} of {len(outputs)} results of a replayed graph are not those of the call"
        self.replay, self.note = replay, "a CUDA graph"
        return None


def captured(run: Callable[[], object]) -> tuple[Callable[[], object], list[Tensor]]:
    """The replay of a run, and the tensors that it writes. Raises RuntimeError where it cannot be captured."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return graph.replay, tensors_of(kept)
