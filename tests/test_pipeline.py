"""Model folders: what is written, that it is whole or absent, and that command line, YAML and Python agree bitwise."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import awd_fast
from awd_fast import InputError, making, sidefiles
from awd_fast import checkpoints as checkpoint_files
from awd_fast.shards import Shards
from tests.conftest import tiny_state, tuned, write_checkpoint
from tests.test_cli import run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def leftovers(folder: Path) -> list[str]:
    """What lies beside the inputs: nothing may be left by a merge that failed."""
    return sorted(p.name for p in folder.iterdir() if p.name not in ("base", "model0", "model1", "model2"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def test_folders_merge_as_state_dicts_do(tmp_path, checkpoints, base_state, model_states):
    base, models = checkpoints
    for index, options in enumerate(({}, {"groups": "global"}, {"method": "average"}, {"dtype": "bfloat16"})):
        out = tmp_path / f"out{index}"
        report = awd_fast.merge_checkpoints(base, models, out, scale=0.5, **options)
        expected = awd_fast.merge(base_state, model_states, scale=0.5, **options)
        found = load(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert report.path == out
        assert len(report.tensors) == len(expected)


def test_command_line_yaml_and_python_write_the_same_bytes(tmp_path, checkpoints):
    base, models = checkpoints
    sources = ["--base", base, *(f"--model={m}" for m in models)]
    code, _, _ = run("merge", *sources, "--out", tmp_path / "a", "--alpha", "1")
    assert code == 0
    config = {
        "merge_method": "awd",
        "base_model": str(base),
        "models": [str(models[0]), *({"model": str(m), "parameters": {"weight": 1}} for m in models[1:])],
        "parameters": {"alpha": 1.0},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    code, _, _ = run("merge", tmp_path / "config.yml", "--out", tmp_path / "b")
    assert code == 0
    awd_fast.merge_checkpoints(str(base), [str(m) for m in models], tmp_path / "c", alpha=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_the_model_card_holds_a_recipe_that_gives_the_same_model(tmp_path, checkpoints):
    base, models = checkpoints
    options = {"optimizer": awd_fast.Adam(lr=1e-3, iterations=5), "weights": [1, 2, -0.5], "exclude": ["*embed*"]}
    awd_fast.merge_checkpoints(base, models, tmp_path / "a", scale=0.35, dtype="float16", others="base", **options)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "2411.18729" in card
    assert awd_fast.__version__ in card
    assert "before" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["base", "model0", "model1", "model2"]
    (tmp_path / "recipe.yml").write_text(card.split("```yaml\n")[1].split("```")[0])
    assert run("merge", tmp_path / "recipe.yml", "--out", tmp_path / "b")[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_output_is_sharded_as_the_base_is(tmp_path, base_state, model_states):
    base = write_checkpoint(tmp_path / "base", base_state, shards=3)
    models = [write_checkpoint(tmp_path / f"model{i}", s, shards=1 + i) for i, s in enumerate(model_states)]
    out = tmp_path / "out"
    awd_fast.merge_checkpoints(base, models, out)
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(p.name for p in base.glob("*.safetensors"))
    for file in base.glob("*.safetensors"):
        assert set(load_file(file)) == set(load_file(out / file.name))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in base_state.values())
    whole = write_checkpoint(tmp_path / "whole", base_state)
    awd_fast.merge_checkpoints(whole, models, tmp_path / "single")
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert all(torch.equal(single[name], tensor) for name, tensor in load(out).items())


def test_side_files_come_from_the_base_and_the_dtype_is_noted(tmp_path, checkpoints):
    base, models = checkpoints
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "README.md").write_text("the base's own card")
    (base / "LICENSE").write_text("free")
    out = tmp_path / "out"
    awd_fast.merge_checkpoints(base, models, out, dtype="bfloat16")
    assert {p.name for p in out.iterdir()} == {
        *("LICENSE", "README.md", "awd_fast.json", "config.json"),
        *("generation_config.json", "model.safetensors", "tokenizer.json"),
    }
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "LICENSE").read_text() == "free"
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_single_files_merge(tmp_path, base_state, model_states):
    for name, state in (("b", base_state), ("m0", model_states[0]), ("m1", model_states[1])):
        save_file(state, tmp_path / f"{name}.safetensors")
    out = tmp_path / "out"
    awd_fast.merge_checkpoints(tmp_path / "b.safetensors", [tmp_path / f"m{i}.safetensors" for i in (0, 1)], out)
    expected = awd_fast.merge(base_state, model_states[:2])
    assert all(torch.equal(load(out)[name], expected[name]) for name in expected)


def test_transformers_loads_the_output(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    base = transformers.BertModel(config)
    base.save_pretrained(tmp_path / "base")
    for index in range(3):
        model = transformers.BertModel(config)
        model.load_state_dict(tuned(base.state_dict(), index))
        model.save_pretrained(tmp_path / f"model{index}")
    models = [tmp_path / f"model{i}" for i in range(3)]
    for options in ({}, {"dtype": "bfloat16"}):
        out = tmp_path / f"out{len(options)}"
        awd_fast.merge_checkpoints(tmp_path / "base", models, out, **options)
        merged, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected = load(out)
        for name, tensor in merged.state_dict().items():
            assert name not in expected or torch.equal(tensor.to(expected[name].dtype), expected[name])


def test_an_existing_output_is_not_touched_unless_overwriting_is_allowed(tmp_path, checkpoints):
    base, models = checkpoints
    out = write_checkpoint(tmp_path / "out", tiny_state(5))
    before = contents(out)
    with pytest.raises(InputError, match=r"the output folder .*out exists"):
        awd_fast.merge_checkpoints(base, models, out)
    assert contents(out) == before
    awd_fast.merge_checkpoints(base, models, out, overwrite=True)
    assert contents(out) != before
    assert leftovers(tmp_path) == ["out"]


def test_overwriting_replaces_only_model_folders_that_are_no_input(tmp_path, checkpoints):
    base, models = checkpoints
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "thesis" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"thesis holds chapter\.tex, which no merge writes"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "package.json").write_text("{}")
    with pytest.raises(InputError, match="holds no safetensors"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "project", overwrite=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_text("{}")
    (tmp_path / "cache" / "model.safetensors").symlink_to(base / "model.safetensors")
    with pytest.raises(InputError, match="holds the input"):
        awd_fast.merge_checkpoints(tmp_path / "cache", models, tmp_path / "cache", overwrite=True)
    for target in (base, models[1], tmp_path):
        with pytest.raises(InputError, match="holds the input"):
            awd_fast.merge_checkpoints(base, models, target, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a folder"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "file", overwrite=True)


def test_a_failed_overwrite_leaves_the_old_model(tmp_path, checkpoints, monkeypatch):
    base, models = checkpoints
    out = write_checkpoint(tmp_path / "out", tiny_state(5))
    before = contents(out)

    def broken(*args):
        raise OSError("disk on fire")

    monkeypatch.setattr(Shards, "write", broken)
    with pytest.raises(OSError, match="disk on fire"):
        awd_fast.merge_checkpoints(base, models, out, overwrite=True)
    assert contents(out) == before
    assert leftovers(tmp_path) == ["out"]


def test_an_error_in_the_last_tensor_leaves_nothing(tmp_path, base_state, model_states):
    last = list(base_state)[-2]
    model_states[2][last][0] = float("nan")
    base = write_checkpoint(tmp_path / "base", base_state, shards=2)
    models = [write_checkpoint(tmp_path / f"model{i}", state) for i, state in enumerate(model_states)]
    with pytest.raises(InputError, match=f"model2.*{last}.*holds 1 NaN or Inf"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "out")
    assert leftovers(tmp_path) == []


ENDING = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def slow_merge(tmp_path: Path, checkpoints: tuple[Path, list[Path]]) -> subprocess.Popen[str]:
    """A merge in a process of its own that takes minutes, unless something ends it."""
    base, models = checkpoints
    command = [sys.executable, "-m", "awd_fast", "merge", "--base", str(base), "--out", str(tmp_path / "out")]
    command += [f"--model={model}" for model in models]
    command += ["--backend", "reference", "--iterations", "1000000"]

    def with_usual_signals() -> None:  # also where this test run is a background job, which ignores SIGINT
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=with_usual_signals)


@pytest.mark.parametrize(("number", "code"), ENDING.items())
def test_an_interrupt_in_the_middle_leaves_no_output(tmp_path, checkpoints, number, code):
    process = slow_merge(tmp_path, checkpoints)
    deadline = time.monotonic() + 60
    while not leftovers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert leftovers(tmp_path) == [".out.awd-fast"], "the merge is under way"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    word = "interrupted" if number == signal.SIGINT else "terminated"
    if leftovers(tmp_path):  # a tensor was done
        kept = tmp_path / ".out.awd-fast"
        assert error.strip() == f"awd-fast: {word}; --resume goes on with what is kept in {kept}"
        assert leftovers(tmp_path) == [kept.name]
    else:
        assert error.strip() == f"awd-fast: {word}; no half-written output is left"


def test_a_signal_between_the_renames_of_an_overwrite_is_held_back(tmp_path, checkpoints, monkeypatch):
    base, models = checkpoints
    out = write_checkpoint(tmp_path / "out", tiny_state(5))
    rename = Path.rename

    def interrupted_rename(self, target):
        result = rename(self, target)
        signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(Path, "rename", interrupted_rename)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            awd_fast.merge_checkpoints(base, models, out, overwrite=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert leftovers(tmp_path) == ["out"]
    assert "Merged with awd-fast" in (out / "README.md").read_text()


def test_parents_made_for_an_output_vanish_with_it(tmp_path, checkpoints, model_states):
    base, models = checkpoints
    model_states[0][next(iter(model_states[0]))][0] = float("inf")
    save_file(model_states[0], models[0] / "model.safetensors")
    with pytest.raises(InputError, match="NaN or Inf"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "p" / "q" / "out")
    assert leftovers(tmp_path) == []
    awd_fast.merge_checkpoints(base, models[1:], tmp_path / "p" / "q" / "out")
    assert (tmp_path / "p" / "q" / "out" / "config.json").exists()


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path, checkpoints, base_state):
    folder = write_checkpoint(tmp_path / "both", tiny_state(9), shards=2)
    save_file(base_state, folder / "model.safetensors")
    read = checkpoint_files.Checkpoint(folder)
    assert all(torch.equal(read.read(name), tensor) for name, tensor in base_state.items())


def test_nested_dtypes_of_a_config_are_noted(tmp_path, checkpoints):
    base, models = checkpoints
    nested = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "layers": 2}, "dtypes": "float32"}
    (base / "config.json").write_text(json.dumps(nested))
    awd_fast.merge_checkpoints(base, models, tmp_path / "out", dtype="float16")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {"dtype": "float16", "text_config": {"torch_dtype": "float16", "layers": 2}, "dtypes": "float32"}


def test_outputs_have_the_usual_permissions(tmp_path, checkpoints):
    base, models = checkpoints
    awd_fast.merge_checkpoints(base, models, tmp_path / "out")
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {usual}


def big_checkpoints(folder: Path) -> tuple[Path, list[Path]]:
    """Checkpoints of 0.8 MB each."""
    base = tiny_state() | {"encoder.big.weight": torch.randn(400, 500)}
    models = [tuned(base, seed) for seed in range(2)]
    paths = [write_checkpoint(folder / f"model{i}", state) for i, state in enumerate(models)]
    return write_checkpoint(folder / "base", base), paths


def test_a_file_that_cannot_be_written_is_an_error_of_the_machine(tmp_path):
    base, models = big_checkpoints(tmp_path)
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000)); "
    code += "from awd_fast.cli import main; main()"
    command = [sys.executable, "-c", code, "merge", "--base", str(base), f"--model={models[0]}", "--out"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("awd-fast: ")
    assert "model.safetensors could not be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert leftovers(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") is not None and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_noticed_before_and_while_writing(tmp_path, small_disk, monkeypatch):
    base, models = big_checkpoints(tmp_path / "inputs")
    (small_disk / "ballast").write_bytes(b"0" * 500_000)
    with pytest.raises(OSError, match=r"MB free; the output needs 0\.8 MB"):
        awd_fast.merge_checkpoints(base, models, small_disk / "out")
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]
    monkeypatch.setattr(making, "check_space", lambda out, needed: None)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written: .*No space left"):
        awd_fast.merge_checkpoints(base, models, small_disk / "out")
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, checkpoints):
    """As under nohup: the merge goes on to its end."""
    base, models = checkpoints
    command = [sys.executable, "-m", "awd_fast", "merge", "--base", str(base), "--out", str(tmp_path / "out")]
    command += [*(f"--model={model}" for model in models), "--backend", "reference", "--iterations", "3000"]
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=ignore)
    deadline = time.monotonic() + 60
    while not leftovers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_under_the_outputs_name_meanwhile_is_not_replaced(tmp_path, checkpoints, monkeypatch, overwrite):
    base, models = checkpoints
    out, copy = tmp_path / "out", sidefiles.copy_side_files

    def made_by_another(*args):
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        copy(*args)

    monkeypatch.setattr(sidefiles, "copy_side_files", made_by_another)
    with pytest.raises(InputError, match=r"exists|which no merge writes"):
        awd_fast.merge_checkpoints(base, models, out, overwrite=overwrite)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    assert leftovers(tmp_path) == [".out.awd-fast", "out"]
    monkeypatch.undo()
    out.rename(tmp_path / "model2" / "elsewhere")  # the merge is complete, and takes its place now
    awd_fast.merge_checkpoints(base, models, out, resume=True)
    assert leftovers(tmp_path) == ["out"]
    assert (out / "model.safetensors").exists()
