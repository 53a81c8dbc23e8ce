"""`merge_models` on models of transformers: text, vision and both, as their folders merge, and what is refused."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import awd_fast  # noqa: E402
from awd_fast import InputError  # noqa: E402
from tests.documents import run_python  # noqa: E402
from tests.module_cases import same, snapshot, state, tuned  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"input_ids": torch.arange(6)[None]}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)}


def bert():
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, **SMALL)
    return transformers.BertForMaskedLM(config), TOKENS


def llama(tied=True):
    config = transformers.LlamaConfig(
        vocab_size=50, max_position_embeddings=20, num_key_value_heads=1, tie_word_embeddings=tied, **SMALL
    )
    return transformers.LlamaForCausalLM(config), TOKENS


def t5():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config), TOKENS | {"decoder_input_ids": torch.arange(3)[None]}


def vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config), IMAGE


def clip():
    text = SMALL | {"vocab_size": 50, "max_position_embeddings": 20, "eos_token_id": 2}
    vision = SMALL | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config), TOKENS | IMAGE


def resnet():
    """With batch norms, whose running means are buffers."""
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config), IMAGE


MODELS = {
    "bert": bert,
    "llama": llama,
    "llama untied": lambda: llama(False),
    "t5": t5,
    "vit": vit,
    "clip": clip,
    "resnet": resnet,
}
FOLDERS = [name for name in MODELS if name != "resnet"]
SGD = {"optimizer": awd_fast.SGD(lr=0.05, iterations=20)}
CASES = {
    "rows": SGD,
    "global": SGD | {"groups": "global"},
    "wudi": {"method": "wudi"},
    "task arithmetic": {"method": "task_arithmetic", "weights": [1, 1, -1], "scale": 0.4},
    "average": {"method": "average"},
}
ALSO = {"resnet": {"include": "*", "exclude": ("*norm*", "*bias")}}  # it has no matrices but its head


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    base, inputs = MODELS[name]()
    base = base.to(dtype).eval()
    return base, [tuned(base, seed, 0.05) for seed in range(3)], inputs


def outputs(model, inputs):
    found = model(**inputs)
    return [tensor.detach() for tensor in found.values() if isinstance(tensor, torch.Tensor)]


def ties(model):
    """Which names of parameters mean the same one."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(groups.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_merge_of_the_state_dicts(name, case):
    base, models, inputs = made(name)
    options = CASES[case] | ALSO.get(name, {})
    before = snapshot(base)
    merged = awd_fast.merge_models(base, models, **options)
    assert same(state(merged), awd_fast.merge(state(base), [state(model) for model in models], **options))
    assert same(snapshot(base), before)
    assert ties(merged) == ties(base)
    assert same(dict(merged.named_buffers()), dict(base.named_buffers()))
    assert type(merged) is type(base)
    assert merged.config.to_dict() == base.config.to_dict()
    assert not merged.training
    found = outputs(merged, inputs)
    assert not torch.allclose(found[0], outputs(base, inputs)[0])
    assert awd_fast.merge_models(base, models, inplace=True, **options) is base
    assert all(torch.equal(one, other) for one, other in zip(found, outputs(base, inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_the_merge_of_the_folders(tmp_path, name, dtype):
    """To the bit, saved and loaded again."""
    base, models, inputs = made(name, dtype)
    folders = [tmp_path / str(index) for index in range(4)]
    for model, folder in zip((base, *models), folders, strict=True):
        model.save_pretrained(folder)
    awd_fast.merge_checkpoints(folders[0], folders[1:], tmp_path / "out")
    wanted = type(base).from_pretrained(tmp_path / "out", dtype=dtype)
    merged = awd_fast.merge_models(base, models)
    assert same(state(merged), state(wanted))
    merged.save_pretrained(tmp_path / "saved")
    again = type(base).from_pretrained(tmp_path / "saved", dtype=dtype)
    assert again.dtype == merged.dtype == dtype
    assert same(state(again), state(merged))
    if dtype == torch.float32:  # of bfloat16 a loaded model keeps buffers that are not saved in float32
        found, wanted = (outputs(model, inputs) for model in (again, merged))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_copy_is_trained_and_generates_as_a_model_does():
    base, models, _ = made("llama")
    base.train()
    merged = awd_fast.merge_models(base, models)
    assert merged.training
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    merged(**TOKENS, labels=TOKENS["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in merged.parameters())
    assert all(parameter.grad is None for parameter in base.parameters())
    assert merged.eval().generate(**TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 9)
    merged.resize_token_embeddings(60)
    assert base.get_input_embeddings().weight.shape[0] == 50


def test_a_model_that_accelerate_dispatched_is_copied_with_its_hooks():
    accelerate = pytest.importorskip("accelerate")
    base, models, inputs = made("llama")
    wanted = outputs(awd_fast.merge_models(base, models), inputs)
    accelerate.dispatch_model(base, {"": "cpu"}, force_hooks=True)
    assert hasattr(base, "_hf_hook")
    merged = awd_fast.merge_models(base, models)
    assert merged._hf_hook is not base._hf_hook
    assert torch.equal(outputs(merged, inputs)[0], wanted[0])  # by forwards that have the copy's parameters
    assert not torch.equal(outputs(base, inputs)[0], wanted[0])


def test_models_that_are_not_whole_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    base, models, _ = made("llama")
    offloaded = copy.deepcopy(base)
    accelerate.cpu_offload(offloaded)
    with pytest.raises(
        InputError, match=r"^base_model: 'model.embed_tokens.weight' is on the meta device, without val"
    ):
        awd_fast.merge_models(offloaded, models)
    disk = copy.deepcopy(base)
    accelerate.disk_offload(disk, tmp_path)
    with pytest.raises(InputError, match=r"^models\[0\]: 'model.embed_tokens.weight' is on the meta device"):
        awd_fast.merge_models(base, [disk])
    with torch.device("meta"):
        empty = llama()[0]
    with pytest.raises(
        InputError, match=r"is on the meta device, without values; expected a model that is loaded whol"
    ):
        awd_fast.merge_models(empty, models)


def test_models_of_other_kinds_are_refused():
    base, models, _ = made("bert")
    with pytest.raises(InputError, match=r"models\[0\] has the tensor 'embeddings.*' that the base lacks"):
        awd_fast.merge_models(base, [models[0].bert])
    config = copy.deepcopy(base.config)
    config.vocab_size = 60
    other = transformers.BertForMaskedLM(config)
    with pytest.raises(
        InputError, match=r"'bert.embeddings.word_embeddings.weight' has shape \[60, 16\]; expected \[50"
    ):
        awd_fast.merge_models(base, [models[0], other])
    merged = awd_fast.merge_models(base, [models[0], other], others="base")
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    with pytest.raises(
        InputError, match=r"models\[0\]: tensor '.*' is bfloat16; expected float32 as in base_model; giv"
    ):
        awd_fast.merge_models(base, [models[0].bfloat16()])


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    base, models, _ = made("bert")
    config = peft.LoraConfig(target_modules=["query"])
    for wrap in (peft.get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)):
        wrapped = wrap(copy.deepcopy(models[0]), config)
        with pytest.raises(InputError, match=r"^models\[1\].* has adapters of PEFT; merge these"):
            awd_fast.merge_models(base, [models[0], wrapped])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["bitsandbytes", "bitsandbytes 8 bit", "torchao", "fp8"])
def test_quantised_models_are_refused(tmp_path, library):
    base, models, _ = made("llama")
    base.save_pretrained(tmp_path)
    if library == "fp8":
        given = copy.deepcopy(base)
        given.config.quantization_config = {"quant_method": "fp8"}
        method = "dict"
    elif library == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        config, method = transformers.TorchAoConfig(Int8WeightOnlyConfig()), "torchao"
    else:
        pytest.importorskip("bitsandbytes")
        config = transformers.BitsAndBytesConfig(load_in_4bit="8" not in library, load_in_8bit="8" in library)
        method = "bitsandbytes"
    if library != "fp8":
        pytest.importorskip("accelerate")
        given = type(base).from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    with pytest.raises(InputError, match=rf"^base_model is quantised \({method}.*; expected floating weights"):
        awd_fast.merge_models(given, models)
    for module in given.modules():  # as where another library quantises
        module.__dict__.pop("hf_quantizer", None)
        config = getattr(module, "config", None)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    if library != "fp8":
        with pytest.raises(InputError, match=r"^base_model: '.*q_proj.*' is (a |quantised \()(Params4bit|Int8)"):
            awd_fast.merge_models(given, models)


def test_the_page_is_true():
    names = run_python("transformers.md")
    assert names["merged"].num_parameters() == names["base"].num_parameters()
