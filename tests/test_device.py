"""Results stay on their device and nothing waits for it: here without a GPU, and at the end on a real one."""

import gc

import pytest
import torch

import awd_fast
from awd_fast import InputError, batches, ops, parts, solver, streaming, transfer
from awd_fast.checkpoints import Checkpoint
from awd_fast.objective import SGD, Adam, Converge, Objective, Options
from awd_fast.ops import backends
from awd_fast.plan import StateDict, make_plan
from awd_fast.recipe import make_recipe
from tests.conftest import tiny_state, tuned, write_checkpoint
from tests.lagging_link import LaggingLink

WAITING = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "cpu", "nonzero")
"""What a tensor of a GPU cannot answer before everything asked of the GPU earlier is done."""


@pytest.fixture
def no_waiting(monkeypatch):
    """From the call on, a tensor that is looked at raises."""

    def begin(patch):
        for name in WAITING:

            def refuse(self, *_, name=name, **__):
                raise AssertionError(f"{name} waits for the device")

            patch.setattr(torch.Tensor, name, refuse)

    def during(call):
        def watched(*arguments, **options):
            with monkeypatch.context() as patch:
                begin(patch)
                return call(*arguments, **options)

        return watched

    return during


@pytest.mark.parametrize("budget", [1 << 30, 20_000])
@pytest.mark.parametrize("groups", ["row", "column", "tensor", "global"])
def test_no_work_of_a_merge_waits_for_the_device(monkeypatch, no_waiting, groups, budget):
    base = tiny_state() | {"large.weight": torch.randn(90, 40)}
    link = LaggingLink("eager", memory=budget * parts.SHARE)
    monkeypatch.setattr(transfer, "connect", lambda device: link)
    monkeypatch.setattr(batches.BatchMerger, "_run", no_waiting(batches.BatchMerger._run))
    models = [tuned(base, seed) for seed in range(3)]
    merged = awd_fast.merge(base, models, groups=groups, backend="reference", optimizer=SGD(iterations=4))
    assert set(merged) == set(base)
    with pytest.raises(AssertionError, match="waits for the device"):  # as the reference's Converge does, and it shows
        awd_fast.merge(base, models, backend="reference", optimizer=Converge())


def test_a_streamed_descent_waits_for_nothing(no_waiting):
    parts = [(torch.randn(9, 4), [torch.randn(9, 4) for _ in range(3)]), (None, [torch.randn(7) for _ in range(3)])]
    for optimizer in (Adam(iterations=5), SGD(iterations=5, momentum=0.0)):
        descend = no_waiting(streaming.descend)
        found = descend(parts, Objective(penalty="l1", alpha=1e-3), optimizer, "reference")
        expected = streaming.descend(parts, Objective(penalty="l1", alpha=1e-3), optimizer, "native")
        torch.testing.assert_close(found.history, expected.history)
        assert found.inner.shape == (2, 3)


def test_a_backend_may_stream_all_iterations_itself(monkeypatch):
    calls = []

    def descend_stream(parts, objective, optimizer):
        calls.append((len(parts), objective, optimizer))
        k = len(parts[0][1])
        shifts = [torch.zeros_like(models[0], dtype=torch.float32) for _, models in parts]
        products = (torch.eye(k).double().expand(len(parts), k, k), torch.zeros(len(parts), k).double())
        return shifts, *products, torch.zeros(len(parts)).double(), torch.ones(3).double()

    monkeypatch.setattr(backends.module("reference"), "descend_stream", descend_stream, raising=False)
    options = Options(groups="tensor", objective=Objective(), optimizer=Adam(iterations=2))
    tensors = [(torch.randn(6), [torch.randn(6), torch.randn(6)])] * 2
    solution, shares = solver.solve_parts(tensors, options, "reference")
    assert calls == [(2, options.objective, options.optimizer)]
    assert torch.equal(solution.gram, 2 * torch.eye(2).double()[None])
    assert torch.equal(solution.history, torch.ones(3).double())
    assert [tuple(share.shift.shape) for share in shares] == [(1, 6), (1, 6)]


def test_traced_histories_are_on_the_device_of_the_inputs():
    base = torch.empty(4, 6, device="meta")
    for optimizer in (SGD(iterations=3), Adam(iterations=3)):
        if isinstance(optimizer, SGD):
            assert ops.merge_rows(base, [base] * 2, torch.ones(2), Objective(), optimizer).history.device.type == "meta"
        assert ops.adam_rows(base, [base] * 2, Objective(), optimizer)[1].device.type == "meta"


def test_only_a_device_that_exists_is_taken(monkeypatch):
    source = StateDict("base", tiny_state())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, known in ((1, "cuda:0"), (2, "cuda:0 to cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        make_plan(source, [source], make_recipe(1, device="cuda"))
        make_plan(source, [source], make_recipe(1, device=torch.device("cuda", count - 1)))
        with pytest.raises(InputError, match=f"device is cuda:{count}, but the only CUDA devices here are {known}$"):
            make_plan(source, [source], make_recipe(1, device=f"cuda:{count}"))
    for wrong in ("cuda:", "cuda:-1", "cuda0", "gpu", "cpu:0", "cuda:1:1"):
        with pytest.raises(InputError, match="expected cpu, cuda or cuda:N"):
            make_recipe(1, device=wrong)
    for wrong in (0, -1, float("nan"), "much", True):
        with pytest.raises(InputError, match="device_memory is"):
            make_recipe(1, device_memory=wrong)


# What follows needs a GPU; there is none where this was written, so it says what should hold, not what was seen.
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here")
SMOOTH = {"similarity": "squared", "optimizer": SGD(lr=1e-3, momentum=0.9, weight_decay=1e-4, iterations=30)}
"""Without kinks, where rounding does not decide over the sign of a gradient."""
WAYS = (
    {},
    {"groups": "column"},
    {"groups": "tensor"},
    {"groups": "global"},
    {"method": "task_arithmetic"},
    {"optimizer": Adam(lr=1e-3, iterations=10)},
    {"groups": "global", "optimizer": Adam(lr=1e-3, iterations=10)},
    {"penalty": "l1", "groups": "tensor"},
)


def model_pair(dtype=torch.float32, count=3):
    """2 MB each: large enough that copies take a while."""
    g = torch.Generator().manual_seed(5)
    base = {f"{i}.weight": torch.randn(256, 384, generator=g).to(dtype) for i in range(5)}
    base |= {"odd.weight": torch.randn(131, 77, generator=g).to(dtype), "a.bias": torch.ones(77).to(dtype)}
    return base, [tuned(base, seed) for seed in range(count)]


def on(device, state):
    return {name: tensor.to(device) for name, tensor in state.items()}


def assert_near(found, expected, device):
    for name, tensor in expected.items():
        assert found[name].device.type == device
        rtol = 0.02 if tensor.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(found[name].cpu(), tensor, rtol=rtol, atol=2e-5)


@gpu
@pytest.mark.parametrize("memory", [None, 8e-3, 5e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_gpu_merges_as_the_cpu_does(options, dtype, memory):
    base, models = model_pair(dtype)
    options = SMOOTH | options
    expected = awd_fast.merge(base, models, **options)
    found = awd_fast.merge(base, models, device="cuda", device_memory=memory, **options)
    assert_near(found, expected, "cpu")


@gpu
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_merge_of_what_lies_on_the_gpu_stays_there(options):
    base, models = model_pair()
    expected = awd_fast.merge(base, models, **(SMOOTH | options))
    # One model is left on the host: it is uploaded.
    there = [on("cuda", model) for model in models[:-1]] + models[-1:]
    for memory in (None, 5e-4):
        found = awd_fast.merge(on("cuda", base), there, device="cuda", device_memory=memory, **(SMOOTH | options))
        assert_near(found, expected, "cuda")
    assert_near(awd_fast.merge(on("cuda", base), there, **(SMOOTH | options)), expected, "cuda")


@gpu
def test_a_gpu_gives_the_same_bits_however_its_memory_is_cut():
    base, models = model_pair()
    whole = awd_fast.merge(base, models, device="cuda", method="task_arithmetic")
    for memory in (1e-2, 1e-3, 3e-4):
        for _ in range(5):  # a race would show now and then
            pieces = awd_fast.merge(base, models, device="cuda", method="task_arithmetic", device_memory=memory)
            assert all(torch.equal(pieces[name], whole[name]) for name in whole)


@gpu
def test_a_merge_on_a_side_stream_sees_what_was_computed_there():
    base, models = model_pair()
    expected = awd_fast.merge(base, models, method="task_arithmetic")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        zero = torch.zeros(4096, 4096, device="cuda")
        for _ in range(20):  # keeps the stream busy, so that what follows is late
            zero = zero @ zero
        late = {name: tensor.cuda(non_blocking=True) + zero[0, 0] for name, tensor in base.items()}
        found = awd_fast.merge(late, models, device="cuda", method="task_arithmetic")
        stream.synchronize()
    assert_near(found, expected, "cuda")


@gpu
@pytest.mark.parametrize("groups", ["row", "column", "tensor"])
@pytest.mark.parametrize("memory", [None, 1e-3])
def test_works_do_not_wait_for_the_gpu(monkeypatch, groups, memory):
    base, models = model_pair()
    run = batches.BatchMerger._run

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options = {"groups": groups, "device_memory": memory, "optimizer": SGD()}
    awd_fast.merge(base, models, device="cuda", **options)  # loads what is loaded once
    monkeypatch.setattr(batches.BatchMerger, "_run", watched)
    awd_fast.merge(base, models, device="cuda", **options)


@gpu
def test_the_memory_of_the_gpu_stays_in_its_bounds():
    base, models = model_pair()
    awd_fast.merge(base, models, device="cuda", method="task_arithmetic")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    awd_fast.merge(base, models, device="cuda", method="task_arithmetic", device_memory=2e-3)
    assert torch.cuda.max_memory_allocated() - before <= 2.2e6  # of 8.1 MB; small tensors take 512 bytes at least
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@gpu
def test_a_gpu_merges_folders(tmp_path):
    base_state, states = model_pair()
    base = write_checkpoint(tmp_path / "base", base_state, shards=2)
    models = [write_checkpoint(tmp_path / f"model{i}", state) for i, state in enumerate(states)]
    expected = awd_fast.merge(base_state, states, device="cuda")
    report = awd_fast.merge_checkpoints(base, models, tmp_path / "out", device="cuda:0", device_memory=3e-3)
    found = Checkpoint(tmp_path / "out")
    for name, tensor in expected.items():
        torch.testing.assert_close(found.read(name), tensor, rtol=0, atol=2e-5)
    assert report.similarity_after < report.similarity_before
    assert report.fallback() is None


@gpu
def test_a_gpu_names_the_tensor_with_nan():
    base, models = model_pair()
    models[1]["odd.weight"][3, 5] = torch.nan
    for options in WAYS:
        with pytest.raises(InputError, match=r"models\[1\]: tensor 'odd.weight' holds 1 NaN or Inf"):
            awd_fast.merge(base, models, device="cuda", **options)


@gpu
def test_operators_leave_their_results_on_the_gpu():
    base, models = torch.randn(9, 40, device="cuda"), [torch.randn(9, 40, device="cuda") for _ in range(3)]
    gram = ops.gram(base, models)
    for optimizer in (SGD(iterations=5), Converge()):
        for name in ("reference", None):
            assert all(t.is_cuda for t in ops.descend(gram, Objective(), optimizer, backend=name))
            assert all(
                t.is_cuda for t in ops.merge_rows(base, models, torch.ones(3), Objective(), optimizer, backend=name)
            )
    found = ops.descend_groups(base, models, Objective(), Adam(iterations=3))
    assert all(t.is_cuda for t in found)
    assert awd_fast.disentangle(models, groups="tensor", penalty="l1").redundant.is_cuda
