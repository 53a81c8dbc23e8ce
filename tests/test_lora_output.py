"""A merge of adapters as one adapter, and merges of adapters that are refused."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import awd_fast
from awd_fast import InputError, blocks, lowrank
from awd_fast.adapters import Adapter
from awd_fast.plan import TensorInfo
from tests.adapter_folders import PREFIX, embedding, linear, random, write_adapter_folder
from tests.conftest import write_checkpoint
from tests.lora_cases import (
    CASES,
    EMBED,
    SPANS,
    Q,
    V,
    base_state,
    folders,
    require_close,
    wanted,
)
from tests.test_cli import run
from tests.test_pipeline import contents, load


@pytest.fixture
def three(tmp_path):
    base = base_state()
    return base, *folders(tmp_path, base)


@pytest.mark.parametrize("name", SPANS)
def test_as_adapter(tmp_path, three, name):
    """Read again, the base with it is the full model."""
    base, folder, adapters, models = three
    out = tmp_path / "out"
    report = awd_fast.merge_checkpoints(folder, adapters, out, as_adapter=True, **CASES[name])
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "awd_fast.json",
    ]  # fmt: skip
    bound = Adapter(out).bind({name: TensorInfo(tuple(t.shape), t.dtype) for name, t in base.items()})
    assert bound.rank(Q) == 11
    found = dict(base)
    for changed in bound.placements:
        found[changed] = lowrank.add(base[changed], *lowrank.merged_factors([bound.factors(changed)], torch.ones(1, 1)))
    found |= {whole: bound.read(whole) for whole in bound.full}
    expected = wanted(base, models, **CASES[name])
    require_close(found, expected)
    full = awd_fast.merge_checkpoints(folder, adapters, tmp_path / "full", **CASES[name])
    assert report.counts() == full.counts()
    if full.overall is not None:
        assert report.similarity_after == pytest.approx(full.similarity_after, rel=1e-9)
    again = awd_fast.merge_checkpoints(folder, [out], tmp_path / "again", method="task_arithmetic", scale=1.0)
    require_close(load(tmp_path / "again"), expected)
    assert again.adapters[0].startswith("LoRA adapter of rank")


def test_as_adapter_on_the_command_line(tmp_path, three):
    _, folder, adapters, _ = three
    sources = ["--base", folder, *(f"--model={path}" for path in adapters)]
    code, _, error = run(
        "merge", *sources, "--out", tmp_path / "a", "--as-adapter", "--dtype=bfloat16", "--optimizer=converge"
    )
    assert (code, error) == (0, "")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    card = (tmp_path / "a" / "README.md").read_text()
    assert "# Merged LoRA adapter" in card
    assert "--out DIR --as-adapter`" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    (tmp_path / "recipe.yml").write_text(card.split("```yaml\n")[1].split("```")[0])
    assert run("merge", tmp_path / "recipe.yml", "--out", tmp_path / "b", "--as-adapter")[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    code, _, error = run("merge", *sources, "--out", tmp_path / "a", "--as-adapter")
    assert code == 2
    assert "exists" in error
    assert run("merge", *sources, "--out", tmp_path / "a", "--as-adapter", "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_failed_adapter_leaves_nothing(tmp_path, three, monkeypatch):
    _, folder, adapters, _ = three

    def broken(*args, **named):
        raise OSError("disk on fire")

    monkeypatch.setattr("awd_fast.adapter_output.save_file", broken)
    with pytest.raises(OSError, match="disk on fire"):
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", as_adapter=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter0", "adapter1", "adapter2", "base"]


@pytest.mark.parametrize(("options", "match"), [
    ({"device": "cuda"}, r"device is cuda, but adapters are merged on the CPU"),
    ({"optimizer": "adam", "groups": "column"}, "Adam with penalty l2 leaves the span .* row groups only; use SGD or"),
    ({"optimizer": "sgd", "penalty": "l1", "groups": "global"}, "SGD with penalty l1 leaves the span .* row groups"),
    ({"penalty": "l1", "groups": "global"}, "Converge with penalty l1 leaves the span .* row groups only"),
    ({"optimizer": "adam", "as_adapter": True}, "leaves the span .* so that the merge is no adapter; use SGD or"),
    ({"include": "*o_proj*"}, "no adapter changes a tensor that is to be disentangled"),
    ({"include": "*nonsense*"}, "matches no tensor of the base"),
    ({"dtype": "float16", "scale": 1e9}, "overflows float16"),
    ({"dtype": "float16", "scale": 1e9, "as_adapter": True}, "overflows float16|are not finite in float16"),
    ({"optimizer": awd_fast.SGD(lr=1e300), "exclude": ()}, "the optimiser diverged"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(tmp_path, three, options, match):
    _, folder, adapters, _ = three
    with pytest.raises(InputError, match=match) as caught:
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter0", "adapter1", "adapter2", "base"]


def test_folders_that_do_not_fit_are_refused(tmp_path, three):
    base, folder, adapters, models = three
    full = write_checkpoint(tmp_path / "full", {n: t.to(base[n].dtype) for n, t in models[0].items()})
    with pytest.raises(InputError, match=r"adapter0 is a LoRA adapter and .*full is a full model; expected models of"):
        awd_fast.merge_checkpoints(folder, [adapters[0], full], tmp_path / "out")
    with pytest.raises(InputError, match=r"the models are full models, whose merge is no adapter"):
        awd_fast.merge_checkpoints(folder, [full, full], tmp_path / "out", as_adapter=True)
    with pytest.raises(InputError, match=r"adapter0 is a LoRA adapter, not a full model"):
        awd_fast.merge_checkpoints(adapters[0], [adapters[1]], tmp_path / "out")
    with pytest.raises(InputError, match=r"holds the input .*adapter_model.safetensors"):
        awd_fast.merge_checkpoints(folder, adapters, adapters[1], overwrite=True)
    q = Q.removesuffix(".weight")
    whole = write_adapter_folder(
        tmp_path / "whole", linear(V.removesuffix(".weight"), 4, 6, 5) | {PREFIX + Q: random(8, 6, seed=1)}
    )
    with pytest.raises(
        InputError, match=r"whole/.* stores the tensor '.*q_proj.weight' whole, and .*adapter0.* changes"
    ):
        awd_fast.merge_checkpoints(folder, [adapters[0], whole], tmp_path / "out")
    extra = write_adapter_folder(tmp_path / "extra", linear(q, 4, 6, 8) | {f"{PREFIX}new.weight": random(2, 2, seed=1)})
    with pytest.raises(InputError, match=r"has the tensor 'new.weight' that the base lacks; give missing=base"):
        awd_fast.merge_checkpoints(folder, [extra], tmp_path / "out")
    awd_fast.merge_checkpoints(folder, [extra], tmp_path / "out", missing="base")
    unlike = write_adapter_folder(tmp_path / "unlike", linear("other", 4, 6, 8))
    with pytest.raises(InputError, match=r"changes the module 'other', but .*base has no tensor 'other.weight'"):
        awd_fast.merge_checkpoints(folder, [unlike], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"base is quantised \(gptq\)"):
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / "x")


def test_a_base_that_holds_nan_is_named(tmp_path):
    base = base_state()
    base[Q][1, 2] = torch.nan
    folder, adapters, _ = folders(tmp_path, base)
    with pytest.raises(InputError, match=r"base/model-.*: tensor '.*q_proj.weight' holds 1 NaN or Inf values"):
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out")


@pytest.mark.parametrize("numbers", [1 << 24, 60, 4])
def test_an_embedding_of_another_base_is_refused(tmp_path, monkeypatch, numbers):
    monkeypatch.setattr(blocks, "NUMBERS", numbers)
    base = base_state()
    folder = write_checkpoint(tmp_path / "base", base)
    for index, changed in enumerate((0.0, 1.0)):
        copy = base[EMBED].clone()
        copy[7, 3] += changed
        stored = embedding("model.embed_tokens", 4, 11, 6) | {f"{PREFIX}model.embed_tokens.base_layer.weight": copy}
        adapter = write_adapter_folder(tmp_path / f"adapter{index}", stored)
        for as_adapter in (False, True):
            options = {"method": "task_arithmetic", "as_adapter": as_adapter}
            if changed:
                with pytest.raises(InputError, match=r"differs from 'model.embed_tokens.weight' of .*base; expec"):
                    awd_fast.merge_checkpoints(folder, [adapter], tmp_path / "out", **options)
            else:
                awd_fast.merge_checkpoints(folder, [adapter], tmp_path / f"out{as_adapter}", **options)


def test_adapters_that_change_are_noticed(tmp_path, three, monkeypatch):
    _, folder, adapters, _ = three
    gram, config = lowrank.gram_rows, adapters[1] / "adapter_config.json"

    def changing(*args):
        config.write_text(config.read_text() + " ")
        return gram(*args)

    monkeypatch.setattr(lowrank, "gram_rows", changing)
    with pytest.raises(InputError, match=r"adapter_config.json was changed while it was read"):
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out")
