"""The benchmark harness: new operators against their contract, CSV rows, shapes, peers, targets, exit code."""

import csv
import math
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awd_fast import bench, measure, ops
from awd_fast.measure import Case, Result
from awd_fast.objective import SGD, Adam, Converge, Objective
from awd_fast.ops import reference
from benchmarks import cases, cpu, harness, integrations, peers, plot, targets
from benchmarks.shapes import SHAPES, Shape

DATA = bench.synthetic([(5, 24), (4, 40)], 1, 3)
Merged = namedtuple("Merged", "merged gram coefficients history")


def merge_rows(base, models, weights, objective, optimizer, groups="row", *, dtype=None, backend=None):
    return Merged(*bench.three_calls(base, models, weights, objective, optimizer, groups, "reference"))


def adam_rows(base, models, objective, optimizer, groups="row", *, backend=None):
    shift, history = ops.descend_elements(reference.task_vectors(base, models, groups), objective, optimizer)
    return reference.ungroup(shift, base.shape, groups), history


def adam_step(base, models, shift, velocity, square, slope, optimizer, step, *, l1=0.0, backend=None) -> Tensor:
    t = torch.stack([model - base for model in models]).double()
    r, multiple = slope[:-1], slope[-1]
    gradient = (multiple * shift.double() - 2.0 * torch.einsum("k,kij->ij", r, t)).float()
    beta1, beta2 = optimizer.betas
    velocity.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    spread = (square / (1.0 - beta2**step)).sqrt() + optimizer.eps
    shift.sub_(optimizer.lr / (1.0 - beta1**step) * velocity / spread)
    d = shift.double()
    return torch.cat([(t * d).sum(dim=(1, 2)), d.square().sum()[None], d.abs().sum()[None]])


@pytest.fixture
def operators(monkeypatch):
    """The operators as their contract has them, from the reference."""
    for operator in (merge_rows, adam_rows, adam_step):
        monkeypatch.setattr(ops, operator.__name__, operator, raising=False)
    monkeypatch.setitem(bench.DESCENTS, "converge", Converge(max_iterations=3))  # the reference takes long for more


def new_cases(operator: str = "") -> list[Case]:
    found = [
        bench.merge_case(DATA, "reference", "sgd300", "row"),
        bench.merge_case(DATA, "reference", "converge", "column"),
        bench.adam_rows_case(DATA, "reference", timed=3),
        bench.adam_step_case(DATA, "reference"),
    ]
    return [case for case in found if case.operation.startswith(operator)]


def test_operators_that_keep_the_contract_are_timed(operators):
    results = measure.measure(new_cases(), 1)
    assert [result.wrong or result.skipped for result in results] == [None] * 4
    assert all(len(result.seconds) == 1 for result in results)


@pytest.mark.parametrize("operator", ["merge_rows", "adam_rows", "adam_step"])
def test_operators_that_break_it_are_red_and_not_timed(operators, monkeypatch, operator):
    right = getattr(ops, operator)

    def off(*arguments, **options):
        found = right(*arguments, **options)
        if operator == "merge_rows":
            return found._replace(merged=found.merged * (1.0 + 1e-5))
        if operator == "adam_rows":
            return found[0] * 1.01, found[1]
        return found * (1.0 + 1e-4)

    monkeypatch.setattr(ops, operator, off)
    for result in measure.measure(new_cases(operator), 1):
        assert result.wrong is not None
        assert result.seconds == ()


@pytest.mark.parametrize(
    ("name", "elements", "tensors"),
    [
        ("minilm_x8", 10_616_832, 36),
        ("bert_base_x8", 84_934_656, 72),
        ("vit_b32_x8", 84_934_656, 72),
        ("vit_l14_x8", 301_989_888, 144),
        ("llama_1b_x4", 60_817_408, 7),
    ],
)
def test_shapes_have_the_elements_of_their_models(name, elements, tensors):
    shape = SHAPES[name]
    assert shape.elements == elements
    assert shape.layers * len(shape.weights) == tensors


def test_sections_take_the_layers_that_fit(monkeypatch):
    monkeypatch.setattr(cases, "MOST_BYTES", 3.5 * 4.0 * 1000)
    shape = Shape(((10, 50), (50, 10)), layers=9, tasks=2)
    fitted, note = cases.fitting(shape, 4.0)
    assert (fitted.layers, note) == (3, "3 of 9 layers alone")
    assert cases.fitting(replace(shape, layers=2), 4.0)[1] == ""
    assert cases.fitting(shape, 4e9)[0].layers == 1


def test_parameters_are_those_of_the_shape():
    data = SHAPES["tiny_x3"].parameters()
    assert (data.elements, data.tasks) == (SHAPES["tiny_x3"].elements, 3)
    vectors = torch.stack([(model - data.bases[0]).flatten() for model in data.models[0]])
    assert float(data.bases[0].std()) == pytest.approx(0.04, rel=0.2)
    assert float(vectors.std()) == pytest.approx((1e-8 + 9e-8) ** 0.5, rel=0.2)


@pytest.mark.parametrize("name", ["autograd", "cosine loop", "pairwise"])
def test_peers_follow_the_reference(name):
    t = torch.randn(6, 4, 30, generator=torch.Generator().manual_seed(0))
    t = (t + torch.randn(6, 1, 30, generator=torch.Generator().manual_seed(1))) * 3e-4
    assert cases.wrong_peer(name, t, SGD(lr=1e-7)) is None
    if name != "pairwise":
        assert cases.wrong_peer(name, t, Adam()) is None


def test_a_peer_on_another_trajectory_is_red(monkeypatch):
    wrong = {"autograd": lambda t, optimizer: peers.autograd(t, replace(optimizer, lr=1.5 * optimizer.lr))}
    monkeypatch.setattr(peers, "PEERS", wrong)
    result = measure.measure([cases.descent_peer(DATA, "autograd")], 1)[0]
    assert "the loss after 10 iterations is" in str(result.wrong)
    assert result.seconds == ()


def result(operation: str, seconds: float, backend: str = "native", **options: object) -> Result:
    case = Case(operation=operation, backend=backend, run=lambda: None, check=lambda: None, **options)
    return Result(case, (seconds,) * 3)


def test_rows_are_appended_below_one_header(tmp_path):
    known = harness.facts()
    results = [
        result("triad", 1.0, "plain stores", moved=4e9),
        result("triad", 1.0, "non-temporal stores", moved=8e9),
        result("combine", 0.5, moved=3e9, tasks=8, note="a, b"),
        Result(replace(result("gram row", 1.0).case), wrong="it is off"),
    ]
    file = tmp_path / "results" / "cpu.csv"
    for _ in range(2):
        harness.append(file, harness.rows(results, "tiny", known))
    with file.open(newline="") as lines:
        found = list(csv.DictReader(lines))
    assert file.read_text().count("date,") == 1
    assert [row["operation"] for row in found] == ["triad", "triad", "combine"] * 2
    assert set(found[0]) == set(harness.COLUMNS)
    assert (found[2]["GB/s"], found[2]["share"], found[2]["K"], found[2]["note"]) == ("6.00", "0.750", "8", "a, b")
    assert (found[0]["K"], found[2]["rounds"], found[2]["shape"]) == ("", "3", "tiny")
    assert all(found[0][name] for name in known)


def test_targets_are_reached_missed_or_not_measured():
    found = [
        result("triad", 1.0, "non-temporal stores", moved=100e9),
        result("combine", 1.0, moved=96e9),
        result("gram row", 1.0, moved=79e9),
        result(cases.SGD_ROWS, 2.9),
        result(cases.SGD_ROWS, 3000.0, "autograd"),
    ]
    dtypes = [result("combine", 1.0, tasks=8), result("combine", 0.5, tasks=8, dtype="bfloat16")]
    by_name = {target.name: target.verdict for target in targets.targets(found, dtypes, 1.06)}
    assert list(by_name.values()) == [
        "reached",
        "missed",
        "not measured",
        "reached",
        "not measured",
        "reached",
        *["not measured"] * 3,
        "reached",
        "not measured",
        "missed",
    ]
    assert "2.00x" in targets.dtype_table(dtypes)
    by_k = [result("combine", 0.1 * k, tasks=k) for k in cases.TASKS]
    assert targets.task_table(by_k).count("(1.00x)") == len(cases.TASKS)
    assert math.isnan(targets.targets([], [], math.nan)[0].value)


def test_iterations_of_adam_are_scaled_up():
    many = cases.three_hundred(result("adam_step", 0.01, moved=1e6))
    assert many.median == pytest.approx(3.0)
    assert many.gigabytes == pytest.approx(0.1)
    assert "1 of 300 iterations timed" in many.case.note


def test_a_red_check_ends_the_run_with_1_and_no_row(tmp_path, monkeypatch, capsys):
    arguments = ["--shape=tiny_x3", "--rounds=1", "--threads=1", "--sections=operators", f"--results={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["cpu", *arguments])
    monkeypatch.setattr(cases, "operators", lambda data: [*cases.triad(data), cases.task_arithmetic(data)])
    assert cpu.main() == 0
    file = harness.results_file(tmp_path)
    before = file.read_text()
    assert "combine,PyTorch" in before
    assert file.with_suffix(".svg").stat().st_size < 200_000
    monkeypatch.setattr(peers, "task_arithmetic", lambda base, models, scale: base)
    assert cpu.main() == 1
    assert "combine" not in file.read_text().removeprefix(before)
    assert "WRONG combine (PyTorch, float32)" in capsys.readouterr().out


def test_the_picture_is_small_enough_for_the_readme(tmp_path):
    found = [result("triad", 1.0, "non-temporal stores", moved=1e11)]
    for number, operation in enumerate(plot.GROUPS):
        for index, backend in enumerate(plot.COLOURS):
            found.append(result(operation, 10.0 ** (index - 3 + number / 7), backend, moved=1e8))
    harness.append(tmp_path / "all.csv", harness.rows(found, "tiny", harness.facts()))
    plot.draw(plot.last_run(tmp_path / "all.csv", "tiny"), tmp_path / "all.svg")
    assert 10_000 < (tmp_path / "all.svg").stat().st_size < 200_000


def test_the_objective_of_the_peers_is_the_default():
    assert peers.OBJECTIVE == Objective() == bench.OBJECTIVE


def test_merges_inside_other_libraries_are_judged_by_processor_time():
    pairs = integrations.sides(own_models=2)
    names = {side.name for pair in pairs for side in pair} | {"adamerging"}
    assert set(integrations.TARGETS) <= names
    own, fast = next(pair for pair in pairs if pair[1].name == "mergekit ties accelerate")
    assert own.rounds == 1
    own.runs = [{"cpu": 30.0, "wall": 20.0, "peak": 3e9, "anon": 1e9}]
    fast.runs = [{"cpu": cpu, "wall": 1.0, "peak": 2e9, "anon": 1e9} for cpu in (1.0, 2.5, 2.0)]
    assert "15.0 x, asked 15: reached" in integrations.line((own, fast), "equal")
    fast.runs[2]["cpu"] = 2.2
    assert "13.6 x, asked 15: MISSED" in integrations.line((own, fast), "equal")
    own, fast = next(pair for pair in pairs if pair[1].name == "fusion_bench ties accelerate")
    own.runs = [{"cpu": 30.0, "wall": 20.0, "peak": 9e9, "anon": 1e9}]
    for peak, said in ((1.9e9, "under 2 GB"), (2.1e9, "OVER 2 GB")):
        fast.runs = [{"cpu": 3.0, "wall": 1.0, "peak": peak, "anon": 1e9}]
        assert said in integrations.line((own, fast), "not compared")
    assert integrations.row(fast, 8)["K"] == "8"
    assert integrations.row(own, 8)["K"] == "2"
