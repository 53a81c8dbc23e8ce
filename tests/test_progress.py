"""Progress for people and machines: bytes that add up, and an end that is told."""

import json

import pytest
import torch

import awd_fast
from awd_fast import blocks, progress
from awd_fast.pipeline import inspect_checkpoints
from tests.kinds import OPTIONS
from tests.test_cli import run
from tests.test_resume import inputs, stop_after  # noqa: F401


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_log_counts_every_byte_that_is_read(tmp_path, inputs, options, monkeypatch):  # noqa: F811
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    base, models = inputs
    awd_fast.merge_checkpoints(base, models, tmp_path / "out", json_log=tmp_path / "log", **options)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in (lines[0], lines[-1])] == ["begin", "done"]
    assert {line["event"] for line in lines[1:-1]} == {"progress"}
    assert lines[-1]["bytes_read"] == lines[-1]["bytes_total"] == lines[0]["bytes_total"] > 0
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < written - lines[-1]["bytes_written"] < 2000  # headers
    read = [line["bytes_read"] for line in lines]
    assert read == sorted(read)
    assert lines[-2]["tensor"]
    assert lines[-1]["seconds_left"] == 0
    assert lines[-1]["bytes_per_second"] > 0


def test_a_second_read_is_counted_where_the_memory_asks_for_it(tmp_path, inputs):  # noqa: F811
    base, models = inputs
    totals = []
    for memory in (1.0, 1e-6):
        log = tmp_path / f"log{memory}"
        awd_fast.merge_checkpoints(
            base, models, tmp_path / f"out{memory}", groups="tensor", memory=memory, json_log=log
        )
        last = json.loads(log.read_text().splitlines()[-1])
        assert last["bytes_read"] == last["bytes_total"]
        totals.append(last["bytes_total"])
    assert totals[1] > 1.5 * totals[0]


@pytest.mark.parametrize("memory", [1.0, 2e-4])
@pytest.mark.parametrize("kind", [kind for kind, options in OPTIONS.items() if "method" not in options])
def test_an_inspection_counts_what_it_reads_which_is_all_once(tmp_path, inputs, kind, memory):  # noqa: F811
    memory = memory if "adam" in kind or memory == 1.0 else 1e-5
    inspect_checkpoints(*inputs, memory=memory, json_log=tmp_path / "log", **OPTIONS[kind])
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert last["bytes_read"] == last["bytes_total"] > 0


def test_a_merge_that_fails_or_goes_on_says_so(tmp_path, inputs, monkeypatch):  # noqa: F811
    base, models = inputs
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            awd_fast.merge_checkpoints(base, models, tmp_path / "out", json_log=tmp_path / "a")
    failed = json.loads((tmp_path / "a").read_text().splitlines()[-1])
    assert (failed["event"], failed["error"]) == ("failed", "stopped")
    awd_fast.merge_checkpoints(base, models, tmp_path / "out", resume=True, json_log=tmp_path / "b")
    last = json.loads((tmp_path / "b").read_text().splitlines()[-1])
    assert last["bytes_read"] == last["bytes_total"] < failed["bytes_total"]


def test_the_command_line_logs_to_a_file_or_to_standard_output(tmp_path, checkpoints):
    base, models = checkpoints
    sources = ["--base", base, *(f"--model={model}" for model in models)]
    code, output, _ = run("merge", *sources, "--out", tmp_path / "out", "--json-log", "-")
    assert code == 0
    assert json.loads(output.splitlines()[0])["what"] == "merging"
    code, output, _ = run("inspect", *sources, "--json-log", tmp_path / "log")
    assert code == 0
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["event"] == "done"
    code, _, error = run("merge", *sources, "--out", tmp_path / "out2", "--json-log", tmp_path / "no" / "log")
    assert code == 2
    assert "the log" in error
    assert not (tmp_path / "out2").exists()


def test_a_bar_counts_bytes(capsys, monkeypatch):
    shown = progress.Shown(True)
    with shown:
        shown.begin("merging", 1000)
        shown.read(400, "a.weight")
        shown._bar.refresh()
    error = capsys.readouterr().err
    assert "merging" in error
    assert "400/1.00k" in error


def test_blocks_cover_a_tensor_without_cutting_a_group(monkeypatch):
    from awd_fast.plan import Step, TensorInfo
    from awd_fast.recipe import make_recipe

    monkeypatch.setattr(blocks, "NUMBERS", 64)
    shapes = [(), (1,), (5,), (100,), (3, 7), (40, 3), (2, 90), (0, 4), (4, 0), (3, 4, 5), (16, 1)]
    for groups in ("row", "column", "tensor", "global"):
        recipe = make_recipe(3, groups=groups)
        for shape in shapes:
            for action in ("awd", "task_arithmetic"):
                step = Step("w", action, "", TensorInfo(shape, torch.float32), torch.float32)
                found = blocks.blocks_of(step, recipe)
                assert found[0].begin == 0
                assert found[-1].end == step.info.count
                assert [block.begin for block in found[1:]] == [block.end for block in found[:-1]]
                width = blocks.matrix(step)[1]
                for block in found:
                    assert block.count == block.shape[0] * block.shape[1]
                    whole_rows = block.shape[1] == width and block.begin % max(width, 1) == 0
                    assert whole_rows or not blocks.by_rows(step, recipe)
                    assert block.count <= 16 or block.shape[0] == 1
