"""The merges of mergekit and FusionBench: the registry, the cache and the failures, without either package."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.quality import peers
from benchmarks.quality.peer_methods import LEFT_OUT, METHODS, Method

BASE = {"layer.weight": torch.zeros(2, 3), "layer.bias": torch.zeros(3)}

# Stands in for peer_worker.py: base plus 1, and a line in a file for each time that it ran.
STAND_IN = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
job = json.loads(Path(sys.argv[1]).read_text())
base = load_file(Path(job["base"]) / "model.safetensors")
save_file({name: tensor + 1 for name, tensor in base.items()}, Path(job["output"]) / "model.safetensors")
seconds = {"loading": 0.5, "merging": 2.0, "writing": 0.25}
report = {"seconds": seconds, "changed": {"1": [1, 1], "2": [1, 1]}, "relative_update": 1.0}
(Path(job["output"]) / "report.json").write_text(json.dumps(report))
with open(Path(__file__).with_name("runs"), "a") as file:
    file.write(json.dumps(job) + "\\n")
"""


def model_folder(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and two models of two tensors."""
    moved = [{name: tensor + k for name, tensor in BASE.items()} for k in (1.0, 2.0)]
    return model_folder(tmp_path / "base", BASE), [
        model_folder(tmp_path / f"m{k}", weights) for k, weights in enumerate(moved)
    ]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The worker and the environment replaced; the file with the jobs that were run."""
    worker = tmp_path / "stand_in" / "worker.py"
    worker.parent.mkdir()
    worker.write_text(STAND_IN)
    monkeypatch.setattr(peers, "WORKER", worker)
    monkeypatch.setattr(peers, "peers_python", lambda report: Path(sys.executable))
    return worker.with_name("runs")


def runs(file: Path) -> int:
    return len(file.read_text().splitlines())


# The registry


def test_every_method_is_known_by_its_own_name() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in METHODS)
    titles = [(method.peer, method.title) for method in METHODS.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_options_are_json_and_carry_the_scale(method: Method) -> None:
    before = json.dumps(dict(method.options))
    if method.scale == "none":
        assert method.at(1.0) == method.options
        with pytest.raises(ValueError, match="has no scale"):
            method.at(0.5)
    else:
        assert json.loads(json.dumps(method.at(0.5))) == method.at(0.5)
        assert method.at(0.5) != method.at(1.0)
    assert json.dumps(dict(method.options)) == before


def test_a_method_without_a_scale_has_no_default_either() -> None:
    with pytest.raises(ValueError, match="or none of the three"):
        Method("odd", "Odd", "mergekit", "odd", scale="none", default_scale=1.0)


def test_methods_left_out_have_a_reason() -> None:
    assert LEFT_OUT
    assert all(len(reason.split()) > 3 for reason in LEFT_OUT.values())


# The cache


def test_second_run_takes_the_file_of_the_first(
    folders: tuple[Path, list[Path]], stand_in: Path, tmp_path: Path
) -> None:
    method = METHODS["mergekit-ties-0.2"]
    first = peers.merged(method, *folders, tmp_path / "work", scale=0.5)
    second = peers.merged(method, *folders, tmp_path / "work", scale=0.5)
    assert (first.cached, second.cached) == (False, True)
    assert runs(stand_in) == 1
    assert second.file == first.file
    assert (second.seconds, second.loading, second.process_seconds) == (2.0, 0.5, first.process_seconds)
    assert second.changed == {1: (1, 1), 2: (1, 1)}
    assert torch.equal(load_file(second.file)["layer.bias"], torch.ones(3))
    assert json.loads(stand_in.read_text())["options"] == {"weight": 1.0, "density": 0.2, "lambda": 0.5}


def test_key_changes_with_everything_that_decides_a_merge(
    folders: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = folders
    method = METHODS["mergekit-ties-0.2"]

    def key(method: Method = method, scale: float = 1.0, seed: int = 0, models: list[Path] = models) -> str:
        return peers.key(method, method.at(scale), base, models, seed)

    original = key()
    others = [
        key(METHODS["mergekit-ties-0.5"]),
        key(METHODS["mergekit-dare-ties-0.2"]),
        key(scale=0.5),
        key(seed=1),
        key(models=models[:1]),
        key(models=models[::-1]),
    ]
    assert len({original, *others}) == len(others) + 1

    copy = model_folder(tmp_path / "copy", load_file(models[0] / "model.safetensors"))
    assert key(models=[copy, models[1]]) == original
    save_file({name: tensor + 9 for name, tensor in BASE.items()}, models[0] / "model.safetensors")
    os.utime(models[0] / "model.safetensors", ns=(1, 1))
    assert key() != original

    for constant in ("WORKER", "CONSTRAINTS"):
        before = key()
        changed = tmp_path / constant
        changed.write_bytes(getattr(peers, constant).read_bytes() + b"\n")
        monkeypatch.setattr(peers, constant, changed)
        assert key() != before


# Failures


def test_failure_is_one_sentence_with_the_peers_last_words(
    folders: tuple[Path, list[Path]], stand_in: Path, tmp_path: Path
) -> None:
    peers.WORKER.write_text("print('merging...'); raise ValueError('no such method')")
    with pytest.raises(peers.PeerError) as caught:
        peers.merged(METHODS["mergekit-sce"], *folders, tmp_path / "work")
    assert str(caught.value) == (
        "mergekit-sce could not merge (exit status 1); its last words: ValueError: no such method"
    )
    assert list((tmp_path / "work").iterdir()) == []


def test_merge_that_takes_too_long_is_stopped(folders: tuple[Path, list[Path]], stand_in: Path, tmp_path: Path) -> None:
    peers.WORKER.write_text("import time; print('step 1', flush=True); time.sleep(60)")
    with pytest.raises(peers.PeerError, match="mergekit-sce was stopped after 2 s"):
        peers.merged(METHODS["mergekit-sce"], *folders, tmp_path / "work", timeout=2)


# The environment


class FakeCommands:
    """Runs no command: makes the interpreter's file where `venv` would, and fails at `fails` if it is in a command."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.seen: list[str] = []

    def __call__(self, command: list[str], what: str) -> None:
        words = " ".join(command)
        self.seen.append(words)
        if self.fails and self.fails in words:
            raise peers.PeerError(f"could not {what}")
        if "-m venv" in words:
            python = peers.python_of(Path(command[-1]))
            python.parent.mkdir(parents=True)
            python.write_text("")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWD_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_environment_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = FakeCommands()
    monkeypatch.setattr(peers, "_step", commands)
    told: list[str] = []
    python = peers.peers_python(told.append)
    assert python.is_file()
    assert len(commands.seen) == 3
    assert str(peers.CONSTRAINTS) in commands.seen[1]
    assert len(told) == 2
    assert peers.peers_python(told.append) == python
    assert len(commands.seen) == 3
    assert [entry.name for entry in cache.iterdir()] == [peers.environment_folder().name]


def test_unfinished_environment_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = peers.environment_folder() / "half" / "installed"
    leftover.mkdir(parents=True)
    monkeypatch.setattr(peers, "_step", FakeCommands())
    assert peers.peers_python(lambda line: None).is_file()
    assert not leftover.exists()


def test_failed_installation_leaves_nothing_and_is_tried_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_step", FakeCommands("pip install"))
    with pytest.raises(peers.PeerError, match="could not install"):
        peers.peers_python(lambda line: None)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(peers, "_step", FakeCommands())
    assert peers.peers_python(lambda line: None).is_file()


def test_step_repeats_the_last_words_of_its_command() -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no matching distribution')"]
    with pytest.raises(peers.PeerError, match=r"could not install it .*exit status 1.*no matching distribution"):
        peers._step(command, "install it")


def test_environment_is_named_after_the_pins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = peers.environment_folder()
    other = tmp_path / "pins.txt"
    other.write_text("torch==1.0\n")
    monkeypatch.setattr(peers, "CONSTRAINTS", other)
    assert peers.environment_folder() != before


def test_requirements_are_pinned() -> None:
    pins = {line.split("==")[0] for line in peers.CONSTRAINTS.read_text().splitlines() if "==" in line}
    assert set(peers.REQUIREMENTS) <= pins


# With the peers themselves, where their environment has been made


@pytest.mark.skipif(
    not (peers.environment_folder() / peers.MARKER).is_file(), reason="the environment of the peers is not there"
)
def test_both_peers_compute_the_same_task_arithmetic(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    paths = [tmp_path / name for name in ("base", "one", "two", "three")]
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        transformers.BertModel(config).save_pretrained(path)
    base, *models = (load_file(path / "model.safetensors") for path in paths)
    for name in ("mergekit-task-arithmetic", "fusion-bench-task-arithmetic"):
        made = peers.merged(METHODS[name], paths[0], paths[1:], tmp_path / "work", scale=0.5)
        found = load_file(made.file)
        assert made.relative_update == pytest.approx(0.5, abs=1e-5)
        for tensor, value in base.items():
            expected = value + 0.5 * sum(model[tensor] - value for model in models)
            torch.testing.assert_close(found[tensor], expected, rtol=1e-5, atol=1e-6)
