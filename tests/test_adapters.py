"""LoRA adapters: what a folder holds, and which of a base's tensors it changes and how."""

import json

import pytest
import torch
from safetensors.torch import save_file

from awd_fast import InputError, lowrank
from awd_fast.adapters import Adapter, is_adapter
from awd_fast.plan import TensorInfo
from tests.adapter_folders import PREFIX, embedding, infos, linear, random, write_adapter_folder
from tests.conftest import write_checkpoint

QUERY = "encoder.layer.0.attention.self.query"


def delta(tensors, module, scale):
    """scale * B @ A, from the tensors of a file."""
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "AB")
    return scale * (b @ a)


def exact(bound, name):
    return lowrank.delta(bound.factors(name), torch.float64)


@pytest.fixture
def plain(tmp_path):
    """One linear module of rank 4 with alpha 8."""
    return write_adapter_folder(tmp_path / "plain", linear("m.q", 4, 6, 5))


BASE = infos(m__q__weight=(5, 6), m__norm__weight=(6,), m__v__weight=(7, 6))


def test_a_linear_module(tmp_path):
    tensors = linear("m.q", 4, 6, 5, seed=3)
    adapter = Adapter(write_adapter_folder(tmp_path / "a", tensors))
    assert (adapter.config.r, adapter.config.lora_alpha, adapter.config.base_model) == (4, 8.0, "owner/base")
    assert adapter.config.target_modules == ("q",)
    bound = adapter.bind(BASE)
    assert list(bound.placements) == ["m.q.weight"]
    assert (bound.rank("m.q.weight"), bound.rank("m.v.weight")) == (4, 0)
    factors = bound.factors("m.q.weight")
    assert (factors.shape, factors.rank, factors.scale) == ((5, 6), 4, 2.0)
    torch.testing.assert_close(exact(bound, "m.q.weight"), delta(tensors, "m.q", 2.0), rtol=1e-14, atol=1e-14)
    assert torch.equal(exact(bound, "m.v.weight"), torch.zeros(7, 6, dtype=torch.float64))
    assert bound.where("m.q.weight") == str(tmp_path / "a" / "adapter_model.safetensors")


def test_the_weights_file_names_the_folder_too(plain):
    assert Adapter(plain / "adapter_model.safetensors").folder == Adapter(plain).folder == plain


def test_only_headers_are_read_on_opening(plain, monkeypatch):
    monkeypatch.setattr(Adapter, "read", None)
    assert Adapter(plain).bind(BASE).rank("m.q.weight") == 4


def test_what_is_an_adapter(tmp_path, plain, base_state):
    assert is_adapter(plain)
    assert is_adapter(plain / "adapter_model.safetensors")
    model = write_checkpoint(tmp_path / "model", base_state)
    assert not is_adapter(model)
    assert not is_adapter(model / "model.safetensors")
    (model / "adapter_config.json").write_text("{}")  # beside a full model: the model counts, as in transformers
    assert not is_adapter(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_factors_keep_their_dtype(tmp_path, dtype):
    bound = Adapter(write_adapter_folder(tmp_path / "a", linear("m.q", 4, 6, 5, dtype=dtype))).bind(BASE)
    factors = bound.factors("m.q.weight")
    assert factors.left.dtype == factors.right.dtype == dtype


@pytest.mark.parametrize("name", [".default", ".my-adapter"])
def test_an_adapters_name_in_the_keys_is_left_out(tmp_path, name):
    tensors = linear("m.q", 4, 6, 5, name=name) | embedding("m.e", 4, 9, 3, name=name)
    adapter = Adapter(write_adapter_folder(tmp_path / "a", tensors))
    assert {m.name: m.kind for m in adapter.modules.values()} == {"m.q": "linear", "m.e": "embedding"}


def test_keys_without_pefts_prefix(tmp_path):
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in linear("m.q", 4, 6, 5).items()}
    assert list(Adapter(write_adapter_folder(tmp_path / "a", tensors)).bind(BASE).placements) == ["m.q.weight"]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 0.5}, 0.125),
        ({"use_rslora": True}, 4.0),
        ({"use_rslora": None}, 2.0),
        ({"alpha_pattern": {"q": 12}}, 3.0),
        ({"alpha_pattern": {"q": 12}, "use_rslora": True}, 6.0),
        ({"alpha_pattern": {"other": 1, "m.q": 12, "q": 16}}, 3.0),  # the first that matches
        ({"alpha_pattern": {"[a-z]": 20}}, 5.0),
        ({"alpha_pattern": {"^m.q": 12}}, 3.0),
        ({"alpha_pattern": {"^q": 12, "uq": 1, "m": 1}}, 2.0),  # at the end of a name, and of whole parts only
        ({"r": 2, "rank_pattern": {"q": 4}}, 2.0),
        ({"r": 64, "rank_pattern": {r".*\.q": 4}, "alpha_pattern": {"q": 4}}, 1.0),
    ],
)
def test_scales(tmp_path, config, scale):
    tensors = linear("m.q", 4, 6, 5)
    bound = Adapter(write_adapter_folder(tmp_path / "a", tensors, **config)).bind(BASE)
    torch.testing.assert_close(exact(bound, "m.q.weight"), delta(tensors, "m.q", scale), rtol=1e-14, atol=1e-14)


def test_modules_of_different_ranks(tmp_path):
    tensors = linear("m.q", 2, 6, 5) | linear("m.v", 3, 6, 7, seed=1)
    bound = Adapter(write_adapter_folder(tmp_path / "a", tensors, r=3, rank_pattern={"q": 2})).bind(BASE)
    assert [(name, bound.rank(name), bound.factors(name).scale) for name in bound.placements] == [
        ("m.q.weight", 2, 4.0),
        ("m.v.weight", 3, 8 / 3),
    ]


def test_placements_are_in_the_bases_order(tmp_path):
    base = infos(b__weight=(5, 6), a__weight=(5, 6))
    bound = Adapter(write_adapter_folder(tmp_path / "a", linear("a", 4, 6, 5) | linear("b", 4, 6, 5))).bind(base)
    assert list(bound.placements) == ["b.weight", "a.weight"]


@pytest.mark.parametrize(("shape", "flag", "transposed"), [
    ((5, 6), False, False),
    ((6, 5), True, True),
    ((5, 6), True, False),  # PEFT goes by the type of the layer, and the shape shows it
    ((6, 5), False, True),
])  # fmt: skip
def test_the_layout_follows_the_shape(tmp_path, shape, flag, transposed):
    tensors = linear("m.q", 4, 6, 5)
    bound = Adapter(write_adapter_folder(tmp_path / "a", tensors, fan_in_fan_out=flag)).bind(infos(m__q__weight=shape))
    want = delta(tensors, "m.q", 2.0)
    got = exact(bound, "m.q.weight")
    torch.testing.assert_close(got, want.T if transposed else want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("flag", [True, False])
def test_the_layout_of_a_square_tensor_follows_the_configuration(tmp_path, flag):
    tensors = linear("m.q", 4, 6, 6) | linear("m.v", 4, 6, 7)
    base = infos(m__q__weight=(6, 6), m__v__weight=(6, 7) if flag else (7, 6))
    bound = Adapter(write_adapter_folder(tmp_path / "a", tensors, fan_in_fan_out=flag)).bind(base)
    want = delta(tensors, "m.q", 2.0)
    torch.testing.assert_close(exact(bound, "m.q.weight"), want.T if flag else want, rtol=1e-14, atol=1e-14)


def test_a_square_tensor_beside_others_that_contradict_the_configuration_is_refused(tmp_path):
    tensors = linear("m.q", 4, 6, 6) | linear("m.v", 4, 6, 7)
    adapter = Adapter(write_adapter_folder(tmp_path / "a", tensors))
    match = r"fan_in_fan_out is false, which the shape of 'm.v' contradicts, .* square 'm.q' is not known"
    with pytest.raises(InputError, match=match):
        adapter.bind(infos(m__q__weight=(6, 6), m__v__weight=(6, 7)))


def embedded(tmp_path, copy):
    """An embedding of 9 tokens of size 3, and PEFT's copy of its weights."""
    tensors = embedding("m.e", 4, 9, 3) | ({} if copy is None else {f"{PREFIX}m.e.base_layer.weight": copy})
    adapter = Adapter(write_adapter_folder(tmp_path / "a", tensors, fan_in_fan_out=True))
    return tensors, adapter.bind(infos(e__weight=(9, 3)))


def test_an_embedding(tmp_path):
    tensors, bound = embedded(tmp_path, None)
    a, b = (tensors[f"{PREFIX}m.e.lora_embedding_{side}"].double() for side in "AB")
    torch.testing.assert_close(exact(bound, "e.weight"), 2.0 * (b @ a).T, rtol=1e-14, atol=1e-14)
    assert bound.factors("e.weight").shape == (9, 3)
    bound.require_base("e.weight", torch.zeros(9, 3))  # without a copy there is nothing to compare


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_copy_of_an_embedding_that_peft_stores_is_compared_with_the_base(tmp_path, stored):
    weights = random(9, 3, seed=4)
    _, bound = embedded(tmp_path, weights.to(stored))
    assert bound.full == {}
    bound.require_base("e.weight", weights)
    bound.require_base("e.weight", weights[4:7], 4)
    bound.require_base("other.weight", weights)
    with pytest.raises(
        InputError, match=r"'base_model.model.m.e.base_layer.weight' differs from 'e.weight' of the base"
    ):
        bound.require_base("e.weight", weights[4:7], 3)


def test_the_copy_of_a_resized_embedding_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"base_layer.weight' is float32 \[10, 3\]; expected \[9, 3\] as in the base"):
        embedded(tmp_path, random(10, 3, seed=0))


def test_modules_to_save_are_tensors_stored_whole(tmp_path):
    head = {
        f"{PREFIX}classifier.weight": random(3, 6, seed=8),
        f"{PREFIX}classifier.bias": random(3, seed=9),
        f"{PREFIX}classifier.steps": torch.arange(2),
        f"{PREFIX}pooler.modules_to_save.default.dense.bias": random(6, seed=7),  # as early versions of PEFT did
        f"{PREFIX}m.e.weight": random(9, 3, seed=6),  # an embedding that was resized
    }
    adapter = Adapter(
        write_adapter_folder(tmp_path / "a", linear("m.q", 4, 6, 5) | head, modules_to_save=["classifier"])
    )
    assert adapter.full == {
        "classifier.bias": f"{PREFIX}classifier.bias",
        "classifier.steps": f"{PREFIX}classifier.steps",
        "classifier.weight": f"{PREFIX}classifier.weight",
        "m.e.weight": f"{PREFIX}m.e.weight",
        "pooler.dense.bias": f"{PREFIX}pooler.modules_to_save.default.dense.bias",
    }
    bound = adapter.bind(BASE | infos(x__classifier__weight=(3, 6), x__classifier__bias=(3,), e__weight=(8, 3)))
    assert bound.tensors == {
        "x.classifier.bias": TensorInfo((3,), torch.float32),
        "classifier.steps": TensorInfo((2,), torch.int64),  # by its own name: the base lacks it
        "x.classifier.weight": TensorInfo((3, 6), torch.float32),
        "e.weight": TensorInfo((9, 3), torch.float32),
        "pooler.dense.bias": TensorInfo((6,), torch.float32),
    }
    assert torch.equal(bound.read("x.classifier.weight"), head[f"{PREFIX}classifier.weight"])
    assert bound.device("x.classifier.weight") == torch.device("cpu")


@pytest.mark.parametrize(
    ("task", "head"), [("SEQ_CLS", "classifier"), ("TOKEN_CLS", "score"), ("QUESTION_ANS", "qa_outputs")]
)
def test_heads_that_an_older_configuration_does_not_name(tmp_path, task, head):
    tensors = linear("m.q", 4, 6, 5) | {f"{PREFIX}{head}.bias": torch.zeros(3)}
    assert list(Adapter(write_adapter_folder(tmp_path / "a", tensors, task_type=task)).full) == [f"{head}.bias"]


def test_bias_is_accepted_where_no_bias_is_stored(tmp_path):
    Adapter(write_adapter_folder(tmp_path / "a", linear("m.q", 4, 6, 5), bias="all"))


@pytest.mark.parametrize("module", [QUERY, f"bert.{QUERY}", "query", f"a.b.{QUERY}"])
@pytest.mark.parametrize("prefix", ["", "bert.", "a.bert."])
def test_names_with_and_without_a_head(tmp_path, module, prefix):
    base = {f"{prefix}{QUERY}.weight": TensorInfo((5, 6), torch.float32), "query": TensorInfo((5, 6), torch.float32)}
    adapter = Adapter(write_adapter_folder(tmp_path / "a", linear(module, 4, 6, 5)))
    ours, theirs = f"{prefix}{QUERY}", module
    if f".{ours}".endswith(f".{theirs}") or f".{theirs}".endswith(f".{ours}"):
        assert list(adapter.bind(base).placements) == [f"{prefix}{QUERY}.weight"]
    else:
        with pytest.raises(InputError, match="has no tensor"):
            adapter.bind(base)


def test_the_exact_name_comes_first(tmp_path):
    base = infos(x__m__q__weight=(5, 6), m__q__weight=(5, 6), q__weight=(5, 6))
    bound = Adapter(write_adapter_folder(tmp_path / "a", linear("m.q", 4, 6, 5))).bind(base)
    assert list(bound.placements) == ["m.q.weight"]


REFUSED_BASES = [
    (infos(m__other__weight=(5, 6)), r"changes the module 'm.q', but BASE has no tensor 'm.q.weight', with or without"),
    (infos(m__q__bias=(5,)), "has no tensor 'm.q.weight'"),
    (
        infos(x__m__q__weight=(5, 6), y__m__q__weight=(5, 6)),
        r"'m.q' may mean any of 'x.m.q.weight', 'y.m.q.weight' in BA",
    ),
    (infos(x__m__q__weight=(5, 6), q__weight=(5, 6)), "may mean any of"),
    (infos(m__q__weight=(5, 7)), r"'m.q' are \[5, 4\] x \[4, 6\]; expected .* 'm.q.weight', \[5, 7\], of BASE"),
    (infos(m__q__weight=(5, 6, 1, 1)), r"\[5, 6, 1, 1\]"),
    (infos(m__q__weight=(30,)), r"\[30\]"),
]


@pytest.mark.parametrize(("base", "match"), REFUSED_BASES)
def test_bases_that_do_not_fit_are_refused(plain, base, match):
    with pytest.raises(InputError, match=match) as error:
        Adapter(plain).bind(base, "BASE")
    assert str(plain / "adapter_model.safetensors") in str(error.value)


def test_an_embedding_stored_the_other_way_round_is_refused(tmp_path):
    adapter = Adapter(write_adapter_folder(tmp_path / "a", embedding("m.e", 4, 9, 3)))
    with pytest.raises(InputError, match=r"'m.e' are \[3, 4\] x \[4, 9\]; expected .* \[3, 9\]"):
        adapter.bind(infos(m__e__weight=(3, 9)))


def test_two_modules_for_one_tensor_are_refused(tmp_path):
    adapter = Adapter(write_adapter_folder(tmp_path / "a", linear("x.m.q", 4, 6, 5) | linear("y.m.q", 4, 6, 5)))
    with pytest.raises(InputError, match=r"modules 'x.m.q' and 'y.m.q' both mean the tensor 'm.q.weight' of the base"):
        adapter.bind(BASE)


def test_a_tensor_whole_and_as_factors_is_refused(tmp_path):
    tensors = linear("m.q", 4, 6, 5) | {f"{PREFIX}m.q.weight": random(5, 6, seed=1)}
    adapter = Adapter(write_adapter_folder(tmp_path / "a", tensors))
    with pytest.raises(InputError, match=r"holds the tensor 'm.q.weight' whole and as LoRA factors"):
        adapter.bind(BASE)


@pytest.mark.parametrize("other", ["x", "y"])
def test_two_whole_tensors_for_one_are_refused(tmp_path, other):
    tensors = linear("m.q", 4, 6, 5) | {f"{PREFIX}{n}.m.h.weight": random(5, 6, seed=1) for n in {"x", other, "z"}}
    adapter = Adapter(write_adapter_folder(tmp_path / "a", tensors))
    with pytest.raises(InputError, match=r"both mean the tensor 'm.h.weight' of the base"):
        adapter.bind(BASE | infos(m__h__weight=(5, 6)))


def test_files_without_metadata_are_read(plain):
    save_file(linear("m.q", 4, 6, 5), plain / "adapter_model.safetensors")
    config = json.loads((plain / "adapter_config.json").read_text())
    assert Adapter(plain).config.r == config["r"]
