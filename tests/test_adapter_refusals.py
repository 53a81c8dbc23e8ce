"""Adapters that are refused on opening or reading: one sentence with the file and what was expected."""

import pytest
import torch

from awd_fast import InputError
from awd_fast.adapters import Adapter
from tests.adapter_folders import PREFIX, embedding, infos, linear, write_adapter_folder

BASE = infos(m__q__weight=(5, 6))


@pytest.fixture
def plain(tmp_path):
    """One linear module of rank 4 with alpha 8."""
    return write_adapter_folder(tmp_path / "plain", linear("m.q", 4, 6, 5))


REFUSED_CONFIGS = [
    ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'; expected LORA"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "use_dora is set, which means DoRA"),
    ({"lora_bias": True}, "lora_bias is set"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
    ({"target_parameters": ["experts.w"]}, "target_parameters is set"),
    ({"use_qalora": True}, "use_qalora is set"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is set"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config is set"),
    ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
    ({"monteclora_config": {"a": 1}}, "monteclora_config is set"),
    ({"velora_config": {"a": 1}}, "velora_config is set"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base's weights"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ({"init_lora_weights": ["pissa"]}, "init_lora_weights is"),
    ({"r": 0}, "r is 0; expected a whole number above 0"),
    ({"r": -4}, "r is -4"),
    ({"r": None}, "r is None"),
    ({"r": 4.0}, "r is 4.0"),
    ({"r": True}, "r is True"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern q is 0"),
    ({"rank_pattern": {"q": 8}}, r"lora_A.weight' is \[4, 6\], of rank 4; expected rank 8 as adapter_config.json says"),
    ({"r": 8}, "expected rank 8"),
    ({"rank_pattern": {"(": 4}}, r"rank_pattern has the key '\(', no regular expression"),
    ({"rank_pattern": ["q"]}, "rank_pattern is .'q'.; expected a mapping"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a finite number"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": None}, "lora_alpha is None"),
    ({"alpha_pattern": {"q": float("inf")}}, "alpha_pattern q is inf"),
    ({"alpha_pattern": {"q": None}}, "alpha_pattern q is None"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
    ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1; expected true or false"),
    ({"target_modules": 3}, "target_modules is 3; expected a list of module names"),
    ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier'; expected a list of module names"),
    ({"task_type": 3}, "task_type is 3; expected text"),
]


@pytest.mark.parametrize(("config", "match"), REFUSED_CONFIGS, ids=lambda value: str(value)[:40])
def test_configurations_that_are_refused(tmp_path, config, match):
    folder = write_adapter_folder(tmp_path / "a", linear("m.q", 4, 6, 5), **config)
    with pytest.raises(InputError, match=match) as error:
        Adapter(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("initial", [None, True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_accepted(tmp_path, initial):
    Adapter(write_adapter_folder(tmp_path / "a", linear("m.q", 4, 6, 5), init_lora_weights=initial))


A, B = f"{PREFIX}m.q.lora_A.weight", f"{PREFIX}m.q.lora_B.weight"
REFUSED_TENSORS = [
    ({B: None}, rf"holds '{A}' but no lora_B of the module 'm.q'"),
    ({A: None}, rf"holds '{B}' but no lora_A of the module 'm.q'"),
    ({A: None, B: None}, "holds no LoRA factors; expected lora_A and lora_B"),
    ({f"{PREFIX}m.e.lora_embedding_A": torch.zeros(4, 3)}, "no lora_embedding_B of the module 'm.e'"),
    (
        {B: torch.zeros(5, 3)},
        r"lora_A.weight' is \[4, 6\] and '.*lora_B.weight' is \[5, 3\]; expected \[r, inputs\] and",
    ),
    ({A: torch.zeros(4, 6, 3, 3), B: torch.zeros(5, 4, 1, 1)}, r"is float32 \[4, 6, 3, 3\]; expected two dimensions"),
    ({A: torch.zeros(4, 0)}, r"is float32 \[4, 0\]; expected two dimensions .* that are not 0"),
    ({A: torch.zeros(4, 6, dtype=torch.int8)}, r"is int8 \[4, 6\]; expected an unquantised floating dtype"),
    ({A: torch.zeros(4, 6).to(torch.float8_e4m3fn)}, "is float8_e4m3fn"),
    ({f"{PREFIX}m.q.lora_A.other.weight": torch.zeros(4, 6)}, "holds both .*; expected one adapter in the file"),
    (embedding("m.q", 4, 5, 6), "holds linear and embedding factors for one module"),
    ({f"{PREFIX}m.q.lora_magnitude_vector": torch.zeros(5)}, "lora_magnitude_vector' belongs to DoRA"),
    ({f"{PREFIX}m.q.lora_magnitude_vector.default.weight": torch.zeros(5)}, "belongs to DoRA"),
    ({f"{PREFIX}m.q.lora_B.bias": torch.zeros(5)}, r"lora_B.bias' is a bias of LoRA factors \(lora_bias\)"),
    ({f"{PREFIX}m.q.base_layer.bias": torch.zeros(5)}, "base_layer.bias' is a trained bias; expected .* bias 'none'"),
    ({f"{PREFIX}m.norm.bias": torch.zeros(5)}, "norm.bias' is a trained bias"),
    ({f"{PREFIX}m.q.lora_diag": torch.zeros(5)}, "lora_diag' is neither a LoRA factor nor part of modules_to_save"),
    ({f"{PREFIX}m.q.lora_E.weight": torch.zeros(5)}, "lora_E.weight' is neither"),
    ({f"{PREFIX}m.v.qweight": torch.zeros(5)}, "qweight' is neither"),
    ({f"{PREFIX}m.v.weight": torch.zeros(5, dtype=torch.uint8)}, "m.v.weight' is neither"),
    ({f"{PREFIX}m.v.token_adapter.trainable_tokens_delta": torch.zeros(5)}, "delta' is neither"),
    ({f"{PREFIX}h.weight": torch.zeros(5), "h.weight": torch.zeros(5)}, "holds both .*h.weight"),
]


@pytest.mark.parametrize(("changes", "match"), REFUSED_TENSORS, ids=lambda value: str(value)[:40])
def test_tensors_that_are_refused(tmp_path, changes, match):
    tensors = {name: t for name, t in (linear("m.q", 4, 6, 5) | changes).items() if t is not None}
    folder = write_adapter_folder(tmp_path / "a", tensors)
    with pytest.raises(InputError, match=match) as error:
        Adapter(folder)
    assert str(folder / "adapter_model.safetensors") in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_factors_that_are_not_finite_are_refused_on_reading(tmp_path, value):
    tensors = linear("m.q", 4, 6, 5)
    tensors[A][1, 2] = value
    bound = Adapter(write_adapter_folder(tmp_path / "a", tensors)).bind(BASE)
    with pytest.raises(InputError, match=rf"'{A}' holds 1 NaN or Inf values"):
        bound.factors("m.q.weight")


def test_folders_that_are_refused(tmp_path, plain):
    with pytest.raises(InputError, match="there is no file or folder"):
        Adapter(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"notes.txt is a file; expected an adapter's folder"):
        Adapter(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no adapter_config.json; expected a folder that PEFT's"):
        Adapter(tmp_path / "empty")
    config = (plain / "adapter_config.json").read_text()
    (tmp_path / "empty" / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match=r"empty holds no adapter_model.safetensors; expected"):
        Adapter(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(
        InputError, match=r"holds only adapter_model.bin, .* a pickle can run code; convert it with PEFT"
    ):
        Adapter(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "match"), [("{", "is not readable: JSONDecodeError"), ("[1]", "holds list; expected")]
)
def test_a_configuration_that_is_no_mapping_is_refused(plain, text, match):
    (plain / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=match):
        Adapter(plain)


@pytest.mark.parametrize("kept", [0, 7, 100])
def test_a_broken_file_is_refused(plain, kept):
    file = plain / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        Adapter(plain)
