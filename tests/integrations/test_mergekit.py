"""AWD and WUDI through mergekit's entry points give what awd_fast gives, to the bit where the same operators run."""

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import PerGroupValues
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

import awd_fast
from awd_fast.integrations import mergekit as integration
from tests.integrations.families import MODELS, WEIGHTS, Family, make, same, tensors, written

QUIET = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
FAMILIES = {
    "llama bfloat16 shards": ("llama", torch.bfloat16, True),
    "llama float32": ("llama", torch.float32, False),
    "tied llama float32 shards": ("tied", torch.float32, True),
    "qwen float16": ("qwen", torch.float16, False),
    "electra float32": ("electra", torch.float32, False),
}
OPTIONS = {
    "defaults": {},
    "columns": {"groups": "column", "scale": 0.4},
    "tensors": {"groups": "tensor", "similarity": "absolute"},
    "the authors' later code": {"preset": "rows", "scale": 0.3},
    "adam": {"optimizer": "adam", "lr": 0.001, "betas": [0.8, 0.9], "iterations": 20},
    "selected": {"include": ["*.1.*", "*.0.*"], "exclude": ["*down*", "*bias"], "others": "base"},
    "global": {"groups": "global"},
    "as published": {"preset": "paper", "scale": 0.4},
    "global adam": {"groups": "global", "optimizer": "adam", "iterations": 10},
    "wudi": {"method": "wudi", "ridge": 0.05},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    folder = tmp_path_factory.mktemp("families")
    return {name: make(folder / name.replace(" ", "-"), *how) for name, how in FAMILIES.items()}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """mergekit 0.1.5 plans no BERT, by any method, unless the files hold position_ids."""
    return make(tmp_path_factory.mktemp("bert"), "bert", torch.float32, False)


@pytest.fixture
def llama(families: dict[str, Family]) -> Family:
    return families["llama float32"]


def through_mergekit(config: dict, out: Path, options: MergeOptions = QUIET) -> dict[str, torch.Tensor]:
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return tensors(out)


def through_us(family: Family, out: Path, **options) -> dict[str, torch.Tensor]:
    options = {"weights": WEIGHTS, **options}
    awd_fast.merge_checkpoints(str(family.base), family.paths, str(out), **options)
    return tensors(out)


def states(family: Family) -> list[dict[str, torch.Tensor]]:
    return [tensors(folder) for folder in (family.base, *family.models)]


def many_sums(options: dict) -> float:
    """Steps of the dtype in which results may differ: a global group is summed in the order in which tensors come."""
    return 4 if options.get("groups") == "global" or options.get("preset") == "paper" else 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_merges_of_folders(tmp_path: Path, families: dict[str, Family], family: str, options: dict) -> None:
    method = options.get("method", "awd")
    parameters = {name: value for name, value in options.items() if name != "method"}
    found = through_mergekit(families[family].config(method, parameters=parameters), tmp_path / "theirs")
    same(found, through_us(families[family], tmp_path / "ours", **options), many_sums(options))


@pytest.mark.parametrize("method", ["awd", "wudi"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": "column", "scale": 0.4},
        {"groups": "tensor", "others": "base", "exclude": ()},
        {"groups": "global", "include": ["*dense*"], "exclude": ["*bias"], "others_scale": 0.1},
        {"optimizer": awd_fast.Adam(lr=0.001, iterations=10)},
        {"groups": "global", "optimizer": awd_fast.Adam(lr=0.001, iterations=10)},
        awd_fast.PAPER,
    ],
    ids=["defaults", "columns", "tensors", "global", "adam", "global adam", "as published"],
)
def test_merges_in_memory(bert: Family, method: str, options: dict) -> None:
    base, *models = states(bert)
    if method == "wudi" and options is awd_fast.PAPER:
        options = {"ridge": 1.0, "columns": 7}
    expected = awd_fast.merge(base, models, weights=WEIGHTS, method=method, **options)
    parameters = {**options, "weight": list(WEIGHTS)}
    same(merge_state_dicts([base, *models], method, parameters=parameters, base=0), expected)


def test_the_base_may_stand_anywhere(llama: Family) -> None:
    base, *models = states(llama)
    weights = dict(zip("abc", WEIGHTS, strict=True))
    inputs = {"a": models[0], "base": base, "b": models[1], "c": models[2]}
    merged = merge_state_dicts(inputs, "awd", parameters={"weight": weights}, base="base")
    same(merged, awd_fast.merge(base, models, weights=WEIGHTS))


def test_output_in_another_dtype_is_rounded_once(tmp_path: Path, families: dict[str, Family]) -> None:
    family = families["llama bfloat16 shards"]
    expected = through_us(family, tmp_path / "ours", dtype="float32")
    same(through_mergekit(family.config(out_dtype="float32"), tmp_path / "theirs"), expected)
    base, *models = states(family)
    merged = merge_state_dicts([base, *models], "awd", parameters={"weight": WEIGHTS}, base=0, out_dtype=torch.float32)
    same(merged, expected)


def test_storage_that_differs_is_promoted(tmp_path: Path, llama: Family) -> None:
    base, *models = states(llama)
    models[0] = {name: tensor.bfloat16() for name, tensor in models[0].items()}
    merged = merge_state_dicts([base, *models], "awd", base=0)
    same(merged, awd_fast.merge(base, models, dtype="float32"))


def test_one_tensor(llama: Family) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    state = [state[name] for state in states(llama)]
    for parameters in ({}, {"groups": "global"}):
        merged = merge_tensors(state, "awd", base_index=0, name=name, parameters=parameters)
        groups = "tensor" if parameters else "row"
        expected = awd_fast.merge({name: state[0]}, [{name: t} for t in state[1:]], groups=groups)[name]
        assert torch.equal(merged, expected)
    bias = merge_tensors([t[0] for t in state], "awd", base_index=0, parameters={"scale": 1.0})
    torch.testing.assert_close(bias, state[0][0] + sum(t[0] - state[0][0] for t in state[1:]))


def test_the_command(tmp_path: Path, families: dict[str, Family]) -> None:
    """In a process of its own, as users run it; transformers loads the result."""
    family = families["llama bfloat16 shards"]
    config = written(tmp_path, family.config(parameters={"groups": "global", "exclude": ["*embed*", "*norm*"]}))
    command = [Path(sys.executable).parent / "awd-fast", "mergekit", config, tmp_path / "out", "--quiet"]
    options = ["--no-write-model-card", "--no-copy-tokenizer", "--out-shard-size", "16K"]
    subprocess.run([*map(str, command), *options], check=True, capture_output=True, text=True)
    expected = through_us(family, tmp_path / "ours", groups="global", exclude=["*embed*", "*norm*"])
    same(tensors(tmp_path / "out"), expected, 4)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    same({name: loaded[name] for name in expected}, expected, 4)


def test_the_yaml_of_a_model_card_merges_again(tmp_path: Path, llama: Family) -> None:
    """awd_fast writes lists and numbers that mergekit would read as gradients, or as text."""
    import yaml

    expected = through_us(llama, tmp_path / "ours", optimizer="adam", lr=1e-6, iterations=5)
    text = (tmp_path / "ours" / "README.md").read_text()
    config = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert isinstance(config["parameters"]["exclude"], list)
    same(through_mergekit(config, tmp_path / "theirs"), expected)


def test_parameters_may_differ_between_tensors(tmp_path: Path, llama: Family) -> None:
    config = llama.config(parameters={"scale": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]})
    low, high = (through_us(llama, tmp_path / str(scale), scale=scale) for scale in (0.5, 1.0))
    expected = {name: low[name] if "mlp" in name else high[name] for name in low}
    same(through_mergekit(config, tmp_path / "theirs"), expected)
    base, *models = states(llama)
    scales = PerGroupValues([0.5 if "mlp" in name else 1.0 for name in base])
    merged = merge_state_dicts([base, *models], "awd", parameters={"scale": scales, "weight": WEIGHTS}, base=0)
    same(merged, expected)


def test_layers_may_be_put_together(tmp_path: Path, llama: Family) -> None:
    """A slice takes other layers of the models than the output has."""
    ranges = [[1, 2], [0, 1]]
    sources = [
        [{"model": path, "layer_range": layers} for path in (str(llama.base), *llama.paths)] for layers in ranges
    ]
    config = {"merge_method": "awd", "base_model": str(llama.base), "slices": [{"sources": s} for s in sources]}
    found = through_mergekit(config, tmp_path / "theirs")
    expected = through_us(llama, tmp_path / "ours", weights=None)
    swapped = {name: name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.") for name in expected}
    same(found, {name: expected[swapped[name]] for name in expected})


def test_raw_checkpoints(tmp_path: Path, bert: Family) -> None:
    """mergekit-pytorch, which has a planner of its own, takes every group but the global one."""
    from mergekit.scripts.merge_raw_pytorch import main

    files = [str(folder / "model.safetensors") for folder in (bert.base, *bert.models)]
    config = {"merge_method": "awd", "base_model": files[0], "models": [{"model": file} for file in files[1:]]}
    path = written(tmp_path, config)
    main.main([str(path), str(tmp_path / "out"), "--quiet"], standalone_mode=False)
    same(tensors(tmp_path / "out"), through_us(bert, tmp_path / "ours", weights=None))
    path = written(tmp_path, config | {"parameters": {"groups": "global"}})
    with pytest.raises(awd_fast.InputError, match=r"groups is global, .*expected mergekit-yaml, or tensors in memory"):
        main.main([str(path), str(tmp_path / "out2"), "--quiet"], standalone_mode=False)


def test_other_methods_are_as_before(tmp_path: Path, llama: Family) -> None:
    config = llama.config("linear")
    del config["base_model"]
    _, *models = states(llama)
    for name, tensor in through_mergekit(config, tmp_path / "out").items():
        mean = sum(w * model[name] for w, model in zip(WEIGHTS, models, strict=True)) / sum(WEIGHTS)
        torch.testing.assert_close(tensor, mean, msg=name)


def test_registering_twice_is_harmless() -> None:
    methods, planning = merge_methods.registered_methods(), MergePlanner._plan
    integration.register()
    importlib.reload(integration)
    assert merge_methods.registered_methods() == methods
    assert MergePlanner._plan is planning


def test_a_loss_that_rose_is_logged_once(tmp_path: Path, llama: Family, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "awd_fast.mergekit"):
        through_mergekit(llama.config(parameters={"optimizer": "sgd", "lr": 10.0}), tmp_path / "out")
    told = [record.getMessage() for record in caplog.records if record.name == "awd_fast.mergekit"]
    assert len(told) == 1
    assert "the loss rose from" in told[0]


def test_tensors_that_mergekit_leaves_out_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of the layers of a ViT, by any method, since transformers 5 calls them otherwise than its files do."""
    vit = make(tmp_path / "vit", "vit", torch.float32, False)
    found = through_mergekit(vit.config(parameters={"exclude": []}), tmp_path / "out")
    lost = len(tensors(vit.base)) - len(found)
    told = [record.getMessage() for record in caplog.records if record.name == "awd_fast.mergekit"]
    assert lost > 0
    assert len(told) == 1
    assert f"{lost} tensors of {vit.base} are not in the output" in told[0]


def test_inputs_are_not_changed(llama: Family) -> None:
    before, after = states(llama), states(llama)
    merge_state_dicts(after, "awd", base=0, parameters={"others": "base"})
    for one, other in zip(before, after, strict=True):
        same(one, other)
    assert len(after) == MODELS + 1
