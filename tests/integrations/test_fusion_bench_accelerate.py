"""FusionBench's own merges with awd_fast's arithmetic give what FusionBench gives."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel, get_task_wise_weights
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from awd_fast.integrations import fusion_bench as integration
from awd_fast.integrations import fusion_bench_accelerate
from tests.integrations.families import Family, make
from tests.integrations.fusion_cases import language, named, nets, pool_of


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    integration.restore()
    assert not integration.accelerated()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Family]:
    made: dict[Any, Family] = {}

    def of(kind: str, dtype: torch.dtype) -> Family:
        if (kind, dtype) not in made:
            made[kind, dtype] = make(tmp_path_factory.mktemp(kind), kind, dtype, dtype == torch.bfloat16)
        return made[kind, dtype]

    return of


def ties(merge_func: str = "sum", threshold: float = 20, **options: Any) -> TiesMergingAlgorithm:
    given = {"scaling_factor": 0.3, "remove_keys": []} | options
    return TiesMergingAlgorithm(threshold=threshold, merge_func=merge_func, **given)


ALGORITHMS = {
    "task arithmetic": lambda: TaskArithmeticAlgorithm(scaling_factor=0.3),
    "ties": ties,
    "ties mean": lambda: ties("mean", 0.5),
    "ties of all but one": lambda: ties("sum", 99.99),
    "ties of nothing": lambda: ties("sum", 0),
}


def both(make_algorithm: Callable[[], Any], make_pool: Callable[[], Any]) -> tuple[nn.Module, nn.Module]:
    """By FusionBench, and accelerated, where FusionBench's own arithmetic is not called."""
    theirs = make_algorithm().run(make_pool())
    integration.accelerate()
    assert integration.accelerated()
    ours = make_algorithm().run(make_pool())
    assert type(ours) is type(theirs)
    return theirs, ours


def equal(theirs: nn.Module, ours: nn.Module, leave: tuple[str, ...] = ()) -> None:
    wanted, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert name in leave or torch.equal(found[name], tensor), name


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called after FusionBench's own merge, has its arithmetic fail."""

    def spoil() -> None:
        for module, name in (
            ("fusion_bench.method.ties_merging.ties_merging", "ties_merging"),
            ("fusion_bench.method.task_arithmetic.task_arithmetic", "state_dict_add"),
        ):
            monkeypatch.setattr(f"{module}.{name}", None)

    return spoil


@pytest.mark.parametrize("lazy", [False, True], ids=["loaded", "lazily"])
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_float32_is_equal_to_the_bit(
    family: Any, algorithm: Callable[[], Any], lazy: bool, unused: Callable[[], None]
) -> None:
    llama = family("llama", torch.float32)
    theirs = algorithm().run(language(llama, lazy))
    unused()
    integration.accelerate()
    equal(theirs, algorithm().run(language(llama, lazy)))


@pytest.mark.parametrize("algorithm", ["task arithmetic", "ties", "ties mean"])
def test_pieces_of_tensors_on_disk(family: Any, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = family("llama", torch.float32)
    monkeypatch.setattr(fusion_bench_accelerate, "_PIECE", 7)
    equal(*both(ALGORITHMS[algorithm], lambda: language(llama)))


@pytest.mark.parametrize("algorithm", ["task arithmetic", "ties"])
def test_a_lazily_loaded_model_has_its_tied_weights_and_buffers(family: Any, algorithm: str) -> None:
    """In FusionBench 0.2.33 with transformers 5 they are whatever was in memory."""
    llama = family("tied", torch.float32)
    integration.accelerate()
    loaded, lazy = (ALGORITHMS[algorithm]().run(language(llama, how)) for how in (False, True))
    if algorithm != "ties":  # where a tied weight counts twice if the model is loaded
        equal(loaded, lazy)
    buffers = dict(lazy.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[name], buffer) for name, buffer in loaded.named_buffers())
    assert lazy.lm_head.weight.data_ptr() == lazy.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("algorithm", ["task arithmetic", "ties"])
def test_16_bit_models_are_rounded_once(family: Any, algorithm: str) -> None:
    """As a merge of the same numbers in float64 that is rounded, which FusionBench's own is not."""
    llama = family("llama", torch.bfloat16)
    exact = ALGORITHMS[algorithm]().run(language(llama, torch_dtype="float64")).state_dict()
    theirs, ours = (model.state_dict() for model in both(ALGORITHMS[algorithm], lambda: language(llama)))
    differ = {"theirs": 0, "ours": 0}
    for name, tensor in exact.items():
        for whose, state in (("theirs", theirs), ("ours", ours)):
            differ[whose] += int((state[name] != tensor.bfloat16()).sum())
    # Where the kept elements sum to exactly 0, TIES elects the sign of the whole model there, and + here.
    assert differ["ours"] < (0.01 if algorithm == "task arithmetic" else 0.3) * differ["theirs"], differ


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_by_name_with_buffers(inplace: bool) -> None:
    models = nets()
    before = copy.deepcopy(models)
    algorithm = TaskArithmeticAlgorithm(scaling_factor=0.3, inplace=inplace)
    theirs = algorithm.run(copy.deepcopy(models))
    integration.accelerate()
    ours = algorithm.run(models)
    equal(theirs, ours)
    assert (ours is models["_pretrained_"]) == inplace
    for name in list(models)[0 if not inplace else 1 :]:
        equal(before[name], models[name])


@pytest.mark.parametrize("merge_func", ["sum", "mean"])
def test_every_element_that_ties_at_the_threshold_is_kept(merge_func: str) -> None:
    """Of task vectors of three sizes, none negative, so that no sum is 0."""
    models = {name: nn.Linear(20, 15) for name in ("_pretrained_", "m0", "m1")}
    base = {name: (8 * own).round() / 8 for name, own in models["_pretrained_"].state_dict().items()}
    for name, model in models.items():
        added = 0 if name == "_pretrained_" else 1
        model.load_state_dict({key: own + added * torch.randint(3, own.shape) / 8 for key, own in base.items()})
    for threshold in (20, 50):  # above and below the share of the largest
        equal(*both(lambda share=threshold: ties(merge_func, share), lambda: copy.deepcopy(models)))
        integration.restore()


def test_what_is_not_taken_is_fusionbenchs() -> None:
    models = nets()
    equal(*both(ties, lambda: copy.deepcopy(models)))  # integers among the buffers
    floats = {name: nn.Sequential(model.first, model.second) for name, model in models.items()}
    equal(*both(lambda: ties("max"), lambda: copy.deepcopy(floats)))
    integration.restore()
    floats["m1"].append(nn.Linear(3, 3))
    for accelerated in (False, True):
        if accelerated:
            integration.accelerate()
        with pytest.raises((KeyError, ValueError, RuntimeError, AssertionError)):
            TaskArithmeticAlgorithm(scaling_factor=0.3).run(copy.deepcopy(floats))
        with pytest.raises(RuntimeError, match="kthvalue"):
            ties("sum", 1).run({name: nn.Linear(3, 3) for name in models})


def test_removed_keys_stay_as_they_were() -> None:
    """FusionBench's own TIES raises an error where it removes any."""
    models = {name: nn.Sequential(model.first, model.second) for name, model in nets().items()}
    before = copy.deepcopy(models["_pretrained_"].state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
        ties(remove_keys=["0.bias"]).run(copy.deepcopy(models))
    integration.accelerate()
    merged = ties(remove_keys=["0.bias"]).run(models).state_dict()
    assert torch.equal(merged["0.bias"], before["0.bias"])
    assert not torch.equal(merged["0.weight"], before["0.weight"])


def layer_wise(models: dict[str, nn.Module], weights: torch.Tensor, **options: Any) -> LayerWiseMergedModel:
    base, *others = copy.deepcopy(list(models.values()))
    return LayerWiseMergedModel(weights.clone(), base, others, strict=False, **options)


def task_wise(models: dict[str, nn.Module], weights: torch.Tensor, **options: Any) -> TaskWiseMergedModel:
    base, *others = copy.deepcopy(list(models.values()))
    return TaskWiseMergedModel(weights.clone(), base, others, strict=False, **options)


WEIGHTS = {
    "layer-wise": (layer_wise, lambda: get_layer_wise_weights(3, 5, 0.3) + 0.4 * torch.randn(3, 5), {}),
    "free": (layer_wise, lambda: torch.randn(3, 5), {"clamp_weights": False}),
    "normalised": (layer_wise, lambda: torch.randn(3, 5), {"normalized_merging_weights": True}),
    "task-wise": (task_wise, lambda: get_task_wise_weights(3, 0.3) + 0.4 * torch.randn(3), {}),
    "free task-wise": (task_wise, lambda: torch.randn(3), {"clamp_weights": False}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WEIGHTS.values(), ids=WEIGHTS)
def test_adamerging_modules_merge_and_learn_alike(case: Any, dtype: torch.dtype) -> None:
    """The merged weights, the outputs and the gradient of the coefficients over several tasks, as in a step."""
    wrap, weights, options = case
    torch.manual_seed(0)
    models, start = nets(dtype=dtype), weights().to(dtype)
    for model in models.values():
        model.eval()
    inputs = [torch.randn(7, 6, dtype=dtype) for _ in range(2)]
    found = []
    for accelerated in (False, True):
        if accelerated:
            integration.accelerate()
        module = wrap(models, start, **options)
        state = module.merge_weights()
        outputs = [module(x) for x in inputs]
        for output in outputs:
            output.square().sum().backward(retain_graph=True)
        found.append((state, outputs, module.merge_weight.grad))
    (state, outputs, gradient), (fast_state, fast_outputs, fast_gradient) = found
    least = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 3e-2}[dtype]
    assert fast_state.keys() == state.keys()
    for name, tensor in state.items():
        assert fast_state[name].dtype == tensor.dtype
        torch.testing.assert_close(fast_state[name], tensor, rtol=least, atol=least)
    assert fast_gradient.dtype == gradient.dtype
    scale = float(gradient.abs().max())
    torch.testing.assert_close(fast_gradient, gradient, rtol=0, atol=20 * least * scale)
    for output, fast in zip(outputs, fast_outputs, strict=True):
        torch.testing.assert_close(fast, output, rtol=0, atol=10 * least * float(output.abs().max()))
    assert "combine" in type(fast_state["first.bias"].grad_fn).__name__.lower()


def test_the_merge_of_learned_weights_is_unloaded() -> None:
    models, weights = nets(), torch.rand(3, 5)
    theirs = layer_wise(models, weights).merge_and_unload()
    integration.accelerate()
    ours = layer_wise(models, weights).merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1), (3, 6), (3,), ()], ids=str)
def test_another_number_of_weights_is_fusionbenchs_to_refuse(shape: tuple[int, ...]) -> None:
    for accelerated in (False, True):
        if accelerated:
            integration.accelerate()
        with pytest.raises((AssertionError, TypeError, IndexError)):
            layer_wise(nets(), torch.rand(shape)).merge_weights()


def test_masks_and_sparse_task_vectors_are_fusionbenchs() -> None:
    models, weights = nets(), torch.rand(3, 5)
    mask = {name: torch.rand_like(own).round() for name, own in models["m0"].named_parameters()}
    wanted = layer_wise(models, weights).merge_weights(task_vector_mask=mask)
    single = {name: model.second for name, model in models.items()}
    sparse = layer_wise(single, weights[:, :1], sparsity_ratio=0.5).merge_weights()
    integration.accelerate()
    found = layer_wise(models, weights).merge_weights(task_vector_mask=mask)
    for name in mask:
        assert torch.equal(found[name], wanted[name])
    found = layer_wise(single, weights[:, :1], sparsity_ratio=0.5).merge_weights()
    assert torch.equal(found["weight"], sparse["weight"])


def test_steps_of_its_own_algorithm() -> None:
    """FusionBench's own loop, by the base class of its algorithms, ends with the same weights."""
    data = {name: torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) for name in ("m0", "m1", "m2")}

    class Algorithm(LayerWiseAdaMergingAlgorithm):
        def get_shuffled_test_loader_iter(self, task: str) -> Any:
            return iter([(data[task],)])

        def compute_logits(self, module: Any, images: torch.Tensor, task: str) -> torch.Tensor:
            logits: torch.Tensor = module(images)
            return logits

    config = {"weights": None, "optimizer": "adam", "lr": 0.05, "init_values": 0.3, "clamp_weights": False}
    config |= {"tie_weights": True, "strict": False, "max_steps": 4}
    found = []
    for accelerated in (False, True):
        if accelerated:
            integration.accelerate()
        models = {name: nn.Sequential(model.first, nn.Tanh(), model.second) for name, model in nets().items()}
        algorithm = Algorithm(OmegaConf.create(config))
        algorithm.modelpool = pool_of(models)
        algorithm.fabric.log_dict = lambda *given, **more: None  # no loggers here
        module = algorithm.construct_layer_wise_merged_model(algorithm.modelpool)
        found.append(algorithm.test_time_adaptation(module).merge_weight.detach())
    assert not torch.equal(found[0], torch.full_like(found[0], 0.3))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_the_command_accelerates_fusion_bench(tmp_path: Path, family: Any) -> None:
    llama = family("llama", torch.float32)
    (tmp_path / "conf" / "modelpool").mkdir(parents=True)
    pool = {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": named(llama), "tokenizer": None}
    (tmp_path / "conf" / "modelpool" / "tiny.yaml").write_text(yaml.safe_dump(pool))
    command = [sys.executable, "-m", "awd_fast", "fusion_bench", "--config-dir", "conf", "modelpool=tiny"]
    command += ["method=ties_merging", f"merged_model_save_path={tmp_path / 'out'}", "print_config=false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "RESOLVING SIGN" not in done.stdout  # which FusionBench's own prints
    merged = load_file(tmp_path / "out" / "model.safetensors")
    wanted = ties().run(language(llama)).state_dict()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
