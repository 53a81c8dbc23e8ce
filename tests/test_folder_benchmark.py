"""The benchmark of whole folders: its models, its processes at a tiny scale, its verdicts; and what is on paper."""

import csv
import json
import math
import os
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import awd_fast
from awd_fast.checkpoints import Checkpoint
from awd_fast.errors import InputError
from benchmarks import folder_checks, folder_lora, folder_models, folder_results, folder_runs, folders, harness, scaling
from benchmarks.folder_results import Contestant, Line
from benchmarks.folder_runs import Run
from benchmarks.scaling import Job, Rates, Times, Weight
from benchmarks.targets import target_table

pytestmark = pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")

ROWS = awd_fast.ROWS | {"scale": folder_checks.SCALE}
"""What folders are timed with."""


def test_the_full_cases_have_their_sizes():
    small, large = folder_models.FULL["110m"].layout, folder_models.FULL["llm"].layout
    assert (len(small.shapes()), small.elements) == (110, 109_529_856)
    assert large.elements == 1_479_100_416
    files = folder_models.shards(large)
    sizes = [sum(math.prod(large.shapes()[name]) * 2 for name in names) for names in files.values()]
    assert len(files) == 4
    assert max(sizes) <= 1e9 < sizes[0] + 1e8
    assert folder_models.FULL["lora"].rank == 16


@pytest.mark.parametrize("name", ["110m", "llm"])
def test_models_load_and_are_the_base_and_noise(tmp_path, name):
    case = folder_models.case(name, "tiny")
    base, models = folder_models.make(case, tmp_path / "models")
    layout, source = case.layout, Checkpoint(base)
    assert source.sharded == (name == "llm")
    assert len(models) == 3
    for folder in (base, *models):
        assert folder_checks.wrong_folder(folder, layout) is None
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == layout.dtype
    states = [[Checkpoint(path).read(name).float().flatten() for name in layout.shapes()] for path in (base, *models)]
    flat = [torch.cat(state) for state in states]
    assert float(flat[0].std()) == pytest.approx(0.6, rel=0.05)
    noise = [model - flat[0] for model in flat[1:]]
    assert [float(one.std()) for one in noise] == pytest.approx([0.06] * 3, rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 0.05
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in base.iterdir()}
    folder_models.make(case, tmp_path / "models")
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in base.iterdir()} == before
    folder_models.make(replace(case, models=1), tmp_path / "models")
    assert not models[2].exists()
    assert {file: file.read_bytes() for file in base.iterdir()} == {file: old for file, (_, old) in before.items()}


def test_transformers_loads_a_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    case = folder_models.case("110m", "tiny")
    base, _ = folder_models.make(case, tmp_path / "models")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert model.num_parameters() == case.layout.elements


def test_full_models_of_adapters_are_base_and_product(tmp_path):
    case = folder_models.case("lora", "tiny")
    base, adapters = folder_models.make(case, tmp_path / "models")
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 8, 7)
    assert len(tensors) == 2 * 7 * case.layout.layers
    folder_lora.materialise(base, adapters[0], tmp_path / "full")
    assert folder_checks.wrong_folder(tmp_path / "full", case.layout) is None
    full, source = Checkpoint(tmp_path / "full"), Checkpoint(base)
    name = "model.layers.1.mlp.down_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    weight = source.read(f"{name}.weight")
    changed = folder_lora.changed(f"{name}.weight", weight, *folder_lora.factors(adapters[0]))
    torch.testing.assert_close(changed.double(), weight.double() + 2.0 * b @ a, rtol=0, atol=1e-6)
    assert torch.equal(full.read(f"{name}.weight"), changed.to(torch.bfloat16))
    assert float((b @ a).std()) == pytest.approx(0.03, rel=0.3)
    assert torch.equal(full.read("model.norm.weight"), source.read("model.norm.weight"))


def test_adapters_merge_as_their_full_models_do(tmp_path):
    case = folder_models.case("lora", "tiny")
    base, adapters = folder_models.make(case, tmp_path / "models")
    try:
        awd_fast.merge_checkpoints(base, adapters, tmp_path / "out", **ROWS)
    except InputError as error:
        if folder_results.ADAPTER not in str(error):
            raise
        pytest.skip("adapters are no inputs yet")
    read = folder_checks.from_adapters(base, adapters)
    assert folder_checks.wrong_folder(tmp_path / "out", case.layout) is None
    assert folder_checks.wrong_awd(tmp_path / "out", read, case.layout) is None


def wrong(case, base, models, out):
    read = folder_checks.from_folders(base, models)
    return folder_checks.wrong_folder(out, case.layout) or folder_checks.wrong_awd(out, read, case.layout)


def test_checks_let_right_outputs_pass_and_no_others(tmp_path):
    case = folder_models.case("110m", "tiny")
    base, models = folder_models.make(case, tmp_path / "models")
    names, read = list(case.layout.shapes()), folder_checks.from_folders(base, models)
    sums = {"method": "task_arithmetic", "scale": folder_checks.SCALE}
    awd_fast.merge_checkpoints(base, models, tmp_path / "awd", **ROWS)
    awd_fast.merge_checkpoints(base, models, tmp_path / "plain", **sums)
    assert wrong(case, base, models, tmp_path / "awd") is None
    assert folder_checks.wrong_sums(tmp_path / "plain", read, names) is None
    assert "from the merge in memory" in wrong(case, base, models, tmp_path / "plain")
    assert "the merge is wrong" in folder_checks.wrong_sums(tmp_path / "awd", read, names)
    name = "model.layers.0.self_attn.k_proj.weight"
    weight, others = read(name)
    right = awd_fast.merge({name: weight}, [{name: other} for other in others], **ROWS)[name]
    assert folder_checks.wrong_loss(right, weight, others) is None
    plain = awd_fast.merge({name: weight}, [{name: other} for other in others], **sums)[name]
    assert "the reference goes from" in folder_checks.wrong_loss(plain, weight, others)
    state = load_file(tmp_path / "awd" / "model.safetensors")
    for changes, message in (
        ({"model.norm.weight": torch.full((32,), math.nan)}, "not finite"),
        ({"model.norm.weight": torch.zeros(31)}, "expected float32 [32]"),
        ({"more": torch.zeros(1)}, "1 tensors are missing or unknown"),
    ):
        save_file(state | changes, tmp_path / "awd" / "model.safetensors")
        assert message in wrong(case, base, models, tmp_path / "awd")


def test_a_tiny_run_from_end_to_end(tmp_path, capsys):
    work, rows = tmp_path / "work", tmp_path / "rows.csv"
    arguments = ["--case=bert", "--scale=tiny", "--rounds=1", "--no-peers", f"--work={work}", f"--csv={rows}"]
    assert folders.main(arguments) == 0
    assert not work.exists()
    printed = capsys.readouterr().out
    assert "awd-fast, after imports" in printed
    with rows.open(newline="") as lines:
        found = {(row["operation"], row["backend"]): row for row in csv.DictReader(lines)}
    assert list(found) == [
        folder_results.BASELINE,
        folder_results.DISK,
        folder_results.START,
        folder_results.OURS,
        (folder_results.OURS[0], folder_results.OURS[1] + folder_results.WORK),
    ]
    row = found[folder_results.OURS]
    assert set(row) == set(harness.COLUMNS)
    assert (row["shape"], row["K"], row["rounds"]) == ("folder 110m tiny", "3", "1")
    if os.path.exists("/proc/self/status"):
        assert row["note"].startswith("peak ")
    size = folder_models.case("110m", "tiny").model_bytes
    assert 5 * size < int(row["bytes"]) < 6 * size


def test_too_little_disk_is_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folders, "space", lambda case, folder: 1e18)
    assert folders.main(["--scale=tiny", "--no-peers", f"--work={tmp_path / 'work'}"]) == 2
    assert "GB free; this case needs" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_a_process_is_timed_and_its_memory_is_seen():
    code = "import time; x = bytearray(50_000_000); time.sleep(0.2); print(1)"
    found = folder_runs.run([sys.executable, "-c", code])
    assert 0.2 < found.seconds < 20
    assert found.printed == "1\n"
    if os.path.exists("/proc/self/status"):
        assert 50e6 < found.anonymous <= found.peak < 200e6
    with pytest.raises(folder_runs.ProcessFailed, match="ValueError: no"):
        folder_runs.run([sys.executable, "-c", "raise ValueError('no')"])


def test_the_time_after_imports_comes_from_the_log(tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        assert command[-2] == "--json-log"
        with open(command[-1], "w") as file:
            file.write('{"event": "done", "seconds": 2.0}\n')
        return Run(5.0, peak=7.0)

    monkeypatch.setattr(folder_runs, "run", run)
    found = folder_runs.awd_fast(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", "awd", tmp_path / "log")
    assert (found.seconds, found.work, found.peak) == (5.0, 2.0, 7.0)
    assert len(commands) == 1
    assert f"--model={tmp_path / 'a'}" in commands[0]
    assert " --preset rows --scale 0.3 " in " ".join(commands[0])  # as the committed figures were measured


def test_the_log_ends_with_the_seconds():
    assert folder_runs.last_event('{"event": "tensor", "seconds": 1}\n{"event": "done", "seconds": 2.5}\n') == 2.5
    with pytest.raises(folder_runs.ProcessFailed, match="expected 'done'"):
        folder_runs.last_event('{"event": "tensor", "seconds": 1}')


def test_mergekits_configuration(tmp_path):
    plain = json.loads(folder_runs.mergekit_config(tmp_path, [tmp_path / "a"], "task_arithmetic", 0.3))
    assert plain["models"] == [{"model": str(tmp_path / "a"), "parameters": {"weight": 0.3}}]
    ties = json.loads(folder_runs.mergekit_config(tmp_path, [tmp_path / "a"], "ties", 0.3))
    assert ties["models"][0]["parameters"] == {"weight": 0.3, "density": 0.5}


def test_what_is_wrong_is_not_timed(tmp_path):
    calls = []

    def contestant(name, wrong=None, failure=None, most=0):
        def run(out):
            calls.append(name)
            out.mkdir()
            if failure:
                raise folder_runs.ProcessFailed(failure)
            return Run(float(len(calls)), 0.5)

        return Contestant(("merge", name), run, lambda out: wrong, moved=10.0, most=most)

    found = folder_results.measured(
        [
            contestant("right"),
            contestant("wrong", wrong="it is off"),
            contestant("once", most=1),
            contestant("wrong once", wrong="off as well", most=1),
            contestant("none", failure=f"x {folder_results.ADAPTER}"),
        ],
        2,
        tmp_path / "scratch",
        lambda line: None,
    )
    assert calls == ["right", "wrong", "none", "right", "once", "wrong once", "right"]
    assert [(line.key[1], line.seconds) for line in found] == [
        ("right", (4.0, 7.0)),
        ("right, after imports", (0.5, 0.5)),
        ("wrong", ()),
        ("once", (5.0,)),
        ("once, after imports", (0.5,)),
        ("wrong once", ()),
        ("none", ()),
    ]
    assert (found[2].wrong, found[5].wrong, found[6].wrong) == ("it is off", "off as well", None)
    assert "LoRA" in found[6].skipped
    assert not (tmp_path / "scratch").exists()


def made_up(**seconds):
    keys = {
        "copied": folder_results.BASELINE,
        "start": folder_results.START,
        "disk": folder_results.DISK,
        "ours": folder_results.OURS,
        "work": (folder_results.OURS[0], folder_results.OURS[1] + folder_results.WORK),
        "mergekit": folder_results.MERGEKIT,
        "ties": folder_results.TIES,
    }
    peaks = {"start": 0.25 * 2**30, "ours": 1.5 * 2**30}
    return [Line(keys[name], (value,) * 3, peaks.get(name, math.nan), moved=4e9) for name, value in seconds.items()]


def test_tables_and_verdicts_are_those_of_the_numbers():
    found = made_up(copied=2.0, disk=5.0, start=1.0, ours=4.0, work=3.0, mergekit=10.0, ties=200.0)
    small, large = folder_results.verdicts("110m", found), folder_results.verdicts("llm", found)
    assert [(target.value, target.verdict) for target in small] == [(1.5, "reached"), (2.5, "missed"), (50, "reached")]
    assert [(target.value, target.verdict) for target in large] == [
        (1.25, "reached"),
        (1.5, "reached"),
        (0.6, "reached"),
    ]
    assert [target.verdict for target in folder_results.verdicts("llm", [])] == ["not measured"] * 3
    assert folder_results.verdicts("lora", found) == []
    assert "missed" in target_table(small)
    skipped = Line(folder_results.FULL_MODELS, skipped="too large")
    row = next(line for line in folder_results.table([*found, skipped]).splitlines() if "ties" in line)
    assert row.split()[3:] == ["200.000", "100.00", "50.00", "0.02", "3"]
    assert "skipped: too large" in folder_results.table([skipped])


RATES = Rates(read=100.0, write=10.0, merge=4.0, gram=5.0, combine=10.0, cores=2, latency=1.0, network=8.0)
WEIGHTS = (Weight(4, 10), Weight(2, 10), Weight(2, 10, awd=False))


def test_a_merge_on_paper_as_by_hand():
    """K = 1, two bytes an element: a row of ten elements is 40 B to read and 20 B to write."""
    job = Job(WEIGHTS, models=1, nodes=2)
    disentangled, plain = Times(0.4, 10 / 4 / 2, 2.0), Times(0.4, 10 / 10 / 2, 2.0)
    assert scaling.row_times(job, RATES, WEIGHTS[0]) == disentangled
    assert scaling.row_times(job, RATES, WEIGHTS[2]) == plain
    half = Times(4 * 0.4, 3 * 1.25 + 0.5, 4 * 2.0)
    assert scaling.by_rows(job, RATES) == [half, half]
    first, second = scaling.by_tensors(job, RATES)
    assert (first, second) == (disentangled.times(4), disentangled.times(2) + plain.times(2))
    assert scaling.slowest([second, first]) == first
    assert (first.limit, first.overlapped, first.in_turn) == ("write", 8.0, pytest.approx(1.6 + 5.0 + 8.0))
    assert scaling.mean([first, second]).compute == pytest.approx(half.compute)
    assert scaling.largest_part(job, blocks=False) == 40 * 3 * 2
    assert scaling.largest_part(job, blocks=True) == 20 * 3 * 2


def test_reductions_and_passes_on_paper():
    tensor, whole = (Job(WEIGHTS, models=1, nodes=2, groups=groups) for groups in ("tensor", "global"))
    assert scaling.reduction(tensor, RATES, 1) == 2 * (1.0 + 8.0 / 8.0)
    assert [node.reduce for node in scaling.by_rows(tensor, RATES)] == [8.0, 8.0]  # two tensors, 4 s each
    assert [node.reduce for node in scaling.by_tensors(tensor, RATES)] == [0.0, 0.0]
    for assign in scaling.ASSIGNMENTS.values():
        assert [node.reduce for node in assign(whole, RATES)] == [4.0, 4.0]
    assert scaling.by_rows(whole, RATES)[0].read == pytest.approx(0.4 * (3 * 2 + 1))
    assert scaling.row_times(tensor, RATES, WEIGHTS[0]).compute == pytest.approx(10 / 2 * (1 / 5 + 1 / 10))
    limited = replace(RATES, storage=20.0, memory=6.0)
    assert scaling.row_times(tensor, limited, WEIGHTS[0]) == Times(4.0, 10.0, 2.0)


def test_the_paper_is_about_the_whole_model(capsys):
    assert sum(weight.elements for weight in scaling.LLAMA_405B) == 405_853_388_800
    assert len(scaling.LLAMA_405B) == 126 * 9 + 3
    rates = ["--read=2e9", "--write=1e9", "--merge=1e8", "--gram=2e8", "--combine=4e8", "--cores=64"]
    assert scaling.main([*rates, "--nodes=60"]) == 0
    printed = capsys.readouterr().out
    assert "405,853,388,800 elements" in printed
    assert "row     whole tensors" in printed
    assert "measured here" not in printed


def test_rates_are_measured_in_small(tmp_path):
    found = scaling.compute_rates(2, columns=64, rows=8) | scaling.file_rates(tmp_path, 1 << 20)
    assert set(found) == {"merge", "gram", "combine", "read", "write"}
    assert all(0 < rate < math.inf for rate in found.values())
    assert list(tmp_path.iterdir()) == []
