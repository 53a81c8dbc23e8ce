"""Moving tensors to a device and back: nothing is read before it is there or written while it is still needed."""

import threading
from contextlib import contextmanager

import pytest
import torch

from awd_fast import transfer
from awd_fast.transfer import ALIGNMENT, STAGING_BUFFERS, Conveyor, Load, Work
from tests.lagging_link import LaggingLink

SHAPES = ((), (1,), (63,), (64,), (65,), (7, 9), (3, 5, 2), (257,), (40, 40))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def made(count: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """The tensors of `count` works, of all shapes and dtypes, other sizes in each."""
    g = torch.Generator().manual_seed(seed)
    works = []
    for index in range(count):
        pick = [(SHAPES[(index * 3 + i) % len(SHAPES)], DTYPES[(index + i) % 4]) for i in range(1 + index % 4)]
        works.append([torch.randn(shape, generator=g).to(dtype) for shape, dtype in pick])
    return works


def twice(tensors):
    return [tensor * 2 for tensor in tensors]


def doubling(tensors, done=None) -> Work:
    """A work that doubles its tensors."""
    loads = [Load(lambda t=t: t, tuple(t.shape), t.dtype) for t in tensors]
    return Work(loads, [(tuple(t.shape), t.dtype) for t in tensors], twice, done or (lambda results: results))


def same(found, inputs) -> bool:
    pairs = [
        (a, b) for results, tensors in zip(found, inputs, strict=True) for a, b in zip(results, tensors, strict=True)
    ]
    return all(torch.equal(a, b * 2) and a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)


def carried(link, inputs, staging):
    with Conveyor(link, staging) as conveyor:
        return list(conveyor.carry([doubling(tensors) for tensors in inputs]))


@pytest.mark.parametrize("seed", [None, "eager", "hasty", 1, 2, 3])
@pytest.mark.parametrize("staging", [1, 512, 4096, 1 << 20])
def test_every_work_gets_its_tensors_and_gives_its_results(seed, staging):
    inputs, link = made(23), LaggingLink(seed)
    assert same(carried(link, inputs, staging), inputs)
    assert len(link.host_buffers) <= 2 * STAGING_BUFFERS
    assert max(link.host_buffers) <= max(staging, ALIGNMENT)
    assert len(link.device_buffers) == 2  # made for the largest work, and never again
    assert len(set(link.device_buffers)) == 1


@pytest.mark.parametrize("ignores", ["upload", "compute", "download"])
def test_these_tests_notice_where_events_are_not_heeded(ignores):
    """Of each lane's events, a link that does not heed them must give wrong results in some order of the jobs."""
    inputs = made(23)
    results = []
    for seed in (None, "hasty", 1, 2, 3):
        try:
            results.append(same(carried(LaggingLink(seed, ignores=ignores), inputs, 1024), inputs))
        except (AssertionError, IndexError, RuntimeError):  # read before there was anything to read
            results.append(False)
    assert not all(results)


def test_these_tests_notice_where_staging_buffers_are_reused_too_early():
    inputs = made(23)
    assert not same(carried(LaggingLink(None, waits=False), inputs, 256), inputs)


def test_tensors_are_converted_on_their_way():
    base = torch.randn(5, 7)
    for held in (False, True):  # on the host, or on the device
        load = Load(lambda: base.T, (7, 5), torch.float64)
        work = Work([load], [((7, 5), torch.float64)], lambda tensors: [tensors[0] + 0], lambda results: results[0])
        with Conveyor(LaggingLink(resident=held)) as conveyor:
            (found,) = conveyor.carry([work])
        assert torch.equal(found, base.T.double())


def test_tensors_that_lie_on_the_device_are_not_copied():
    link, inputs = LaggingLink(resident=True), made(5)
    assert same(carried(link, inputs, 512), inputs)
    assert link.counts["upload"] == 0
    assert link.device_buffers == []


def test_the_next_work_is_read_and_launched_before_the_last_one_is_taken():
    inputs, log, release = made(4), [], threading.Event()

    def work(index: int, tensors) -> Work:
        def read(tensor):
            if index == 2:
                release.set()
            return tensor

        def done(results):
            # While nothing has been taken yet, work 1 is launched and work 2 is being read by another thread.
            assert index > 0 or release.wait(timeout=30)
            log.append(f"took {index}")

        def run(tensors):
            log.append(f"ran {index}")
            return twice(tensors)

        loads = [Load(lambda t=t: read(t), tuple(t.shape), t.dtype) for t in tensors]
        return Work(loads, [(tuple(t.shape), t.dtype) for t in tensors], run, done)

    with Conveyor(LaggingLink("eager")) as conveyor:
        list(conveyor.carry([work(i, tensors) for i, tensors in enumerate(inputs)]))
    assert log == ["ran 0", "ran 1", "took 0", "ran 2", "took 1", "ran 3", "took 2", "took 3"]


@pytest.mark.parametrize("seed", [None, "eager", 5])
@pytest.mark.parametrize("where", ["read", "run", "done"])
@pytest.mark.parametrize("index", [0, 1, 6])
def test_an_error_ends_everything(seed, where, index):
    inputs, link = made(7), LaggingLink(seed)
    works = [doubling(tensors) for tensors in inputs]

    def fail(*_):
        raise ValueError("broken")

    loads = [Load(fail, (3,), torch.float32)] if where == "read" else works[index].loads
    run = fail if where == "run" else works[index].run
    works[index] = Work(loads, works[index].results, run, fail if where == "done" else works[index].done)
    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"), Conveyor(link) as conveyor:
        list(conveyor.carry(works))
    assert threading.active_count() == before
    assert not any(link.queues.values())


def test_who_stops_early_leaves_nothing_under_way():
    link = LaggingLink()
    before = threading.active_count()
    with Conveyor(link) as conveyor:
        next(conveyor.carry([doubling(tensors) for tensors in made(9)]))
    assert threading.active_count() == before
    assert not any(link.queues.values())


def test_nothing_to_carry():
    with Conveyor(LaggingLink()) as conveyor:
        assert list(conveyor.carry([])) == []
        assert list(conveyor.carry([Work([], [], twice, lambda results: results)])) == [[]]


class Recorded:
    """Stands for a CUDA stream, and for its events, and notes what it is asked for."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")


def test_what_the_link_to_a_gpu_asks_of_torch(monkeypatch):
    log, names = [], iter(("upload", "download"))

    @contextmanager
    def stream(current):
        log.append(f"enter {current.name}")
        yield
        log.append("leave")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Recorded(f"{next(names)} {device}", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Recorded(f"current {device}", log))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    link = transfer.connect("cuda")
    assert (link.device, link.free()) == (torch.device("cuda:1"), 1200)
    assert link.holds(torch.device("cuda:1"))
    assert not link.holds(torch.device("cuda:0"))
    event = link.do("compute", lambda: log.append("job"), ["one", "two"])
    link.wait(Recorded("event", log))
    link.finish()
    assert event == "event of current cuda:1"
    assert log == [
        "current cuda:1 waits for one",
        "current cuda:1 waits for two",
        "enter current cuda:1",
        "job",
        "leave",
        "current cuda:1 records",
        "host waits for event",
        *(f"host waits for {name} cuda:1" for name in ("upload", "current", "download")),
    ]


def test_the_cpu_needs_no_link():
    assert transfer.connect("cpu") is None
