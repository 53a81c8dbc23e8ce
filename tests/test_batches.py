"""Merging in batches and pieces gives what merging tensor by tensor gives; here on a device that the host plays."""

import json

import pytest
import torch
from safetensors.torch import load_file

import awd_fast
from awd_fast import InputError, batches, merger, parts, transfer
from awd_fast.objective import make_optimizer
from awd_fast.pipeline import inspect_checkpoints
from awd_fast.plan import StateDict, make_plan
from awd_fast.recipe import make_recipe
from awd_fast.report import MergeReport
from awd_fast.shards import Shards
from tests.conftest import tiny_state, tuned, write_checkpoint
from tests.lagging_link import LaggingLink
from tests.test_cli import run
from tests.test_pipeline import contents, leftovers
from tests.test_resume import stop_after

BUDGETS = (1 << 30, 200_000, 20_000, 100)
"""Of bytes in flight: everything in a batch, several batches, large tensors in pieces, all tensors in many."""
SGD = {"similarity": "absolute", "optimizer": awd_fast.SGD()}
ADAM = {"similarity": "absolute", "optimizer": awd_fast.Adam(lr=1e-3, iterations=6)}
CONVERGE = {"similarity": "absolute", "optimizer": awd_fast.Converge()}
EXACT = (
    {},
    SGD,
    SGD | {"groups": "column", "penalty": "none"},
    SGD | {"groups": "tensor"},
    CONVERGE,
    {"method": "task_arithmetic"},
    {"method": "average", "weights": (1, 2, 5)},
    {"others": "base"},
    awd_fast.PAPER,
    SGD | {"groups": "global", "include": "*"},
)
ELEMENTWISE = (
    ADAM,
    SGD | {"penalty": "l1", "groups": "column"},
    SGD | {"penalty": "l1", "groups": "tensor"},
    ADAM | {"groups": "global"},
    CONVERGE | {"penalty": "l1", "include": ("c.weight", "d.weight")},
    CONVERGE | {"penalty": "l1", "groups": "global"},
)


def odd_state(dtype=torch.float32):
    """Sizes that no block divides, a convolution, vectors, one number, integers, and a weight larger than the rest."""
    g = torch.Generator().manual_seed(3)
    shapes = {"a.weight": (70, 33), "b.weight": (129, 5), "c.weight": (1, 257), "d.weight": (31, 1), "conv": (5, 3, 7)}
    shapes |= {"large.weight": (151, 67), "a.bias": (70,), "scalar": (), "empty": (0, 4)}
    state = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return state | {"ids": torch.arange(9)}


@pytest.fixture
def linked(monkeypatch):
    """Lets merges go over a link, until it is given None."""

    def use(link):
        monkeypatch.setattr(transfer, "connect", lambda device: link)
        return link

    return use


def both(linked, base, models, budget, seed=None, **options):
    """Merged tensor by tensor and over a link that may use `budget` bytes, and the reports."""
    reports, merged = [], []
    for link in (None, LaggingLink(seed, memory=budget * parts.SHARE)):
        linked(link)
        merged.append(awd_fast.merge(base, models, on_report=reports.append, **options))
    return (*merged, *reports)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", EXACT + ELEMENTWISE, ids=str)
def test_batches_and_pieces_merge_as_single_tensors_do(linked, budget, options):
    base = odd_state()
    models = [tuned(base, seed) for seed in range(3)]
    plain, found, plainly, batched = both(linked, base, models, budget, seed=budget % 7, **options)
    assert list(found) == list(plain)
    # Gram matrices of columns and of whole tensors are summed piece by piece: the last bit of a float64 may differ.
    exact = budget > 100_000 or options.get("groups", "row") == "row" or options in ELEMENTWISE
    for name, tensor in plain.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        if exact:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2.0**-22)
    assert [r.step for r in batched.tensors] == [r.step for r in plainly.tensors]
    for one, other in zip(plainly.tensors, batched.tensors, strict=True):
        assert (one.similarity is None) == (other.similarity is None)
        if one.similarity is not None:
            torch.testing.assert_close(one.similarity.after, other.similarity.after, rtol=1e-9, atol=1e-9)
    if options in ELEMENTWISE and budget < 10_000:
        assert "did not fit the memory of cpu and was computed on the CPU" in batched.fallback()
    elif options in EXACT:
        assert batched.fallback() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("budget", BUDGETS)
def test_other_dtypes(linked, dtype, budget):
    base = odd_state(dtype)
    models = [tuned(base, seed) for seed in range(2)]
    for wanted in (None, "float32", "bfloat16"):
        plain, found, *_ = both(linked, base, models, budget, dtype=wanted)
        for name, tensor in plain.items():
            # Summed by another kernel, the last bit of a Gram matrix may differ, and float64 results show it.
            shown = 1e-14 if tensor.dtype == torch.float64 else 0.0
            torch.testing.assert_close(found[name], tensor, rtol=shown, atol=shown)


def test_storage_that_differs_is_widened_on_the_way(linked):
    base = odd_state()
    models = [
        tuned(base, 0),
        {name: t.bfloat16() if t.is_floating_point() else t for name, t in tuned(base, 1).items()},
    ]
    for budget in BUDGETS:
        plain, found, *_ = both(linked, base, models, budget, dtype="bfloat16")
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_tensors_that_are_no_rows_of_numbers_in_memory(linked):
    base = {"a.weight": torch.randn(40, 30).T, "b.weight": torch.randn(60, 60)[::2, ::3]}
    models = [{name: t + 0.1 * torch.randn_like(t) for name, t in base.items()} for _ in range(3)]
    for budget in BUDGETS:
        plain, found, *_ = both(linked, base, models, budget, seed=1)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def cutter_of(base, models, budget, **options):
    recipe = make_recipe(len(models), device_memory=budget / 1e9, **options)
    sources = [StateDict("base", base), *(StateDict("model", model) for model in models)]
    return parts.Cutter(sources, recipe, LaggingLink()), make_plan(sources[0], sources[1:], recipe)


@pytest.mark.parametrize("groups", ["row", "column", "tensor"])
@pytest.mark.parametrize("budget", [20_000, 50_000, 1_000_000])
def test_parts_cover_a_tensor_and_fit(groups, budget):
    base = odd_state()
    cutter, plan = cutter_of(base, [tuned(base, seed) for seed in range(3)], budget, groups=groups)
    flat = groups == "tensor"
    for step in (step for step in plan if step.action == "awd"):
        found = cutter.split(step, "_gather", groups, flat=flat, combines=False)
        assert [part.begin for part in found] == [0, *(part.end for part in found[:-1])]
        assert found[-1].last
        assert len(found) > 1 or found[0].shape == step.info.shape
        for part in found:
            assert part.end - part.begin == torch.Size(part.shape).numel()
            least = parts.SMALLEST if flat else step.info.shape[-1]
            assert cutter.fits(part) or part.end - part.begin <= least
    works = cutter.together([cutter.whole(step, "_solve", groups, combines=True) for step in plan if step.info.count])
    assert sum(map(len, works)) == len([step for step in plan if step.info.count])
    assert all(sum(part.cost for part in work) <= cutter.capacity for work in works if len(work) > 1)


def test_the_memory_in_flight_stays_in_its_bounds(linked):
    base = {f"{i}.weight": torch.randn(64, 32) for i in range(40)}
    models = [tuned(base, seed) for seed in range(3)]
    link = linked(LaggingLink())
    awd_fast.merge(base, models, device_memory=400e-6)
    assert sum(link.device_buffers) <= 400_000  # of 1.6 MB
    assert link.counts["compute"] >= 8


def test_a_model_in_one_batch_is_one_launch(linked, monkeypatch):
    calls = []
    fuse = batches.BatchMerger._fuse
    monkeypatch.setattr(
        batches.BatchMerger,
        "_fuse",
        lambda self, parts, tensors: calls.append(len(parts)) or fuse(self, parts, tensors),
    )
    base = {f"{i}.weight": torch.randn(8, 8) for i in range(10)} | {f"{i}.bias": torch.randn(8) for i in range(10)}
    linked(LaggingLink())
    awd_fast.merge(base, [tuned(base, seed) for seed in range(2)])
    assert calls == [10]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "options", [{}, {"groups": "column"}, {"groups": "tensor"}, awd_fast.PAPER, {"method": "average"}]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "converge"])
def test_every_way_names_the_tensor_with_nan(linked, budget, options, optimizer):
    base = {"a.weight": torch.randn(70, 5), "b.weight": torch.randn(40, 5), "c.weight": torch.randn(3, 3)}
    models = [{name: t + 0.1 * torch.randn_like(t) for name, t in base.items()} for _ in range(3)]
    models[1]["b.weight"][22, 3] = torch.nan
    linked(LaggingLink(4, memory=budget * parts.SHARE))
    with pytest.raises(InputError, match=r"models\[1\]: tensor 'b.weight' holds 1 NaN or Inf"):
        awd_fast.merge(base, models, **{**options, "optimizer": make_optimizer(optimizer)})


@pytest.mark.parametrize("budget", BUDGETS)
def test_divergence_and_overflow_are_errors(linked, budget):
    base = odd_state()
    models = [tuned(base, seed) for seed in range(3)]
    linked(LaggingLink(memory=budget * parts.SHARE))
    with pytest.raises(InputError, match="the optimiser diverged"):
        awd_fast.merge(base, models, penalty="squared_l2", alpha=1e3, optimizer=awd_fast.SGD(lr=1e3))
    with pytest.raises(InputError, match=r"'a.weight' overflows float16"):
        awd_fast.merge(base, models, scale=1e6, dtype="float16", others="base")


def test_what_does_not_fit_is_not_taken_from_a_backend_that_was_named(linked):
    base = odd_state()
    link = linked(LaggingLink())
    recipe = make_recipe(1, optimizer="adam", device_memory=1e-6)
    object.__setattr__(recipe, "backend", "triton")  # whether there is one or not
    source = StateDict("base", base)
    found = batches.BatchMerger.__new__(batches.BatchMerger)
    merger.Merger.__init__(found, source, [source], recipe, MergeReport(recipe, "base", ("m",)))
    found.link, found.cutter = link, parts.Cutter([source, source], make_recipe(1, device_memory=1e-6), link)
    step = make_plan(source, [source], make_recipe(1))[0]
    with pytest.raises(
        InputError, match=r"'a.weight' does not fit 1e-06 GB of cpu; give more .*leave out backend triton"
    ):
        found._require_any_backend(step)


def test_results_stay_where_the_base_is(linked):
    base = odd_state()
    models = [tuned(base, seed) for seed in range(3)]
    for options in EXACT + ELEMENTWISE:
        linked(None)
        plain = awd_fast.merge(base, models, **options)
        for budget in BUDGETS[1:2]:
            link = linked(LaggingLink("eager", memory=budget * parts.SHARE, resident=True))
            found = awd_fast.merge(base, models, **options)
            assert link.counts["upload"] == 0
            for name, tensor in plain.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=2.0**-22)
                assert found[name].data_ptr() != base[name].data_ptr() or not tensor.numel()


@pytest.mark.parametrize("budget", BUDGETS)
def test_files_are_the_same_bytes(linked, tmp_path, budget):
    base_state = odd_state()
    base = write_checkpoint(tmp_path / "base", base_state, shards=3)
    models = [write_checkpoint(tmp_path / f"model{i}", tuned(base_state, i), shards=1 + i) for i in range(3)]
    for seed, link in (("plain", None), *((str(s), LaggingLink(s, memory=budget * parts.SHARE)) for s in (None, 2))):
        linked(link)
        awd_fast.merge_checkpoints(base, models, tmp_path / f"out-{seed}")
    plain = contents(tmp_path / "out-plain")
    for seed in ("None", "2"):
        found = contents(tmp_path / f"out-{seed}")
        assert found.keys() == plain.keys()
        for name in plain:  # the similarities of the report are Gram matrices', whose last bit may differ
            assert found[name] == plain[name] or (name in ("README.md", "awd_fast.json") and budget < 1 << 30)


@pytest.mark.parametrize(
    "options", [{}, SGD, SGD | {"groups": "tensor"}, SGD | {"groups": "global"}, *ELEMENTWISE[:4]], ids=str
)
@pytest.mark.parametrize("budget", BUDGETS)
def test_inspections_say_the_same(linked, tmp_path, options, budget):
    base_state = odd_state()
    base = write_checkpoint(tmp_path / "base", base_state)
    models = [write_checkpoint(tmp_path / f"model{i}", tuned(base_state, i)) for i in range(2)]
    found = []
    for link in (None, LaggingLink(6, memory=budget * parts.SHARE)):
        linked(link)
        report = awd_fast.pipeline.inspect_checkpoints(base, models, **options)
        found.append([(r.step.name, r.similarity and r.similarity.mean(after=True)) for r in report.tensors])
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    assert {name for name, _ in found[0]} == set(base_state)
    for (_, one), (_, other) in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_error_in_the_middle_leaves_nothing(linked, tmp_path, budget, monkeypatch):
    base_state = odd_state()
    models = [tuned(base_state, seed) for seed in range(3)]
    models[2]["conv"][1, 2, 3] = torch.inf
    base = write_checkpoint(tmp_path / "base", base_state, shards=2)
    paths = [write_checkpoint(tmp_path / f"model{i}", state) for i, state in enumerate(models)]
    link = linked(LaggingLink(3, memory=budget * parts.SHARE))
    with pytest.raises(InputError, match=r"model2.*'conv' holds 1 NaN or Inf"):
        awd_fast.merge_checkpoints(base, paths, tmp_path / "out")
    assert leftovers(tmp_path) == []
    assert not any(link.queues.values())

    def broken(*args):
        raise OSError("disk on fire")

    monkeypatch.setattr(Shards, "write", broken)
    with pytest.raises(OSError, match="disk on fire"):
        awd_fast.merge_checkpoints(base, paths[:2], tmp_path / "out")
    assert leftovers(tmp_path) == []
    assert not any(link.queues.values())


@pytest.mark.parametrize("options", [{}, SGD, SGD | {"groups": "column"}, awd_fast.PAPER, ELEMENTWISE[3]], ids=str)
def test_a_merge_on_a_device_goes_on_to_the_same_bytes(linked, tmp_path, monkeypatch, options):
    monkeypatch.setattr("awd_fast.blocks.NUMBERS", 2000)
    base_state = odd_state()
    base = write_checkpoint(tmp_path / "base", base_state)
    models = [write_checkpoint(tmp_path / f"model{i}", tuned(base_state, i)) for i in range(3)]
    linked(LaggingLink("eager", memory=20_000 * parts.SHARE))
    awd_fast.merge_checkpoints(base, models, tmp_path / "whole", **options)
    for done in (2, 7):
        with monkeypatch.context() as patch:
            stop_after(done, patch)
            with pytest.raises(KeyboardInterrupt):
                awd_fast.merge_checkpoints(base, models, tmp_path / "out", resume=True, **options)
    awd_fast.merge_checkpoints(base, models, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_command_line_warns_of_what_was_computed_on_the_cpu(linked, tmp_path, checkpoints):
    base, models = checkpoints
    linked(LaggingLink())
    sources = ["--base", base, *(f"--model={m}" for m in models), "--out", tmp_path / "out"]
    code, _, error = run("merge", *sources, "--optimizer", "adam", "--iterations", "2", "--device-memory", "1e-6")
    assert code == 0
    assert "and 1 more did not fit the memory of cpu and was computed on the CPU; give more memory" in error
    report = json.loads((tmp_path / "out" / "awd_fast.json").read_text())
    assert [name for name, entry in report["tensors"].items() if "device" in entry] == [
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.0.output.dense.weight",
    ]
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tiny_state())


@pytest.mark.parametrize("optimizer", [awd_fast.SGD(), awd_fast.Adam(lr=1e-3, iterations=3)], ids=["span", "elements"])
def test_storage_of_8_bits_in_a_global_group_is_merged_on_the_host(linked, optimizer):
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(40, 6, generator=g), "b.weight": torch.randn(9, 7, generator=g)}
    models = [tuned(base, seed, size=0.3) for seed in range(2)]
    states = [{name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()} for state in (base, *models)]
    plain, found, plainly, batched = both(linked, states[0], states[1:], 1 << 20, groups="global", optimizer=optimizer)
    for name, tensor in plain.items():
        assert torch.equal(found[name].float(), tensor.float())
    assert [r.similarity.groups for r in batched.tensors] == [r.similarity.groups for r in plainly.tensors]


@pytest.mark.parametrize("groups", ["row", "tensor", "global"])
def test_an_inspection_on_a_device_counts_what_it_reads(linked, tmp_path, groups):
    base = odd_state()
    paths = [write_checkpoint(tmp_path / f"m{i}", state) for i, state in enumerate((base, tuned(base, 0)))]
    linked(LaggingLink("eager"))
    inspect_checkpoints(paths[0], paths[1:], groups=groups, json_log=tmp_path / "log")
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert last["bytes_read"] == last["bytes_total"] > 0
