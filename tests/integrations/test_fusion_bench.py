"""AWD, WUDI and AWD + AdaMerging as FusionBench's algorithms give what awd_fast gives."""

import copy
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from fusion_bench.modelpool import CausalLMPool
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

import awd_fast
from awd_fast import InputError
from awd_fast.integrations import fusion_bench as integration
from awd_fast.integrations.fusion_bench import AWDAdaMergingAlgorithm, AWDAlgorithm, CLIPAWDAdaMergingAlgorithm
from awd_fast.merging import merge_states
from awd_fast.plan import StateDict, make_plan
from awd_fast.recipe import make_recipe
from tests.documents import run_python
from tests.integrations.families import Family, make, tensors
from tests.integrations.fusion_cases import clip, clip_pool, language, named, nets

QUIET = {"progress": False}
CONFIGURATIONS = files("awd_fast.integrations.fusion_bench_config") / "method" / "awd_fast"
OPTIONS = {
    "defaults": {},
    "weights by name": {"weights": {"m1": 0.5, "m2": -1.0}, "scale": 0.4},
    "weights in order": {"weights": [1.0, 0.5, 2.0]},
    "selected": {"include": ["*mlp*"], "exclude": [], "others": "base"},
    "the authors' later code": {"preset": "rows"},
    "as published": {"preset": "paper", "scale": 0.3},
    "adam": {"optimizer": "adam", "lr": 0.001, "betas": [0.8, 0.9], "iterations": 5},
    "wudi": {"method": "wudi", "ridge": 0.05},
    "task arithmetic": {"method": "task_arithmetic", "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make(tmp_path_factory.mktemp("llama"), "llama", torch.float32, True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make(tmp_path_factory.mktemp("tied"), "tied", torch.bfloat16, False)


@pytest.fixture(scope="module")
def clip_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return clip(tmp_path_factory.mktemp("clip"))


def expected(family: Family, **options: object) -> dict[str, torch.Tensor]:
    weights = options.get("weights")
    if isinstance(weights, dict):
        options["weights"] = [weights.get(f"m{index}", 1.0) for index in range(len(family.models))]
    base, *models = (StateDict(folder.name, tensors(folder)) for folder in (family.base, *family.models))
    recipe = make_recipe(len(models), **options)
    return merge_states(base, models, recipe, make_plan(base, models, recipe))


def same(model: nn.Module, merged: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    for name, tensor in merged.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("lazy", [False, True], ids=["loaded", "lazily"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_pool_of_files(llama: Family, options: dict, lazy: bool) -> None:
    same(AWDAlgorithm(**QUIET, **options).run(language(llama, lazy)), expected(llama, **options))


@pytest.mark.parametrize("lazy", [False, True], ids=["loaded", "lazily"])
def test_tied_weights_stay_tied_and_buffers_have_values(tied: Family, lazy: bool) -> None:
    model = AWDAlgorithm(**QUIET).run(language(tied, lazy))
    same(model, expected(tied))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    wanted = dict(language(tied).load_model("m0").named_buffers())
    assert wanted
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, wanted[name])
    ids = torch.arange(6)[None]
    assert bool(model(ids).logits.isfinite().all())


def test_models_that_are_files_are_not_loaded(llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, loaded = language(llama), []
    load = pool.load_model
    monkeypatch.setattr(
        pool, "load_model", lambda name, *rest, **more: loaded.append(name) or load(name, *rest, **more)
    )
    AWDAlgorithm(**QUIET).run(pool)
    assert loaded == ["_pretrained_"]


def test_models_that_the_pool_changes_are_loaded(llama: Family) -> None:
    pool = language(llama, torch_dtype="bfloat16")
    narrow = [{n: t.bfloat16() for n, t in tensors(folder).items()} for folder in (llama.base, *llama.models)]
    same(AWDAlgorithm(**QUIET).run(pool), awd_fast.merge(narrow[0], narrow[1:]))


def test_models_that_are_loaded_in_another_way_are_loaded(llama: Family, tmp_path: Path) -> None:
    """One is in a folder below its own, which holds another model; one is stored in 16 bits."""
    shutil.copytree(llama.models[0], tmp_path / "model")
    shutil.copytree(llama.models[1], tmp_path / "model" / "inside")
    narrow = AutoModelForCausalLM.from_pretrained(llama.models[2]).bfloat16()
    narrow.save_pretrained(tmp_path / "narrow")

    def config(path: Path, **more: str) -> dict:
        target = "transformers.AutoModelForCausalLM.from_pretrained"
        return {"_target_": target, "pretrained_model_name_or_path": str(path), "torch_dtype": "float32", **more}

    models = {"_pretrained_": config(llama.base), "m0": config(tmp_path / "model", subfolder="inside")}
    pool = CausalLMPool(models | {"m1": config(tmp_path / "narrow")}, tokenizer=None)
    rounded = {name: tensor.float() for name, tensor in narrow.state_dict().items()}
    wanted = awd_fast.merge(tensors(llama.base), [tensors(llama.models[1]), rounded])
    same(AWDAlgorithm(**QUIET).run(pool), wanted)


def test_modules_by_name() -> None:
    models = nets()
    before = copy.deepcopy(models)
    base, *others = models.values()
    merged = awd_fast.merge_models(base, others, scale=0.4)
    found = AWDAlgorithm(scale=0.4, inplace=False, **QUIET).run(models)
    assert found is not base
    same(found, dict(merged.state_dict()))
    for name, model in models.items():
        same(model, before[name].state_dict())
    found = AWDAlgorithm(scale=0.4, **QUIET).run(models)
    assert found is base
    same(found, dict(merged.state_dict()))
    assert found.out.weight is found.first.weight


def test_only_marked_modules_are_merged() -> None:
    models = nets()
    before = copy.deepcopy(models["_pretrained_"]).state_dict()
    for model in models.values():
        model._fusion_bench_target_modules = ["second"]
    wanted = awd_fast.merge_models(*list(models.values())[:1], list(models.values())[1:])
    state = AWDAlgorithm(**QUIET).run(models).state_dict()
    for name, tensor in state.items():
        chosen = wanted.state_dict() if name.startswith("second.") else before
        assert torch.equal(tensor, chosen[name]), name
    assert not torch.equal(state["second.weight"], before["second.weight"])


def test_wrong_input_is_one_sentence(llama: Family) -> None:
    models = nets()
    with pytest.raises(InputError, match=r"has no option 'density'; it has .*alpha"):
        AWDAlgorithm(density=0.5)
    with pytest.raises(InputError, match=r"has no option 'scale'"):
        AWDAdaMergingAlgorithm(scale=0.5)
    with pytest.raises(InputError, match=r"weights has the model 'other'; expected models of the pool, m0, m1, m2"):
        AWDAlgorithm(weights={"other": 1.0}).run(models)
    with pytest.raises(InputError, match=r"has no _pretrained_ model"):
        AWDAlgorithm().run({"m0": models["m0"]})
    with pytest.raises(InputError, match=r"no model beside _pretrained_"):
        AWDAlgorithm().run({"_pretrained_": models["m0"]})
    with pytest.raises(InputError, match=r"modelpool is list; expected a model pool"):
        AWDAlgorithm().run(list(models.values()))
    with pytest.raises(InputError, match=r"no test datasets, and no batches"):
        AWDAdaMergingAlgorithm().run(models)
    with pytest.raises(InputError, match=r"batches has none of 'm1'"):
        AWDAdaMergingAlgorithm(batches={"m0": []}).run(models)
    with pytest.raises(InputError, match=r"loads lazily.*enable_lazy_loading=false"):
        AWDAdaMergingAlgorithm().run(language(llama, True))
    with pytest.raises(InputError, match=r"'m0' is a state dict; expected a module"):
        AWDAlgorithm().run(models | {"m0": models["m0"].state_dict()})
    given = {"batches": {name: [torch.ones(2, 6)] for name in models}}
    with pytest.raises(InputError, match=r"m0 is the base itself"):
        AWDAdaMergingAlgorithm(**given).run(models | {"m0": models["_pretrained_"]})
    with pytest.raises(InputError, match=r"save_merging_weights is '/proc/nope/x\.pt', which cannot be written"):
        AWDAdaMergingAlgorithm(**given, save_merging_weights="/proc/nope/x.pt").run(models)
    with pytest.raises(InputError, match=r"init_values is 'nothing\.pt'; expected numbers, or a file"):
        AWDAdaMergingAlgorithm(**given, init_values="nothing.pt").run(models)
    models["m1"].second = nn.Linear(9, 5, bias=False)
    before = copy.deepcopy(models["_pretrained_"].state_dict())
    with pytest.raises(InputError, match=r"m1.*second\.weight.*\[5, 9\].*\[6, 9\]"):
        AWDAlgorithm(**QUIET).run(models)
    same(models["_pretrained_"], before)


@pytest.mark.parametrize("per", ["task", "tensor"])
def test_adamerging_of_modules_by_name(tmp_path: Path, per: str) -> None:
    models = nets()
    base, *others = (copy.deepcopy(model).eval() for model in models.values())
    for model in models.values():
        model.eval()
    batches = {name: [torch.randn(5, 6) for _ in range(2)] for name in list(models)[1:]}
    wanted = awd_fast.adamerge(
        base,
        copy.deepcopy(base.state_dict()),
        [model.state_dict() for model in others],
        list(batches.values()),
        logits=lambda model, batch, index: model(batch)[:, : 3 + index],
        steps=3,
        per=per,
        bounds=(0, 1),
        groups="tensor",
    )
    algorithm = AWDAdaMergingAlgorithm(
        batches=batches,
        logits=lambda model, batch, name: model(batch)[:, : 3 + int(name[1:])],
        max_steps=3,
        per=per,
        clamp_weights=True,
        groups="tensor",
        save_merging_weights=str(tmp_path / "weights" / "merging.pt"),
        inplace=False,
    )
    same(algorithm.run(models), wanted.state_dict)
    saved = torch.load(tmp_path / "weights" / "merging.pt", weights_only=True)
    assert torch.equal(saved["coefficients"], wanted.coefficients)
    assert tuple(saved["names"]) == wanted.names
    again = AWDAdaMergingAlgorithm(
        batches=batches, max_steps=0, per=per, init_values=str(tmp_path / "weights" / "merging.pt"), groups="tensor"
    )
    same(again.run(models), wanted.state_dict)


def test_adamerging_of_clip_on_its_images(
    tmp_path: Path, clip_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # FusionBench keeps heads there
    found = {}
    for steps in (0, 3):
        torch.manual_seed(0)
        algorithm = CLIPAWDAdaMergingAlgorithm(max_steps=steps, batch_size=4, lr=0.1)
        found[steps] = algorithm.run(clip_pool(clip_models))
    assert isinstance(found[0], CLIPVisionModel)
    vision = [CLIPVisionModel.from_pretrained(path).state_dict() for path in clip_models.values()]
    same(found[0], awd_fast.merge(vision[0], vision[1:], scale=0.3))
    moved = [not torch.equal(a, b) for a, b in zip(found[0].parameters(), found[3].parameters(), strict=True)]
    assert all(moved)
    plain = CLIPAWDAdaMergingAlgorithm(max_steps=0, method="task_arithmetic").run(clip_pool(clip_models))
    same(plain, awd_fast.merge(vision[0], vision[1:], scale=0.3, method="task_arithmetic"))


@pytest.mark.parametrize("file", sorted(file.name for file in CONFIGURATIONS.iterdir()))
def test_configurations_have_options_that_are_there(file: str) -> None:
    config = yaml.safe_load((CONFIGURATIONS / file).read_text())
    kind = getattr(integration, config.pop("_target_").rsplit(".", 1)[1])
    algorithm = kind(**config)
    own = set(algorithm._config_mapping.values()) - {"_usage_", "_version_", "_recursive_"}
    method = config["method"]
    assert set(config) <= own | {"logits"}
    if kind is AWDAlgorithm and method == "awd":
        assert own - set(config) == {"ridge", "columns"}
    again = kind(**{n: v for n, v in OmegaConf.to_container(algorithm.config).items() if not n.startswith("_")})
    assert again.options() == algorithm.options()


def test_the_program_finds_the_configurations(tmp_path: Path, llama: Family) -> None:
    (tmp_path / "conf" / "modelpool").mkdir(parents=True)
    pool = {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": named(llama), "tokenizer": None}
    (tmp_path / "conf" / "modelpool" / "tiny.yaml").write_text(yaml.safe_dump(pool))
    command = [sys.executable, "-m", "fusion_bench", "--config-dir", "conf", "modelpool=tiny"]
    command += ["method=awd_fast/awd", "method.scale=0.3", "method.weights={m1: 0.5}", "method.groups=column"]
    command += [f"merged_model_save_path={tmp_path / 'out'}", "print_config=false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    wanted = expected(llama, scale=0.3, weights=[1.0, 0.5, 1.0], groups="column")
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python("fusion_bench.md")
    assert (tmp_path / "merging_weights.pt").is_file()
    assert not integration.accelerated()
