"""Adapters in memory: the same as those on disk, in what they mean, in their merge, and in what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from awd_fast import InputError
from awd_fast.adapter_models import AdapterModel, plan_adapters
from awd_fast.adapter_output import adapter_state
from awd_fast.held_adapters import HeldAdapter
from awd_fast.lora_merger import LoraMerger
from awd_fast.pipeline import merge_checkpoints
from awd_fast.plan import StateDict
from awd_fast.recipe import make_recipe
from awd_fast.report import Tally
from tests.adapter_folders import infos, linear
from tests.lora_cases import CASES, SPANS, base_state, folders

BASE = infos(q__weight=(5, 6))
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def held(folder, index=0):
    """The adapter of a folder, loaded."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return HeldAdapter(f"adapter {index}", config, load_file(folder / "adapter_model.safetensors"), {})


@pytest.mark.parametrize("name", SPANS)
def test_the_merge_is_that_of_folders(tmp_path, name):
    """To the bit."""
    state = base_state()
    base, written, _ = folders(tmp_path, state)
    report = merge_checkpoints(base, written, tmp_path / "out", as_adapter=True, **CASES[name])
    state = {tensor.step.name: state[tensor.step.name] for tensor in report.tensors}  # in the order of the files
    source, recipe, tally = StateDict("base", state), make_recipe(3, **CASES[name]), Tally()
    models = [AdapterModel(held(folder, index), source, "the base") for index, folder in enumerate(written)]
    plan = plan_adapters(source, models, recipe, as_adapter=True)
    merger = LoraMerger(source, models, recipe)
    full = merger.stored_whole(plan, tally)
    found, config = adapter_state([model.bound for model in models], merger.as_factors(plan, tally), full)
    wanted = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert config == json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert repr(tally.report(plan)) == repr(report.tensors)


def test_a_scale_that_was_set_counts():
    tensors = linear("q", 4, 6, 5)
    factors = HeldAdapter("a", PLAIN, tensors, {"q": 0.5, "other": 3.0}).bind(BASE).factors("q.weight")
    assert factors.scale == 0.5
    assert HeldAdapter("a", PLAIN, tensors, {}).bind(BASE).factors("q.weight").scale == 2.0


def test_tensors_of_any_layout_are_read():
    tensors = {name: tensor.T.contiguous().T for name, tensor in linear("q", 4, 6, 5).items()}
    adapter = HeldAdapter("a", PLAIN, {name: tensor.requires_grad_() for name, tensor in tensors.items()}, {})
    factors = adapter.bind(BASE).factors("q.weight")
    assert torch.equal(factors.right, tensors["base_model.model.q.lora_A.weight"])
    assert torch.equal(factors.left, tensors["base_model.model.q.lora_B.weight"])


def test_refusals_name_the_adapter():
    tensors = linear("q", 4, 6, 5)
    with pytest.raises(InputError, match=r"^adapter 'x': use_dora is set, which means DoRA"):
        HeldAdapter("adapter 'x'", PLAIN | {"use_dora": True}, tensors, {})
    with pytest.raises(InputError, match=r"^adapter 'x': peft_type is 'IA3'; expected LORA"):
        HeldAdapter("adapter 'x'", {"peft_type": "IA3"}, {}, {})
    with pytest.raises(InputError, match=r"^adapter 'x' holds no LoRA factors"):
        HeldAdapter("adapter 'x'", PLAIN, {}, {})
    with pytest.raises(InputError, match=r"^adapter 'x': 'base_.*A.weight' is .* on meta; expected a dense tensor"):
        HeldAdapter("adapter 'x'", PLAIN, {name: tensor.to("meta") for name, tensor in tensors.items()}, {})
    tensors["base_model.model.q.lora_A.weight"][0, 0] = torch.nan
    bound = HeldAdapter("adapter 'x'", PLAIN, tensors, {}).bind(BASE)
    with pytest.raises(InputError, match=r"^adapter 'x': tensor 'base_.*A.weight' holds 1 NaN or Inf"):
        bound.factors("q.weight")
