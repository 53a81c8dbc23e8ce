"""What cannot be merged through mergekit is one sentence that names the option, before anything is written."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.merge_methods.base import PerGroupValues
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import awd_fast
from awd_fast import cli
from tests.integrations.families import WEIGHTS, Family, copied, make, same, tensors, written
from tests.test_cli import run

Change = Callable[[dict], object]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make(tmp_path_factory.mktemp("llama"), "llama", torch.float32, False)


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make(tmp_path_factory.mktemp("electra"), "electra", torch.float32, False)


@pytest.fixture(autouse=True)
def no_hints_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "HINTS", [])


def sliced(config: dict) -> None:
    models = [config["base_model"], *(entry["model"] for entry in config.pop("models"))]
    config["slices"] = [{"sources": [{"model": model, "layer_range": [0, 2]} for model in models]}]


def parameters(**given: object) -> Change:
    return lambda config: config.update(parameters=given)


def changes(*several: Change) -> Change:
    return lambda config: [change(config) for change in several]


GLOBAL = parameters(groups="global")
REFUSED: dict[str, tuple[Change, str]] = {
    "unknown option": (parameters(density=0.5), "parameters has the unknown option 'density'; awd has adam_eps, "),
    "option of a model": (
        lambda config: config["models"][1]["parameters"].update(groups="row"),
        "model1 has the option 'groups', which is one of the whole merge; expected weight only",
    ),
    "no base": (lambda config: config.pop("base_model"), "merge method awd has no base; expected base_model"),
    "wrong word": (parameters(groups="rows"), "groups is 'rows'; expected one of row, column, tensor, global"),
    "wrong number": (parameters(scale="much"), "scale is 'much'; expected a finite number"),
    "wrong weight": (
        lambda config: config["models"][0]["parameters"].update(weight="heavy"),
        "weight is 'heavy'; expected a finite number",
    ),
    "wrong sign": (parameters(alpha=-1), "alpha is -1; expected a number in [0.0, inf)"),
    "option of another optimizer": (parameters(optimizer="converge", lr=1), "optimizer converge has no option lr"),
    "unknown backend": (parameters(backend="fortran"), "backend is 'fortran'; expected one of native"),
    "pattern that matches nothing": (parameters(include="*.attention.*"), "include pattern '*.attention.*' matches no"),
    "nothing selected": (parameters(exclude="*"), "no tensor is left to disentangle"),
    "no model": (lambda config: config.update(models=[{"model": config["base_model"]}]), "no model was given"),
    "global and a tokenizer": (
        changes(GLOBAL, lambda config: config.update(tokenizer={"source": "base"})),
        "groups is global, which makes one group of all tensors as the files hold them, but the configuration has a "
        "tokenizer; expected none, or groups row or column",
    ),
    "global and tokenizer_source": (
        changes(GLOBAL, lambda config: config.update(tokenizer_source="base")),
        "the configuration has a tokenizer",
    ),
    "global and slices": (changes(GLOBAL, sliced), "the configuration has slices; expected none"),
    "global and a filter": (
        parameters(groups="global", alpha=[{"filter": "mlp", "value": 0.1}, {"value": 0.2}]),
        "groups is global, which makes one group of all tensors as the files hold them, but alpha differs between them",
    ),
    "global and a gradient": (
        changes(GLOBAL, lambda config: config["models"][0]["parameters"].update(weight=[0.5, 1.0])),
        "but weight differs between them; expected one value",
    ),
    "global for some": (
        parameters(groups=[{"filter": "mlp", "value": "global"}, {"value": "row"}]),
        "but groups differs between them; expected one value",
    ),
    "wrong type": (lambda config: config.update(models="M"), "models: Input should be a valid list"),
    "diverging descent": (parameters(optimizer="sgd", penalty="squared_l2", alpha=1e9, lr=1e9), "diverged"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_configurations_are_refused_in_one_sentence(
    tmp_path: Path, llama: Family, change: Change, message: str
) -> None:
    config = llama.config()
    change(config)
    code, out, error = run("mergekit", written(tmp_path, config), tmp_path / "out", "--quiet")
    assert (code, out) == (2, "")
    assert error.startswith(f"awd-fast: {tmp_path / 'config.yml'}: ")
    assert message in error
    assert error.count("\n") == 1
    if "diverged" not in message:
        assert not (tmp_path / "out").exists()


def test_run_merge_refuses_the_same(tmp_path: Path, llama: Family) -> None:
    config = MergeConfiguration.model_validate(llama.config(parameters={"density": 0.5}))
    with pytest.raises(awd_fast.InputError, match="unknown option 'density'"):
        run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))


def test_a_global_group_takes_no_truncated_vocabulary(tmp_path: Path, llama: Family) -> None:
    config = written(tmp_path, llama.config(parameters={"groups": "global"}))
    code, _, error = run("mergekit", config, tmp_path / "out", "--quiet", "--unsafe-truncate-embeddings")
    assert code == 2
    assert "the configuration has --unsafe-truncate-embeddings" in error


def test_the_command_line_and_files(tmp_path: Path, llama: Family) -> None:
    code, _, error = run("mergekit", written(tmp_path, llama.config()))
    assert (code, error) == (2, "awd-fast: Missing argument 'OUT_PATH'.\n")
    code, _, error = run("mergekit", tmp_path / "none.yml", tmp_path / "out")
    assert code == 1
    assert "No such file" in error
    (tmp_path / "broken.yml").write_text("a: [")
    code, _, error = run("mergekit", tmp_path / "broken.yml", tmp_path / "out")
    assert code == 2
    assert "broken.yml is not a readable YAML file" in error
    code, out, error = run("mergekit", "--help")
    assert (code, error) == (0, "")
    assert "--lora-merge-cache" in out


@pytest.mark.parametrize("groups", ["row", "global"])
def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path, llama: Family, groups: str) -> None:
    spoilt = copied(llama.models[1], tmp_path / "spoilt") / "model.safetensors"
    state = load_file(spoilt)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, spoilt, metadata={"format": "pt"})
    config = llama.config(parameters={"groups": groups})
    config["models"][1]["model"] = str(tmp_path / "spoilt")
    code, _, error = run("mergekit", written(tmp_path, config), tmp_path / "out", "--quiet")
    assert code == 2
    assert f"{tmp_path / 'spoilt'}: tensor 'model.layers.1.mlp.up_proj.weight' holds 1 NaN or Inf values" in error
    if (tmp_path / "out").exists():  # mergekit's, where this was found among what it had written
        assert f"what mergekit has written is left in {tmp_path / 'out'}" in error


@pytest.mark.parametrize("groups", ["row", "global"])
def test_a_tensor_that_a_model_lacks(tmp_path: Path, electra: Family, groups: str) -> None:
    name = "encoder.layer.1.output.LayerNorm.bias"
    lacking = copied(electra.models[2], tmp_path / "lacking") / "model.safetensors"
    state = load_file(lacking)
    del state[name]
    save_file(state, lacking, metadata={"format": "pt"})
    config = electra.config(parameters={"groups": groups})
    config["models"][2]["model"] = str(tmp_path / "lacking")
    options = ("--quiet", "--no-copy-tokenizer")
    code, _, error = run("mergekit", written(tmp_path, config), tmp_path / "out1", *options)
    assert code == 2
    assert f"{tmp_path / 'lacking'} lacks the tensor '{name}' of the base; give missing=base" in error
    config["parameters"]["missing"] = "base"
    code, _, error = run("mergekit", written(tmp_path, config), tmp_path / "out2", *options)
    assert (code, error) == (0, "")
    models = [*electra.paths[:2], str(tmp_path / "lacking")]
    awd_fast.merge_checkpoints(
        str(electra.base), models, str(tmp_path / "ours"), weights=WEIGHTS, groups=groups, missing="base"
    )
    expected = tensors(tmp_path / "ours")
    same(tensors(tmp_path / "out2"), expected, 4 if groups == "global" else 0)
    assert torch.equal(expected[name], tensors(electra.base)[name])


def test_refusals_in_memory(llama: Family) -> None:
    base, *models = (tensors(folder) for folder in (llama.base, *llama.models))

    def merged(**given: object) -> object:
        return merge_state_dicts([base, *models], "awd", **{"base": 0, **given})

    with pytest.raises(awd_fast.InputError, match=r"awd has no base; expected base_model \(in Python, base\)"):
        merged(base=None)
    with pytest.raises(TypeError, match="density"):
        merged(parameters={"density": 1})
    with pytest.raises(awd_fast.InputError, match="groups is 'rows'"):
        merged(parameters={"groups": "rows"})
    with pytest.raises(awd_fast.InputError, match="include pattern 'x' matches no tensor"):
        merged(parameters={"include": ["x"]})
    alphas = PerGroupValues([float(index) for index in range(len(base))])
    with pytest.raises(awd_fast.InputError, match=r"groups is global, .* alpha differs between them"):
        merged(parameters={"groups": "global", "alpha": alphas})
    with pytest.raises(awd_fast.InputError, match="no model was given"):
        merge_state_dicts([base], "awd", base=0)
    broken = dict(models[1]) | {"model.norm.weight": torch.full_like(base["model.norm.weight"], torch.inf)}
    with pytest.raises(awd_fast.InputError, match=r"models\[2\]: tensor 'model.norm.weight' holds 32 NaN or Inf"):
        merge_state_dicts([base, models[0], broken], "awd", base=0)


def test_another_method_of_the_name_is_not_replaced() -> None:
    """In a process of its own: names are registered once."""
    code = """
from mergekit import merge_methods
from mergekit.merge_methods.easy_define import merge_method
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.registry import register
import torch
@merge_method(name="wudi")
def other(group: TensorGroup) -> torch.Tensor:
    return group.tensors[0]
register(other)
try:
    import awd_fast.integrations.mergekit
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "mergekit has a merge method wudi of mergekit.merge_methods.base; expected none\n"


def test_a_plain_name_is_looked_up_by_the_model_card(tmp_path: Path, llama: Family) -> None:
    """Which docs/mergekit.md warns of: mergekit asks the Hub when all is written, and fails without a network."""
    config = llama.config()
    config["base_model"] = "base"
    for entry in config["models"]:
        entry["model"] = Path(entry["model"]).name
    command = [sys.executable, "-m", "awd_fast", "mergekit", str(written(tmp_path, config)), str(tmp_path / "out")]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=llama.base.parent, env=variables, capture_output=True, text=True)
    assert done.returncode != 0
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert f"what mergekit has written is left in {tmp_path / 'out'}" in done.stderr
    done = subprocess.run(
        [*command[:-1], str(tmp_path / "out2"), "--no-write-model-card"], cwd=llama.base.parent, env=variables
    )
    assert done.returncode == 0


def test_the_extra_names_the_versions() -> None:
    (wanted,) = (line for line in requires("awd-fast") or [] if line.startswith("mergekit"))
    assert wanted.startswith(("mergekit>=0.1.5,<0.2;", "mergekit<0.2,>=0.1.5;"))
