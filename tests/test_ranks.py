"""Several processes, by torch.distributed's gloo: the bytes of one process, and one that fails ends all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

import awd_fast
from awd_fast import journal
from awd_fast.blocks import cut
from awd_fast.plan import StateDict, make_plan
from awd_fast.ranks import Ranks
from awd_fast.recipe import make_recipe
from tests.conftest import tuned
from tests.kinds import OPTIONS
from tests.test_resume import NUMBERS, contents, inputs, make_inputs  # noqa: F401

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
ALL_KINDS = """
import json, os, signal, sys
import awd_fast
from awd_fast.ranks import joined
from tests.small_blocks import arrange
from tests.kinds import OPTIONS

base, models, out = json.loads(sys.argv[1])
arrange({"numbers": 200})
started = []
for rank in range(int(os.environ["WORLD_SIZE"])):  # what they share is only what all have imported
    started.append(os.fork())
    if started[-1] == 0:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        signal.alarm(100)
        break
else:
    sys.exit(int(any(os.waitpid(process, 0)[1] for process in started)))
with joined():
    for index, options in enumerate(OPTIONS.values()):
        report = awd_fast.merge_checkpoints(base, models, f"{out}-{index}", **options)
        assert len(report.tensors) == 6
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def team(count: int) -> dict[str, str]:
    """The environment of so many processes."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return os.environ | meeting | {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}


def start(count: int, command: list[str]) -> list[subprocess.Popen[str]]:
    """The processes, as whoever starts them on several machines would: without anything that watches over them."""
    shared = team(count)
    return [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def merging(base: Path, models: list[Path], out: Path, arranged: dict, *options: str) -> list[str]:
    command = [sys.executable, "-m", "tests.small_blocks", json.dumps({"numbers": NUMBERS} | arranged), "merge"]
    return [*command, "--base", str(base), *(f"--model={model}" for model in models), "--out", str(out), *options]


@pytest.mark.parametrize("count", [2, 4])  # three are killed and stopped below
def test_processes_together_write_the_bytes_of_one(tmp_path, inputs, count):  # noqa: F811
    base, models = inputs
    given = json.dumps([str(base), [str(model) for model in models], str(tmp_path / "out")])
    done = subprocess.run([sys.executable, "-c", ALL_KINDS, given], env=team(count), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for index, (kind, options) in enumerate(OPTIONS.items()):
        awd_fast.merge_checkpoints(base, models, tmp_path / f"one-{index}", **options)
        assert contents(tmp_path / f"out-{index}") == contents(tmp_path / f"one-{index}"), kind


def test_torchrun_merges_and_only_the_first_process_speaks(tmp_path):
    base, models = make_inputs(tmp_path)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "awd_fast", "merge", "--base", str(base), *(f"--model={model}" for model in models)]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("merged 2 models into") == 1
    awd_fast.merge_checkpoints(base, models, tmp_path / "one")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_is_killed_ends_all_soon_and_what_is_done_is_kept(tmp_path, inputs, victim):  # noqa: F811
    base, models = inputs
    out = tmp_path / "out"
    processes = start(3, merging(base, models, out, {"pause": 0.3, "silence": 2}))
    kept = tmp_path / ".out.awd-fast"
    while not (kept.exists() and len({r.tensor for r in journal.records(kept)}) > 1):
        assert processes[victim].poll() is None, processes[victim].communicate()[1]
        time.sleep(0.05)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for index, process in enumerate(processes):
        error = process.communicate(timeout=60)[1]
        if index != victim:
            assert process.returncode == 1
            why = rf"process {victim} has given no sign of life|the process that the others meet at is gone"
            assert re.search(f"awd-fast: stopped, because ({why}).*--resume goes on", error), error
    assert time.monotonic() - killed < 30
    assert not out.exists()
    for process in start(2, merging(base, models, out, {}, "--resume")):  # as many as there are now
        assert process.wait(timeout=60) == 0
    awd_fast.merge_checkpoints(base, models, tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_an_error_in_one_process_ends_all_with_its_words(tmp_path):
    base, models = make_inputs(tmp_path)
    file = models[0] / "model.safetensors"
    state = load_file(file)
    state["embed.weight"][-1, -1] = torch.nan
    save_file(state, file)
    processes = start(3, merging(base, models, tmp_path / "out", {"pause": 0.02, "silence": 2}))
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert all("'embed.weight' holds 1 NaN or Inf values" in error for error in errors), "\n".join(errors)
    assert sum("awd-fast: stopped, because process" in error for error in errors) == 2
    assert not any("--resume" in error for error in errors), "it would meet the same"
    assert {process.returncode for process in processes} == {1, 2}
    assert not (tmp_path / "out").exists()


def test_processes_take_the_gpus_of_their_machine_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one = Ranks()
    assert one.device("cuda") == "cuda"
    one.rank, one.count = 7, 8
    assert [one.device(name) for name in ("cpu", "cuda:1", "cuda")] == ["cpu", "cuda:1", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert one.device("cuda") == "cuda:0"


def test_blocks_are_shared_evenly_and_in_order():
    g = torch.Generator().manual_seed(0)
    base = {f"{i}.weight": torch.randn(40 + i, 60, generator=g) for i in range(20)}
    recipe = make_recipe(1)
    plan = make_plan(StateDict("base", base), [StateDict("m", tuned(base, 0))], recipe)
    blocks = cut(plan, recipe)
    total = sum(block.count for block in blocks)
    for count in (1, 2, 3, 7, 50):
        shares = []
        for rank in range(count):
            one = Ranks()
            one.rank, one.count = rank, count
            shares.append(one.share(blocks, lambda step: True))
        assert [block for share in shares for block in share] == blocks
        largest = max(block.count for block in blocks)
        assert all(sum(block.count for block in share) <= total / count + largest for share in shares)
