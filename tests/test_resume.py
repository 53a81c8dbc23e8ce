"""A merge that was stopped, by whatever, goes on to the result of one that was not, and never shows half an output."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import awd_fast
from awd_fast import InputError, blocks, disk, journal, pipeline
from awd_fast.shards import Shards
from tests.conftest import tuned, write_checkpoint
from tests.kinds import OPTIONS, least_memory
from tests.small_blocks import fail
from tests.test_cli import run

NUMBERS = 200


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A base and two models whose tensors have many blocks each."""
    monkeypatch.setattr(blocks, "NUMBERS", NUMBERS)
    return make_inputs(tmp_path)


def make_inputs(folder: Path) -> tuple[Path, list[Path]]:
    g = torch.Generator().manual_seed(3)
    shapes = {"a.weight": (23, 17), "b.weight": (5, 150), "c.bias": (300,), "embed.weight": (31, 6), "d.weight": (9, 9)}
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | {"ids": torch.arange(200)}
    models = [write_checkpoint(folder / f"model{i}", tuned(base, i), shards=1 + i) for i in range(2)]
    return write_checkpoint(folder / "base", base, shards=2), models


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def stop_after(count: int, monkeypatch, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Writing fails after so many blocks."""
    write, calls = Shards.write, iter(range(count))

    def stopping(self, *given):
        if next(calls, None) is None:
            raise error("stopped")
        return write(self, *given)

    monkeypatch.setattr(Shards, "write", stopping)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_merge_goes_on_where_it_stopped_to_the_same_bytes(tmp_path, inputs, monkeypatch, options):
    base, models = inputs
    awd_fast.merge_checkpoints(base, models, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    for done in (1, 3, 4):
        with monkeypatch.context() as patch:
            stop_after(done, patch)
            with pytest.raises(KeyboardInterrupt):
                awd_fast.merge_checkpoints(base, models, out, resume=True, **options)
        assert not out.exists()
    assert len(journal.records(tmp_path / ".out.awd-fast")) == 8
    written = []
    write = Shards.write
    monkeypatch.setattr(Shards, "write", lambda self, *given: written.append(given[:2]) or write(self, *given))
    awd_fast.merge_checkpoints(base, models, out, resume=True, **options)
    assert contents(out) == expected
    assert len(written) == len(set(written)) > 8
    assert not (tmp_path / ".out.awd-fast").exists()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_neither_the_memory_nor_a_cut_changes_a_bit(tmp_path, inputs, options):
    base, models = inputs
    awd_fast.merge_checkpoints(base, models, tmp_path / "a", **options)
    little = least_memory(options, 1e-5)
    awd_fast.merge_checkpoints(base, models, tmp_path / "b", memory=little, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    states = [{k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (base, *models)]
    found = awd_fast.merge(states[0], states[1:], **options)
    merged = {k: v for f in (tmp_path / "a").glob("*.safetensors") for k, v in load_file(f).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items())


def test_what_was_damaged_after_it_was_noted_is_done_again(tmp_path, inputs, monkeypatch):
    base, models = inputs
    awd_fast.merge_checkpoints(base, models, tmp_path / "whole")
    out, kept = tmp_path / "out", tmp_path / ".out.awd-fast"
    with monkeypatch.context() as patch:
        stop_after(9, patch)
        with pytest.raises(KeyboardInterrupt):
            awd_fast.merge_checkpoints(base, models, out)
    noted = {record.tensor for record in journal.records(kept)}
    spoilt = 0
    for file in (kept / "model").glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        head = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:head]).items():
            if name in noted:  # its first block was written, and a power cut took it
                at = head + entry["data_offsets"][0]
                spoilt += data[at : at + 8] != bytes(8)
                data[at : at + 8] = bytes(8)
        file.write_bytes(data)
    assert spoilt > 0
    with open(kept / "done-0.jsonl", "ab") as file:
        file.write(b'0badcafe {"tensor": "a.wei')  # a line that was cut off
    awd_fast.merge_checkpoints(base, models, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_another_merge_does_not_go_on_with_it(tmp_path, inputs, monkeypatch):
    base, models = inputs
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            awd_fast.merge_checkpoints(base, models, out)
    with pytest.raises(InputError, match=r"an unfinished merge into .*out lies in .*go on with it \(--resume\)"):
        awd_fast.merge_checkpoints(base, models, out)
    with pytest.raises(InputError, match=r"is another one: recipe\.parameters\.scale changed"):
        awd_fast.merge_checkpoints(base, models, out, resume=True, scale=0.7)
    with pytest.raises(InputError, match="is another one: models"):
        awd_fast.merge_checkpoints(base, models[::-1], out, resume=True)
    os.utime(models[0] / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match=r"models\[0\]\.model\.safetensors\.changed changed"):
        awd_fast.merge_checkpoints(base, models, out, resume=True)
    given = ["merge", "--base", base, *(f"--model={model}" for model in models), "--out", out]
    for options, word in (((), "an unfinished merge"), (("--resume", "--scale=0.7"), "scale changed")):
        code, _, error = run(*given, *options)
        assert code == 2
        assert word in error
        assert "--resume goes on" not in error, "it would not"
    awd_fast.merge_checkpoints(base, models, out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model0", "model1", "out"]


def test_two_merges_into_one_folder_do_not_meet(tmp_path, inputs, monkeypatch):
    base, models = inputs
    tried = []

    def meanwhile(self, *given):
        if not tried:
            tried.append(True)
            with pytest.raises(InputError, match=r"another merge into .*out is under way"):
                awd_fast.merge_checkpoints(base, models, tmp_path / "out", resume=True)
        return write(self, *given)

    write = Shards.write
    monkeypatch.setattr(Shards, "write", meanwhile)
    awd_fast.merge_checkpoints(base, models, tmp_path / "out")
    assert tried


def test_a_folder_is_locked_until_all_else_in_it_is_removed(tmp_path, inputs, monkeypatch):
    base, models = inputs
    out, kept = tmp_path / "out", tmp_path / ".out.awd-fast"
    awd_fast.merge_checkpoints(base, models, out)
    names = []
    unlink = os.unlink

    def noting(path, **where):
        names.append(os.path.basename(path))
        if names[-1] == "lock":
            assert os.listdir(kept) == ["lock"]
        unlink(path, **where)

    monkeypatch.setattr(os, "unlink", noting)
    monkeypatch.setattr(os, "scandir", with_the_lock_first(os.scandir))
    awd_fast.merge_checkpoints(base, models, out, overwrite=True)
    assert names[-1] == "lock"
    assert not kept.exists()


def with_the_lock_first(scandir):
    """`os.scandir`, as a file system may order it."""

    @contextmanager
    def ordered(folder):
        with scandir(folder) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name != "lock"))

    return ordered


def killed_between_the_renames(kept: Path):
    rename = Path.rename

    def killed(self, target):
        rename(self, target)
        if self.parent != kept:
            os.kill(os.getpid(), signal.SIGKILL)

    return killed


@pytest.mark.parametrize("resume", [False, True])
def test_an_old_output_survives_a_kill_between_the_renames_and_a_failure_after_it(
    tmp_path, inputs, monkeypatch, resume
):
    base, models = inputs
    out, kept = tmp_path / "out", tmp_path / ".out.awd-fast"
    awd_fast.merge_checkpoints(base, models, out, scale=0.9)
    old = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_between_the_renames(kept))
        pid = os.fork()
        if pid == 0:
            awd_fast.merge_checkpoints(base, models, out, overwrite=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not out.exists()
    if resume:
        awd_fast.merge_checkpoints(base, models, out, overwrite=True, resume=True)
        assert contents(out) != old
    else:
        with monkeypatch.context() as patch:
            stop_after(0, patch)
            with pytest.raises(KeyboardInterrupt):
                awd_fast.merge_checkpoints(base, models, out, overwrite=True)
        assert contents(out) == old
    assert not kept.exists()


def killed_after_the_rename(out: Path):
    def sync_folder(folder: Path) -> None:
        if out.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    return sync_folder


def test_resuming_after_the_rename_only_cleans_up(tmp_path, inputs, monkeypatch):
    base, models = inputs
    out = tmp_path / "out"
    expected = awd_fast.merge_checkpoints(base, models, tmp_path / "whole").to_json()
    with monkeypatch.context() as patch:
        patch.setattr("awd_fast.staging.sync_folder", killed_after_the_rename(out))
        pid = os.fork()
        if pid == 0:
            awd_fast.merge_checkpoints(base, models, out)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert (tmp_path / ".out.awd-fast").exists()
    found = awd_fast.merge_checkpoints(base, models, out, resume=True)
    assert found.to_json() == expected
    assert not (tmp_path / ".out.awd-fast").exists()
    with pytest.raises(InputError, match=r"out exists"):
        awd_fast.merge_checkpoints(base, models, out, resume=True)


@pytest.mark.parametrize(("call", "word"), [("pread", "could not be read"), ("pwrite", "could not be written")])
def test_a_disk_that_fails_in_the_middle_costs_nothing(tmp_path, inputs, monkeypatch, call, word):
    base, models = inputs
    awd_fast.merge_checkpoints(base, models, tmp_path / "whole")
    out, kept = tmp_path / "out", tmp_path / ".out.awd-fast"
    number = errno.EIO if call == "pread" else errno.ENOSPC
    for after in (30, 45, 60) if call == "pread" else (4, 7, 12):
        with monkeypatch.context() as patch:
            patch.setattr(disk, "_read", disk._read)  # put back at the end
            patch.setattr(disk, "_write", disk._write)
            fail(call, after, number)
            with pytest.raises(OSError, match=rf"{word}: {os.strerror(number)}"):
                awd_fast.merge_checkpoints(base, models, out, resume=True)
        assert not out.exists()
    assert kept.exists()
    awd_fast.merge_checkpoints(base, models, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path, inputs, monkeypatch):
    base, models = inputs
    plan = pipeline.open_and_plan

    def cut_then(*given):
        found = plan(*given)
        file = models[0] / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1000)
        return found

    monkeypatch.setattr(pipeline, "open_and_plan", cut_then)
    with pytest.raises(OSError, match=r"model0/model\.safetensors: tensor .* ends .* bytes early"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_changed_meanwhile_is_an_error(tmp_path, inputs, monkeypatch):
    base, models = inputs
    write = Shards.write

    def touching(self, *given):
        os.utime(models[1] / "model-00001-of-00002.safetensors", ns=(5, 5))
        return write(self, *given)

    monkeypatch.setattr(Shards, "write", touching)
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors was changed while it was read"):
        awd_fast.merge_checkpoints(base, models, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model0", "model1"]


KILLING = """
import json, os, random, signal, sys, time
from awd_fast import merge_checkpoints
from awd_fast.journal import HEADER
from tests.small_blocks import arrange

inputs, out, rounds, seed = json.loads(sys.argv[1])
arrange({"numbers": 200, "pause": 0.002})
choose, kept = random.Random(seed), 0

def child(**options):
    pid = os.fork()
    if pid == 0:
        try:
            merge_checkpoints(inputs[0], inputs[1:], out, resume=True, **options)
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

def ends(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

seconds = []
for _ in range(2):  # the first is slower
    started = time.monotonic()
    assert ends(child()) == 0
    seconds.append(time.monotonic() - started)
    os.rename(out, f"{out}-undisturbed-{len(seconds)}")
for index in range(rounds):
    pid = child()
    time.sleep(choose.uniform(0.0, 0.95 * seconds[1]))
    os.kill(pid, signal.SIGKILL)
    ended = ends(pid)
    if ended == 0:
        os.rename(out, f"{out}-{index}")
        seconds[1] *= 0.7  # the machine was busier before
        continue
    assert ended == -signal.SIGKILL, ended
    staged = os.path.join(os.path.dirname(out), "." + os.path.basename(out) + ".awd-fast")
    assert not os.path.exists(out) or os.path.exists(os.path.join(out, "awd_fast.json"))
    kept += os.path.exists(os.path.join(staged, "done-0.jsonl"))
    if not (os.path.exists(out) and not os.path.exists(os.path.join(staged, HEADER))):  # else it was all done
        assert ends(child()) == 0
    os.rename(out, f"{out}-{index}")
print(json.dumps(kept))
"""


def test_twenty_kills_at_random_moments_cost_nothing(tmp_path, inputs):
    """kill -9, each followed by --resume: twenty times the bytes of an undisturbed merge."""
    base, models = inputs
    awd_fast.merge_checkpoints(base, models, tmp_path / "whole")
    given = json.dumps([[str(base), *map(str, models)], str(tmp_path / "out"), 20, random.randrange(1 << 30)])
    done = subprocess.run([sys.executable, "-c", KILLING, given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{given}\n{done.stdout}{done.stderr}"
    expected = contents(tmp_path / "whole")
    assert all(contents(tmp_path / f"out-{index}") == expected for index in range(20)), given
    assert int(done.stdout.split()[-1]) > 3, "too few kills came in the middle"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_done_and_says_how_to_go_on(tmp_path, inputs, number):
    base, models = inputs
    out, kept = tmp_path / "out", tmp_path / ".out.awd-fast"
    command = [sys.executable, "-m", "tests.small_blocks", json.dumps({"numbers": NUMBERS, "pause": 0.2}), "merge"]
    command += ["--base", str(base), *(f"--model={model}" for model in models), "--out", str(out)]
    usual = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=usual)
    while process.poll() is None and not (kept.exists() and journal.records(kept)):
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"--resume goes on with what is kept in {kept}" in error
    assert not out.exists()
    given = ["merge", "--base", base, *(f"--model={model}" for model in models), "--out"]
    assert run(*given, out, "--resume")[0] == 0
    assert run(*given, tmp_path / "whole")[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_jobs_beside_each_other_change_no_bit(tmp_path, inputs, options):
    base, models = inputs
    awd_fast.merge_checkpoints(base, models, tmp_path / "one", **options)
    little = least_memory(options, 3e-5)
    torch.set_num_threads(9)  # the fixture puts it back
    for memory in (1.0, little):
        out = tmp_path / f"out{memory}"
        awd_fast.merge_checkpoints(base, models, out, memory=memory, **options)
        assert torch.get_num_threads() == 9
        assert {k: v for k, v in contents(out).items() if k.endswith(".safetensors")} == {
            k: v for k, v in contents(tmp_path / "one").items() if k.endswith(".safetensors")
        }
