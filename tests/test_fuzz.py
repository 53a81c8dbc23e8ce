"""Spoilt inputs: a few thousand from `benchmarks.fuzz`, and what the hundred thousand once found, each by itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import awd_fast
from awd_fast import InputError, tensor_files
from awd_fast.adapters import Adapter
from awd_fast.checkpoints import Checkpoint
from awd_fast.config import load_config
from tests.adapter_folders import infos, linear, write_adapter_folder
from tests.conftest import write_checkpoint

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="the cases run in forked workers")


def refused(run, *words: str) -> str:
    """The one sentence with which a call is refused."""
    with pytest.raises(InputError) as raised:
        run()
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert message.isprintable()
    assert len(message) < 1000
    return message


def safetensors(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
    return file


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@linux
def test_thousands_of_spoilt_inputs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fuzz", "--cases", "1500", "--seed", "20"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(tmp_path), check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert ": 1,500 cases in" in run.stdout
    for kind in ("safetensors", "index", "config.json", "YAML"):
        assert f"| {kind} | refused |" in run.stdout
        assert f"| {kind} | merged |" in run.stdout
    for kind in ("adapter_config.json", "adapter weights"):
        assert f"| {kind} | bound |" in run.stdout


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "AWD_FAST_FUZZ": str(folder)}


VIOLATIONS = """
import os
from benchmarks import fuzz, fuzz_cases
from benchmarks.fuzz_checks import Violation, attempt, require

def crash(good, random):
    os.abort()

def spin(good, random):
    while True:
        try:
            sum(range(100000))
        except Exception:
            pass

def swallow(good, random):
    good.spoilt[:] = []
    return str(len(b"x" * (100 << 20)))

def huge(good, random):
    return attempt(lambda: bytearray(1 << 40))

def leak(good, random):
    return attempt(lambda: [][1])

def wrong(good, random):
    require(False, "wrong")

def fine(good, random):
    return "fine"

fuzz.SECONDS = 0.3
fuzz_cases.KINDS.clear()
for kind in (crash, spin, swallow, huge, leak, wrong, fine):
    fuzz_cases.KINDS[kind.__name__] = (kind, 1.0)
tally = fuzz.fuzz(0, range(20))
counts, bad = tally.counts, tally.bad
kinds = [fuzz.choose(0, case)[0] for case in range(20)]
assert set(kinds) == set(fuzz_cases.KINDS), kinds
assert sum(counts.values()) == 20, counts
assert bad == [case for case in range(20) if kinds[case] != "fine"], counts
for kind, word in (("crash", "ended with -6"), ("spin", "0.3 s"), ("swallow", "memory"), ("huge", "MemoryError"),
                   ("leak", "IndexError"), ("wrong", "wrong")):
    assert all(word in outcome for (name, outcome) in counts if name == kind), counts
"""


@linux
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
def test_the_harness_sees_what_is_wrong(tmp_path):
    command = [sys.executable, "-c", VIOLATIONS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(tmp_path), check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert any("--only" in (kept / "traceback.txt").read_text() for kept in tmp_path.iterdir())


def test_a_message_is_one_line_of_bounded_length():
    assert str(InputError("a\nb\x1b[31m\ud800\u202e é")) == "a\\nb\\x1b[31m\\ud800\\u202e é"
    assert str(InputError("é" * 800)) == "é" * 800
    for text in ("x" * 10**6, "\ud800" * 10**6):
        assert len(str(InputError(f"file: {text}; expected less"))) < 1000
        assert str(InputError(f"file: {text}; expected less")).startswith("file: ")
        assert str(InputError(f"file: {text}; expected less")).endswith("; expected less")


@pytest.mark.parametrize("written", [["F32", [1], [0, 4]], entry("F32", [1], 0, 4) | {"dtype": {"F32": None}}])
def test_a_header_that_only_serde_understands(tmp_path, written):
    file = safetensors(tmp_path / "m.safetensors", {"x": written}, bytes(4))
    assert load_file(file)["x"].shape == (1,)
    refused(lambda: Checkpoint(file), str(file), "'x' is not written as fields")


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ([0, 2**63], "a dimension that is too large"),
        ([2**40, 0, 2**40], "a dimension that is too large"),
        ([1] * 65, "65 dimensions; expected at most 64"),
    ],
)
def test_shapes_that_torch_does_not_take(tmp_path, shape, sentence):
    end = 0 if 0 in shape else 4
    file = safetensors(tmp_path / "m.safetensors", {"x": entry("F32", shape, 0, end)}, bytes(end))
    refused(lambda: Checkpoint(file), str(file), "'x'", sentence)


def test_a_name_without_end(tmp_path):
    """An adapter's names are looked for by each of their ends, of which this has 50000, of 50 kB on average."""
    name = "a." * 50_000 + "weight"
    file = safetensors(tmp_path / "m.safetensors", {name: entry("F32", [1], 0, 4)}, bytes(4))
    refused(lambda: Checkpoint(file), str(file), "has a name of 100006 characters; expected at most 500")
    folder = write_adapter_folder(tmp_path / "a", linear(name, 4, 3, 5))
    refused(lambda: Adapter(folder), "adapter_model.safetensors", "characters; expected at most 500")


@pytest.mark.parametrize("length", [2**63, 2**40, 65])
def test_a_length_that_is_longer_than_the_file_takes_no_memory(tmp_path, monkeypatch, length):
    """As of a file that is replaced after `safetensors` has looked at it."""
    file = tmp_path / "m.safetensors"
    file.write_bytes(save({"x": torch.ones(1)}))
    whole = tensor_files.safe_open(str(file), framework="pt")
    file.write_bytes(length.to_bytes(8, "little") + bytes(64))
    monkeypatch.setattr(tensor_files, "safe_open", lambda *args, **kwargs: whole)
    refused(lambda: Checkpoint(file), f"its header has {length} bytes, the file 72")


def test_empty_tensors_keep_one_order(tmp_path):
    header = {f"e{i:02d}": entry("F32", [0], 0, 0) for i in reversed(range(50))}
    file = safetensors(tmp_path / "m.safetensors", header)
    assert list(Checkpoint(file).tensors) == sorted(header)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"weight_map": {"x": list(range(1000))}}, "is not a plain .safetensors file name"),
        ({"weight_map": {"x": "y" * 300 + ".safetensors"}}, "which does not exist"),
        ({"weight_map": {"x": "\0.safetensors"}}, "which does not exist"),
        ({"weight_map": {"x": "\ud800.safetensors"}}, "which does not exist"),
        ({"weight_map": "x"}, "expected weight_map, a mapping of tensors to files"),
    ],
)
def test_an_index_with_strange_names(tmp_path, base_state, index, sentence):
    folder = write_checkpoint(tmp_path / "m", base_state, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: Checkpoint(folder), "model.safetensors.index.json", sentence)


def test_a_config_that_is_deeper_than_python_can_copy(tmp_path, checkpoints):
    base, models = checkpoints
    for depth, fits in ((100, True), (101, False), (600, False), (5000, False)):
        text = '{"dtype":' * depth + '"float32"' + "}" * depth
        (base / "config.json").write_text(text)
        run = lambda depth=depth: awd_fast.merge_checkpoints(base, models, tmp_path / f"{depth}", dtype="float16")  # noqa: E731
        if fits:
            run()
            assert (tmp_path / f"{depth}" / "config.json").read_text().count('"float16"') == 1
        else:
            refused(run, "base/config.json is not readable", "nested more than 100 levels deep")


BOMB = "[" + ", ".join(f"&{c} [{', '.join([f'*{p}'] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)) + "]"
MERGES = "[" + ", ".join(
    f"&{c} {{<<: [{', '.join([f'*{p}'] * 9)}]}}" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("!!bool x", "'x' cannot be read as bool"),
        ("!!timestamp x", "'x' cannot be read as timestamp"),
        ("2024-13-45", "'2024-13-45' cannot be read as timestamp"),
        ("9999-12-31T23:59:59-24:00", "cannot be read as timestamp"),
        ("!!int _", "'_' cannot be read as int"),
        ("!!map [a]", "expected a mapping"),
        ("!!map x", "expected a mapping"),
        ("{a: 1, a: 2}", "the key 'a' stands twice"),
        ("&a [*a]", "this holds itself"),
        ("&a {x: *a}", "this holds itself"),
        ("&a {<<: *a}", "this holds itself"),
        (BOMB.replace("&b", "&a [x], &b", 1), "with its aliases written out it has more than 20000 values"),
        (MERGES.replace("&b", "&a {x: 1}, &b", 1) + "]", "with its aliases written out it has more than 20000 values"),
        ("[" * 150 + "]" * 150, "nested more than 100 levels deep"),
        ("[" * 2000 + "]" * 2000, "nested more than 100 levels deep"),
        ("x" * 100_001, "expected at most 100000"),
        ("x" * 1_000_000, "expected at most 100000"),
        (f"[{', '.join(['x'] * 3000)}]", "expected"),
        ('"\\uD800"', "expected"),
    ],
)
def test_yaml_that_loaders_fail_on(tmp_path, value, sentence):
    file = tmp_path / "c.yml"
    file.write_text(f"base_model: b\nmodels: [m]\nparameters:\n  scale: {value}\n")
    start = time.process_time()
    refused(lambda: load_config(file), "c.yml", sentence)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ['"a\\0b"', '"\\uD800"', "x" * 5000, "~nobody-is-called-this/x"])
def test_yaml_with_paths_that_are_none(tmp_path, name):
    file = tmp_path / "c.yml"
    file.write_text(f"base_model: b\nmodels: [{name}]\n")
    config = load_config(file)
    words = refused(lambda: Checkpoint(config.models[0]))
    assert "there is no file or folder" in words or "is not a usable path" in words


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*x", "((a|a.)+)+z", ".*" * 12 + "z", "(a?){40}z", "(a|aa)" * 40 + "z", "(?=(a+)+z)q"]
)
def test_regular_expressions_without_end(tmp_path, pattern):
    module = "a" * 40 + ".q"
    for key in ("rank_pattern", "alpha_pattern"):
        folder = write_adapter_folder(tmp_path / key, linear(module, 4, 3, 5), **{key: {pattern: 4}})
        start = time.process_time()
        refused(lambda folder=folder: Adapter(folder), f"{key} has the key", "in more ways than can be tried")
        assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "pattern",
    [r".*layers\.\d+\.(self_attn|mlp)\..*_proj", r"model\.layers\.(0|1|2|3)\.\w+\.[qv]_proj", "q_proj|v_proj"],
)
def test_regular_expressions_that_are_in_use(tmp_path, pattern):
    module = "model.layers.3.self_attn.q_proj"
    folder = write_adapter_folder(tmp_path / "a", linear(module, 4, 3, 5), alpha_pattern={pattern: 12})
    assert Adapter(folder).modules[module].scale == 3.0


def test_a_tensor_of_many_dimensions_in_an_adapter(tmp_path):
    tensors = linear("q", 4, 3, 5) | {"base_model.model.x.weight": torch.ones(3).reshape(*[1] * 64, 3)}
    refused(lambda: Adapter(write_adapter_folder(tmp_path / "a", tensors)), "x.weight", "65 dimensions")


def test_an_adapter_with_numbers_of_another_dtype(tmp_path):
    tensors = linear("q", 4, 3, 5) | {"base_model.model.q.weight": torch.ones(2, dtype=torch.uint16)}
    refused(lambda: Adapter(write_adapter_folder(tmp_path / "a", tensors)), "'base_model.model.q.weight'", "U16")
    good = Adapter(write_adapter_folder(tmp_path / "b", linear("q", 4, 3, 5))).bind(infos(q__weight=(5, 3)))
    assert good.factors("q.weight").shape == (5, 3)


def test_thousands_of_like_tensors_that_a_model_lacks_are_each_read_once(tmp_path):
    alike = torch.arange(4.0).view(2, 2)
    save_file({f"a{i}": alike.clone() for i in range(3000)}, tmp_path / "base.safetensors")
    there = {f"a{i}": alike.clone() for i in range(0, 3000, 2)}
    save_file({f"b{i}": alike.clone() for i in range(3000)} | there, tmp_path / "m.safetensors")
    base, model = Checkpoint(tmp_path / "base.safetensors"), Checkpoint(tmp_path / "m.safetensors")
    start = time.process_time()
    model.tie(base)
    assert time.process_time() - start < 10  # a hundred times that where each is compared with each
    assert len(model.tensors) == 4500  # a twin among many is none
