"""The suite for a GPU and its benchmark, without one: stages, processes, verdicts of their output, results, targets."""

import csv
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from awd_fast import bench, measure
from awd_fast.measure import Case, Result
from awd_fast.ops import native
from benchmarks import gpu, gpu_jobs, gpu_shard, gpu_suite, harness
from benchmarks.gpu_jobs import Job, Outcome
from tests import emulated, small_gpu_calls


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_one_sentence_and_2(no_gpu, tmp_path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    assert gpu.main(["--results", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [gpu_suite.NO_GPU, gpu.NO_GPU]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("main", "wrong", "said"),
    [
        (gpu_suite.main, ["--stages=build,rest"], "--stages is build,rest; expected some of build, tests"),
        (gpu_suite.main, ["--jobs=0"], "--jobs is at least 1"),
        (gpu_suite.main, ["--seconds=0"], "--seconds more than 0"),
        (gpu.main, ["--sections=cuda,rest"], "--sections is cuda,rest; expected some of cuda, triton"),
        (gpu.main, ["--rounds=0"], "--rounds is at least 1"),
    ],
)
def test_wrong_arguments_are_named(main, wrong, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_stages_fit_into_nine_minutes():
    beside = max(gpu_suite.STAGES["tests"], gpu_suite.STAGES["sanitizer"])
    assert gpu_suite.STAGES["build"] + beside + gpu_suite.STAGES["benchmark"] <= gpu_suite.options([]).seconds <= 540


KNOWN = {"instruction set": "sm_90", "device": "NVIDIA H200"}


def planned(stage: str, tmp_path: Path, *arguments: str) -> list[Job]:
    chosen = gpu_suite.options(["--out", str(tmp_path), "--jobs=16", *arguments])
    return [job for chain in gpu_suite.plan(stage, chosen, KNOWN, tmp_path) for job in chain]


def test_the_build_is_of_this_gpu_alone(tmp_path):
    extension, registers, emulation, triton = planned("build", tmp_path)
    assert triton.command[1:] == ("-m", "tests.small_gpu_calls", "triton")
    assert extension.command[1:] == ("setup.py", "build_ext", "--inplace")
    assert extension.settings["AWD_FAST_CUDA_ARCHS"] == "90"
    assert extension.settings["AWD_FAST_CUDA"] == extension.settings["AWD_FAST_BUILD"] == "require"
    assert extension.settings["AWD_FAST_JOBS"] == emulation.settings["AWD_FAST_JOBS"] == "16"
    assert registers.command[1:] == ("-m", "benchmarks.gpu_jobs", "registers")


def test_every_test_file_is_run(tmp_path):
    jobs = planned("tests", tmp_path)
    files = {job.command[3] for job in jobs}
    assert files == {f"tests/{file.name}" for file in (harness.ROOT / "tests").glob("test_*.py")}
    more = sum(gpu_suite.SHARDS.values()) - len(gpu_suite.SHARDS)
    assert len({job.report for job in jobs}) == len({job.name for job in jobs}) == len(jobs) == len(files) + more
    assert all(job.strict and not any(tmp_path in Path(str(w)).parents for w in job.command[:4]) for job in jobs)
    shards = [job.settings["AWD_FAST_SHARD"] for job in jobs if job.command[3] == "tests/test_cuda.py"]
    assert shards == ["0/4", "1/4", "2/4", "3/4"]
    assert {job.name for job in planned("tests", tmp_path, "--rehearse")} == set(gpu_suite.REHEARSED_TESTS)


def test_shards_share_all_tests(tmp_path, monkeypatch):
    seen = []
    hook = SimpleNamespace(pytest_deselected=lambda items: seen.append(len(items)))
    every: list[str] = []
    for index in range(3):
        items = [f"test {number}" for number in range(8)]
        monkeypatch.setenv("AWD_FAST_SHARD", f"{index}/3")
        gpu_shard.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        every += items
    assert sorted(every) == [f"test {number}" for number in range(8)]
    assert seen == [5, 5, 6]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "benchmarks.gpu_shard",
        "--collect-only",
        "tests/test_structure.py",
    ]
    monkeypatch.setenv("AWD_FAST_SHARD", "0/2")
    done = gpu_jobs.subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    assert "deselected" in done.stdout, done.stdout


def test_every_tool_sees_both_backends(tmp_path):
    jobs = planned("sanitizer", tmp_path)
    expected = [
        f"{tool} {backend}" for backend in ("cuda", "triton") for tool in ("memcheck", "racecheck", "initcheck")
    ]
    assert [job.name for job in jobs] == expected
    for job in jobs:
        assert job.command[1:3] == ("--tool", job.name.split()[0])
        assert job.command[-3:] == ("-m", "tests.small_gpu_calls", job.name.split()[1])
        assert job.settings == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_every_section_is_measured(tmp_path):
    jobs = planned("benchmark", tmp_path)
    assert [job.name for job in jobs] == list(gpu.SECTIONS)
    assert all("--rehearse" not in job.command and job.command[-1] == job.name for job in jobs)
    for job in jobs:
        chosen = gpu.options(job.command[3:])
        assert (chosen.sections, chosen.add, chosen.results) == ([job.name], True, tmp_path)


def python(code: str, **options: object) -> Job:
    return Job("build", "any", (sys.executable, "-c", code), **options)


def test_processes_are_judged_and_logged(tmp_path):
    chains = [
        [python("print('fine')"), python("import sys; print('so it', 'is broken'); sys.exit(3)")],
        [python("import os; print(os.environ['WORD'])", settings={"WORD": "told"})],
        [Job("build", "missing", ("/no/such/program",))],
    ]
    outcomes = list(gpu_jobs.run(chains, time.monotonic() + 60.0, 2, tmp_path))
    found = {(outcome.status, outcome.detail) for outcome in outcomes}
    assert ("failed", "exit code 3; so it is broken") in found
    assert ("cannot run", "/no/such/program does not start: No such file or directory") in found
    assert [outcome.status for outcome in outcomes].count("passed") == 2
    log = (tmp_path / "build.log").read_text()
    assert "fine" in log
    assert "told" in log
    assert "2" in gpu_jobs.table(outcomes).splitlines()[-1]


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path):
    number = tmp_path / "pid"
    script = f"sleep 60 & echo $! > '{number}'; echo began; wait"
    slow = Job("build", "any", ("/bin/sh", "-c", script))
    late, never = gpu_jobs.run_chain([slow, python("print(1)")], time.monotonic() + 2.0, tmp_path)
    assert (late.status, late.detail) == ("out of time", "began")
    assert (never.status, never.detail) == ("out of time", "there was no time left to begin it")
    stat = Path("/proc", number.read_text().strip(), "stat")

    def ended() -> bool:
        return not stat.exists() or stat.read_text().split()[2] == "Z"  # nobody may have asked yet what became of it

    deadline = time.monotonic() + 5.0  # a signal takes its time to reach a process that does not run
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended()


def test_reports_of_tests_and_of_the_sanitizer_are_read(tmp_path):
    file = tmp_path / "report.xml"
    text = '<testsuite><testcase name="a"/><testcase name="b"><error message="no"/></testcase></testsuite>'
    tests = replace(python(f"open({str(file)!r}, 'w').write({text!r})"), report=file)
    checked = replace(python(f"print({OURS!r}); raise SystemExit(99)"), stage="sanitizer")
    found = gpu_jobs.run_chain([tests, checked], time.monotonic() + 60.0, tmp_path)
    assert [outcome.status for outcome in found] == ["failed", "failed"]
    assert found[0].detail == "1 failed: b; 1 passed"
    assert "Invalid __global__ write" in found[1].detail
    assert "Invalid __global__ write" in (tmp_path / "sanitizer.log").read_text()


def report(*cases: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")


def test_tests_that_were_skipped_needlessly_are_a_failure():
    right = '<testcase name="a"/>'
    wrong = '<testcase name="b"><failure message="no"/></testcase>'
    fair = '<testcase name="c"><skipped type="pytest.skip" message="there is a CUDA device"/></testcase>'
    needless = '<testcase name="d"><skipped type="pytest.skip" message="needs a CUDA device"/></testcase>'
    assert gpu_jobs.tested(0, report(right, right, fair), True) == (
        "passed",
        "2 passed; 1 skipped (there is a CUDA device)",
    )
    assert gpu_jobs.tested(1, report(right, wrong), True) == ("failed", "1 failed: b; 1 passed")
    assert gpu_jobs.tested(0, report(right, needless), False)[0] == "passed"
    status, detail = gpu_jobs.tested(0, report(right, needless), True)
    assert status == "failed"
    assert "1 skipped (needs a CUDA device); skipped, though there is a GPU" in detail
    assert gpu_jobs.tested(5, report(), True)[0] == "passed"
    assert gpu_jobs.tested(2, report(right), True)[0] == "failed"


OURS = """========= COMPUTE-SANITIZER
cuda: [3, 5], 2 models at float32
========= Invalid __global__ write of size 4 bytes
=========     at void awd::cuda::(anonymous namespace)::combine_rows<(awd::Dtype)0>(Table)+0x90 in combine.cu:40
=========     by thread (32,0,0) in block (0,0,0)
=========     Address 0x7f0 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""
PYTORCHS = OURS.replace("awd::", "at::native::").replace("combine.cu", "reduce.cuh")
HAZARD = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at gram_kernel+0x90 in /a/awd_fast/ops/triton_gram.py:40
=========     and Read access at gram_kernel+0xa0 in /a/awd_fast/ops/triton_gram.py:44 [8 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_only_errors_in_our_kernels_are_red():
    clean = "========= COMPUTE-SANITIZER\nnumbers above 0.5: 7\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_jobs.sanitized(0, clean) == ("passed", "")
    status, detail = gpu_jobs.sanitized(99, OURS)
    assert status == "failed"
    assert detail.startswith("1 errors, the first: Invalid __global__ write of size 4 bytes at void awd::cuda")
    assert gpu_jobs.sanitized(99, HAZARD)[0] == "failed"
    assert gpu_jobs.sanitized(99, PYTORCHS) == ("passed", "1 errors in kernels that are not ours")
    assert gpu_jobs.sanitized(1, clean) == ("failed", "exit code 1; ========= ERROR SUMMARY: 0 errors")
    assert gpu_jobs.sanitized(99, "a format nobody knows")[0] == "failed"
    assert gpu_jobs.sanitized(255, "Error: Device not supported")[0] == "cannot run"


def test_registers_are_read_from_the_newest_build(tmp_path):
    assert gpu_jobs.registers(tmp_path) == "no reports of ptxas"
    folder = tmp_path / "cuda-123"
    folder.mkdir()
    text = "ptxas info : Compiling entry function '_Z4gram' for 'sm_90'\n 0 bytes stack frame, 8 bytes spill stores\n"
    (folder / "gram.ptxas.txt").write_text(text + "ptxas info : Used 96 registers, used 1 barriers\n")
    assert gpu_jobs.registers(tmp_path).split() == ["96", "registers", "8", "bytes", "spilled", "_Z4gram"]


def test_the_processes_have_one_command_of_their_own(capfd):
    command = [sys.executable, "-m", "benchmarks.gpu_jobs"]
    assert gpu_jobs.subprocess.run([*command, "registers"], cwd=harness.ROOT).returncode == 0
    assert gpu_jobs.subprocess.run(command, cwd=harness.ROOT).returncode == 1
    assert "registers" in capfd.readouterr().err


def test_pytest_does_without_pytest_benchmark(monkeypatch):
    assert gpu_jobs.benchmark_options() == []
    monkeypatch.setattr(gpu_jobs.importlib.util, "find_spec", lambda name: None)
    assert gpu_jobs.benchmark_options() == ["-o", "addopts=-q --strict-markers"]


def test_a_rehearsal_runs_all_stages(tmp_path, monkeypatch, capsys):
    """With processes that only say who they are, but for the benchmark, which has its own tests."""
    began = []

    def run_job(job, deadline, out):
        began.append(job)
        if job.stage == "benchmark":
            record = harness.results_file(out, gpu.facts("cpu")["device"]).with_suffix(".json")
            record.write_text(json.dumps({"facts": {}, "sections": {}, "rehearsal": True}))
        return Outcome(job.stage, job.name, status.get(job.stage, "passed"), 1.0, "so it is")

    status: dict[str, str] = {}
    monkeypatch.setattr(gpu_jobs, "run_job", run_job)
    monkeypatch.delenv("AWD_FAST_COMMIT", raising=False)
    monkeypatch.setenv("AWD_FAST_COMMIT", "")
    assert gpu_suite.main(["--rehearse", "--out", str(tmp_path), "--commit", "abc1234"]) == 0
    assert [job.stage for job in began] == ["build", "tests", "tests", "sanitizer", *["benchmark"] * 3]
    told = json.loads((tmp_path / "suite.json").read_text())
    assert {"device", "driver", "torch", "triton", "CUDA", "commit", "python"} <= set(told["facts"])
    assert [stage["status"] for stage in told["stages"]] == ["passed"] * 7
    said = capsys.readouterr().out
    assert said.count(gpu_suite.REHEARSAL) == 2
    assert "PASSED in" in said
    status["sanitizer"] = "cannot run"
    assert gpu_suite.main(["--rehearse", "--out", str(tmp_path), "--stages=sanitizer,build"]) == 1
    assert "CANNOT RUN sanitizer calls alone: so it is" in capsys.readouterr().out


def test_the_suite_on_a_gpu(tmp_path, monkeypatch, capsys):
    """With stand-ins for the processes and the GPU: every stage is begun, and results are kept."""
    began = []

    def run_job(job, deadline, out):
        began.append(job.stage)
        record = out / "nvidia-h200.json"
        record.write_text(json.dumps({"facts": {}, "sections": {}, "rehearsal": False}))
        record.with_suffix(".csv").write_text("a,b\n1,2\n")
        return Outcome(job.stage, job.name, "passed", deadline - time.monotonic())

    monkeypatch.setattr(gpu_jobs, "run_job", run_job)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda device: dict(KNOWN))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 0
    assert set(began) == set(gpu_suite.STAGES)
    assert (tmp_path / "nvidia-h200.csv").exists()
    assert (tmp_path / "nvidia-h200.json").exists()
    said = capsys.readouterr().out
    assert "REHEARSAL" not in said
    assert "streaming Adam" in said
    stages = json.loads((tmp_path / "out" / "suite.json").read_text())["stages"]
    # All time that is left over goes to the stages behind.
    limits = [max(one["seconds"] for one in stages if one["stage"] == name) for name in gpu_suite.STAGES]
    assert limits == pytest.approx([170.0, 360.0, 360.0, 520.0], abs=20.0)


def test_results_are_kept_below_one_header(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.RESULTS.mkdir()
    record = tmp_path / "nvidia-h200.json"
    record.write_text("{}")
    record.with_suffix(".csv").write_text("a,b\n1,2\n")
    gpu_suite.keep(record)
    gpu_suite.keep(record)
    assert (harness.RESULTS / "nvidia-h200.csv").read_text() == "a,b\n1,2\n1,2\n"
    assert (harness.RESULTS / "nvidia-h200.json").read_text() == "{}"


def test_the_small_calls_run_in_the_emulation_too(capsys):
    if emulated.why_not() is not None:
        pytest.skip(str(emulated.why_not()))
    with emulated.running(emulated.load()):
        assert small_gpu_calls.main(["cuda", "--device", "cpu"]) == 0
    assert "numbers above 0.5" in capsys.readouterr().out


def test_the_small_calls_say_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(native, "unavailable", lambda: "it is not built")
    with pytest.raises(SystemExit) as ended:
        small_gpu_calls.main(["native"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "native cannot run here: it is not built\n"


def test_commit_of_a_copy_without_git(monkeypatch):
    monkeypatch.setattr(harness, "ROOT", Path("/"))
    monkeypatch.setenv("AWD_FAST_COMMIT", "abc1234")
    assert harness.commit() == "abc1234"
    monkeypatch.delenv("AWD_FAST_COMMIT")
    assert harness.commit() == "unknown"


def test_rows_have_the_versions_too(tmp_path):
    case = Case(operation="combine", backend="cuda", run=lambda: None, check=lambda: None, moved=8e9, tasks=8)
    rows = harness.rows([Result(case, (0.5, 0.25))], "tiny", gpu.facts("cpu") | {"driver": "580.1"})
    harness.append(tmp_path / "a.csv", rows, (*harness.COLUMNS, *gpu.MORE_COLUMNS))
    with (tmp_path / "a.csv").open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert (row["operation"], row["driver"], row["median_s"]) == ("combine", "580.1", "0.375")
    assert set(row) == {*harness.COLUMNS, *gpu.MORE_COLUMNS}
    assert math.isnan(measure.memory_limit([]))
    assert bench.synthetic([(2, 3)], 1, 2).bases[0].device.type == "cpu"
