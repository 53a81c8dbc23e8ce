"""The command line: exit codes, one sentence per mistake, quick start, and what each command prints."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from awd_fast import cli


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `awd-fast ARGUMENTS`, in this process."""
    import contextlib
    import io

    out, error = io.StringIO(), io.StringIO()
    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    sys.argv = ["awd-fast", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = stopped.value.code
    return (0 if code is None else int(code)), out.getvalue(), error.getvalue()


def arguments(checkpoints: tuple[Path, list[Path]]) -> list[str]:
    base, models = checkpoints
    return ["--base", str(base), *(f"--model={model}" for model in models)]


def test_merge_says_what_it_did(tmp_path, checkpoints):
    code, out, error = run("merge", *arguments(checkpoints), "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    assert "merged 3 models" in out
    assert "2 by awd" in out
    assert "3 by task_arithmetic" in out
    assert "mean |cos| of 12 groups" in out


def test_dry_run_lists_every_tensor_and_writes_nothing(tmp_path, checkpoints, base_state):
    code, out, _ = run("merge", *arguments(checkpoints), "--out", tmp_path / "out", "--dry-run", "--dtype", "float16")
    assert code == 0
    assert not (tmp_path / "out").exists()
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert set(base_state) <= set(rows)
    assert "awd" in rows["encoder.layer.0.output.dense.weight"]
    assert "float16" in rows["encoder.layer.0.output.dense.weight"]
    assert "excluded by *embed*" in rows["embeddings.word_embeddings.weight"]
    assert "the same in all models" in rows["embeddings.position_ids"]
    (tmp_path / "out").mkdir()
    assert run("merge", *arguments(checkpoints), "--out", tmp_path / "out", "--dry-run")[0] == 2


def test_inspect_prints_writes_and_draws(tmp_path, checkpoints):
    picture, report = tmp_path / "p.png", tmp_path / "r.json"
    code, out, _ = run("inspect", *arguments(checkpoints), "--plot", picture, "--json", report, "--optimizer=converge")
    assert code == 0
    assert "encoder.layer.0.output.dense.weight" in out
    assert out.splitlines()[-2].startswith("all disentangled tensors")
    assert out.splitlines()[-1].startswith("mean |cos| of 12 groups (row)")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    data = json.loads(report.read_text())
    assert data["overall"]["similarity_after"] < data["overall"]["similarity_before"]
    assert len(data["overall"]["matrix_before"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model0", "model1", "model2", "p.png", "r.json"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_inspect_of_a_global_group_shows_each_tensors_part(tmp_path, checkpoints, optimizer):
    files = ("--plot", tmp_path / "p.png", "--json", tmp_path / "p.json")
    code, out, _ = run("inspect", *arguments(checkpoints), "--groups=global", "--optimizer", optimizer, *files)
    assert code == 0
    assert len(out.splitlines()) == 5
    tensors = json.loads((tmp_path / "p.json").read_text())["tensors"].values()
    assert [t["groups"] for t in tensors if "groups" in t] == [1, 1]
    assert all(t["loss_before"] is None for t in tensors if "groups" in t)


def test_info_names_version_backends_and_machine():
    code, out, _ = run("info")
    assert code == 0
    for part in ("awd-fast", "torch", "backend reference: ready", "backend native:", "threads:", "devices: cpu"):
        assert part in out


def test_options_overrule_a_configuration_file(tmp_path, checkpoints):
    base, models = checkpoints
    config = {"base_model": str(base), "models": [str(m) for m in models], "parameters": {"lambda": 0.9}}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    assert run("merge", tmp_path / "c.yml", "--out", tmp_path / "a", "--scale", "0.3")[0] == 0
    assert run("merge", *arguments(checkpoints), "--out", tmp_path / "b", "--scale", "0.3")[0] == 0
    for file in ("model.safetensors", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_every_option_reaches_the_recipe(tmp_path, checkpoints):
    out = tmp_path / "out"
    options = "--method awd --scale 0.7 --weight 1 --weight 2 --weight -1 --groups column --similarity squared "
    options += "--penalty squared_l2 --alpha 0.25 --eps 1e-7 --optimizer sgd --lr 0.001 --momentum 0.5 --nesterov "
    options += "--weight-decay 0.125 --iterations 7 --include * --exclude *embed* --others base --missing base"
    code, _, error = run("merge", *arguments(checkpoints), "--out", out, *options.split())
    assert (code, error) == (0, "")
    recipe = json.loads((out / "awd_fast.json").read_text())["recipe"]
    assert [m["parameters"]["weight"] for m in recipe["models"]] == [1, 2, -1]
    assert recipe["parameters"] == {
        "scale": 0.7,
        "groups": "column",
        "similarity": "squared",
        "penalty": "squared_l2",
        "alpha": 0.25,
        "eps": 1e-7,
        "optimizer": "sgd",
        "lr": 0.001,
        "momentum": 0.5,
        "nesterov": True,
        "weight_decay": 0.125,
        "iterations": 7,
        "include": ["*"],
        "exclude": ["*embed*"],
        "others": "base",
        "missing": "base",
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--preset", "paper"], {"groups": "global", "alpha": 0.1, "lr": 0.01, "momentum": 0.0, "exclude": []}),
        (["--preset", "paper", "--iterations", "9"], {"groups": "global", "lr": 0.01, "iterations": 9}),
        (["--preset", "rows", "--alpha", "0.5"], {"groups": "row", "alpha": 0.5, "lr": 1e-4}),
        (["--optimizer", "adam", "--lr", "0.001", "--betas", "0.5", "0.6"], {"lr": 0.001, "betas": [0.5, 0.6]}),
        (["--optimizer", "adam", "--adam-eps", "0.001"], {"adam_eps": 0.001, "eps": 1e-8}),
        (["--optimizer", "converge", "--tolerance", "0.01"], {"optimizer": "converge", "tolerance": 0.01}),
        ([], {"groups": "row", "similarity": "squared", "penalty": "l2", "alpha": 1e-6, "optimizer": "converge"}),
        (["--preset", "rows", "--scale", "0.3"], {"scale": 0.3, "similarity": "absolute", "optimizer": "sgd"}),
        (["--preset", "rows", "--optimizer", "converge"], {"similarity": "absolute", "optimizer": "converge"}),
        (["--preset", "rows"], {"scale": 1.25 / 3**0.5}),
        (["--iterations", "9"], {"optimizer": "sgd", "similarity": "squared", "lr": 1e-4, "iterations": 9}),
        (["--momentum", "0.5"], {"optimizer": "sgd", "momentum": 0.5}),
        (["--no-nesterov"], {"optimizer": "sgd", "nesterov": False}),
        (["--weight-decay", "0.5"], {"optimizer": "sgd", "weight_decay": 0.5}),
        (["--lr", "0.001", "--betas", "0.5", "0.6"], {"optimizer": "adam", "lr": 0.001, "betas": [0.5, 0.6]}),
        (["--max-iterations", "3"], {"optimizer": "converge", "max_iterations": 3}),
    ],
)
def test_presets_and_optimisers_from_the_command_line(tmp_path, checkpoints, options, expected):
    code, _, error = run("merge", *arguments(checkpoints), "--out", tmp_path / "out", *options)
    assert (code, error) == (0, "")
    found = json.loads((tmp_path / "out" / "awd_fast.json").read_text())["recipe"]["parameters"]
    assert {key: found[key] for key in expected} == expected


def test_help_starts_quickly_and_without_torch():
    code = "import sys; from awd_fast import cli; cli.cli(['merge', '--help'], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, "torch or numpy was imported for --help"
        assert "--optimizer" in done.stdout
    assert min(times) < 1.0  # 0.1 s on an idle machine; the bound leaves room for a busy one


def test_python_dash_m_is_the_same_command():
    command = [sys.executable, "-m", "awd_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("awd-fast, version ")
