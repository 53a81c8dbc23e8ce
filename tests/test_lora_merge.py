"""Adapters as inputs of a merge: the result is that of their task vectors, multiplied out in float64."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import awd_fast
from awd_fast import InputError, blocks, lowrank, pipeline
from awd_fast.ranks import Ranks
from awd_fast.shards import Shards
from tests.adapter_folders import linear, random, write_adapter_folder
from tests.conftest import write_checkpoint
from tests.lora_cases import (
    CASES,
    HEAD,
    HEAD_BIAS,
    NORM,
    SGD,
    SPANS,
    O,
    Q,
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


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_merge_of_the_task_vectors(tmp_path, three, name, monkeypatch):
    base, folder, adapters, models = three
    if name in SPANS:  # then no task vector may be made

        def refuse(*args):
            raise AssertionError("a task vector was made")

        monkeypatch.setattr(lowrank, "delta", refuse)
    report = awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", **CASES[name])
    expected = wanted(base, models, **CASES[name])
    require_close(load(tmp_path / "out"), expected)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(
        p.name for p in folder.glob("*.safetensors")
    )
    steps = {each.step.name: each.step for each in report.tensors}
    for kept in (O, NORM, "model.position_ids"):
        assert (steps[kept].action, steps[kept].reason) == ("base", "no adapter changes it")
        assert torch.equal(load(tmp_path / "out")[kept], base[kept])
    if report.overall is not None:
        said: list[awd_fast.MergeReport] = []
        names = [each.step.name for each in report.tensors if each.step.action == "awd"]
        awd_fast.merge(
            {n: base[n].double() for n in names},
            [{n: model[n] for n in names} for model in models],
            on_report=said.append,
            **(CASES[name] | {"include": "*", "exclude": ()}),
        )
        assert report.similarity_before == pytest.approx(said[0].similarity_before, abs=1e-6)
        assert report.similarity_after == pytest.approx(said[0].similarity_after, abs=1e-5)
        assert report.update_cosine == pytest.approx(said[0].update_cosine, abs=1e-5, nan_ok=True)
        seen = pipeline.inspect_checkpoints(folder, adapters, **CASES[name])
        assert seen.similarity_after == pytest.approx(report.similarity_after, rel=1e-12)
        assert seen.adapters == ("LoRA adapter of rank 4", "LoRA adapter of rank 2", "LoRA adapter of rank 3 to 5")


@pytest.mark.parametrize("name", ["rows", "columns", "global", "arithmetic", "rows adam"])
@pytest.mark.parametrize("dtypes", [("bfloat16", None), ("float32", "bfloat16"), ("float16", "float32")])
def test_other_dtypes(tmp_path, name, dtypes):
    stored, written = dtypes
    base = base_state(getattr(torch, stored))
    folder, adapters, models = folders(tmp_path, base)
    awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", dtype=written, **CASES[name])
    expected = wanted(base, models, **CASES[name])
    require_close(load(tmp_path / "out"), expected, getattr(torch, written or stored))


def test_float8_and_float64_bases(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float64):
        base = base_state()
        base[Q] = base[Q].to(dtype)
        folder, adapters, models = folders(tmp_path / str(dtype), base | {HEAD: base[HEAD], HEAD_BIAS: base[HEAD_BIAS]})
        for adapter in adapters:  # heads as the base's
            stored = load_file(adapter / "adapter_model.safetensors")
            save_file({n: t.float() for n, t in stored.items()}, adapter / "adapter_model.safetensors")
        models = [model | {n: model[n].float().double() for n in (HEAD, HEAD_BIAS)} for model in models]
        out = tmp_path / str(dtype) / "out"
        awd_fast.merge_checkpoints(folder, adapters, out, scale=0.5, method="task_arithmetic")
        found = load(out)[Q]
        expected = wanted(base, models, scale=0.5, method="task_arithmetic")[Q]
        assert found.dtype == dtype
        bound = 1e-13 if dtype == torch.float64 else 0.07 * expected.abs() + 2**-9
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", [*CASES])
@pytest.mark.parametrize("numbers", [4, 40, 100])
def test_blocks_of_any_size(tmp_path, three, monkeypatch, name, numbers):
    """Some rows each, or pieces that hold parts of several rows."""
    base, folder, adapters, models = three
    monkeypatch.setattr(blocks, "NUMBERS", numbers)
    awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", **CASES[name])
    require_close(load(tmp_path / "out"), wanted(base, models, **CASES[name]))
    awd_fast.merge_checkpoints(folder, adapters, tmp_path / "small", memory=1e-6 * numbers, **CASES[name])
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == (tmp_path / "small" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["rows", "tensors", "global", "arithmetic"])
def test_every_byte_that_is_read_is_counted(tmp_path, three, monkeypatch, name):
    base, folder, adapters, _ = three
    monkeypatch.setattr(blocks, "NUMBERS", 60)
    log = tmp_path / "log"
    options = CASES[name] | {"others": "base", "exclude": "*classifier*"}
    awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", json_log=log, **options)
    last = json.loads(log.read_text().splitlines()[-1])
    stored = sum(tensor.numel() * tensor.itemsize for tensor in base.values())
    assert last["bytes_read"] == last["bytes_total"]
    if name != "arithmetic":  # which ends with the heads that are stored whole
        assert last["bytes_read"] == stored
    pipeline.inspect_checkpoints(folder, adapters, json_log=log, **(options | {"method": "awd"}))
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["bytes_read"] == last["bytes_total"] == 0


@pytest.mark.parametrize("groups", ["row", "column", "tensor", "global"])
def test_any_number_of_threads_gives_the_same_bits(tmp_path, groups):
    """Of a size at which a BLAS shares out the sums of Gram matrices."""
    base = write_checkpoint(tmp_path / "base", {"q.weight": random(40, 4096, seed=1)})
    adapters = [
        write_adapter_folder(tmp_path / str(seed), linear("q", 16, 4096, 40, seed=seed), r=16) for seed in (1, 2)
    ]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        options = {"optimizer": SGD, "groups": groups}
        awd_fast.merge_checkpoints(base, adapters, tmp_path / f"out{threads}", **options)
        assert torch.get_num_threads() == threads
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_groups_are_solved_some_at_a_time(tmp_path, three, monkeypatch):
    base, folder, adapters, models = three
    monkeypatch.setattr("awd_fast.lora_merger.GRAM_NUMBERS", 20)
    for name in ("rows", "columns"):
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / name, **CASES[name])
        require_close(load(tmp_path / name), wanted(base, models, **CASES[name]))


class Part(Ranks):
    """One of three processes, of which each computes what no other sends it."""

    count = 3

    def __init__(self, rank: int) -> None:
        self.rank = rank


@pytest.mark.parametrize("name", ["rows", "columns", "tensors", "global", "rows adam"])
def test_processes_need_nothing_of_each_other(tmp_path, three, monkeypatch, name):
    from awd_fast.merging import make_merger
    from awd_fast.recipe import make_recipe

    _, folder, adapters, _ = three
    monkeypatch.setattr(blocks, "NUMBERS", 64)
    options = CASES[name] | {"others": "base"} | ({"exclude": ("*classifier*",)} if name == "global" else {})
    recipe = make_recipe(3, **options)
    base, models, plan = pipeline.open_and_plan(folder, adapters, recipe)
    cut = [block for block in blocks.cut(plan, recipe) if not any(m.stores(block.step.name) for m in models)]

    def parts(ranks):
        merger = make_merger(base, models, recipe, None, ranks)
        mine = ranks.share(cut, merger.indivisible)
        merger.prepare(plan, mine)
        return [(result.block, result.tensor.clone()) for result in merger.results(mine)]

    alone = parts(Ranks())
    together = [part for rank in range(3) for part in parts(Part(rank))]
    assert [block for block, _ in together] == [block for block, _ in alone]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", ["rows", "columns", "global", "arithmetic"])
def test_a_merge_that_was_stopped_goes_on(tmp_path, three, monkeypatch, name):
    _, folder, adapters, _ = three
    monkeypatch.setattr(blocks, "NUMBERS", 100)
    options = {**CASES[name]}
    awd_fast.merge_checkpoints(folder, adapters, tmp_path / "whole", **options)
    write, count = Shards.write, 0

    def failing(self, *args):
        nonlocal count
        count += 1
        if count > 9:
            raise OSError("disk on fire")
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", failing)
        with pytest.raises(OSError, match="disk on fire"):
            awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", **options)
    config = adapters[0] / "adapter_config.json"
    before = config.read_text()
    config.write_text(before.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(InputError, match=r"is another one: models\[0\].adapter_config.json changed"):
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", resume=True, **options)
    config.write_text(before)
    awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_command_line_yaml_and_python_write_the_same_bytes(tmp_path, three):
    _, folder, adapters, _ = three
    sources = ["--base", folder, *(f"--model={path}" for path in adapters)]
    code, out, error = run("merge", *sources, "--out", tmp_path / "a", "--optimizer", "converge")
    assert (code, error) == (0, "")
    assert "merged 3 models" in out
    config = {
        "base_model": str(folder),
        "models": [str(path) for path in adapters],
        "parameters": {"optimizer": "converge"},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    assert run("merge", tmp_path / "config.yml", "--out", tmp_path / "b")[0] == 0
    awd_fast.merge_checkpoints(folder, adapters, tmp_path / "c", optimizer="converge")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"- LoRA adapter of rank 3 to 5: `{adapters[2]}`, weight 1" in card
    assert json.loads((tmp_path / "a" / "awd_fast.json").read_text())["adapters"][1] == "LoRA adapter of rank 2"


def test_dry_run_and_inspect(tmp_path, three):
    _, folder, adapters, _ = three
    sources = ["--base", folder, *(f"--model={path}" for path in adapters)]
    code, out, _ = run("merge", *sources, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows[O].endswith("no adapter changes it")
    assert "awd" in rows[Q]
    assert "task_arithmetic" in rows[HEAD]
    assert out.splitlines()[-1].startswith("2 files and an index")
    code, out, _ = run("merge", *sources, "--out", tmp_path / "out", "--dry-run", "--as-adapter")
    assert out.splitlines()[-1] == "1 adapter: 4 tensors by factors of rank 2 to 11, 2 tensors whole"
    assert not (tmp_path / "out").exists()
    code, out, _ = run("inspect", *sources, "--json-log", tmp_path / "log", "--json", tmp_path / "report.json")
    assert code == 0
    assert "all disentangled tensors" in out
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert last["bytes_read"] == last["bytes_total"]
