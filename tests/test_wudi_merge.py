"""Merges by WUDI, as a whole: storage, memory, devices, adapters, folders, and what is said about them."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import awd_fast
from awd_fast import InputError, lowrank, parts, transfer, wudi
from awd_fast.adapters import Adapter
from awd_fast.pipeline import inspect_checkpoints
from awd_fast.plan import TensorInfo
from awd_fast.stream import StreamMerger
from tests.conftest import tuned, write_checkpoint
from tests.lagging_link import LaggingLink
from tests.lora_cases import C, Q, V, folders
from tests.lora_cases import base_state as lora_base
from tests.test_batches import odd_state
from tests.test_cli import arguments, run
from tests.test_pipeline import contents, load
from tests.test_wudi import normal_equations

WEIGHTS = ("encoder.layer.0.attention.self.query.weight", "encoder.layer.0.output.dense.weight")
OTHERS = ("embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.bias")


def expected(base, models, name, weights=None, ridge=0.1, columns=0, scale=1.0):
    """The merged tensor in float64."""
    shape = base[name].shape
    flat = [t[name].double().reshape(-1, shape[-1]) for t in (base, *models)]
    vectors = [w * (t - flat[0]) for w, t in zip(weights or [1.0] * len(models), flat[1:], strict=True)]
    tau = normal_equations(vectors, ridge, columns)
    return (flat[0] if tau is None else flat[0] + scale * tau).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, (1.0, -0.5, 2.0), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)], ids=str)
def test_storage_and_weights(dtype, weights):
    base = odd_state(dtype)
    models = [tuned(base, seed) for seed in range(3)]
    merged = awd_fast.merge(base, models, method="wudi", weights=weights, scale=1.3, others_scale=1.3, columns=40)
    for name in ("a.weight", "b.weight", "c.weight", "d.weight", "large.weight"):
        wanted = expected(base, models, name, weights, columns=40, scale=1.3)
        assert merged[name].dtype == dtype
        rounding = 1e-12 if dtype == torch.float64 else 1e-4 + torch.finfo(dtype).eps * float(wanted.abs().max()) / 2
        assert float((merged[name].double() - wanted).abs().max()) < rounding, name
    for name in ("conv", "a.bias", "scalar"):
        plain = awd_fast.merge(base, models, method="task_arithmetic", weights=weights, scale=1.3)[name]
        assert torch.equal(merged[name], plain)


def test_float8_and_another_dtype():
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(20, 30, generator=g)}
    models = [{"a.weight": (base["a.weight"] + torch.randn(20, 30, generator=g)).to(torch.float8_e4m3fn)}] * 2
    narrow = {"a.weight": base["a.weight"].to(torch.float8_e4m3fn)}
    wanted = expected(narrow, models, "a.weight", scale=1.0)
    merged = awd_fast.merge(narrow, models, method="wudi", scale=1.0, dtype="float32")["a.weight"]
    assert float((merged.double() - wanted).abs().max()) < 1e-4
    kept = awd_fast.merge(narrow, models, method="wudi", scale=1.0)["a.weight"]
    assert torch.equal(kept, merged.to(torch.float8_e4m3fn))


def test_whatever_is_selected_is_seen_as_a_matrix():
    base = odd_state()
    models = [tuned(base, seed) for seed in range(3)]
    merged = awd_fast.merge(base, models, method="wudi", include=["conv", "a.bias", "scalar"], exclude=(), scale=1.0)
    for name in ("conv", "a.bias"):
        torch.testing.assert_close(merged[name].double(), expected(base, models, name, scale=1.0), rtol=0, atol=1e-4)
    # A number: t_i^2 / |t_i|^2 is 1, so that tau = (sum_i t_i + e S) / (K + e) with e = ridge * K.
    total = sum(float(model["scalar"] - base["scalar"]) for model in models)
    assert float(merged["scalar"] - base["scalar"]) == pytest.approx(total * 1.3 / 3.3, rel=1e-5)


def test_one_model_is_given_back():
    base = odd_state()
    model = tuned(base, 0)
    merged = awd_fast.merge(base, [model], method="wudi", scale=1.0)
    for name in ("a.weight", "large.weight"):
        torch.testing.assert_close(merged[name], model[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("weights", [None, (0.0, 1.0)])
def test_what_is_not_finite_is_named(base_state, model_states, value, weights):
    model_states[0][WEIGHTS[1]][2, 3] = value
    with pytest.raises(InputError, match=rf"models\[0\]: tensor '{WEIGHTS[1]}' holds 1 NaN or Inf values"):
        awd_fast.merge(base_state, model_states[:2], method="wudi", weights=weights)


def test_what_cannot_be_merged_is_said(base_state, model_states):
    with pytest.raises(InputError, match="overflows float16; choose a smaller scale"):
        awd_fast.merge(base_state, model_states, method="wudi", scale=1e9, dtype="float16")
    same = {name: t + 1 if t.is_floating_point() else t for name, t in base_state.items()}
    with pytest.raises(
        InputError, match=rf"ridge is 1e-30, too small to solve for the update of tensor '{WEIGHTS[0]}'"
    ):
        awd_fast.merge(base_state, [same, same], method="wudi", ridge=1e-30)
    with pytest.raises(InputError, match="no tensor is left for wudi"):
        awd_fast.merge(base_state, model_states, method="wudi", exclude="*")


def test_others_scale(base_state, model_states):
    for method in ("awd", "wudi", "task_arithmetic"):
        small = awd_fast.merge(base_state, model_states, method=method, scale=0.6, others_scale=0.6)
        large = awd_fast.merge(base_state, model_states, method=method, scale=1.4)
        both = awd_fast.merge(base_state, model_states, method=method, scale=1.4, others_scale=0.6)
        assert all(torch.equal(both[name], large[name]) for name in WEIGHTS)
        assert all(torch.equal(both[name], small[name]) for name in OTHERS)
        none = awd_fast.merge(base_state, model_states, method=method, scale=1.4, others_scale=0.0)
        assert all(torch.equal(none[name], base_state[name]) for name in OTHERS)
    plain = awd_fast.merge(base_state, model_states, method="average")
    scaled = awd_fast.merge(base_state, model_states, method="average", others_scale=0.5)
    assert all(torch.equal(scaled[name], plain[name]) for name in plain)


# Memory, devices.


def test_model_by_model_gives_the_same_bits(tmp_path, monkeypatch):
    base = odd_state()
    models = [tuned(base, seed) for seed in range(3)]
    paths = (
        write_checkpoint(tmp_path / "base", base),
        [write_checkpoint(tmp_path / f"m{i}", model) for i, model in enumerate(models)],
    )
    whole = awd_fast.merge_checkpoints(*paths, tmp_path / "a", method="wudi")
    assert whole.read_twice == 0
    monkeypatch.setattr(StreamMerger, "_fits", lambda self, step: False)
    again = awd_fast.merge_checkpoints(*paths, tmp_path / "b", method="wudi")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    sizes = [r.step.info.size for r in again.tensors if r.step.action == "wudi"]
    assert again.read_twice == 2 * sum(sizes)
    assert "were read again, because all models of a tensor did not fit the memory" in again.note()
    log = tmp_path / "log"
    awd_fast.merge_checkpoints(*paths, tmp_path / "c", method="wudi", json_log=log)
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["bytes_read"] == last["bytes_total"]


def test_memory_that_is_not_enough_is_said_with_what_would_be(tmp_path):
    base = {"a.weight": torch.randn(64, 512)}
    model = write_checkpoint(tmp_path / "m", tuned(base, 0))
    paths = write_checkpoint(tmp_path / "base", base), [model, write_checkpoint(tmp_path / "n", tuned(base, 1))]
    with pytest.raises(InputError, match=r"'a\.weight' in memory, which takes .* where 0\.005 GB may be used") as error:
        awd_fast.merge_checkpoints(*paths, tmp_path / "out", method="wudi", memory=0.005)
    enough = float(str(error.value).split("takes ")[1].split(" GB")[0]) * 1.01
    assert "--columns" in str(error.value)
    awd_fast.merge_checkpoints(*paths, tmp_path / "out", method="wudi", memory=enough)
    awd_fast.merge_checkpoints(*paths, tmp_path / "narrow", method="wudi", memory=0.005, columns=64)


@pytest.mark.parametrize("budget", [1 << 30, 300_000])
@pytest.mark.parametrize("resident", [False, True])
def test_a_device(monkeypatch, budget, resident):
    base = odd_state()
    models = [tuned(base, seed) for seed in range(3)]
    options = {"method": "wudi", "weights": (1.0, -0.5, 2.0), "scale": 1.3, "others_scale": 0.5, "columns": 40}
    reports = []
    plain = awd_fast.merge(base, models, on_report=reports.append, **options)
    link = LaggingLink(1, memory=budget * parts.SHARE, resident=resident)
    monkeypatch.setattr(transfer, "connect", lambda device: link)
    found = awd_fast.merge(base, models, on_report=reports.append, **options)
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor), name
    for one, other in zip(*(report.tensors for report in reports), strict=True):
        assert (one.interference is None) == (other.interference is None)
        if one.interference is not None:
            assert torch.equal(one.interference.to_figures(), other.interference.to_figures())
    on_cpu = [r.step.name for r in reports[1].tensors if r.on_cpu]
    if budget == 1 << 30:
        assert on_cpu == []
        assert link.counts["compute"] > 0
    else:
        assert "large.weight" in on_cpu
        assert "--columns" in reports[1].fallback()


@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_a_device_says_what_is_wrong(monkeypatch, base_state, model_states, value):
    monkeypatch.setattr(transfer, "connect", lambda device: LaggingLink())
    model_states[0][WEIGHTS[1]][2, 3] = value
    sentence = "ridge is 1e-30, too small" if value == 1.0 else "holds 1 NaN or Inf values"
    same = [model_states[0]] * 2
    with pytest.raises(InputError, match=sentence):
        awd_fast.merge(base_state, same, method="wudi", ridge=1e-30, include=WEIGHTS[1])


# Adapters.


def test_adapters_are_the_models_that_they_mean(tmp_path):
    base = lora_base()
    folder, adapters, models = folders(tmp_path, base)
    report = awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", method="wudi", scale=1.2, others_scale=0.5)
    found = load(tmp_path / "out")
    for name in (Q, V, C):
        wanted = expected(base, models, name, scale=1.2)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-3)
    assert report.interference.after < report.interference.before
    assert report.counts()["wudi"] >= 3


@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 0.0]])
def test_the_merge_of_adapters_is_an_adapter(tmp_path, weights):
    """Of no more than the sum of the ranks, read again by what reads any adapter."""
    base = lora_base()
    folder, adapters, models = folders(tmp_path, base)
    options = {"method": "wudi", "scale": 1.2, "weights": weights, "dtype": "float64"}
    report = awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", as_adapter=True, **options)
    bound = Adapter(tmp_path / "out").bind({name: TensorInfo(tuple(t.shape), t.dtype) for name, t in base.items()})
    for name in (Q, V, C):
        weighted = [
            w * (model[name] - base[name].double()) for w, model in zip(weights or [1.0] * 3, models, strict=True)
        ]
        wanted = 1.2 * wudi.update(weighted)
        assert bound.rank(name) <= min(base[name].shape[1], 11)
        torch.testing.assert_close(lowrank.delta(bound.factors(name), torch.float64), wanted, rtol=1e-10, atol=1e-10)
    whole = awd_fast.merge_checkpoints(folder, adapters, tmp_path / "whole", method="wudi", weights=weights)
    one, other = (made.interference.to_figures() for made in (report, whole))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_merges_of_adapters_that_are_no_adapter(tmp_path):
    folder, adapters, _ = folders(tmp_path, lora_base())
    with pytest.raises(InputError, match="columns is 2, so that wudi's update is no adapter of the sum of the ranks"):
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", method="wudi", columns=2, as_adapter=True)
    with pytest.raises(InputError, match="no adapter changes a tensor that is for wudi"):
        awd_fast.merge_checkpoints(folder, adapters, tmp_path / "out", method="wudi", include="*o_proj*")


# Folders, the command line, reports.


def test_the_command_line_yaml_and_python_write_the_same_bytes(tmp_path, checkpoints, base_state, model_states):
    base, models = checkpoints
    options = {"method": "wudi", "scale": 1.4, "others_scale": 0.6, "ridge": 0.2, "columns": 4, "weights": (1, 2, -1)}
    awd_fast.merge_checkpoints(base, models, tmp_path / "python", **options)
    given = "--method wudi --scale 1.4 --others-scale 0.6 --ridge 0.2 --columns 4 --weight 1 --weight 2 --weight -1"
    code, out, error = run("merge", *arguments(checkpoints), "--out", tmp_path / "cli", *given.split())
    assert (code, error) == (0, "")
    assert "2 by wudi" in out
    assert "interference of 2 tensors: " in out
    card = (tmp_path / "cli" / "README.md").read_text()
    text = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(text)["parameters"] == {
        "scale": 1.4,
        "ridge": 0.2,
        "columns": 4,
        "exclude": list(awd_fast.DEFAULT_EXCLUDE),
        "others": "task_arithmetic",
        "others_scale": 0.6,
    }
    (tmp_path / "c.yml").write_text(text)
    assert run("merge", tmp_path / "c.yml", "--out", tmp_path / "yaml")[0] == 0
    assert contents(tmp_path / "python") == contents(tmp_path / "cli") == contents(tmp_path / "yaml")
    merged = awd_fast.merge(base_state, model_states, **options)
    written = load_file(tmp_path / "python" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in merged.items())


def test_the_report_says_how_much_interference_was_removed(tmp_path, checkpoints, base_state, model_states):
    base, models = checkpoints
    report = awd_fast.merge_checkpoints(base, models, tmp_path / "out", method="wudi", scale=1.3)
    before = after = 0.0
    data = json.loads((tmp_path / "out" / "awd_fast.json").read_text())
    for name in WEIGHTS:
        vectors = [m[name].double() - base_state[name].double() for m in model_states]
        figures = data["tensors"][name]
        own = [float(wudi.interference(tau, vectors)) for tau in (sum(vectors), normal_equations(vectors))]
        assert [figures["interference_before"], figures["interference_after"]] == pytest.approx(own, rel=1e-4)
        before, after = before + own[0], after + own[1]
        assert data["tensors"][name]["action"] == "wudi"
    overall = data["overall"]
    assert [overall["interference_before"], overall["interference_after"]] == pytest.approx([before, after], rel=1e-4)
    assert report.interference.removed == pytest.approx(1 - after / before, rel=1e-4)
    assert 0 < report.update_cosine < 1
    assert report.overall is report.similarity_before is report.warning() is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by [WUDI](https://arxiv.org/abs/2503.08099) in closed form" in card
    assert "## Interference per tensor" in card
    assert f"{report.interference.removed:.1%} less" in card
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines] == ["tensor", *WEIGHTS, "all"]
    assert lines[0].split("  ")[-1] == "cos(update, TA)"


def test_nothing_to_remove_is_a_dash():
    base = {"a.weight": torch.ones(3, 4)}
    reports = []
    merged = awd_fast.merge(base, [base, base], method="wudi", on_report=reports.append)
    assert torch.equal(merged["a.weight"], base["a.weight"])
    assert reports[0].table().splitlines()[1].split() == ["a.weight", "0", "0", "-", "-"]
    assert json.loads(reports[0].json_text())["overall"]["update_cosine"] is None


def test_a_dry_run_and_an_inspection(tmp_path, checkpoints):
    code, out, _ = run("merge", *arguments(checkpoints), "--out", tmp_path / "out", "--dry-run", "--method", "wudi")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "wudi" in rows[WEIGHTS[0]]
    assert "task_arithmetic" in rows[OTHERS[0]]
    with pytest.raises(InputError, match="method is wudi; an inspection shows what awd does"):
        inspect_checkpoints(*checkpoints, method="wudi")
