"""A GPU's clock, graphs and poisoned results, with stand-ins for what torch would ask of a GPU."""

from collections import namedtuple
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from awd_fast import measure
from awd_fast.measure import Case
from benchmarks import gpu_clock
from benchmarks.gpu_clock import Clock, Graphed, poisoned


def test_results_begin_as_nan_and_only_within():
    with poisoned():
        assert bool(torch.empty(3).isnan().all())
        assert torch.empty(3, dtype=torch.int64).shape == (3,)
    before = torch.empty
    with pytest.raises(ZeroDivisionError), poisoned():
        raise ZeroDivisionError
    assert torch.empty is before


@pytest.fixture
def events(monkeypatch):
    """torch.cuda with events that count up, and a list of what was asked of it."""
    asked: list[object] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("wait")

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: asked.append("sleep"))
    return asked


def test_the_clock_of_a_gpu_lets_the_host_go_ahead(events):
    def run():
        events.append("run")

    clock = Clock("cuda")
    assert clock(run) == (0.0025, 0, 0)
    timed = ["sleep", "record", "run", "record", "wait"]
    assert events == ["synchronize", "run", "synchronize", *timed]  # how long the host takes is seen first
    events.clear()
    assert clock(run) == (0.0025, 0, 0)
    assert events == ["synchronize", *timed]
    events.clear()
    Clock("cuda", ahead=False)(run)
    assert events == ["synchronize", "record", "run", "record", "wait"]


def test_the_clock_of_a_cpu_is_the_host():
    seconds, faults, preempted = Clock("cpu")(lambda: sum(range(1000)))
    assert seconds > 0.0
    assert (faults, preempted) == (0, 0)


class FakeGraph:
    """Records nothing: a replay writes what `written` says into the results of the capture."""

    outputs: ClassVar[list[torch.Tensor]] = []
    written: ClassVar[list[torch.Tensor]] = []

    def replay(self):
        for tensor, value in zip(self.outputs, self.written, strict=True):
            tensor.copy_(value)


@pytest.fixture
def graphs(monkeypatch, events):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: poisoned())


def some_case(run, wrong=None) -> Case:
    return Case(operation="gram", backend="cuda", run=run, check=lambda: wrong)


Pair = namedtuple("Pair", "a b")


def test_a_graph_is_timed_where_its_results_are_the_calls(graphs, monkeypatch):
    def run():
        found = Pair(torch.ones(2), [torch.full((2,), 3.0), SimpleNamespace(c=torch.arange(2))])
        FakeGraph.outputs = gpu_clock.tensors_of(found)
        return found

    monkeypatch.setattr(FakeGraph, "written", [torch.ones(2), torch.full((2,), 3.0), torch.arange(2)])
    graphed = Graphed(some_case(run), allowed=True)
    (result,) = measure.measure([graphed.case], 1)
    assert result.wrong is None
    assert graphed.note == "a CUDA graph"
    assert graphed.replay is not None
    monkeypatch.setattr(FakeGraph, "written", [torch.ones(2), torch.full((2,), torch.nan), torch.arange(2)])
    (result,) = measure.measure([Graphed(some_case(run), allowed=True).case], 1)
    assert result.wrong == "1 of 3 results of a replayed graph are not those of the call"


def test_what_no_graph_takes_is_timed_as_it_is(graphs, monkeypatch):
    calls = []

    def run():
        calls.append(1)
        return torch.ones(1)

    plain = Graphed(some_case(run), allowed=False)
    assert plain.case.check() is None
    assert (calls, plain.note) == ([], "")

    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphed = Graphed(some_case(run), allowed=True)
    assert graphed.case.check() is None
    assert graphed.note == "no graph: operation not permitted when stream is capturing"
    assert torch.equal(graphed.case.run(), torch.ones(1))
    assert Graphed(some_case(run, wrong="it is off"), allowed=True).case.check() == "it is off"
