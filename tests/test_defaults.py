"""What a merge does where its options do not say: the rules, and that Python, command line, YAML and card agree."""

import inspect
import json
import math

import pytest
import torch
import yaml

import awd_fast
from awd_fast import SGD, Adam, Converge, InputError, defaults
from awd_fast.recipe import make_recipe
from tests.conftest import tuned
from tests.test_cli import arguments, run
from tests.test_pipeline import contents


@pytest.mark.parametrize(
    ("weights", "scale"),
    [
        ([1], 1.0),
        ([1, 1], 1.25 / math.sqrt(2)),
        ([1] * 8, 1.25 / math.sqrt(8)),
        ([1, 0], 1.0),  # a model without a weight adds nothing
        ([1, 0, 1, 0.0], 1.25 / math.sqrt(2)),
        ([0, 0], 1.0),
        ([1, -1], 1.25 / math.sqrt(2)),  # one that is forgotten adds as much
        ([0.1, 5, -3], 1.25 / math.sqrt(3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["awd", "task_arithmetic"])
def test_the_scale_follows_from_the_number_of_models(method, weights, scale):
    recipe = make_recipe(len(weights), method=method, weights=weights)
    assert recipe.scale == scale
    assert recipe.others_scale is None
    assert recipe.plain_scale == scale
    assert make_recipe(len(weights), method=method, weights=torch.tensor(weights)).scale == scale


@pytest.mark.parametrize(
    ("weights", "others"),
    [([1], 1.0), ([1, 1], 0.5**0.5), ([1] * 8, 8**-0.5), ([2, 0, -1], 0.5**0.5), ([0, 0], 1.0)],
    ids=str,
)
def test_wudi_restores_and_what_it_does_not_select_is_a_plain_sum(weights, others):
    recipe = make_recipe(len(weights), method="wudi", weights=weights)
    assert recipe.scale == 1.0
    assert recipe.plain_scale == pytest.approx(others, rel=1e-15)
    assert (recipe.others_scale is None) == (others == 1.0)
    assert make_recipe(len(weights), method="wudi", weights=weights, scale=0.5).plain_scale == recipe.plain_scale / 2


def test_scales_that_are_given_win():
    for method in ("awd", "task_arithmetic", "wudi"):
        recipe = make_recipe(4, method=method, scale=0.3, others_scale=0.2)
        assert (recipe.scale, recipe.others_scale) == (0.3, 0.2)
        assert make_recipe(4, method=method, others_scale=0).plain_scale == 0.0
        assert make_recipe(4, method=method, scale=0).plain_scale == 0.0
    assert make_recipe(4, scale=2).plain_scale == 2.0  # above 1 too
    assert make_recipe(4, preset="rows", scale=0.3).scale == 0.3


def test_an_average_has_no_scale(tmp_path, checkpoints):
    assert make_recipe(3, method="average").scales() == ""
    code, out, _ = run("merge", *arguments(checkpoints), "--out", tmp_path / "out", "--method", "average")
    assert code == 0
    assert "with scale" not in out
    assert "scale" not in json.loads((tmp_path / "out" / "awd_fast.json").read_text())["recipe"]["parameters"]


def test_the_update_of_right_angles_is_as_long_as_was_said():
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.zeros(20, 400)}
    models = [{"a.weight": torch.randn(20, 400, generator=g)} for _ in range(9)]
    merged = awd_fast.merge(base, models, method="task_arithmetic")["a.weight"]
    lengths = [float(model["a.weight"].norm()) for model in models]
    assert float(merged.norm()) == pytest.approx(1.25 * sum(lengths) / 9, rel=0.05)


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({}, Converge()),
        ({"tolerance": 0.01}, Converge(tolerance=0.01)),
        ({"max_iterations": 3}, Converge(max_iterations=3)),
        ({"lr": 0.1}, SGD(lr=0.1)),
        ({"iterations": 3}, SGD(iterations=3)),
        ({"momentum": 0.5}, SGD(momentum=0.5)),
        ({"nesterov": True}, SGD(nesterov=True)),
        ({"weight_decay": 0.0}, SGD(weight_decay=0.0)),
        ({"lr": 0.1, "iterations": 3, "weight_decay": 0.0}, SGD(lr=0.1, iterations=3, weight_decay=0.0)),
        ({"betas": (0.5, 0.6)}, Adam(betas=(0.5, 0.6))),
        ({"adam_eps": 1e-3, "lr": 0.1}, Adam(eps=1e-3, lr=0.1)),
        ({"lr": None, "momentum": None}, Converge()),
        ({"preset": "rows", "lr": 0.1}, SGD(lr=0.1)),
        ({"preset": "rows", "optimizer": "converge"}, Converge()),
    ],
    ids=str,
)
def test_the_optimizer_is_the_first_that_has_the_options(options, optimizer):
    assert make_recipe(2, **options).options.optimizer == optimizer


def test_options_that_no_optimizer_has_together_are_named():
    for options in ({"lr": 0.1, "tolerance": 0.1}, {"betas": (0.5, 0.6), "momentum": 0.5}):
        with pytest.raises(InputError, match=f"no optimizer has all of the options {', '.join(options)}; name one"):
            make_recipe(2, **options)


def test_python_says_the_same_defaults():
    recipe = make_recipe(2)
    known = {name: getattr(recipe.options.objective, name) for name in ("similarity", "penalty", "alpha", "eps")}
    known |= {"groups": recipe.options.groups, "optimizer": recipe.options.optimizer}
    for function in (awd_fast.merge, awd_fast.disentangle, awd_fast.RedundantVector):
        said = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
        steps = {"optimizer": SGD()} if function is awd_fast.RedundantVector else {}
        assert {name: said[name] for name in known} == known | steps
    said = {name: parameter.default for name, parameter in inspect.signature(awd_fast.merge).parameters.items()}
    assert said["scale"] is said["others_scale"] is None
    for name in ("method", "others", "missing", "exclude", "ridge", "columns", "device"):
        assert said[name] == getattr(recipe, name)


def test_a_merge_without_options_is_the_one_that_is_documented(base_state, model_states):
    found = awd_fast.merge(base_state, model_states)
    named = {"similarity": "squared", "penalty": "l2", "alpha": 1e-6, "eps": 1e-8, "optimizer": Converge()}
    same = awd_fast.merge(base_state, model_states, scale=1.25 / 3**0.5, groups="row", **named)
    old = awd_fast.merge(base_state, model_states, scale=0.3, **awd_fast.ROWS)
    assert all(torch.equal(found[name], same[name]) for name in found)
    assert any(not torch.equal(found[name], old[name]) for name in found)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, {"scale": 1.25 / math.sqrt(3)}),
        ({"weights": (1, 0, -2)}, {"scale": 1.25 / math.sqrt(2)}),
        ({"method": "task_arithmetic"}, {"scale": 1.25 / math.sqrt(3)}),
        ({"method": "wudi"}, {"scale": 1.0, "others_scale": 1 / math.sqrt(3)}),
        ({"method": "wudi", "scale": 0.8}, {"scale": 0.8, "others_scale": 0.8 / math.sqrt(3)}),
    ],
    ids=str,
)
def test_the_card_shows_the_numbers_and_gives_the_same_bytes(tmp_path, checkpoints, options, numbers):
    base, models = checkpoints
    awd_fast.merge_checkpoints(base, models, tmp_path / "python", **options)
    report = json.loads((tmp_path / "python" / "awd_fast.json").read_text())
    text = (tmp_path / "python" / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    for parameters in (report["recipe"]["parameters"], yaml.safe_load(text)["parameters"]):
        assert {name: value for name, value in parameters.items() if "scale" in name} == numbers
    (tmp_path / "c.yml").write_text(text)
    given = [f"--{name}={value}" for name, value in options.items() if name != "weights"]
    given += [f"--weight={weight}" for weight in options.get("weights", ())]
    code, said, _ = run("merge", tmp_path / "c.yml", "--out", tmp_path / "yaml")
    assert code == 0
    assert f"with scale {numbers['scale']:.4g}" in said
    assert run("merge", *arguments(checkpoints), "--out", tmp_path / "cli", *given)[0] == 0
    assert contents(tmp_path / "python") == contents(tmp_path / "yaml") == contents(tmp_path / "cli")
    code, said, _ = run("merge", *arguments(checkpoints), "--out", tmp_path / "dry", *given, "--dry-run")
    assert code == 0
    shown = f"scale {numbers['scale']:.4g}"
    shown += f", of the other tensors {numbers['others_scale']:.4g}" if "others_scale" in numbers else ""
    assert shown in said.splitlines()


def test_a_file_that_names_no_scale_gets_that_of_the_method(tmp_path, checkpoints):
    base, models = checkpoints
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"base_model": str(base), "models": [str(m) for m in models]}))
    assert run("merge", tmp_path / "c.yml", "--out", tmp_path / "out", "--method", "wudi")[0] == 0
    parameters = json.loads((tmp_path / "out" / "awd_fast.json").read_text())["recipe"]["parameters"]
    assert (parameters["scale"], parameters["others_scale"]) == (1.0, 1 / math.sqrt(3))


def test_the_help_says_the_defaults():
    _, out, _ = run("merge", "--help")
    text = " ".join(out.split())
    assert "[default: for K models min(1, 1.25 / sqrt(K)); of wudi 1]" in text
    assert "[default: --scale; of wudi --scale / sqrt(K)]" in text
    assert "|cos| or cos^2. [default: squared]" in text
    assert "[default: converge" in text


def test_one_model_is_given_back(base_state):
    """There is nothing to be disentangled from, and nothing that lengthens the update."""
    model = tuned(base_state, 0)
    for method in ("awd", "task_arithmetic", "wudi"):
        merged = awd_fast.merge(base_state, [model], method=method)
        for name, tensor in model.items():
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5)


def test_an_l1_penalty_converges_too(base_state, model_states):
    """By shrinking steps, in the reference path."""
    reports = []
    awd_fast.merge(base_state, model_states, penalty="l1", alpha=1e-4, on_report=reports.append)
    assert reports[0].overall.loss_after < 0.5 * reports[0].overall.loss_before
    assert reports[0].warning() is None


def test_the_rules_hold_for_any_collection_of_weights():
    assert defaults.vectors(()) == 1
    assert defaults.vectors((0.0, 2.0, -0.0)) == 1
