"""The defaults and presets as they are documented, and how loose options become a recipe."""

import numpy as np
import pytest
import torch

import awd_fast
from awd_fast import Adam, Converge, InputError
from awd_fast.objective import Objective, Options
from awd_fast.plan import StateDict, make_plan
from awd_fast.recipe import DEFAULT_EXCLUDE, Recipe, make_recipe

SGD = awd_fast.SGD


def test_the_defaults():
    options = Options(
        groups="row",
        objective=Objective(similarity="squared", penalty="l2", alpha=1e-6, eps=1e-8),
        optimizer=Converge(tolerance=1e-6, max_iterations=200),
    )
    assert make_recipe(2) == Recipe(
        method="awd",
        scale=1.25 / 2**0.5,
        weights=(1.0, 1.0),
        others="task_arithmetic",
        others_scale=None,
        missing="error",
        options=options,
    )


def test_the_rows_preset_is_the_authors_later_options():
    rows = Options(
        groups="row",
        objective=Objective(similarity="absolute", penalty="l2", alpha=1e-6, eps=1e-8),
        optimizer=SGD(lr=1e-4, momentum=0.9, weight_decay=1e-4, nesterov=False, iterations=300),
    )
    assert make_recipe(2, preset="rows").options == rows
    assert make_recipe(2, **awd_fast.ROWS).options == rows
    assert Objective() == rows.objective
    assert SGD() == rows.optimizer
    assert Adam() == Adam(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, iterations=300)
    assert Converge() == Converge(tolerance=1e-6, max_iterations=200)


def test_the_paper_preset_is_as_published():
    paper = make_recipe(3, **awd_fast.PAPER)
    assert paper == make_recipe(3, preset="paper")
    assert paper.options == Options(
        groups="global",
        objective=Objective(similarity="absolute", penalty="l2", alpha=0.1, eps=1e-8),
        optimizer=SGD(lr=0.01, momentum=0.0, weight_decay=0.0, nesterov=False, iterations=300),
    )
    assert (paper.include, paper.exclude) == (("*",), ())


@pytest.mark.parametrize("preset", [awd_fast.PAPER, awd_fast.ROWS], ids=["paper", "rows"])
def test_a_preset_says_all_of_its_options(preset):
    """So that no default of anything else decides what it gives."""
    assert {"groups", "similarity", "penalty", "alpha", "eps", "optimizer"} <= set(preset)


EXAMPLES = {
    "*embed*": "model.embed_tokens.weight",
    "wte.*": "wte.weight",
    "*.wte.*": "transformer.wte.weight",
    "wpe.*": "wpe.weight",
    "*.wpe.*": "transformer.wpe.weight",
    "shared.*": "shared.weight",
    "*relative_attention_bias*": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "*bias": "attention.bias",
    "*norm*": "final_norm.weight",
    "*Norm*": "LayerNorm.weight",
    "*.ln_*": "h.0.ln_1.weight",
    "*pooler*": "pooler.dense.weight",
    "*classifier*": "classifier.weight",
    "*lm_head*": "lm_head.weight",
    "*_head.*": "classification_head.dense.weight",
    "head.*": "head.weight",
    "*.head.*": "model.head.weight",
    "heads.*": "heads.0.weight",
    "*.heads.*": "model.heads.0.weight",
    "cls.*": "cls.predictions.decoder.weight",
    "*.cls.*": "bert.cls.weight",
    "score.*": "score.weight",
    "*.score.*": "model.score.weight",
    "*qa_outputs*": "qa_outputs.weight",
}


def test_every_default_pattern_has_an_example():
    assert tuple(EXAMPLES) == DEFAULT_EXCLUDE


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_a_default_pattern_excludes_what_it_is_for(pattern):
    name = EXAMPLES[pattern]
    base = {name: torch.ones(2, 2), "layer.weight": torch.ones(2, 2)}
    plan = make_plan(StateDict("base", base), [StateDict("model", base)], make_recipe(1))
    assert {step.name: step.action for step in plan} == {name: "task_arithmetic", "layer.weight": "awd"}


def test_numbers_of_numpy_and_torch_are_numbers():
    recipe = make_recipe(2, scale=np.float32(0.5), weights=torch.tensor([1, 2]), iterations=np.int64(7))
    assert recipe == make_recipe(2, scale=0.5, weights=(1.0, 2.0), iterations=7)
    assert make_recipe(2, weights=np.array([1, 2])) == make_recipe(2, weights=[1.0, 2.0])


def test_options_of_the_optimizer_overrule_those_of_an_instance():
    given = make_recipe(1, optimizer=SGD(lr=0.5, momentum=0.0), iterations=9).options.optimizer
    assert given == SGD(lr=0.5, momentum=0.0, iterations=9)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"colour": 1}, "unknown option 'colour'"),
        ({"optimizer": "newton"}, "optimizer is 'newton'"),
        ({"weights": "ab"}, "weights is 'ab'"),
        ({"weights": [1, "x"]}, "weight is 'x'"),
        ({"include": [1]}, r"include is \[1\]"),
        ({"scale": True}, "scale is True"),
        ({"scale": 10**400}, "expected a finite number"),
        ({"device": torch.device("meta")}, "device is 'meta'"),
        ({"dtype": torch.int8}, "dtype is 'int8'"),
        ({"others": "drop"}, "others is 'drop'"),
        ({"missing": "skip"}, "missing is 'skip'"),
    ],
)
def test_bad_options_are_named(options, sentence):
    with pytest.raises(InputError, match=sentence):
        make_recipe(2, **options)


def test_a_looser_tolerance_takes_fewer_steps():
    t = torch.randn(6, 4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = {
        tolerance: len(awd_fast.disentangle(t.transpose(0, 1), optimizer=Converge(tolerance=tolerance)).history)
        for tolerance in (1e-2, 1e-8)
    }
    assert steps[1e-2] < steps[1e-8]
