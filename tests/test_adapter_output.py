"""A merge of adapters written as one: read again it is the weighted sum, under the names that PEFT looks for."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from awd_fast import InputError, lowrank
from awd_fast.adapter_config import by_pattern
from awd_fast.adapter_output import write_adapter
from awd_fast.adapters import Adapter
from tests.adapter_folders import PREFIX, embedding, infos, linear, random, write_adapter_folder

BASE = infos(model__q__weight=(5, 6), model__v__weight=(7, 6), model__e__weight=(9, 3), model__norm__weight=(6,))
WEIGHTS = torch.tensor([[0.7, -0.4]], dtype=torch.float64)


def bind(folder, tensors, base=BASE, **config):
    return Adapter(write_adapter_folder(folder, tensors, **config)).bind(base)


@pytest.fixture
def pair(tmp_path):
    """Two adapters: both change q, by ranks 4 and 2, the first v too, the second the embedding."""
    first = linear("model.q", 4, 6, 5, seed=1) | linear("model.v", 4, 6, 7, seed=2)
    second = linear("model.q", 2, 6, 5, seed=3) | embedding("model.e", 2, 9, 3, seed=4)
    return [bind(tmp_path / "first", first), bind(tmp_path / "second", second, r=2, use_rslora=True, lora_alpha=3)]


def merged(adapters, base=BASE, weights=WEIGHTS):
    for name, info in base.items():
        if len(info.shape) == 2:
            factors = [bound.factors(name) for bound in adapters]
            yield name, *lowrank.merged_factors(factors, weights, "tensor")


def total(adapters, name, weights=WEIGHTS):
    """sum_j w_j t_j in float64."""
    vectors = [lowrank.delta(bound.factors(name), torch.float64) for bound in adapters]
    return sum(weight * vector for weight, vector in zip(weights[0], vectors, strict=True))


def write(folder, adapters, *args, base=BASE, **kwargs):
    folder.mkdir()
    write_adapter(folder, adapters, merged(adapters, base), *args, **kwargs)
    config = json.loads((folder / "adapter_config.json").read_text())
    return Adapter(folder).bind(base), config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.1), (torch.float64, 1e-14)])
def test_read_again_it_is_the_sum(tmp_path, pair, dtype, error):
    again, config, stored = write(tmp_path / "out", pair, dtype=dtype)
    assert {name: again.rank(name) for name in BASE} == {
        "model.q.weight": 6,
        "model.v.weight": 4,
        "model.e.weight": 2,
        "model.norm.weight": 0,
    }
    for name in again.placements:
        torch.testing.assert_close(
            lowrank.delta(again.factors(name), torch.float64), total(pair, name), rtol=0, atol=error
        )
        assert again.factors(name).scale == 1.0
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == {
        f"{PREFIX}model.q.lora_A.weight": [6, 6],
        f"{PREFIX}model.q.lora_B.weight": [5, 6],
        f"{PREFIX}model.v.lora_A.weight": [4, 6],
        f"{PREFIX}model.v.lora_B.weight": [7, 4],
        f"{PREFIX}model.e.lora_embedding_A": [2, 9],
        f"{PREFIX}model.e.lora_embedding_B": [3, 2],
    }
    assert config["target_modules"] == ["model.q", "model.v", "model.e"]
    assert config["r"] == config["lora_alpha"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.v": 4, "model.e": 2}
    assert (config["peft_type"], config["use_rslora"], config["bias"]) == ("LORA", False, "none")
    assert (config["fan_in_fan_out"], config["modules_to_save"]) == (False, None)
    assert config["base_model_name_or_path"] == "owner/base"


def test_the_most_common_rank_is_the_default(tmp_path):
    base = infos(a__weight=(5, 6), b__weight=(5, 6), c__weight=(5, 6))
    both = linear("b", 4, 6, 5, seed=1) | linear("c", 4, 6, 5, seed=2)
    adapters = [
        bind(tmp_path / "x", both | linear("a", 4, 6, 5), base),
        bind(tmp_path / "y", both, base),
    ]
    _, config, _ = write(tmp_path / "out", adapters, base=base)
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (8, {"a": 4}, {"a": 4})


def test_transposed_layers(tmp_path):
    base = infos(q__weight=(6, 5), s__weight=(6, 6))
    tensors = [linear("q", 4, 6, 5, seed=seed) | linear("s", 4, 6, 6, seed=seed + 5) for seed in (1, 2)]
    adapters = [bind(tmp_path / str(i), each, base, fan_in_fan_out=True) for i, each in enumerate(tensors)]
    again, config, stored = write(tmp_path / "out", adapters, base=base)
    assert config["fan_in_fan_out"] is True
    assert list(stored[f"{PREFIX}q.lora_A.weight"].shape) == [8, 6]
    for name in base:
        got = lowrank.delta(again.factors(name), torch.float64)
        torch.testing.assert_close(got, total(adapters, name), rtol=0, atol=1e-5)


def test_a_module_whose_name_ends_with_anothers(tmp_path):
    base = infos(x__fc__weight=(5, 6), y__weight=(5, 6), fc__weight=(5, 6))
    wide = linear("x.fc", 4, 6, 5, seed=1) | linear("y", 4, 6, 5, seed=2)
    adapters = [bind(tmp_path / "a", wide | linear("fc", 4, 6, 5), base), bind(tmp_path / "b", wide, base)]
    again, config, _ = write(tmp_path / "out", adapters, base=base)  # "fc" as a pattern would match x.fc too
    assert config["rank_pattern"] == {"^fc": 4}
    assert {name: by_pattern(config["rank_pattern"], name, 8) for name in ("x.fc", "y", "fc")} == {
        "x.fc": 8,
        "y": 8,
        "fc": 4,
    }
    assert again.rank("x.fc.weight") == 8


def test_tensors_stored_whole(tmp_path):
    base = BASE | infos(x__classifier__weight=(3, 6), x__classifier__bias=(3,))
    adapters = []
    for seed in (1, 2):
        head = {
            f"{PREFIX}classifier.weight": random(3, 6, seed=seed),
            f"{PREFIX}classifier.bias": random(3, seed=seed),
        }
        tensors = linear("model.q", 4, 6, 5, seed=seed) | head
        folder = tmp_path / str(seed)
        adapters.append(bind(folder, tensors, base, task_type="SEQ_CLS", modules_to_save=["classifier", "score"]))
    full = {name: torch.stack([bound.read(name) for bound in adapters]).mean(dim=0) for name in adapters[0].full}
    again, config, stored = write(tmp_path / "out", adapters, full, base=base)
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert torch.equal(stored[f"{PREFIX}classifier.bias"], full["x.classifier.bias"])
    assert list(again.full) == ["x.classifier.bias", "x.classifier.weight"]
    with pytest.raises(
        InputError, match=r"stores the tensor 'x.classifier.bias' whole, and no merged tensor was given"
    ):
        write_adapter(
            tmp_path / "out", adapters, merged(adapters), {"x.classifier.weight": full["x.classifier.weight"]}
        )
    with pytest.raises(InputError, match="a merged tensor was given for 'other', which no adapter stores whole"):
        write_adapter(tmp_path / "out", adapters, merged(adapters), full | {"other": torch.zeros(1)})


def test_what_the_inputs_do_not_agree_on_is_left_open(tmp_path):
    adapters = [
        bind(tmp_path / str(i), linear("model.q", 4, 6, 5), base_model_name_or_path=f"owner/{i}", task_type=task)
        for i, task in enumerate(["CAUSAL_LM", None])
    ]
    _, config, _ = write(tmp_path / "out", adapters)
    assert (config["base_model_name_or_path"], config["task_type"]) == (None, None)
    _, config, _ = write(tmp_path / "named", adapters, base_model="owner/other")
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/other", None)


def test_metadata(tmp_path, pair):
    write(tmp_path / "out", pair, metadata={"made_by": "test"})
    with safe_open(str(tmp_path / "out" / "adapter_model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "test"}


@pytest.mark.parametrize(("module", "match"), [
    ("model.q", None),
    ("q", "as linear q; expected linear model.q as in .*first"),
])  # fmt: skip
def test_inputs_that_name_a_module_differently_are_refused(tmp_path, module, match):
    adapters = [bind(tmp_path / "first", linear("model.q", 4, 6, 5)), bind(tmp_path / "b", linear(module, 4, 6, 5))]
    if match is None:
        write(tmp_path / "out", adapters)
        return
    with pytest.raises(InputError, match=match):
        write(tmp_path / "out", adapters)


def test_inputs_of_another_layout_or_name_are_refused(tmp_path):
    base = infos(q__weight=(6, 6), h__weight=(3, 6))
    adapters = [bind(tmp_path / str(flag), linear("q", 4, 6, 6), base, fan_in_fan_out=flag) for flag in (True, False)]
    with pytest.raises(InputError, match=r"as linear q, not transposed; expected linear q, transposed as in .*True"):
        write(tmp_path / "out", adapters, base=base)
    heads = [
        bind(tmp_path / f"head{i}", linear("q", 4, 6, 6) | {f"{PREFIX}{name}.weight": torch.zeros(3, 6)}, base)
        for i, name in enumerate(["h", "x.h"])
    ]
    with pytest.raises(InputError, match=r"calls the tensor 'h.weight' 'x.h.weight'; expected 'h.weight'"):
        write(tmp_path / "heads", heads, {"h.weight": torch.zeros(3, 6)}, base=base)


def test_factors_that_cannot_be_written_are_refused(tmp_path, pair):
    left, right = torch.ones(5, 2), torch.ones(2, 6)
    with pytest.raises(InputError, match="no merged factors were given"):
        write_adapter(tmp_path, pair, [("model.q.weight", torch.ones(5, 0), torch.ones(0, 6))])
    with pytest.raises(InputError, match=r"for the tensor 'model.norm.weight', which no adapter changes"):
        write_adapter(tmp_path, pair, [("model.norm.weight", left, right)])
    with pytest.raises(
        InputError, match=r"of 'model.q.weight' are \[6, 2\] and \[2, 5\]; expected \[5, r\] and \[r, 6\]"
    ):
        write_adapter(tmp_path, pair, [("model.q.weight", right.T, left.T)])
    with pytest.raises(InputError, match=r"'model.q.weight' are not finite in float16; choose a smaller scale or"):
        write_adapter(tmp_path, pair, [("model.q.weight", 1e6 * left, right)], dtype=torch.float16)
    assert not (tmp_path / "adapter_config.json").exists()


def test_views_of_one_memory_are_written(tmp_path, pair):
    """safetensors itself refuses them."""
    shared = torch.ones(2, 6)
    factors = [("model.q.weight", torch.ones(5, 2), shared), ("model.v.weight", torch.ones(7, 2), shared)]
    write_adapter(tmp_path, pair, factors)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4
