"""The operators in Triton against the reference: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter runs programs one by one in NumPy, so sizes here are small; what compiled kernels look like is in
tests/test_triton_compile.py.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from awd_fast import checks, ops, statistics
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Objective
from awd_fast.ops import backends, reference, triton_backend
from tests import interpreted
from tests.blocks import check_blocks
from tests.test_adam import OBJECTIVES, check_rows, check_step, distance, states
from tests.test_native import (
    DTYPES,
    GROUPS,
    check_combine,
    check_gram,
    check_patterns,
    check_rounding,
    grams,
    loss_at,
    models_like,
)

pytestmark = [
    pytest.mark.skipif(triton_backend.unavailable() is not None, reason=str(triton_backend.unavailable())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy in the interpreter: 0 x inf, say, is meant here
]

DEVICE = "cpu" if triton_backend.interpreted() else "cuda" if torch.cuda.is_available() else "xpu"
SHAPES = ((1,), (), (5, 1), (1, 9), (0, 5), (5, 0), (4, 33), (2, 2, 7), (3, 128), (259,))
SQUARED = Objective(similarity="squared", alpha=1e-3)
PENALTIES = ("none", "l2", "squared_l2")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.prepare_once(monkeypatch)
    interpreted.poison_results(monkeypatch)


def kernels(name: str) -> ModuleType:
    return importlib.import_module(f"awd_fast.ops.triton_{name}")


def moved(value: Any, device: str) -> Any:
    """Tensors, and those in lists and tuples, on this device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(moved(one, device) for one in value) if type(value) in (list, tuple) else value


def on_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator on DEVICE for arguments and results on the CPU, where the checks are."""

    def run(*arguments: Any) -> Any:
        found = operator(*(moved(argument, DEVICE) for argument in arguments))
        for tensor in found if isinstance(found, tuple) else (found,):
            assert tensor.device.type == DEVICE
        return moved(found, "cpu")

    return run


gram = on_device(triton_backend.gram)
combine = on_device(triton_backend.combine)
descend = on_device(triton_backend.descend)
merge_rows = on_device(triton_backend.merge_rows)


def check_both(base: Tensor | None, models: list[Tensor], groups: str, *targets: torch.dtype) -> None:
    check_gram(gram(base, models, groups), base, models, groups)
    count = reference.group_count(models[0], groups)
    weights = torch.linspace(-1.0, 1.0, count * len(models), dtype=torch.float64).view(count, len(models))
    for target in targets or (models[0].dtype,):
        check_combine(combine(base, models, weights, groups, target), base, models, weights, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", GROUPS)
def test_gram_and_combine_are_the_reference(groups, dtype):
    for shape in SHAPES if dtype == torch.float32 else SHAPES[-4:]:
        for k in (1, 3, 8, 9, 17) if shape == (2, 2, 7) else (2, 5):
            base, models = models_like(shape, k, dtype, k)
            check_both(base, models, groups)
            if k == 5:
                check_both(None, models, groups, *(DTYPES if shape == (4, 33) else (dtype,)))


@pytest.mark.parametrize("k", [3, 9])
def test_groups_are_divided_among_programs(monkeypatch, k):
    monkeypatch.setattr(kernels("gram"), "STEPS", 2)
    base, models = models_like((5, 203) if k == 3 else (3, 131), k, torch.float32, 0)
    for groups in GROUPS:
        first = gram(base, models, groups)
        check_gram(first, base, models, groups)
        assert torch.equal(gram(base, models, groups), first)
        assert torch.equal(first, first.mT)
    assert kernels("gram").divided(37, 7, 1) == (2, 19)


def test_parts_are_as_many_as_fill_a_gpu_and_cover_a_group():
    for size in (0, 1, 31, 32, 33, 8192, 8193, 10**6, 10**9 + 1):
        for blocks in (0, 1, 7, 4096, 10**6):
            for stride in (1, 32):
                chunk, splits = kernels("gram").divided(size, blocks, stride)
                assert chunk % stride == 0
                assert chunk * splits >= size
                assert splits == 1 or (splits * blocks <= 2 * 4096 and chunk >= 128 * stride)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_values_pass_unchanged_and_rounding_is_pytorchs(dtype):
    # Triton's interpreter knows no subnormal numbers of bfloat16 and cuts off where compiled code rounds (which
    # tests/test_triton_compile.py sees in the instructions).
    poor = dtype == torch.bfloat16 and triton_backend.interpreted()
    check_patterns(combine, dtype, torch.finfo(dtype).tiny if poor else 0.0)
    if not poor:
        check_rounding(combine, dtype)


def test_one_row_of_weights_serves_every_group():
    base, models = models_like((9, 14), 3, torch.float32, 0)
    weights = torch.tensor([[0.3, -0.1, 0.7]])
    for groups in GROUPS:
        check_combine(combine(base, models, weights, groups, torch.float32), base, models, weights, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_transposed_and_negated_tensors(dtype):
    flat, several = models_like((4 * 77 + 3,), 3, dtype, 1)
    base, models = flat[1:309].view(4, 77), [model[1:309].view(4, 77) for model in several]
    for groups in GROUPS:
        check_both(base, models, groups)
        check_both(base.T, [model.T for model in models], groups)
        check_both(base[:, ::2], [torch._neg_view(model[:, ::2]) for model in models], groups)


@pytest.mark.parametrize(
    ("k", "penalty"),
    [(k, penalty) for k in (1, 2, 3, 5, 8) for penalty in PENALTIES] + [(9, "none"), (17, "l2"), (32, "squared_l2")],
)
def test_sgd_with_the_squared_similarity_follows_the_reference(k, penalty):
    """Every pair of K, penalty and options, not every three."""
    values = grams(5, k, k, common=1.0)
    objective = Objective(similarity="squared", penalty=penalty, alpha=1e-3)
    every = (
        SGD(lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-2, iterations=5),
        SGD(lr=0.2, iterations=5),
        SGD(lr=2.0, momentum=0.0, weight_decay=0.0, iterations=3),
    )
    one = every[(k + PENALTIES.index(penalty)) % 3 if k < 9 else 0]
    for options in (one, SGD(iterations=0)) if k < 9 else (one,):
        found, history = descend(values, objective, options)
        expected, losses = reference.descend(values, objective, options)
        assert found.shape == expected.shape
        assert history.shape == losses.shape
        assert (found - expected).norm() <= 1e-9 * expected.norm()
        torch.testing.assert_close(history, losses, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_sgd_with_the_absolute_similarity_has_the_same_losses(k):
    values = grams(4, k, 100 + k)
    for options in (SGD(lr=0.01, iterations=checks.COMPARED), SGD(lr=0.1, momentum=0.0, iterations=9)):
        _, history = descend(values, Objective(alpha=1e-3), options)
        _, losses = reference.descend(values, Objective(alpha=1e-3), options)
        torch.testing.assert_close(history, losses, rtol=1e-4, atol=0)


def test_long_runs_go_from_launch_to_launch(monkeypatch):
    values, options = grams(5, 8, 0, common=1.0), SGD(lr=0.2, iterations=10)
    whole = descend(values, SQUARED, options)
    monkeypatch.setattr(kernels("descend"), "LOSSES", 8)  # of two programs: launches of four losses, and of three
    for found, expected in zip(descend(values, SQUARED, options), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_awkward_groups_are_defined(k, eps, similarity):
    values = grams(9, k, k, awkward=True)
    objective = Objective(similarity=similarity, eps=eps, alpha=1e-3)
    found, history = descend(values, objective, SGD(lr=1.0, iterations=4))
    assert bool(found.isfinite().all())
    assert bool(history.isfinite().all())
    expected = reference.descend(values, objective, SGD(iterations=0))[1][0]
    assert float(history[0]) == pytest.approx(float(expected), rel=1e-12)
    assert bool((found[0] == 0.0).all())


def test_exactly_orthogonal_vectors_stay():
    """sign(0) = 0: where every pair is orthogonal d = 0 is a fixed point."""
    values = torch.eye(3, dtype=torch.float64).repeat(5, 1, 1)
    values[2, 0, 1] = values[2, 1, 0] = 0.5
    found, _ = descend(values, Objective(), SGD(lr=0.5, iterations=5))
    expected = reference.descend(values, Objective(), SGD(lr=0.5, iterations=5))[0]
    assert found.abs().amax(dim=1).bool().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_no_groups_at_all():
    for optimizer in (SGD(iterations=5), Converge()):
        found, history = descend(torch.zeros(0, 3, 3, dtype=torch.float64), Objective(), optimizer)
        assert found.shape == (0, 3)
        assert bool((history == 0.0).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_gram_that_is_not_finite_has_no_finite_loss(k, value):
    for i, j in ((0, 0), (k - 1, 0)):
        values = grams(9, k, 1)
        values[4, i, j] = values[4, j, i] = value
        found, history = descend(values, Objective(), SGD(iterations=2))
        assert bool(history.isnan().all())
        assert bool(found[torch.arange(9) != 4].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", ["row", "column"])
def test_merge_rows_is_its_operators(groups, dtype):
    base, models = models_like((6, 41) if groups == "row" else (41, 6), 4, dtype, 0)
    weights = torch.linspace(1.0, 0.2, 4, dtype=torch.float64)
    optimizer = checks.gentle(SGD(iterations=10), reference.gram(base, models, groups))
    for origin, target in ((base, dtype), (None, torch.float32)):
        merged, g, found, history = merge_rows(origin, models, weights, SQUARED, optimizer, groups, target)
        expected = reference.merge_rows(origin, models, weights, SQUARED, optimizer, groups, target)
        check_gram(g, origin, models, groups)
        assert merged.dtype == target
        check_combine(merged, origin, models, statistics.merge_weights(weights, found), groups)
        assert (found - expected[2]).norm() <= 1e-6 * expected[2].norm()
        torch.testing.assert_close(history, expected[3], rtol=1e-9, atol=1e-13)


def test_converge_is_that_of_the_reference_on_the_device():
    base, models = models_like((6, 41), 3, torch.float32, 0)
    optimizer = Converge(max_iterations=5)
    _, g, found, history = merge_rows(base, models, torch.ones(3), SQUARED, optimizer, "row", torch.float32)
    assert loss_at(g, found, SQUARED) == pytest.approx(float(history[-1]), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(history, reference.descend(g, SQUARED, optimizer)[1], rtol=1e-6, atol=1e-12)


OPTIMIZERS = (
    Adam(lr=1e-3, iterations=4),
    Adam(lr=2e-3, betas=(0.0, 0.5), eps=1e-4, weight_decay=0.1, iterations=3),
    SGD(lr=1e-2, momentum=0.5, nesterov=True, weight_decay=0.2, iterations=4),
    SGD(lr=1e-2, momentum=0.0, iterations=3),
)
WAYS = {"resident": {}, "streaming": {"THREADS": 0}, "in launches": {"LOSSES": 12}}
WAYS["streaming in launches"] = WAYS["streaming"] | WAYS["in launches"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(kernels("adam"), name, value)
    return request.param


BOTH_KERNELS = pytest.mark.parametrize("way", ["resident", "streaming"], indirect=True)


@pytest.mark.parametrize(
    ("way", "k"), [(way, k) for way in WAYS for k in (1, 3, 8) if k == 3 or "launches" not in way], indirect=["way"]
)
def test_adam_rows_follow_the_reference_in_float64(way, k):
    for index, objective in enumerate(OBJECTIVES):
        shape = (3, 33) if index % 2 else (33, 3)
        base, models = models_like(shape, k, torch.float64, k)
        groups = ("row" if index % 2 else "column") if index else "tensor"
        origin = base if index < 2 else None
        given = models if index < 2 else [model - base for model in models]
        check_rows(moved(origin, DEVICE), moved(given, DEVICE), groups, objective, OPTIMIZERS[index], backend="triton")


@BOTH_KERNELS
@pytest.mark.parametrize("shape", [(1, 2, 2), (4, 2), (0, 5), (5, 0), (3, 300)])
def test_adam_rows_of_every_size(way, shape):
    base, models = moved(models_like(shape, 3, torch.float64, 0), DEVICE)
    for groups in GROUPS if shape != (3, 300) else ("row", "tensor"):
        check_rows(base, models, groups, OBJECTIVES[1], Adam(lr=1e-3, iterations=2), 1e-7, "triton")


@BOTH_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adam_rows_in_narrow_storage(way, dtype):
    base, models = moved(models_like((3, 133), 5, dtype, 1), DEVICE)
    check_rows(base, models, "row", OBJECTIVES[1], SGD(lr=1e-2, iterations=5), 1e-5, "triton")
    found = ops.adam_rows(base, models, Objective(), Adam(lr=1e-4, iterations=3), backend="triton")[0]
    expected = ops.adam_rows(base, models, Objective(), Adam(lr=1e-4, iterations=3), backend="reference")[0]
    assert found.dtype == torch.float32
    assert distance(found, expected) <= 0.1  # a step may go the other way where a gradient is rounding


@BOTH_KERNELS
def test_zero_groups_and_an_eps_that_rounds_to_nothing_stay_finite(way):
    for dtype in (torch.float32, torch.float64):
        base, models = moved(models_like((3, 37), 3, dtype, 1), DEVICE)
        for eps in (1e-8, 1e-60):
            found = ops.descend_groups(base, models, Objective(), Adam(eps=eps, iterations=2), backend="triton")
            assert all(bool(tensor.isfinite().all()) for tensor in found)
            assert bool((found.shift[0] == 0.0).all())  # the first row is the base's


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 2])
def test_models_that_are_not_finite_have_no_finite_loss(k, value):
    base, models = models_like((3, 13), k, torch.float32, 0)
    models[0][2, 3] = value
    for optimizer in (Adam(iterations=2), SGD(iterations=2)):
        found = ops.descend_groups(*moved((base, models), DEVICE), Objective(), optimizer, backend="triton")
        assert bool(found.history.isnan().all())
        assert bool(found.shift[:2].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, SGD(lr=1e-2)])
def test_a_step_is_that_of_the_reference(optimizer, dtype):
    for size in (0, 1, 511, 9001) if dtype == torch.float32 else (15, 511):
        for k in (1, 8) if size < 1000 else (17,):
            base, models = moved(models_like((size + 1,), k, dtype, k), DEVICE)
            base, models = base[1:], [model[1:] for model in models]  # not aligned to anything but an element
            slope = torch.linspace(-0.7, 1.3, k + 1, dtype=torch.float64)
            mine, theirs = moved(states(base.cpu(), k, offset=1), DEVICE), moved(states(base.cpu(), k), DEVICE)
            check_step(base, models, mine, theirs, moved(slope, DEVICE), optimizer, 3, 0.05 * (k % 2), "triton")


def test_blocks_of_rows_are_those_of_the_whole():
    given = moved(models_like((5, 33), 3, torch.float64, 0), DEVICE)
    arguments = (torch.ones(3), SQUARED, SGD(lr=0.5, iterations=4))
    check_blocks(ops.merge_rows, given, arguments, (3, 4), 3, tolerance=1e-9, backend="triton")


@BOTH_KERNELS
def test_blocks_of_rows_are_those_of_the_whole_by_adam(way):
    given = moved(models_like((5, 33), 3, torch.float64, 0), DEVICE)
    check_blocks(ops.descend_groups, given, (SQUARED, OPTIMIZERS[1]), (3, 4), 1, tolerance=1e-7, backend="triton")


def test_results_are_bitwise_the_same_from_call_to_call():
    base, models = moved(models_like((5, 300), 3, torch.float32, 5), DEVICE)
    slope = moved(torch.linspace(-1, 1, 4, dtype=torch.float64), DEVICE)
    runs = []
    for _ in range(2):
        run = [ops.gram(base, models, "tensor", backend="triton")]
        run += ops.descend_groups(base, models, Objective(), Adam(iterations=2), backend="triton")
        state = moved(states(base.cpu(), 1), DEVICE)
        run += [ops.adam_step(base, models, *state, slope, Adam(), 2, l1=0.1, backend="triton"), *state]
        runs.append(run)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_calls_that_name_no_backend_do_not_get_the_interpreter(monkeypatch):
    assert backends.available()["triton"] is None
    if triton_backend.interpreted():
        monkeypatch.setattr(backends.module("native"), "refusal", lambda operator, tensors: "it refuses")
        assert backends.select("gram", None, [torch.ones(2, 3)]) is reference
        assert backends.select("gram", "triton", [torch.ones(2, 3)]) is triton_backend
        assert any("interpreter" in line for line in backends.machine())


def test_what_it_does_not_take_is_said_in_words():
    class Marked(Tensor):
        pass

    plain = torch.ones(2, 3, device=DEVICE)
    cases = {
        "Marked": plain.as_subclass(Marked),
        "not on meta": plain.to("meta"),
        "dense": plain.to_sparse(),
        "does not take torch.int32": plain.int(),
        "no multiple of 4 bytes": torch.frombuffer(bytearray(32), dtype=torch.float32, offset=2, count=6),
    }
    for words, tensor in cases.items():
        if DEVICE == "cpu" or "bytes" not in words:
            assert words in str(triton_backend.refusal("gram", [plain, tensor])), words
    assert triton_backend.refusal("gram", [plain, torch.nn.Parameter(plain)]) is None
    many = torch.zeros(1, 33, 33, dtype=torch.float64, device=DEVICE)
    with pytest.raises(InputError, match="cannot run descend: it takes up to 32 tasks, not 33"):
        ops.descend(many, Objective(), SGD(iterations=1), backend="triton")
    with pytest.raises(InputError, match="cannot run gram: it takes up to 32 tasks, not 33"):
        ops.gram(None, [plain] * 34, backend="triton")
    assert ops.gram(plain, [plain] * 32, backend="triton").shape == (2, 32, 32)


def outside(code: str) -> str:
    """What this code prints in a process without Triton's interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True).stdout


def test_triton_is_imported_late_and_missed_in_words():
    found = outside(
        "import sys\nfrom awd_fast import ops\nfrom awd_fast.ops import backends\n"
        "print(backends.available()['triton'], 'triton' in sys.modules)\n"
        "sys.modules['triton'] = None\nbackends.module('triton').unavailable.cache_clear()\n"
        "print(backends.available()['triton'])"
    )
    present, missing = found.splitlines()
    assert present.endswith("False")
    assert torch.cuda.is_available() or torch.xpu.is_available() or "finds no GPU" in present
    assert "triton is not installed" in missing
