"""`merge_models`: the merge of state dicts, in a model that is otherwise the base; and models that are refused."""

import copy
import subprocess
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import awd_fast
from awd_fast import InputError
from tests.module_cases import Net, net, same, snapshot, state, tuned

CASES = {
    "awd": {},
    "columns": {"groups": "column", "optimizer": awd_fast.SGD(lr=0.05, iterations=20)},
    "global": {"groups": "global", "include": "*", "exclude": ()},
    "adam": {"optimizer": awd_fast.Adam(lr=1e-3, iterations=10)},
    "wudi": {"method": "wudi"},
    "task arithmetic": {"method": "task_arithmetic", "scale": 0.5, "weights": [1, -0.5, 2]},
    "average": {"method": "average"},
}


@pytest.fixture
def base():
    return net()


@pytest.fixture
def models(base):
    return [tuned(base, seed) for seed in range(3)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_merge_of_the_state_dicts(base, models, name):
    reports = []
    merged = awd_fast.merge_models(base, models, on_report=reports.append, **CASES[name])
    wanted = awd_fast.merge(state(base), [state(model) for model in models], **CASES[name])
    assert same(state(merged), wanted)
    assert len(reports[0].tensors) == len(wanted)
    again = awd_fast.merge_models(base, models, inplace=True, **CASES[name])
    assert again is base
    assert same(state(base), wanted)


def test_all_else_is_the_base(base, models):
    before, theirs = snapshot(base), [snapshot(model) for model in models]
    merged = awd_fast.merge_models(base, models)
    assert same(snapshot(base), before)
    assert all(same(snapshot(model), kept) for model, kept in zip(models, theirs, strict=True))
    assert type(merged) is Net
    assert not {id(p) for p in base.parameters()} & {id(p) for p in merged.parameters()}
    assert not {t.data_ptr() for t in base.state_dict().values()} & {t.data_ptr() for t in merged.state_dict().values()}
    assert merged.decoder.weight is merged.embed.weight
    assert same(dict(merged.named_buffers()), dict(base.named_buffers()))
    assert [m.training for m in merged.modules()] == [m.training for m in base.modules()]
    assert merged.mix.training
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in base.parameters()]
    assert merged.mix.weight.grad is None
    assert merged.conv.weight.stride() == base.conv.weight.stride() != merged.conv.weight.contiguous().stride()
    assert list(merged.state_dict()) == list(base.state_dict())
    inputs = torch.arange(8).view(2, 4), torch.ones(2, 3, 3, 3)
    outputs = merged(*inputs)
    outputs.sum().backward()  # through the copy's own parameters, the LSTM's among them
    assert all((p.grad is not None) == p.requires_grad for p in merged.parameters())
    assert not torch.equal(outputs, base(*inputs))


def test_in_place_nothing_but_parameters_changes(base, models):
    objects, gradient = dict(base.named_parameters(remove_duplicate=False)), base.mix.weight.grad
    strides, buffers = base.conv.weight.stride(), {name: b.clone() for name, b in base.named_buffers()}
    addresses = [parameter.data_ptr() for parameter in base.parameters()]
    merged = awd_fast.merge_models(base, models, inplace=True)
    assert {name: id(p) for name, p in merged.named_parameters(remove_duplicate=False)} == {
        name: id(p) for name, p in objects.items()
    }
    assert [parameter.data_ptr() for parameter in merged.parameters()] == addresses
    assert base.mix.weight.grad is gradient
    assert base.conv.weight.stride() == strides
    assert same(dict(base.named_buffers()), buffers)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_in_place_nothing_is_written_where_a_merge_fails(base, models, value):
    with torch.no_grad():
        models[2].decoder.bias[3] = value  # of the last tensor
    before = snapshot(base)
    for inplace in (True, False):
        with pytest.raises(InputError, match=r"models\[2\]: tensor 'decoder.bias' holds 1 NaN or Inf"):
            awd_fast.merge_models(base, models, inplace=inplace)
        assert same(snapshot(base), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    base = net(dtype=dtype)
    models = [tuned(base, seed) for seed in range(2)]
    merged = awd_fast.merge_models(base, models)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert same(state(merged), awd_fast.merge(state(base), [state(model) for model in models]))


def test_another_dtype(base, models):
    wide = [model.double() for model in models]
    with pytest.raises(
        InputError, match=r"models\[0\]: tensor 'embed.weight' is float64; expected float32 as in base_"
    ):
        awd_fast.merge_models(base, wide)
    wanted = awd_fast.merge(state(base), [state(model) for model in wide], dtype="float64")
    merged = awd_fast.merge_models(base, wide, dtype="float64")
    assert {p.dtype for p in merged.parameters()} == {torch.float64}
    assert same(state(merged), wanted)
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    awd_fast.merge_models(base, wide, dtype=torch.float64, inplace=True)
    assert same(state(base), wanted)
    assert base.decoder.weight is base.embed.weight


def test_ties_of_memory_alone():
    """Two parameters whose values are the same memory, as some libraries tie them."""
    base = nn.Sequential(OrderedDict(a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False)))
    base.b.weight.data = base.a.weight.data
    models = [tuned(base, seed) for seed in range(2)]
    for model in models:
        model.b.weight.data = model.a.weight.data  # which deepcopy parts
    wanted = awd_fast.merge({"a": base.a.weight}, [{"a": model.a.weight} for model in models])["a"]
    for inplace in (False, True):
        merged = awd_fast.merge_models(base, models, inplace=inplace)
        assert merged.a.weight is not merged.b.weight
        assert merged.a.weight.data_ptr() == merged.b.weight.data_ptr()
        assert torch.equal(merged.b.weight, wanted)


def test_ties_of_the_base_hold_for_models(base, models):
    models[1].decoder.weight = nn.Parameter(models[1].embed.weight.detach().clone())
    merged = awd_fast.merge_models(base, models)  # the same values
    assert merged.decoder.weight is merged.embed.weight
    models[1].decoder.weight.data[0] += 1
    with pytest.raises(InputError, match=r"base ties 'embed.weight' and 'decoder.weight', but models\[1\] has differ"):
        awd_fast.merge_models(base, models)
    base.decoder.weight = nn.Parameter(base.embed.weight.detach().clone())  # tied in a model only
    merged = awd_fast.merge_models(base, models)
    assert not torch.equal(merged.decoder.weight, merged.embed.weight)


def test_a_module_that_copies_itself_in_its_own_way(base, models):
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            made = Own(self.in_features, self.out_features)
            made.load_state_dict(self.state_dict())
            return made

    first = Own(3, 4)
    models = [nn.Sequential(Own(3, 4)) for _ in range(2)]
    merged = awd_fast.merge_models(nn.Sequential(first), models)
    assert same(state(merged), awd_fast.merge(state(nn.Sequential(first)), [state(model) for model in models]))


def test_frozen_parts_may_be_shared(base, models):
    for model in models:
        model.conv.weight = base.conv.weight
    merged = awd_fast.merge_models(base, models)
    assert torch.equal(merged.conv.weight, base.conv.weight)
    with pytest.raises(InputError, match=r"models\[0\]: 'conv.weight' shares its memory with the base, so that it"):
        awd_fast.merge_models(base, models, inplace=True)


def test_transformers_is_not_needed():
    code = (
        "import sys, torch, awd_fast; net = torch.nn.Linear(3, 3); awd_fast.merge_models(net, [torch.nn.Linear(3, 3)]);"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'peft', 'accelerate')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _set(path, value):
    def change(module):
        *parents, last = path.split(".")
        target = module
        for name in parents:
            target = getattr(target, name)
        setattr(target, last, value(getattr(target, last, None)) if callable(value) else value)
        return module

    return change


class Sharded(nn.Parameter):
    """As those of torch.distributed.tensor, whose class has this name."""


Sharded.__name__ = "DTensor"


class Params4bit(nn.Parameter):
    pass


def _lazy(module):
    module.mix = nn.LazyLinear(6)
    return module


def _packed(module):
    module.mix.register_buffer("qweight", torch.ones(2, 2).int())
    return module


def _quantised(module):
    module.mix = torch.ao.nn.quantized.Linear(5, 6)
    return module


def _wrapped(name):
    def wrap(module):
        outer = type(name, (nn.Module,), {})()
        outer.module = module
        return outer

    return wrap


REFUSED = {
    "state dict": (lambda m: m.state_dict(), r" is OrderedDict; expected a torch.nn.Module; state dicts are merged by"),
    "meta": (_set("mix", lambda m: m.to("meta")), r": 'mix.weight' is on the meta device, without values; expected a"),
    "dtensor": (
        _set("mix.weight", Sharded),
        r": 'mix.weight' is a DTensor, sharded among processes; .*\.full_tensor\(\)",
    ),
    "zero-3": (_set("mix.weight.ds_status", 1), r": 'mix.weight' is sharded among processes \(Parameter\)"),
    "fsdp": (_wrapped("FullyShardedDataParallel"), r" is a FullyShardedDataParallel; its parameters are sharded"),
    "ddp": (_wrapped("DistributedDataParallel"), r" is a DistributedDataParallel; give the model inside"),
    "compiled": (_wrapped("OptimizedModule"), r" is a OptimizedModule; give the model that was compiled"),
    "bitsandbytes": (_set("mix.weight", Params4bit), r": 'mix.weight' is a Params4bit; expected a plain tensor"),
    "int8": (
        _set("mix.weight", lambda w: nn.Parameter(w.to(torch.int8), False)),
        r": 'mix.weight' is quantised \(Parameter, int8\)",
    ),
    "gptq": (_packed, r": 'mix.qweight' is quantised \(Tensor, int32\)"),
    "torch.ao": (_quantised, r"\.mix is a quantised Linear; expected floating weights"),
    "transformers": (_set("hf_quantizer", object()), r" is quantised \(object\); expected floating weights: load the"),
    "configuration": (_set("config", SimpleNamespace(quantization_config={"a": 1})), r" is quantised \(dict\)"),
    "peft": (_set("mix.peft_config", {}), r"\.mix has adapters of PEFT; merge these \(awd_fast.integrations.peft"),
    "lazy": (_lazy, r": 'mix.weight' is a UninitializedParameter; expected a plain tensor, not one of"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(base, models, name):
    change, message = REFUSED[name]
    with pytest.raises(InputError, match=r"^base_model" + message):
        awd_fast.merge_models(change(copy.deepcopy(base)), models)
    models[1] = change(models[1])
    with pytest.raises(InputError, match=r"^models\[1\]" + message):
        awd_fast.merge_models(base, models)


def test_models_that_differ_are_refused(base, models):
    with pytest.raises(InputError, match=r"models is Net; expected a list of torch.nn.Module"):
        awd_fast.merge_models(base, models[0])
    with pytest.raises(InputError, match="no model was given"):
        awd_fast.merge_models(base, [])
    with pytest.raises(InputError, match=r"models\[1\] is the base itself"):
        awd_fast.merge_models(base, [models[0], base])
    with pytest.raises(InputError, match="unknown option 'nonsense'"):
        awd_fast.merge_models(base, models, nonsense=1)
    models[0].mix = nn.Linear(5, 7, bias=False)
    with pytest.raises(
        InputError, match=r"models\[0\]: tensor 'mix.weight' has shape \[7, 5\]; expected \[6, 5\] as in"
    ):
        awd_fast.merge_models(base, models)
    models[0].mix = nn.Identity()
    with pytest.raises(InputError, match=r"models\[0\] lacks the tensor 'mix.weight' of the base"):
        awd_fast.merge_models(base, models)
    merged = awd_fast.merge_models(base, models, missing="base", include="lstm.weight*")
    assert torch.equal(merged.mix.weight, base.mix.weight)
    models[0].mix = nn.Linear(5, 6)
    with pytest.raises(InputError, match=r"models\[0\] has the tensor 'mix.bias' that the base lacks"):
        awd_fast.merge_models(base, models)


def test_buffers_that_differ_are_refused(base, models):
    models[2].mask = torch.ones(12)
    with pytest.raises(InputError, match=r"models\[2\]: buffer 'mask' has shape \[12\]; expected \[11\] as in base_m"):
        awd_fast.merge_models(base, models)
    del models[2].mask
    with pytest.raises(InputError, match=r"models\[2\] lacks the buffer 'mask' of base_model"):
        awd_fast.merge_models(base, models)
    awd_fast.merge_models(base, models, missing="base")


def test_a_model_that_cannot_be_copied_can_be_merged_in_place(base, models):
    base.handle = base.mix.weight * 2  # deepcopy takes no tensors of a graph
    with pytest.raises(InputError, match=r"base_model cannot be copied \(RuntimeError: .*or give inplace=True"):
        awd_fast.merge_models(base, models)
    assert awd_fast.merge_models(base, models, inplace=True) is base


def test_parameters_of_inference_mode():
    with torch.inference_mode():
        base, models = nn.Linear(3, 3), [nn.Linear(3, 3)]
    with pytest.raises(InputError, match=r"'weight' was made in inference mode, and cannot be written to; expected in"):
        awd_fast.merge_models(base, models, inplace=True)
    merged = awd_fast.merge_models(base, models, method="average")
    torch.testing.assert_close(merged.weight.detach(), models[0].weight.clone().detach())
