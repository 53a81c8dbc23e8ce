"""The benchmark of a GPU, without one: cases, clock, graphs, targets, predictions; on the CPU or in the emulation."""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from awd_fast import bench, checks, measure, streaming
from awd_fast.measure import Case, Result
from awd_fast.objective import SGD, Adam
from awd_fast.ops import backends, cuda, native, reference
from benchmarks import gpu, gpu_cases, gpu_clock, gpu_suite, gpu_targets, harness, peers
from benchmarks.cases import SGD_ROWS
from benchmarks.shapes import SHAPES, Shape
from tests import emulated

DATA = bench.synthetic([(5, 24), (4, 40)], 2, 3)
WHOLE = bench.adam_rows_case


@pytest.fixture
def short(monkeypatch):
    """Fewer iterations: here they show nothing more."""
    monkeypatch.setattr(gpu_cases, "SGD_300", SGD(iterations=checks.COMPARED + 2))
    monkeypatch.setattr(gpu_cases, "SHORT", 2)
    monkeypatch.setattr(gpu_cases, "LONG", 4)


def timed_by(seconds: float):
    """A clock that runs what it times, and says that it took so long."""

    def clock(run):
        run()
        return seconds, 0, 0

    return clock


def check_operators(backend: str, expected: list[str]) -> list[Result]:
    cases = gpu_cases.operators(DATA, backend)
    results = measure.measure([gpu_cases.copy("cpu", 1 << 12), *cases], 2, timed=timed_by(0.5))
    assert [result.wrong or result.skipped for result in results] == [None] * len(results)
    assert [result.case.operation for result in results] == ["copy", *expected]
    assert all(result.seconds == (0.5, 0.5) for result in results)
    return results


ROWS = ["gram row", "gram column", "gram tensor", "multi_dot row", "multi_dot column", "combine", "descend sgd300"]
ROWS += ["merge_rows row sgd300", "merge_rows column sgd300", "adam_rows 300"]


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_every_operator_of_a_backend_is_a_case(short):
    check_operators("native", [*ROWS, "adam_step"])


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_every_cuda_operator_is_a_case_and_right(short, monkeypatch):
    # In the emulation a thread costs a fiber.
    monkeypatch.setattr(bench, "adam_rows_case", lambda data, backend: WHOLE(data, backend, timed=4))
    with emulated.running(emulated.load()):
        results = check_operators("cuda", [*ROWS, "adam_stream 2", "adam_stream 4"])
    one = gpu_cases.iteration(results, "cuda", DATA)
    assert one is not None
    assert (one.case.operation, one.case.moved) == ("adam_step", bench.adam_step_bytes(DATA))
    assert one.seconds == (0.0, 0.0)
    assert gpu_cases.iteration(results, "triton", DATA) is None


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_a_group_may_have_more_tensors_than_a_call_takes_models(monkeypatch):
    data, streams = bench.synthetic([(2, 8)], cuda.MOST_TENSORS // 8, 8), []
    right = cuda.descend_stream
    monkeypatch.setattr(cuda, "descend_stream", lambda *given: streams.append(len(given[0])) or right(*given))
    with emulated.running(emulated.load()):
        assert gpu_cases.stream(data, "cuda", 3).run().history.shape == (4,)
    assert streams == [len(data.bases)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and Triton no interpreter then")
def test_operators_of_triton_are_cases_in_its_interpreter(short):
    reason = backends.unavailable("triton")
    if reason is not None:
        pytest.skip(reason)
    cases = [
        one for one in gpu_cases.operators(DATA, "triton") if one.operation in ("gram row", "combine", "adam_step")
    ]
    results = measure.measure(cases, 1, timed=timed_by(0.5))
    assert [result.wrong or result.skipped for result in results] == [None] * 3


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
@pytest.mark.parametrize("operator", ["gram", "multi_dot", "combine", "merge_rows"])
def test_a_result_that_is_not_written_is_red(short, monkeypatch, operator):
    """Once it was right in the same memory, and then a kernel leaves one tensor out."""
    with emulated.running(emulated.load()):
        found = [case for case in gpu_cases.operators(DATA, "cuda") if case.operation.startswith(operator)]
        right = getattr(cuda, f"{operator}_many")

        def lazy(parameters, own, *shared):
            results = right(parameters, own, *shared)
            first = results[1][0] if operator == "merge_rows" else results[1]
            first.copy_(torch.empty(first.shape, dtype=first.dtype))
            return results

        monkeypatch.setattr(cuda, f"{operator}_many", lazy)
        for result in measure.measure(found, 1, timed=timed_by(1.0)):
            assert result.wrong is not None
            assert result.seconds == ()


def test_peers_are_cases_too():
    for case in (gpu_cases.row_peer(DATA, "autograd"), gpu_cases.global_peer(DATA, "autograd")):
        (result,) = measure.measure([case], 1)
        assert (result.wrong, result.skipped, len(result.seconds)) == (None, None, 1)
    assert gpu_cases.row_peer(DATA, "autograd").repeats == 300.0


def test_what_is_compiled_is_a_section(monkeypatch):
    """Without the compiler, whose own time is long."""
    monkeypatch.setitem(peers.PEERS, "compiled", peers.autograd)
    results = gpu.run("compiled", DATA, "cpu", gpu.options(["--rehearse", "--rounds=1"]))
    assert [(one.case.operation, one.case.backend, one.wrong) for one in results] == [
        ("copy", "PyTorch", None),
        ("adam_step", "compiled", None),
    ]


def test_a_wrong_descent_is_red(short, monkeypatch):
    right = reference.descend

    def off(*given):
        coefficients, history = right(*given)
        return coefficients * 1.1, history

    monkeypatch.setattr(reference, "descend", off)
    assert "absolute: the first or last loss is wrong" in str(gpu_cases.descend(DATA, "reference").check())


def test_the_step_of_a_model_suits_its_longest_norms():
    large = bench.Parameters(DATA.bases, tuple(tuple(m + 1.0 for m in models) for models in DATA.models), DATA.layer)
    assert gpu_cases.common_step(large, "row").lr > gpu_cases.common_step(DATA, "row").lr > 0.0
    assert gpu_cases.firsts(DATA) == [0, 1]


# The program, its results and targets.


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_sections_are_added_to_a_run_and_judged_together(tmp_path, monkeypatch, capsys, short):
    monkeypatch.setitem(gpu.REHEARSED, "cuda", "native")
    arguments = ["--rehearse", "--shape=tiny_x3", "--rounds=1", f"--results={tmp_path}"]
    assert gpu.main([*arguments, "--sections=cuda"]) == 0
    assert gpu.main([*arguments, "--sections=peers", "--add"]) == 0
    file = harness.results_file(tmp_path, gpu.facts("cpu")["device"])
    assert file.name.startswith("rehearsal-on-")
    kept = json.loads(file.with_suffix(".json").read_text())
    assert list(kept["sections"]) == ["cuda", "peers"]
    assert file.read_text().count("date,") == 1
    assert "native, from Python" in file.read_text()
    capsys.readouterr()
    assert gpu.main([f"--verdict={file.with_suffix('.json')}"]) == 0
    said = capsys.readouterr().out
    assert "REHEARSAL" in said
    assert said.count("not measured") == 2 * 2  # compiled, and resident against a stream that native does not have
    kept["sections"]["cuda"][1]["wrong"] = "it is off"
    file.with_suffix(".json").write_text(json.dumps(kept))
    assert gpu.main([f"--verdict={file.with_suffix('.json')}"]) == 1
    assert "WRONG gram row (native): it is off" in capsys.readouterr().out


def test_a_run_on_a_gpu_fails_where_something_is_missing(tmp_path, monkeypatch, capsys):
    """The program as on a GPU, but for what would need one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "facts", lambda device: {"device": "NVIDIA H200", "driver": "580.1", "date": "today"})
    monkeypatch.setattr(Shape, "parameters", lambda shape, device: DATA)
    found = {"cuda": [result("combine", 1.0)], "triton": [replace(result("combine", 1.0), seconds=(), skipped="it is")]}
    monkeypatch.setattr(gpu, "run", lambda section, data, device, chosen: found[section])
    assert gpu.main([f"--results={tmp_path}", "--sections=cuda"]) == 0
    assert gpu.main([f"--results={tmp_path}", "--sections=triton", "--add"]) == 1
    said = capsys.readouterr().out
    assert "REHEARSAL" not in said
    assert "SKIPPED combine (cuda): it is" in said
    assert (tmp_path / "nvidia-h200.csv").read_text().count("580.1") == 1


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_the_section_of_cuda_notes_how_each_case_was_launched(short, monkeypatch, capsys):
    def captured(run):
        found = run()
        if isinstance(found, streaming.Streamed):
            raise RuntimeError("it cannot be captured")
        return (lambda: found), []

    monkeypatch.setitem(gpu.REHEARSED, "cuda", "cuda")
    monkeypatch.setattr(gpu_clock, "captured", captured)
    monkeypatch.setattr(gpu_clock, "differing", lambda found, expected: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "adam_rows_case", lambda data, backend: WHOLE(data, backend, timed=4))
    with emulated.running(emulated.load()):
        results = gpu.run("cuda", DATA, "cpu", gpu.options(["--rehearse", "--rounds=2"]))
    notes = {one.case.operation: one.case.note for one in results if one.case.backend == "cuda"}
    assert {notes.pop(name) for name in ROWS} == {"a CUDA graph"}
    assert notes.pop("adam_step") == "4 iterations less 2, over 2; one global group"
    assert set(notes.values()) == {"no graph: it cannot be captured"}
    again = [one for one in results if one.case.backend == "cuda, from Python"]
    assert [one.case.operation for one in again] == [*ROWS, "adam_stream 2", "adam_stream 4"]
    assert all(one.seconds for one in again)


def test_a_backend_that_is_not_there_is_said(monkeypatch):
    chosen = gpu.options(["--rehearse", "--rounds=1"])
    for name in ("cuda", "opencl"):
        monkeypatch.setitem(gpu.REHEARSED, "cuda", name)
        monkeypatch.setattr(cuda, "unavailable", lambda: "CUDA sees no device")
        (result,) = gpu.run("cuda", DATA, "cpu", chosen)
        assert result.skipped == {"cuda": "CUDA sees no device", "opencl": "this version has no such backend"}[name]
        assert gpu.revived(gpu.recorded(result)).skipped == result.skipped


def test_the_facts_of_a_gpu(monkeypatch, tmp_path):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.159.04\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    known = gpu.facts("cuda")
    assert (known["device"], known["instruction set"], known["driver"]) == ("NVIDIA H200", "sm_90", "580.159.04")
    assert gpu_suite.machine()["gpu, memory, SM clock, its maximum, power limit"] == "580.159.04"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.driver() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpu.driver() == "unknown"
    assert gpu_suite.machine() == {}


def test_triton_may_be_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert gpu.triton_version() == ""


def result(operation: str, seconds: float, backend: str = "cuda", moved: float = 0.0) -> Result:
    case = Case(operation=operation, backend=backend, run=lambda: None, check=lambda: None, moved=moved, tasks=8)
    return Result(case, (seconds,) * 3)


def test_targets_are_reached_or_missed():
    found = [
        result("copy", 1.0, "PyTorch", moved=100e9),
        result("combine", 1.0, moved=91e9),
        result("gram row", 1.0, moved=84e9),
        result("adam_step", 1.0, moved=90e9),
        result(SGD_ROWS, 1.9, moved=100e9),
        result(SGD_ROWS, 1.9 * 1999, "autograd"),
        result("adam_step", 12.0, "autograd"),
        result("adam_step", 2.0, "compiled"),
        result("adam_rows 300", 50.0),
        result("adam_stream 300", 300.0),
        result("combine", 1.2, "triton", moved=91e9),
        result("gram row", 1.3, "triton", moved=84e9),
    ]
    verdicts = [target.verdict for target in gpu_targets.targets(found)]
    assert verdicts == [
        *["reached", "missed", "reached", "reached", "missed", "reached", "missed", "reached"],
        *["missed", "reached", *["not measured"] * 4],
    ]
    text = gpu_targets.verdicts(gpu_targets.targets(found))
    assert "91.0%" in text
    assert ">= 2,000 x" in text
    nothing = gpu_targets.targets([])
    assert {target.verdict for target in nothing} == {"not measured"}
    red = [replace(one, seconds=(), wrong="it is off") for one in found]
    assert {target.verdict for target in gpu_targets.targets(red)} == {"not measured"}


def test_predictions_are_those_that_were_counted():
    shape = SHAPES["vit_b32_x8"]
    found = gpu_targets.predictions(shape)
    assert len(found) == len(gpu_targets.targets([]))
    assert "3.4 GB" in found[0].counted
    assert found[0].predicted.startswith("0.79 ms")
    assert found[1].predicted.startswith("0.71 ms; arithmetic 0.16 ms and conversions 0.18 ms")
    assert found[2].predicted.startswith("1.19 ms")
    assert found[3].value == pytest.approx(1.9)
    assert "0.70 ms" in found[3].predicted
    assert "31 ms and 32 ms" in found[7].predicted
    slower = gpu_targets.predictions(shape, replace(gpu_targets.H200, copy=3.0e12))
    assert slower[0].predicted.startswith("1.13 ms")
    # Of docs/performance.md: one read of the data, with eight rows on a multiprocessor and 700 cycles an iteration.
    gpu = gpu_targets.H200
    assert 82_944 / (8 * gpu.processors) * 300 * 700 / gpu.clock == pytest.approx(9.4e-3, rel=0.01)


def test_traffic_is_counted_by_operation_and_not_for_views():
    with gpu_targets.Traffic() as traffic:
        a = torch.ones(8)
    assert traffic.moved == 32
    with gpu_targets.Traffic() as traffic:
        (a.view(2, 4).T + 1.0).add_(1.0)
    assert traffic.moved == 64 + 64 + 0 * len(a)
    assert gpu_targets.autograd_traffic(Adam(), 1, 3, 64) > gpu_targets.autograd_traffic(Adam(), 1, 2, 64) > 0.0
    assert isinstance(peers.autograd(torch.ones(1, 2, 3), SGD()), peers.Autograd)


@pytest.mark.skipif(not (harness.ROOT / "docs").exists(), reason="a copy without the documentation")
def test_the_documentation_has_the_table_that_the_command_prints(capsys):
    assert gpu.main(["--predict"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed.count("| not measured |") == len(gpu_targets.targets([]))
    documented = (harness.ROOT / "docs" / "performance.md").read_text().splitlines()
    for line in printed.splitlines():
        if "of autograd" in line:  # its operations are those of the version of PyTorch
            line = line[: line.index("not measured") + len("not measured |")]
        assert any(one.startswith(line) for one in documented), line


def test_the_command_says_what_it_does():
    for module in ("gpu", "gpu_suite"):
        command = [sys.executable, "-m", f"benchmarks.{module}", "--help"]
        done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=True)
        assert "--rehearse" in done.stdout
