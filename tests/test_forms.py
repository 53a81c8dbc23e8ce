"""The forms that checkpoints come in: tied weights, other vocabularies, 8-bit storage, what is refused with advice."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import awd_fast
from awd_fast import InputError
from tests.conftest import tiny_state, tuned, write_checkpoint
from tests.test_pipeline import load

QUERY = "encoder.layer.0.attention.self.query.weight"
EMBEDDING = "embeddings.word_embeddings.weight"
HEAD = "lm_head.weight"


def test_tied_weights_match_whichever_names_a_model_stores(tmp_path, base_state, model_states):
    tied = base_state | {HEAD: base_state[EMBEDDING].clone()}
    both = [state | {HEAD: state[EMBEDDING].clone()} for state in model_states]
    expected = awd_fast.merge(tied, both)
    for name, base, models in (
        ("models store it once", tied, [both[0], model_states[1], model_states[2]]),
        ("the base stores it once", base_state, [both[0], model_states[1], both[2]]),
    ):
        folder = tmp_path / name
        paths = [write_checkpoint(folder / f"model{i}", state) for i, state in enumerate(models)]
        awd_fast.merge_checkpoints(write_checkpoint(folder / "base", base), paths, folder / "out")
        found = load(folder / "out")
        assert found.keys() == base.keys()
        assert all(torch.equal(found[key], expected[key]) for key in base)


def test_weights_that_only_look_tied_are_still_missing(tmp_path, base_state, model_states):
    zeros = {"first.weight": torch.zeros(4, 4), "second.weight": torch.zeros(4, 4)}
    base = write_checkpoint(tmp_path / "base", base_state | zeros)
    lacking = write_checkpoint(tmp_path / "m", model_states[0] | {"first.weight": torch.randn(4, 4)})
    with pytest.raises(InputError, match=r"lacks the tensor 'second\.weight'"):
        awd_fast.merge_checkpoints(base, [lacking], tmp_path / "out")
    untied = model_states[1] | zeros | {HEAD: torch.randn(11, 6)}
    with pytest.raises(InputError, match=r"has the tensor 'lm_head\.weight' that the base lacks"):
        awd_fast.merge_checkpoints(base, [write_checkpoint(tmp_path / "n", untied)], tmp_path / "out")


def test_another_vocabulary_is_named_and_others_base_keeps_the_table(tmp_path, base_state, model_states):
    model_states[1][EMBEDDING] = torch.randn(14, 6)
    base = write_checkpoint(tmp_path / "base", base_state)
    models = [write_checkpoint(tmp_path / f"model{i}", state) for i, state in enumerate(model_states)]
    with pytest.raises(InputError, match=r"model1.*has shape \[14, 6\].*do the vocabularies differ.*--others base"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "out")
    awd_fast.merge_checkpoints(base, models, tmp_path / "out", others="base")
    found = load(tmp_path / "out")
    assert torch.equal(found[EMBEDDING], base_state[EMBEDDING])
    assert not torch.equal(found[QUERY], base_state[QUERY])
    model_states[1] = model_states[0] | {QUERY: torch.randn(7, 6)}
    models[1] = write_checkpoint(tmp_path / "model9", model_states[1])
    with pytest.raises(InputError, match=r"has shape \[7, 6\]; expected \[6, 6\] as in .*base/model\.safetensors$"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "out2", others="base")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("groups", ["row", "tensor", "global"])
def test_8_bit_storage_is_merged_in_float32_and_rounded_once(tmp_path, base_state, model_states, dtype, groups):
    def narrow(state):
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}

    def widened(state):
        return {name: t.float() if t.dtype == dtype else t for name, t in state.items()}

    base, models = narrow(base_state), [narrow(state) for state in model_states]
    paths = [write_checkpoint(tmp_path / f"model{i}", state) for i, state in enumerate(models)]
    write_checkpoint(tmp_path / "base", base)
    expected = awd_fast.merge(widened(base), list(map(widened, models)), groups=groups)
    awd_fast.merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", groups=groups)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected.items():
        wanted = tensor.to(base[name].dtype)
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name].view(torch.uint8), wanted.view(torch.uint8))
    awd_fast.merge_checkpoints(tmp_path / "base", paths, tmp_path / "wide", groups=groups, dtype="float32")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(tmp_path / "wide").items())


def test_a_sum_beyond_8_bits_is_an_overflow(tmp_path):
    base = {"a.weight": torch.full((2, 2), 400.0).to(torch.float8_e4m3fn)}
    model = {"a.weight": torch.full((2, 2), 440.0).to(torch.float8_e4m3fn)}
    paths = [write_checkpoint(tmp_path / name, state) for name, state in (("base", base), ("model", model))]
    with pytest.raises(InputError, match=r"'a\.weight' overflows float8_e4m3fn"):
        awd_fast.merge_checkpoints(paths[0], paths[1:], tmp_path / "out", method="task_arithmetic", scale=3.0)


def test_quantised_models_gguf_and_pickles_are_refused_with_advice(tmp_path, checkpoints):
    base, models = checkpoints
    config = json.loads((models[0] / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (models[0] / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(InputError, match=r"model0 is quantised \(gptq\): .*save it dequantised"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "out")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "model-Q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "p.bin").write_bytes(b"\x80\x02")
    for path, advice in (("g", "GGUF holds"), ("g/model-Q4.gguf", "GGUF holds"), ("p.bin", "is a pickle; only")):
        with pytest.raises(InputError, match=advice):
            awd_fast.merge_checkpoints(base, [tmp_path / path], tmp_path / "out")


def test_what_differs_in_dtype_is_merged_where_the_output_says_its_own(tmp_path):
    base, tune = tiny_state(), [tuned(tiny_state(), seed) for seed in range(2)]
    half = {name: t.half() if t.is_floating_point() else t for name, t in tune[1].items()}
    paths = [write_checkpoint(tmp_path / f"m{i}", state) for i, state in enumerate((base, tune[0], half))]
    with pytest.raises(InputError, match="give --dtype"):
        awd_fast.merge_checkpoints(paths[0], paths[1:], tmp_path / "out")
    awd_fast.merge_checkpoints(paths[0], paths[1:], tmp_path / "out", dtype="float32")
    wide = {name: t.float() if t.is_floating_point() else t for name, t in half.items()}
    expected = awd_fast.merge(base, [tune[0], wide])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(tmp_path / "out").items())


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("awd_fast.disk.OPEN", 2)
    base = {f"layer{i}.weight": torch.randn(5, 4) for i in range(9)}
    model = tuned(base, 1)
    paths = [write_checkpoint(tmp_path / name, state, shards=9) for name, state in (("base", base), ("model", model))]
    awd_fast.merge_checkpoints(paths[0], paths[1:], tmp_path / "out")
    expected = awd_fast.merge(base, [model])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(tmp_path / "out").items())


def test_every_file_is_closed_in_the_end(tmp_path, checkpoints):
    import gc
    import os

    base, models = checkpoints
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    awd_fast.merge_checkpoints(base, models, tmp_path / "out")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="holds no tensors"):
        awd_fast.merge_checkpoints(tmp_path / "empty.safetensors", models, tmp_path / "out2")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
