"""The quality study's decisions: what chooses a scale, what an outcome depends on, and that splits are disjoint."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import awd_fast
from benchmarks.quality import claims, lab, methods, models, pages, run, study
from benchmarks.quality.classes import TEMPLATES, phrases
from benchmarks.quality.data import PACKAGES, Split, Task, cache_folder, load_task, normalised, require_disjoint
from benchmarks.quality.encoder import FrozenHead
from benchmarks.quality.lab import Lab, Ledger
from benchmarks.quality.methods import Method
from benchmarks.quality.study import COMMON_SCALE, SCALES, Finding


class FakeLab:
    """A base of one number; accuracy falls with the distance from a best scale that differs between the halves."""

    def __init__(self, validation: float = 0.6, test: float = 1.3) -> None:
        self.base = {"w": torch.zeros(1)}
        self.best = {"validation": validation, "test": test}
        self.asked: list[tuple[str, float]] = []

    def examine(self, weights, half, tasks=None):
        scale = float(weights["w"])
        self.asked.append((half, scale))
        right = round(100 - 60 * abs(scale - self.best[half]))
        return {"task": torch.arange(100) < right}


def found(validation: float, test: float, **options) -> tuple[Finding, FakeLab]:
    fake = FakeLab(validation, test)
    method = Method("m", "b", lambda given: {"w": torch.ones(1)}, **options)
    return study.investigate(fake, method, 0), fake


def test_validation_texts_alone_choose_the_scale():
    finding, fake = found(0.6, 1.3)
    assert finding.chosen == 0.6
    halves = [half for half, _ in fake.asked]
    assert halves == sorted(halves, key=["validation", "test"].index), "test texts were looked at before the choice"
    assert set(finding.test) == {0.6, COMMON_SCALE}
    other, _ = found(0.6, 0.2)
    assert other.chosen == finding.chosen


def test_hopeless_scales_are_left_out_and_equal_ones_give_the_smaller():
    finding, _ = found(0.3, 0.3)
    assert max(finding.validation) < max(SCALES)
    assert study.best({0.2: 0.7, 0.3: 0.8, 0.6: 0.8}) == 0.3


def test_a_variant_that_falls_behind_on_the_first_seed_is_not_run_on_another():
    def row(name: str, validation: float) -> Finding:
        return Finding(name, "block", 0, True, 0.0, 0.6, {0.6: validation})

    findings = {name: [row(name, value)] for name, value in (("best", 0.8), ("near", 0.795), ("far", 0.78))}

    def asked(name: str, **options) -> bool:
        return study.behind(Method(name, "block", lambda given: {}, **options), findings)

    variants = {"seeds": models.CHOOSING_SEEDS}
    assert [asked(name, **variants) for name in ("best", "near", "far", "new")] == [False, False, True, False]
    assert not asked("far"), "on every seed whatever comes out"
    findings["best"].append(Finding("best", "block", 1, True, 0.0, 0.6, {0.6: 0.7}))
    findings["near"].append(Finding("near", "block", 1, True, 0.0, 0.6, {0.6: 0.72}))
    assert pages.best_of(findings, "block", [0, 1]) == "near", "the one with one seed is not in the choice"


def test_a_method_without_a_scale_is_examined_once():
    finding, fake = found(1.0, 1.0, scaled=False)
    assert fake.asked == [("test", 1.0)]
    assert finding.common is None


def test_a_curve_has_all_scales():
    finding, _ = found(0.6, 0.6, curve=True)
    assert set(finding.test) == set(finding.validation)


def test_means_and_gains_over_seeds():
    first = [{"a": torch.tensor([True] * 3 + [False])}, {"a": torch.tensor([True] * 4)}]
    second = [{"a": torch.tensor([True] * 2 + [False] * 2)}, {"a": torch.tensor([True] * 4)}]
    value = study.gain(first, second)
    assert value.value == pytest.approx(0.125)
    assert value.by_texts == pytest.approx(0.25 / 2)  # of one seed: variance 1/4 of four texts; of the other: none
    assert value.by_seeds == pytest.approx(0.125)
    assert study.mean(first[:1]).error == study.mean(first[:1]).by_texts  # one seed says nothing about seeds


# Outcomes


@dataclass
class Model:
    """What a lab asks of a fine-tuned model."""

    settings: SimpleNamespace
    encoder: Path
    directions: torch.Tensor

    def head(self) -> FrozenHead:
        return FrozenHead(self.directions, torch.zeros(16))


def split(task: str, half: str, count: int) -> Split:
    return Split(tuple(f"{task} {half} {n}" for n in range(count)), tuple(n % 2 for n in range(count)))


@pytest.fixture
def make_lab(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    bert = transformers.BertModel(config).eval()
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}

    def tokenizer(texts, **options):
        return {"input_ids": [[1 + sum(map(ord, word)) % 49 for word in text.split()] for text in texts]}

    def task(name, sizes, seed):
        return Task(
            name,
            ("x", "y"),
            split(name, "training", sizes.train),
            split(name, "validation", sizes.validation),
            split(name, "test", sizes.test),
        )

    monkeypatch.setattr(lab, "VALIDATION_TEXTS", 6)
    monkeypatch.setattr(lab, "UNLABELLED_TEXTS", 4)
    monkeypatch.setattr(lab, "TEST_TEXTS", 8)
    monkeypatch.setattr(lab, "pretrained_folder", lambda: tmp_path)
    monkeypatch.setattr(lab, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(lab, "load_encoder", lambda folder: bert)
    monkeypatch.setattr(lab, "load_task", task)
    monkeypatch.setattr(lab, "read", lambda folder: state)
    ledger = Ledger(tmp_path / "outcomes.sqlite")

    def make(seed: int = 0) -> Lab:
        directions = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
        wanted = [SimpleNamespace(task=name, train=3, tokens=9, seed=0) for name in ("one", "two")]
        return Lab([Model(one, tmp_path, directions) for one in wanted], ledger)

    return make


def test_equal_weights_are_examined_once(make_lab):
    first = make_lab()
    outcome = first.examine(first.base, "test")
    assert {name: len(right) for name, right in outcome.items()} == {"one": 8, "two": 8}
    assert first.examined == 16
    again = make_lab()
    repeated = again.examine(again.base, "test")
    assert again.examined == 0
    assert all(torch.equal(outcome[name], repeated[name]) for name in outcome)


def test_an_outcome_depends_on_weights_half_tasks_and_heads(make_lab):
    one = make_lab()
    one.examine(one.base, "test")
    one.examine(one.base, "validation")
    one.examine(one.base, "test", ["two"])
    changed = dict(one.base)
    name = next(name for name, tensor in changed.items() if tensor.is_floating_point())
    changed[name] = changed[name] + 1e-3
    one.examine(changed, "test")
    assert one.examined == 16 + 12 + 8 + 16
    other = make_lab(seed=1)  # the same texts and weights, with other heads
    other.examine(other.base, "test")
    assert other.examined == 16


def test_a_part_of_the_tasks_has_the_outcome_that_all_have(make_lab):
    one = make_lab()
    assert torch.equal(one.examine(one.base, "test", ["two"])["two"], one.examine(one.base, "test")["two"])


def test_unlabelled_texts_are_in_no_other_split(make_lab):
    one = make_lab()
    assert len(one.unlabelled("one")) == 4
    assert len(one.split("one", "validation")) == 6
    texts = [*one.split("one", "validation").texts, *one.split("one", "test").texts]
    seen = {tuple(row) for half in ("validation", "test") for row in one.tokens("one", half)}
    assert len(texts) == 14
    assert not seen & {tuple(row) for row in one.unlabelled("one")}


def test_overlapping_splits_are_refused():
    def task(test: str) -> Task:
        return Task("t", ("x",), Split(("A text.",), (0,)), Split(("another",), (0,)), Split((test,), (0,)))

    require_disjoint(task("a third"))
    with pytest.raises(ValueError, match="in training and in test"):
        require_disjoint(task("a TEXT"))


@pytest.mark.skipif(
    not all((cache_folder() / "packages" / package.filename).is_file() for package in PACKAGES),
    reason="the texts are not in the cache; `make quality` fetches them",
)
@pytest.mark.parametrize("name", ["reuters", "books", "editorials", "films"])
def test_real_splits_are_disjoint(name):
    settings = models.settings(name, 0)
    task = load_task(name, lab.Sizes(settings.train, lab.VALIDATION_TEXTS + lab.UNLABELLED_TEXTS, 200), 0)
    require_disjoint(task)
    halves = [{normalised(text) for text in part.texts} for part in (task.train, task.validation, task.test)]
    assert sum(map(len, halves)) == len(set.union(*halves)) == 1200 + 350 + 200


# Rules and pages


def test_the_scale_of_least_interference_is_the_minimum():
    torch.manual_seed(0)
    base = {"layer.weight": torch.randn(12, 20), "layer.bias": torch.randn(12)}
    states = [{name: t + 0.1 * torch.randn_like(t) for name, t in base.items()} for _ in range(3)]
    fake = SimpleNamespace(base=base, states=states)
    full = awd_fast.merge(base, states, method="task_arithmetic", scale=1.0)
    name = "layer.weight"
    vectors = [(state[name] - base[name]).double() for state in states]

    def interference(scale: float) -> float:
        update = (full[name] - base[name]).double()
        return sum(float((((scale * update - t) @ t.T) ** 2).sum() / t.square().sum()) for t in vectors)

    for by_tensor in (True, False):
        merged = methods.least_interference(fake, full, by_tensor)
        scale = float(((merged[name] - base[name]) / (full[name] - base[name])).mean())
        assert interference(scale) < min(interference(scale - 0.02), interference(scale + 0.02))
        bias = (merged["layer.bias"] - base["layer.bias"]) / (full["layer.bias"] - base["layer.bias"])
        torch.testing.assert_close(bias, torch.full_like(bias, scale), rtol=1e-3, atol=1e-3)


def test_disentangled_states_add_up_to_the_merge():
    torch.manual_seed(0)
    base = {"layer.weight": torch.randn(6, 8), "layer.bias": torch.randn(6)}
    states = [{name: t + 0.1 * torch.randn_like(t) for name, t in base.items()} for _ in range(3)]
    fake = SimpleNamespace(base=base, states=states)
    total = sum(state["layer.weight"] - base["layer.weight"] for state in methods.disentangled(fake))
    merged = awd_fast.merge(base, states, scale=1.0, **methods.BEST_AWD)
    torch.testing.assert_close(total, merged["layer.weight"] - base["layer.weight"], rtol=1e-4, atol=1e-5)


def test_methods_have_names_of_their_own():
    names = [method.name for method in methods.own_methods()]
    assert len(set(names)) == len(names)
    assert {methods.TASK_ARITHMETIC, methods.AWD_ROWS, methods.AWD_PAPER, pages.WUDI_ROW} <= set(names)
    assert len(methods.confirming()) > 5


def test_classes_have_phrases_of_their_own():
    assert set(models.TWELVE) <= set(TEMPLATES)
    assert phrases("election", ["HillaryClinton"]) == ["a tweet by Hillary Clinton"]
    assert phrases("reuters", ["veg-oil", "soy-meal"]) == ["news about vegetable oil", "news about soy meal"]


def test_a_report_says_what_was_found(tmp_path):
    def finding(name: str, block: str, seed: int, right: int, scaled: bool = True) -> Finding:
        outcome = {"a": torch.arange(50) < right, "b": torch.arange(50) < right}
        one = Finding(name, block, seed, scaled, 0.5, chosen=0.6 if scaled else 1.0)
        one.validation = {0.3: 0.5, 0.6: right / 50, 1.0: 0.4} if scaled else {}
        one.test = {0.3: outcome, 0.6: outcome, 1.0: outcome} if scaled else {1.0: outcome}
        return one

    rows = {
        "individual": ("baselines", 45, False),
        methods.TASK_ARITHMETIC: (methods.BASELINES, 30, True),
        methods.AWD_PAPER: (methods.AWD, 31, True),
        methods.AWD_ROWS: (methods.AWD, 32, True),
        "AWD rows, squared, Converge": (methods.AWD, 35, True),
        pages.WUDI_ROW: (methods.WUDI, 40, True),
        "Task Arithmetic at 1 / sqrt(K)": (methods.RULES, 28, False),
        "AdaMerging, by task": (methods.ADAPTED, 33, False),
        "AWD rows + AdaMerging, by task": (methods.ADAPTED, 32, False),
    }
    eight = {name: [finding(name, b, seed, right, s) for seed in (0, 1, 2)] for name, (b, right, s) in rows.items()}
    points = [claims.Point("alpha", "squared", x, 0.7, 0.01) for x in claims.ALPHAS]
    points += [claims.Point("unseen", "WUDI", "a + b", 0.6, 0.01), claims.Point("similarity", "alpha", 0.1, 0.7, 0.01)]
    about = {"machine": "m", "torch": "t", "awd_fast": "v"}
    pages.write(tmp_path, eight, {"all twelve tasks": eight}, points, about)
    text = (tmp_path / "report.md").read_text()
    assert "Task Arithmetic, each at its chosen scale: +4.0 ± " in text
    assert "best AWD on validation texts of the choosing seeds, above Task Arithmetic: +10.0" in text
    assert re.search(r"above AdaMerging, by task: -2.0 ± \d.\d points; 0.0 were hoped for: NOT reached", text)
    assert "WUDI in closed form above Task Arithmetic: +20.0" in text
    for name in ("scales.png", "alpha.png", "unseen.png", "similarity.png", "results.json", "points.csv"):
        assert (tmp_path / name).stat().st_size > 0
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["half"] for line in lines} == {"validation", "test"}
    assert sum(line["method"] == pages.WUDI_ROW for line in lines) == 3 * (3 + 3)


def test_the_time_that_is_left_is_planned(monkeypatch):
    monkeypatch.setattr(run, "cached", lambda settings: None)
    everything = run.planned([0, 1], methods.own_methods(), [], {"claims"})
    assert everything > run.planned([0], methods.own_methods(), [], set()) > 0


def test_stages_are_chosen_as_scales_are():
    fake = FakeLab(0.6, 1.3)
    stages = [(10.0 * k, {"w": torch.full((1,), 0.3 * k)}) for k in range(4)]
    finding = study.investigate(fake, Method("m", "b", lambda given: {}, scaled=False, stages=lambda given: stages), 0)
    assert finding.chosen == 20.0
    assert list(finding.test) == [20.0]
    assert [half for half, _ in fake.asked] == ["validation"] * 4 + ["test"]
