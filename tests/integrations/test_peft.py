"""AWD over the adapters of a PeftModel: the merge of the saved adapters, and of the full models that they mean."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import awd_fast  # noqa: E402
from awd_fast import InputError  # noqa: E402
from awd_fast.integrations.peft import add_weighted_adapter  # noqa: E402
from tests.documents import run_python  # noqa: E402
from tests.integrations.peft_cases import MODELS, NAMES, adapted, alone, fingerprint, saved  # noqa: E402

TOKENS = torch.arange(5)[None]
EVERYTHING = {"include": "*", "exclude": ()}
SGD = awd_fast.SGD(lr=0.05, iterations=20)
CASES = {
    "rows": {"optimizer": SGD},
    "columns": {"groups": "column", "optimizer": SGD},
    "tensors": {"groups": "tensor", "optimizer": SGD, "weights": [1, -0.5, 2]},
    "global": {"groups": "global", "optimizer": SGD, "alpha": 0.1, "others": "base"},
    "everything": EVERYTHING | {"optimizer": SGD, "others_scale": 0.3},
    "wudi": {"method": "wudi"},
    "task arithmetic": {"method": "task_arithmetic", "scale": 0.5, "weights": [1, -0.5, 2]},
    "average": {"method": "average"},
}


def outputs(model):
    found = model(input_ids=TOKENS)
    return getattr(found, "logits", found).detach()


def merge(model, name="merged", **options):
    weights = options.pop("weights", None)
    return add_weighted_adapter(model, NAMES, weights, name, **options)


def deltas(model, adapter):
    """What an adapter adds to each layer, in float64, by PEFT's own account."""
    return {
        path: layer.get_delta_weight(adapter).detach().double()
        for path, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer) and adapter in layer.scaling
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_merge_of_the_full_models(name, case):
    """In float64, of which sums of at most 200 terms below 100 leave 1e-11."""
    base, model = adapted(name, torch.float64)
    report = merge(model, **CASES[case])
    models = [alone(base, model, adapter) for adapter in NAMES]
    wanted = awd_fast.merge_models(base, models, **CASES[case])
    model.set_adapter("merged")
    merged = copy.deepcopy(model).merge_and_unload()
    found = dict(merged.named_parameters())
    for key, parameter in wanted.named_parameters():
        torch.testing.assert_close(found[key], parameter, rtol=1e-11, atol=1e-11, msg=key)
    if name != "llama":  # where embeddings are tied, factors change one of the two names
        torch.testing.assert_close(outputs(model), outputs(wanted), rtol=1e-9, atol=1e-9)
    assert report.counts()[CASES[case].get("method", "awd")] > 0


@pytest.mark.parametrize("name", MODELS)
def test_by_default_the_loss_is_as_low_as_for_full_models(name):
    """Where the minimum is flat, other roundings of the Gram matrices end elsewhere in it, as low."""
    base, model = adapted(name, torch.float64)
    report, reports = merge(model), []
    awd_fast.merge_models(base, [alone(base, model, each) for each in NAMES], on_report=reports.append)
    full = {tensor.step.name: tensor.similarity for tensor in reports[0].tensors}
    found = {tensor.step.name: tensor.similarity for tensor in report.tensors if tensor.similarity is not None}
    assert found
    for key, similarity in found.items():
        assert similarity.loss_before == pytest.approx(full[key].loss_before, rel=1e-9)
        assert similarity.loss_after == pytest.approx(full[key].loss_after, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_merge_of_the_saved_adapters(tmp_path, name, dtype):
    """To the bit: both are computed in float64 from the same factors, and rounded once."""
    base, model = adapted(name, dtype)
    folder, adapters = saved(base, model, tmp_path)
    plain = str(dtype).removeprefix("torch.")
    awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", as_adapter=True, dtype=plain)
    merge(model)
    model.load_adapter(tmp_path / "out", "disk", autocast_adapter_dtype=False)
    found, wanted = (
        peft.get_peft_model_state_dict(model, adapter_name=each, save_embedding_layers=False)
        for each in ("merged", "disk")
    )
    assert found.keys() == wanted.keys()
    for key in found:
        assert found[key].dtype == dtype
        assert torch.equal(found[key], wanted[key]), key
    one, other = (model.peft_config[each] for each in ("merged", "disk"))
    assert (one.r, one.rank_pattern) == (other.r, other.rank_pattern)
    assert set(one.modules_to_save or ()) == set(other.modules_to_save or ())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", MODELS)
def test_it_is_saved_and_loaded(tmp_path, name):
    base, model = adapted(name)
    before = fingerprint(model)
    plain = outputs(model)
    merge(model)
    after = fingerprint(model)
    added = {key for key in after[0] if key not in before[0]}
    assert all("merged" in key for key in added)
    assert {key: value for key, value in after[0].items() if key not in added} == before[0]
    assert {key: value for key, value in after[1].items() if key in before[1]} == before[1]
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if key in added)
    assert not any(module.training for module in model.modules())
    assert after[2] == before[2] == ["one"]
    assert {key: value for key, value in after[3].items() if key != "merged"} == before[3]
    assert torch.equal(outputs(model), plain)
    model.set_adapter("merged")
    wanted = outputs(model)
    assert not torch.allclose(wanted, plain)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged").eval()
    assert torch.equal(outputs(again), wanted)


@pytest.mark.parametrize("name", ["gpt2", "plain"])  # it takes neither modules_to_save nor a pattern among lists
def test_a_weighted_sum_is_that_of_peft(name):
    """PEFT's own method with "cat", which multiplies in float32."""
    weights = [0.7, -0.4, 1.2]
    _, model = adapted(name)
    merge(model, method="task_arithmetic", scale=1.0, weights=weights)
    model.base_model.add_weighted_adapter(NAMES, weights, "peft", combination_type="cat")
    found, theirs = deltas(model, "merged"), deltas(model, "peft")
    assert found.keys() <= theirs.keys()
    for key, delta in theirs.items():
        torch.testing.assert_close(found.get(key, torch.zeros_like(delta)), delta, rtol=1e-5, atol=1e-5)


def test_ranks_add_up():
    _, model = adapted("bert")
    report = merge(model, dtype="bfloat16")
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert layer.lora_A["merged"].weight.shape == (4 + 2 + 5, 16)
    assert layer.lora_A["merged"].weight.dtype == torch.bfloat16
    assert layer.scaling["merged"] == 1.0
    assert model.peft_config["merged"].modules_to_save == ["classifier", "score"]
    assert report.similarity_after < report.similarity_before
    assert (report.models, report.as_adapter) == (tuple(NAMES), True)
    assert report.adapters == ("LoRA adapter of rank 4", "LoRA adapter of rank 2", "LoRA adapter of rank 3 to 5")
    assert report.counts()["awd"] == 10  # 5 of each layer; the pooler is excluded


def test_a_scale_that_was_set_counts():
    _, model = adapted("plain", torch.float64)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("two", 3.0)
    merge(model, method="task_arithmetic", scale=1.0)
    summed = [sum(each) for each in zip(*(deltas(model, name).values() for name in NAMES), strict=True)]
    for found, wanted in zip(deltas(model, "merged").values(), summed, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_merge_of_merges():
    """Adapters that were merged, by this or by PEFT, are adapters."""
    _, model = adapted("plain", torch.float64)
    merge(model, "ours", method="task_arithmetic", scale=1.0)
    model.base_model.add_weighted_adapter(NAMES[:2], [1.0, 1.0], "theirs", combination_type="cat")
    add_weighted_adapter(model, ["ours", "theirs"], [1.0, -1.0], "both", method="task_arithmetic", scale=1.0)
    for found, wanted in zip(deltas(model, "both").values(), deltas(model, "three").values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_a_model_in_training_goes_on_as_it_was():
    _, model = adapted("bert")
    model.train()
    model.set_adapter("two")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(before.values())
    merge(model)
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert model.active_adapters == ["two"]
    outputs_before = model(input_ids=TOKENS).logits.sum()
    outputs_before.backward()


def test_layers_may_be_quantised():
    """Four bits of bitsandbytes: factors alone are read, so that the merge is that of the same adapters elsewhere."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    def model(quantised):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 128))
        if quantised:
            for index, layer in enumerate(list(net)):
                net[index] = Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32)
                net[index].load_state_dict(layer.state_dict())
            net.to("cpu")
        made = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "1"]), adapter_name="one")
        for name, rank in (("two", 3), ("three", 4)):
            made.add_adapter(name, peft.LoraConfig(r=rank, target_modules=["0", "1"]))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        return made.eval()

    plain, packed = model(False), model(True)
    assert not packed.base_model.model[0].base_layer.weight.is_floating_point()
    merge(plain)
    merge(packed)
    found, wanted = (peft.get_peft_model_state_dict(each, adapter_name="merged") for each in (packed, plain))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    packed.set_adapter("merged")
    assert packed(torch.ones(1, 64)).isfinite().all()


def test_the_page_is_true():
    names = run_python("peft.md")
    assert names["report"].similarity_after < names["report"].similarity_before


# What is refused.


def _config(**config):
    return lambda: peft.LoraConfig(target_modules=["first", "second"], **config)


KINDS = {
    "dora": (_config(use_dora=True), r"adapter 'x': use_dora is set, which means DoRA"),
    "pissa": (_config(r=2, init_lora_weights="pissa"), r"adapter 'x': init_lora_weights is 'pissa', which changes the"),
    "biases": (_config(lora_bias=True), r"adapter 'x': lora_bias is set, which means biases in its factors"),
    "trained biases": (_config(bias="all"), r"adapter 'x': tensor '.*bias' is a trained bias; expected"),
    "parameters": (
        lambda: peft.LoraConfig(target_modules=["second"], target_parameters=["first.weight"]),
        r"adapter 'x': target_parameters is set",
    ),
    "ia3": (lambda: peft.IA3Config(target_modules=["first"], feedforward_modules=["first"]), r"peft_type is 'IA3'; ex"),
    "loha": (lambda: peft.LoHaConfig(target_modules=["first"]), r"adapter 'x': peft_type is 'LOHA'; expected LORA"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_kinds_are_refused(kind):
    config, message = KINDS[kind]
    model = peft.get_peft_model(adapted("plain")[0], config(), adapter_name="x")
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        add_weighted_adapter(model, ["x", "x"], None, "new")
    assert fingerprint(model) == before


def test_layers_of_other_kinds_are_refused():
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "2"]), adapter_name="x")
    with pytest.raises(InputError, match=r"adapter 'x': tensor '.*0.lora_A.weight' is .*; expected two dimensions"):
        add_weighted_adapter(model, ["x"], None, "new")
    net = torch.nn.Sequential(torch.nn.MultiheadAttention(4, 2), torch.nn.Linear(4, 4))
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"]), adapter_name="x")
    with pytest.raises(InputError, match=r"adapter 'x' changes the module '0', but the model has no tensor '0.weight'"):
        add_weighted_adapter(model, ["x"], None, "new")
    base, _ = adapted("llama")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(base, config, adapter_name="x")
    with pytest.raises(InputError, match=r"adapter 'x': peft_type is 'PROMPT_TUNING'; expected LORA"):
        add_weighted_adapter(model, ["x"], None, "new")


ARGUMENTS = {
    "no model": ({"model": torch.nn.Linear(2, 2)}, "model is Linear; expected a peft.PeftModel"),
    "unknown": (
        {"adapters": ["one", "four"]},
        "the model has no adapter 'four'; expected one of 'one', 'two', 'three'",
    ),
    "text": ({"adapters": "one"}, "adapters is 'one'; expected a list of names"),
    "none": ({"adapters": []}, r"adapters is \[\]; expected a list of names"),
    "taken": ({"adapter_name": "two"}, "the model has an adapter 'two' already; expected a new name"),
    "dots": ({"adapter_name": "a.b"}, "adapter_name is 'a.b'; expected a text without dots"),
    "weights": ({"weights": [1.0]}, "1 weights were given for 3 models; expected one for each"),
    "adam": ({"optimizer": "adam"}, "Adam with penalty l2 leaves the span of the adapters' task vectors"),
    "include": ({"include": "*nothing*"}, r"include pattern '\*nothing\*' matches no tensor of the base"),
    "option": ({"svd_rank": 3}, "unknown option 'svd_rank'"),
    "device": ({"device": "cuda"}, "device is cuda, but adapters are merged on the CPU"),
    "overflow": ({"scale": 1e9, "dtype": "float16"}, "the merged factors of 'first.weight' are not finite in float16"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_are_refused(case):
    changed, message = ARGUMENTS[case]
    _, model = adapted("plain")
    before = fingerprint(model)
    given = {"model": model, "adapters": NAMES, "weights": None, "adapter_name": "new"} | changed
    with pytest.raises(InputError, match=message):
        add_weighted_adapter(**given)
    assert fingerprint(model) == before


def test_adapters_that_are_named_as_modules_are_refused():
    """PEFT takes their names out of those of tensors."""
    _, model = adapted("plain")
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"PEFT did not load 'base_.*first.*' of the merged adapter 'first'; expected"):
        merge(model, "first")
    assert fingerprint(model) == before
    model.add_adapter("first", peft.LoraConfig(target_modules=["second"]))
    with pytest.raises(InputError, match=r"adapter 'one': PEFT does not give its factors of the module 'first', as it"):
        merge(model, "new")


def test_no_other_module_becomes_part_of_the_adapter():
    """PEFT takes "fc" for every module whose name ends with it."""
    net = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4), "x": torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})})
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules="fc"), adapter_name="one")
    add_weighted_adapter(model, ["one"], None, "new")
    assert isinstance(model.base_model.model["fc"], peft.tuners.lora.LoraLayer)
    assert not isinstance(model.base_model.model["x"]["fc"], peft.tuners.lora.LoraLayer)


def test_nan_is_named():
    _, model = adapted("plain")
    model.base_model.model.second.lora_B["two"].weight.data[1, 0] = torch.nan
    with pytest.raises(InputError, match=r"adapter 'two': tensor '.*second.lora_B.weight' holds 1 NaN or Inf values"):
        merge(model)


def test_nothing_stays_where_peft_fails(monkeypatch):
    _, model = adapted("bert")
    before = fingerprint(model)

    def fail(*args, **named):
        raise RuntimeError("no memory")

    monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        merge(model)
    assert fingerprint(model) == before
    monkeypatch.undo()
    merge(model)
