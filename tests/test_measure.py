"""How speed is measured: the triad is right, wrong cases are not timed, and `awd-fast bench` runs."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from awd_fast import bench, measure, ops
from awd_fast.errors import InputError
from awd_fast.measure import CannotRunError, Case
from awd_fast.ops import native
from tests.test_cli import run as command

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def case(name: str, calls: list[str], wrong: str | None = None, **options: object) -> Case:
    def run() -> None:
        calls.append(name)

    return Case(**{"operation": name, "backend": "native", "run": run, "check": lambda: wrong} | options)


@needs_native
@pytest.mark.parametrize("instruction_set", ["base", "avx2", "avx512"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_triad_is_right_for_any_size_alignment_and_threads(instruction_set, streaming):
    module = native._module()
    present = module.cpu_isa()
    try:
        module.choose_cpu_isa(instruction_set)
    except ValueError:
        pytest.skip(f"this CPU has no {instruction_set}")
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for count in (0, 1, 15, 16, 63, 64, 65, 1000, 12345):
                for first in (0, 1, 7):
                    b, c = torch.randn(2, count + first)[:, first:]
                    a = torch.full((count + first + 3,), torch.nan)
                    measure.triad(a[first : first + count], b, c, 3.0, streaming)
                    torch.testing.assert_close(a[first : first + count], b + 3.0 * c, rtol=1e-6, atol=1e-6)
                    assert bool(a[:first].isnan().all())
                    assert bool(a[first + count :].isnan().all())
    finally:
        module.choose_cpu_isa(present)


def test_a_case_is_checked_before_it_is_run():
    calls: list[str] = []

    def refuse() -> str | None:
        raise CannotRunError("no compiler")

    def fail() -> str | None:
        raise ValueError("broken\nin two lines")

    def unable() -> str | None:
        unaligned = torch.frombuffer(bytearray(32), dtype=torch.float32, offset=2, count=6)
        ops.gram(None, [unaligned], backend="native")
        return None

    said: list[str] = []
    cases = [
        case("right", calls),
        case("wrong", calls, wrong="it is off by 3"),
        case("skipped", calls, check=refuse),
        case("failing", calls, check=fail),
        case("unable", calls, check=unable),
    ]
    right, wrong, skipped, failing, refused = measure.measure(cases, 3, say=said.append)
    assert calls == ["right"] * 4  # once to warm up
    assert len(right.seconds) == 3
    assert (wrong.seconds, wrong.wrong) == ((), "it is off by 3")
    assert (skipped.seconds, skipped.wrong, skipped.skipped) == ((), None, "no compiler")
    assert failing.wrong == "ValueError: broken"
    assert "backend native cannot run gram" in str(refused.skipped)
    assert said[1] == "WRONG wrong (native): it is off by 3"
    text = measure.table([right, wrong, skipped])
    assert "WRONG" in text
    assert "no compiler" in text


def test_rounds_are_interleaved_and_slow_cases_leave_early():
    calls: list[str] = []

    def clock(run: Callable[[], object]) -> measure.Timed:
        run()
        return (2.0 if calls[-1] == "slow" else 0.1), 0, 0

    results = measure.measure([case(name, calls) for name in ("a", "b", "slow")], 4, budget=1.0, timed=clock)
    assert calls == ["a", "b", "slow", *["a", "b", "slow"], *["a", "b"] * 3]
    assert [len(result.seconds) for result in results] == [4, 4, 1]


def test_what_is_scaled_up_is_counted_in():
    one = measure.measure([case("a", [], moved=8.0, repeats=100.0, run=lambda: time.sleep(0.001))], 2)[0]
    assert one.median >= 0.1
    assert one.gigabytes == pytest.approx(8.0 / one.median / 1e9)
    assert math.isnan(measure.measure([case("a", [])], 2)[0].gigabytes)


def test_a_busy_machine_is_noted():
    timed = measure.measure([case("a", [], note="part")], 2)[0]
    assert measure.note(replace(timed, preempted=0)) == "part"
    assert measure.note(replace(timed, preempted=5)) == "part; busy machine"


def test_the_memory_limit_is_the_better_triad():
    results = measure.measure(measure.triad_cases(1000), 3)
    assert measure.memory_limit(results) == max(result.gigabytes for result in results)
    assert all(result.wrong is None for result in results)
    assert math.isnan(measure.memory_limit([]))


def test_bytes_are_everything_once():
    data = bench.synthetic([(3, 5), (4, 5)], 2, 6)
    assert data.elements == 70
    assert bench.read_bytes(data) == 7 * 70 * 4
    assert bench.combine_bytes(data) == 8 * 70 * 4
    assert bench.adam_step_bytes(data) == (7 + 6) * 70 * 4
    assert bench.combine_bytes(data.to(torch.bfloat16)) == 8 * 70 * 2
    assert bench.adam_step_bytes(data.to(torch.bfloat16)) == 7 * 70 * 2 + 6 * 70 * 4
    assert data.first_layer().elements == 35
    assert data.first_tasks(2).tasks == 2


@pytest.mark.parametrize("operator", ["gram", "descend", "combine", "multi_dot"])
def test_a_wrong_operator_is_red(monkeypatch, operator):
    data = bench.synthetic([(12, 16)], 1, 3)
    right = getattr(ops, operator)

    def off(*arguments: object, **options: object) -> object:
        found = right(*arguments, **options)
        if operator == "descend":
            return found[0] * (1.0 + 1e-3), found[1]
        found[0, 0] *= 1.0 + 1e-4
        return found

    cases = {
        "gram": lambda: bench.gram_case(data, "reference", "row"),
        "multi_dot": lambda: bench.multi_dot_case(data, "reference", "row"),
        "combine": lambda: bench.combine_case(data, "reference"),
        "descend": lambda: bench.descend_case(data, "reference", "sgd300"),
    }
    assert measure.measure([cases[operator]()], 1)[0].wrong is None
    monkeypatch.setattr(ops, operator, off)
    result = measure.measure([cases[operator]()], 1)[0]
    assert result.wrong is not None
    assert result.seconds == ()


def test_the_command_compares_backends_and_memory():
    start = time.process_time()
    code, out, _ = command(
        "bench", "--rows", 6, "--columns", 12, "--tensors", 2, "--models", 2, "--rounds", 1, "--threads", 1
    )
    assert time.process_time() - start < 30.0  # 3 on an idle machine: a busy one makes processor time longer, too
    assert code == 0
    assert "instruction set" in out
    for operation in ("triad", "gram row", "combine", "descend sgd300", "descend converge"):
        assert operation in out
    if native.unavailable() is None:
        assert "x reference" in out


def test_the_command_fails_when_an_operator_is_wrong(monkeypatch):
    monkeypatch.setattr(ops, "gram", lambda base, models, groups, backend=None: torch.zeros(4, 2, 2).double())
    monkeypatch.setattr(bench, "operator_cases", lambda data, backend, peer: [bench.gram_case(data, backend, "row")])
    code, out, error = command("bench", "--rows", 4, "--columns", 9, "--tensors", 1, "--models", 2, "--rounds", 1)
    assert code == 1
    assert "WRONG" in out
    assert "an operator gave a wrong result" in error


def test_too_few_of_anything_is_said():
    with pytest.raises(InputError, match="models"):
        bench.compare(4, 4, 1, 1, 1, print)
