"""Bad input: one clear sentence naming file and tensor, exit code 2, nothing written. Each is a user's mistake."""

import json
import struct

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.conftest import tiny_state, write_checkpoint
from tests.test_cli import arguments, run

QUERY = "encoder.layer.0.attention.self.query.weight"
IDS = "embeddings.position_ids"


def rejected(tmp_path, *command: object) -> str:
    """Runs a merge that must be refused; returns its one sentence."""
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    code, out, error = run(*command)
    assert code == 2, error
    assert out == ""
    assert error.startswith("awd-fast: ")
    assert len(error.strip().splitlines()) == 1, error
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before, "nothing may be written"
    return error


def merge(tmp_path, checkpoints, *options: object) -> str:
    return rejected(tmp_path, "merge", *arguments(checkpoints), "--out", tmp_path / "out", *options)


def change(folder, state) -> None:
    save_file(state, folder / "model.safetensors")


def test_missing_tensor(tmp_path, checkpoints, model_states):
    del model_states[1][QUERY]
    change(checkpoints[1][1], model_states[1])
    error = merge(tmp_path, checkpoints)
    assert "model1" in error
    assert QUERY in error
    assert "lacks the tensor" in error


def test_tensor_that_the_base_lacks(tmp_path, checkpoints, model_states):
    change(checkpoints[1][2], model_states[2] | {"classifier.weight": torch.ones(2, 6)})
    error = merge(tmp_path, checkpoints)
    assert "model2" in error
    assert "'classifier.weight' that the base lacks" in error


def test_another_shape(tmp_path, checkpoints, model_states):
    change(checkpoints[1][0], model_states[0] | {QUERY: torch.ones(6, 7)})
    error = merge(tmp_path, checkpoints)
    assert "model0" in error
    assert f"'{QUERY}' has shape [6, 7]; expected [6, 6]" in error


def test_another_dtype_unless_an_output_dtype_is_chosen(tmp_path, checkpoints, model_states):
    change(checkpoints[1][1], model_states[1] | {QUERY: model_states[1][QUERY].bfloat16()})
    error = merge(tmp_path, checkpoints)
    assert "model1" in error
    assert f"'{QUERY}' is bfloat16; expected float32" in error
    assert run("merge", *arguments(checkpoints), "--out", tmp_path / "out", "--dtype", "float32")[0] == 0


def test_an_integer_tensor_that_differs(tmp_path, checkpoints, model_states):
    change(checkpoints[1][1], model_states[1] | {IDS: torch.arange(5) + 1})
    error = merge(tmp_path, checkpoints)
    assert "model1" in error
    assert f"int64 tensor '{IDS}' differs from the base's" in error


def test_an_integer_tensor_where_the_base_floats(tmp_path, checkpoints, model_states):
    change(checkpoints[1][1], model_states[1] | {QUERY: torch.ones(6, 6, dtype=torch.int32)})
    assert f"'{QUERY}' is int32; expected float32" in merge(tmp_path, checkpoints, "--dtype", "float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "model"])
def test_nan_and_inf(tmp_path, checkpoints, base_state, model_states, value, where):
    folder, state = (checkpoints[0], base_state) if where == "base" else (checkpoints[1][2], model_states[2])
    state[QUERY][3, 3] = value
    change(folder, state)
    error = merge(tmp_path, checkpoints)
    assert f"{folder.name}/model.safetensors: tensor '{QUERY}' holds 1 NaN or Inf" in error


def test_a_truncated_file(tmp_path, checkpoints):
    file = checkpoints[1][1] / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert f"{file} is not a readable safetensors file" in merge(tmp_path, checkpoints)


def test_a_corrupted_header(tmp_path, checkpoints):
    file = checkpoints[0] / "model.safetensors"
    whole = file.read_bytes()
    for start in (struct.pack("<Q", 2**40), b"\xff" * 8, struct.pack("<Q", 10) + b"not json!!"):
        file.write_bytes(start + whole[len(start) :])
        assert f"{file} is not a readable safetensors file" in merge(tmp_path, checkpoints)


def test_an_index_naming_a_missing_shard(tmp_path, checkpoints, model_states):
    folder = write_checkpoint(tmp_path / "sharded", model_states[0], shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = rejected(tmp_path, "merge", "--base", checkpoints[0], f"--model={folder}", "--out", tmp_path / "out")
    assert (
        "model.safetensors.index.json names the shard model-00002-of-00002.safetensors, which does not exist" in error
    )


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("not json", "is not a readable index"),
        ("[]", "is not a readable index"),
        ('{"weight_map": []}', "is not a readable index"),
        ("{}", "is not a readable index"),
        ('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}', "holds the tensor 'x', but it does not"),
        ('{"weight_map": {"x": "../base/model.safetensors"}}', "is not a plain .safetensors file name"),
        ('{"weight_map": {"x": "README.md"}}', "is not a plain .safetensors file name"),
        ("[" * 100_000, "is not a readable index"),
        ('{"weight_map": {}}', "holds no tensors"),
    ],
)
def test_a_bad_index(tmp_path, checkpoints, model_states, index, sentence):
    folder = write_checkpoint(tmp_path / "sharded", model_states[0], shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    command = ("merge", "--base", checkpoints[0], f"--model={folder}", "--out", tmp_path / "out")
    assert sentence in rejected(tmp_path, *command)


def test_a_pickle_is_refused_with_advice(tmp_path, checkpoints):
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save(tiny_state(), folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        error = rejected(tmp_path, "merge", "--base", checkpoints[0], f"--model={path}", "--out", tmp_path / "out")
        assert "pytorch_model.bin" in error
        assert "save_pretrained" in error


def test_folders_that_are_no_checkpoint(tmp_path, checkpoints):
    empty, adapter = tmp_path / "empty", tmp_path / "adapter"
    empty.mkdir()
    adapter.mkdir()
    save_file({"lora": torch.ones(2)}, adapter / "adapter_model.safetensors")
    for path, sentence in (
        (empty, "holds no model.safetensors"),
        (adapter, "holds no adapter_config.json"),
        (tmp_path / "nowhere", "there is no file or folder"),
        (checkpoints[0] / "config.json", "is not a readable safetensors file"),
    ):
        error = rejected(tmp_path, "merge", "--base", checkpoints[0], f"--model={path}", "--out", tmp_path / "out")
        assert str(path) in error
        assert sentence in error


def test_an_output_folder_that_exists(tmp_path, checkpoints):
    (tmp_path / "out").mkdir()
    assert "out exists" in merge(tmp_path, checkpoints)


def test_nothing_to_merge(tmp_path, checkpoints):
    base, models = checkpoints
    out = ("--out", tmp_path / "out")
    assert "no model was given" in rejected(tmp_path, "merge", "--base", base, *out)
    assert "no base model was given" in rejected(tmp_path, "merge", f"--model={models[0]}", *out)
    assert "no tensor is left to disentangle" in merge(tmp_path, checkpoints, "--exclude", "*")
    assert "include pattern '*.typo' matches no tensor" in merge(tmp_path, checkpoints, "--include", "*.typo")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--weight", "1"], "1 weights were given for 3 models"),
        (["--scale", "nan"], "scale is nan"),
        (["--method", "average", "--weight", "1", "--weight", "-2", "--weight", "1"], "sum to 0"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--optimizer", "converge", "--lr", "1"], "optimizer converge has no option lr"),
        (["--optimizer", "adam", "--momentum", "0.9"], "optimizer adam has no option momentum"),
        (["--backend", "quantum"], "backend is 'quantum'; expected one of native, cuda, triton, reference"),
        (["--device", "tpu"], "device is 'tpu'; expected cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "device is 'cuda:x'; expected cpu, cuda or cuda:N"),
        (["--device-memory", "0"], "device_memory is 0; expected GB above 0"),
        (["--optimizer", "sgd", "--max-iterations", "3"], "optimizer sgd has no option max_iterations"),
        (["--lr", "1", "--tolerance", "0.1"], "no optimizer has all of the options lr, tolerance; name one"),
        (["--preset", "rows", "--betas", "0.5", "0.6"], "optimizer sgd has no option betas"),
        (["--iterations", "99999999999999999999"], "expected an integer from 0 to 10000000"),
        (["--backend", "native", "--optimizer", "converge", "--penalty", "l1"], "backend native"),
        (["--method", "average", *["--weight", "1e308"] * 3], "sum to inf"),
    ],
)
def test_bad_values(tmp_path, checkpoints, options, sentence):
    assert sentence in merge(tmp_path, checkpoints, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(tmp_path, checkpoints):
    assert "sees no CUDA device here" in merge(tmp_path, checkpoints, "--device", "cuda")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "magic"], "'magic' is not one of 'awd', 'wudi', 'task_arithmetic', 'average'"),
        (["--groups", "block"], "'block' is not one of"),
        (["--learning-rate", "1"], "--learning-rate"),
        (["--scale", "much"], "'much' is not a valid float"),
    ],
)
def test_unknown_options_and_methods(tmp_path, checkpoints, options, sentence):
    assert sentence in merge(tmp_path, checkpoints, *options)


def test_unknown_commands(tmp_path):
    assert "No such command 'mergee'" in rejected(tmp_path, "mergee")
    assert "Missing command" in rejected(tmp_path)
    assert "Missing option '--out'" in rejected(tmp_path, "merge", "--base", "x")


def good_config(checkpoints) -> dict:
    return {"merge_method": "awd", "base_model": str(checkpoints[0]), "models": [str(m) for m in checkpoints[1]]}


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda c: c.pop("base_model"), "lacks the key base_model"),
        (lambda c: c.pop("models"), "lacks the key models"),
        (lambda c: c.update(models=[]), "models is []"),
        (lambda c: c.update(models="x"), "models is 'x'"),
        (lambda c: c.update(models=[{"path": "x"}]), "unknown key 'path'"),
        (lambda c: c.update(models=[{"model": 3}]), "has no model path"),
        (lambda c: c.update(base_model=3), "base_model is 3"),
        (lambda c: c.update(tokenizer_source="union"), "unknown key 'tokenizer_source'"),
        (lambda c: c.update(slices=[]), "unknown key 'slices'"),
        (
            lambda c: c.update(merge_method="ties"),
            "method is 'ties'; expected one of awd, wudi, task_arithmetic, average",
        ),
        (lambda c: c.update(parameters={"density": 0.5}), "unknown key 'density'"),
        (lambda c: c.update(parameters={"scale": "big"}), "scale is 'big'"),
        (lambda c: c.update(parameters={"scale": 1, "lambda": 1}), "both scale and lambda"),
        (lambda c: c.update(parameters={"iterations": 2.5}), "iterations is 2.5"),
        (lambda c: c.update(parameters=[1]), "parameters is [1]"),
        (lambda c: c.update(parameters={"optimizer": ["sgd"]}), "optimizer is ['sgd']"),
        (lambda c: c.update(parameters={"preset": {}}), "preset is {}"),
        (lambda c: c.update(parameters={"scale": 10**400}), "expected a finite number"),
        (lambda c: c.update(parameters={"include": 5}), "include is 5"),
        (lambda c: c.update(dtype="int8"), "dtype is 'int8'"),
        (lambda c: c["models"].append({"model": c["models"][0], "parameters": {"weight": "heavy"}}), "'heavy'"),
        (
            lambda c: c["models"].append({"model": c["models"][0], "parameters": {"density": 1}}),
            "unknown key 'density'",
        ),
    ],
)
def test_a_bad_configuration(tmp_path, checkpoints, edit, sentence):
    config = good_config(checkpoints)
    edit(config)
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    assert sentence in rejected(tmp_path, "merge", tmp_path / "c.yml", "--out", tmp_path / "out")


def test_a_configuration_that_is_no_yaml_or_not_there(tmp_path, checkpoints):
    (tmp_path / "c.yml").write_text("a: [b")
    (tmp_path / "d.yml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "e.yml").write_text("just text")
    (tmp_path / "g.yml").write_text("base_model: a\nbase_model: b\nmodels: [c]\n")
    (tmp_path / "h.yml").write_text("scale: 2024-13-45")
    (tmp_path / "i.yml").write_text("[" * 5000)
    for name in ("c.yml", "d.yml", "g.yml", "h.yml", "i.yml", "nowhere.yml"):
        assert "is not a readable YAML file" in rejected(tmp_path, "merge", tmp_path / name, "--out", tmp_path / "out")
    assert "expected a mapping" in rejected(tmp_path, "merge", tmp_path / "e.yml", "--out", tmp_path / "out")
    (tmp_path / "f.yml").write_text(yaml.safe_dump(good_config(checkpoints)))
    command = ("merge", tmp_path / "f.yml", "--base", checkpoints[0], "--out", tmp_path / "out")
    assert "--base and --model go with no configuration file" in rejected(tmp_path, *command)


def test_an_unknown_storage_dtype(tmp_path, checkpoints):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (checkpoints[0] / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x00")
    error = merge(tmp_path, checkpoints)
    assert "model.safetensors" in error


def test_a_picture_that_cannot_be_written(tmp_path, checkpoints):
    (tmp_path / "folder.png").mkdir()
    for option, name, sentence in (
        ("--plot", "no/such/file.png", "there is no folder"),
        ("--json", "no/such/file.json", "there is no folder"),
        ("--plot", "p.xyz", "must end in .png or .svg or .pdf"),
        ("--json", "model0/model.safetensors", "must end in .json"),
        ("--plot", "folder.png", "it is a folder"),
    ):
        command = ("inspect", *arguments(checkpoints), option, tmp_path / name)
        assert sentence in rejected(tmp_path, *command)
    command = ("inspect", *arguments(checkpoints), "--method", "average")
    assert "an inspection shows what awd does" in rejected(tmp_path, *command)


@pytest.mark.parametrize("config", ["{", "[]", "null", '"dtype"', "[" * 100_000])
def test_a_config_that_cannot_take_the_new_dtype(tmp_path, checkpoints, config):
    (checkpoints[0] / "config.json").write_text(config)
    error = merge(tmp_path, checkpoints, "--dtype", "float16")
    assert "base/config.json" in error


def test_a_step_size_that_makes_the_descent_diverge(tmp_path, checkpoints):
    assert "the optimiser diverged" in merge(tmp_path, checkpoints, "--lr", "1e30", "--weight-decay", "1e30")
    code, _, error = run("merge", *arguments(checkpoints), "--out", tmp_path / "out", "--lr", "30")
    assert code == 0
    assert error.startswith("awd-fast: warning: the loss rose from")


def test_the_base_as_a_model_of_its_own(tmp_path, checkpoints):
    base = checkpoints[0]
    error = rejected(tmp_path, "merge", "--base", base, f"--model={base}", "--out", tmp_path / "out")
    assert "is the base itself" in error
    config = {"base_model": str(base), "models": [f"{base}/.", *map(str, checkpoints[1])]}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    assert run("merge", tmp_path / "c.yml", "--out", tmp_path / "a")[0] == 0
    assert run("merge", *arguments(checkpoints), "--out", tmp_path / "b")[0] == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("out", ["base/config.json/x", "file/x"])
def test_an_output_below_a_file(tmp_path, checkpoints, out):
    (tmp_path / "file").write_text("")
    error = rejected(tmp_path, "merge", *arguments(checkpoints), "--out", tmp_path / out)
    assert "is not a folder" in error


def test_a_home_of_nobody(tmp_path, checkpoints):
    error = rejected(tmp_path, "merge", *arguments(checkpoints), "--out", "~no-such-user/x")
    assert "is not a usable path" in error


def test_paths_that_no_encoding_can_show(tmp_path, checkpoints):
    for path in ("no\udcffsuch", "no\nsuch"):
        error = rejected(tmp_path, "merge", "--base", path, "--model=x", "--out", tmp_path / "out")
        assert "no file or folder" in error
