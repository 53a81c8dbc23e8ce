"""The CUDA operators against the reference: run thread by thread on the CPU, and on a GPU where there is one.

Fresh random data, every dtype, edge sizes, NaN-poisoned results, at tolerances derived from dtype and size.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awd_fast import checks, ops, statistics
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Objective
from awd_fast.ops import backends, cuda, reference
from tests import emulated
from tests.blocks import check_blocks
from tests.test_native import DTYPES, GROUPS, check_combine, check_gram, grams, loss_at, models_like

pytestmark = pytest.mark.skipif(
    emulated.why_not() is not None and cuda.unavailable() is not None, reason=str(emulated.why_not())
)
SHAPES = ((1,), (), (7, 33), (5, 1), (1, 9), (0, 5), (5, 0), (70, 44), (3, 5, 8), (37, 256), (20001,))
SQUARED = Objective(similarity="squared", alpha=1e-3)
PENALTIES = ("none", "l2", "squared_l2")


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors lie: "cpu" in the emulation."""
    if request.param == "cuda":
        reason = cuda.unavailable()
        if reason is not None:
            pytest.skip(reason)
        yield "cuda"
        return
    if emulated.why_not() is not None:
        pytest.skip(str(emulated.why_not()))
    with emulated.running(emulated.load()):
        yield "cpu"


def made(shape: tuple[int, ...], k: int, dtype: torch.dtype, seed: int, device: str) -> tuple[Tensor, list[Tensor]]:
    base, models = models_like(shape, k, dtype, seed)
    return base.to(device), [model.to(device) for model in models]


def on_cpu(base: Tensor | None, models: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    return None if base is None else base.cpu(), [model.cpu() for model in models]


def checked_gram(base: Tensor | None, models: list[Tensor], groups: str) -> None:
    found = cuda.gram(base, models, groups)
    check_gram(found.cpu(), *on_cpu(base, models), groups)


def checked_combine(base: Tensor | None, models: list[Tensor], groups: str, target: torch.dtype, one: bool) -> None:
    count = 1 if one else reference.group_count(models[0], groups)
    weights = torch.randn(count, len(models), dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    found = cuda.combine(base, models, weights.to(models[0].device), groups, target)
    assert found.dtype == target
    check_combine(found.cpu(), *on_cpu(base, models), weights, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", GROUPS)
def test_gram_and_combine_are_the_reference(device, groups, shape, dtype):
    for seed, k in enumerate((1, 3, 8, 17) if torch.Size(shape).numel() < 5000 else (3,)):
        base, models = made(shape, k, dtype, seed, device)
        for origin in (base, None):
            checked_gram(origin, models, groups)
            for target in (dtype, torch.float32, torch.bfloat16) if k == 3 else (dtype,):
                checked_combine(origin, models, groups, target, one=False)
        checked_combine(base, models, groups, dtype, one=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_transposed_and_misaligned_tensors(device, dtype):
    flat, several = made((4 * 80 + 3,), 3, dtype, 1, device)
    for start in (1, 3):
        base = flat[start : start + 320].view(4, 80)
        models = [model[start : start + 320].view(4, 80) for model in several]
        for groups in GROUPS:
            for view in (lambda t: t, lambda t: t.T, lambda t: t[:, ::2]):
                checked_gram(view(base), [view(model) for model in models], groups)
                checked_combine(view(base), [view(model) for model in models], groups, dtype, one=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_pass_unchanged_and_round_as_pytorch_does(device, dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    one = torch.ones(1, 1, device=device)
    for target in (torch.float32, dtype):
        found = cuda.combine(None, [patterns], one, "tensor", target)
        torch.testing.assert_close(found, (patterns.float() + 0.0).to(target), rtol=0, atol=0, equal_nan=True)
    halves = torch.arange(0, 0x7F00, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 1e-8, 2.9802322e-08, 6e-8, -0.0])
    values = torch.cat([(halves[:-1] + halves[1:]) / 2, special]).to(device)
    found = cuda.combine(None, [values], one, "tensor", dtype)
    torch.testing.assert_close(found, (values + 0.0).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_long_groups_are_cut_and_added_in_order(device):
    """Beside short ones, which are not."""
    short = made((5, 40), 3, torch.float32, 1, device)
    for shape, groups in (((2, 17001), "row"), ((2500, 38), "column"), ((18, 1000), "tensor")):
        base, models = made(shape, 3, torch.float32, 0, device)
        checked_gram(base, models, groups)
        assert torch.equal(cuda.gram(base, models, groups), cuda.gram(base, models, groups))
        together = cuda.gram_many([short, (base, models), short], [()] * 3, groups)
        for found, (origin, others) in zip(together, (short, (base, models), short), strict=True):
            check_gram(found.cpu(), *on_cpu(origin, others), groups)


@pytest.mark.parametrize("groups", ["row", "column"])
def test_parameters_of_a_model_in_one_launch_are_each_their_own(device, groups):
    """More of them than a table holds, of different shapes, without elements too."""
    shapes = [(3, 8), (5, 12), (0, 4), (33, 7), (2, 0), (1, 1)] * 50
    parameters = [made(shape, 2, torch.float32, seed, device) for seed, shape in enumerate(shapes)]
    for found, (base, models) in zip(cuda.gram_many(parameters, [()] * 300, groups), parameters, strict=True):
        check_gram(found.cpu(), *on_cpu(base, models), groups)
    each = [torch.rand(reference.group_count(models[0], groups), 2) for _, models in parameters]
    sums = ops.combine_many(parameters, [w.to(device) for w in each], groups, backend="cuda")
    for found, w, (base, models) in zip(sums, each, parameters, strict=True):
        check_combine(found.cpu(), *on_cpu(base, models), w, groups)
    weights = torch.tensor([0.7, 0.4], dtype=torch.float64)
    optimizer = SGD(lr=0.05, iterations=3)
    dtypes = [torch.bfloat16 if index % 3 == 0 else torch.float32 for index in range(300)]
    merged = ops.merge_rows_many(parameters, weights, SQUARED, optimizer, groups, dtypes=dtypes, backend="cuda")
    for (found, _, a, history), dtype, (base, models) in zip(merged, dtypes, parameters, strict=True):
        base_here, models_here = on_cpu(base, models)
        expected = reference.merge_rows(base_here, models_here, weights, SQUARED, optimizer, groups, torch.float32)
        assert found.dtype == dtype
        torch.testing.assert_close(a.cpu(), expected[2], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(history.cpu(), expected[3], rtol=1e-6, atol=1e-12)
        check_combine(found.cpu(), base_here, models_here, statistics.merge_weights(weights, a.cpu()), groups)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_sgd_with_the_squared_similarity_follows_the_reference(device, k, penalty):
    gram = grams(37, k, k, common=1.0)
    objective = Objective(similarity="squared", penalty=penalty, alpha=1e-3)
    for options in (
        SGD(lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-2, iterations=33),
        SGD(lr=2.0, momentum=0.0, weight_decay=0.0, iterations=20),
        SGD(iterations=0),
    ):
        found, history = cuda.descend(gram.to(device), objective, options)
        expected, losses = reference.descend(gram, objective, options)
        assert (found.cpu() - expected).norm() <= 1e-9 * expected.norm()
        torch.testing.assert_close(history.cpu(), losses, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("k", [2, 5, 8, 11])
def test_sgd_with_the_absolute_similarity_and_awkward_groups(device, k):
    gram = grams(40, k, k, awkward=True)
    objective = Objective(alpha=1e-3)
    found, history = cuda.descend(gram.to(device), objective, SGD(lr=5.0, iterations=40))
    losses = reference.descend(gram, objective, SGD(lr=5.0, iterations=40))[1]
    assert bool(found.isfinite().all())
    torch.testing.assert_close(history.cpu(), losses, rtol=1e-4, atol=1e-12)
    assert float(history[-1]) == pytest.approx(loss_at(gram, found.cpu(), objective), rel=1e-8)


@pytest.mark.parametrize("k", [3, 9])
def test_long_runs_of_sgd_continue_from_stretch_to_stretch(device, k):
    gram = grams(33, k, 3, common=1.0).to(device)
    options = SGD(lr=2e-3, momentum=0.9, weight_decay=0.0, iterations=4200)
    found, history = cuda.descend(gram, SQUARED, options)
    assert len(history) == 4201
    short = cuda.descend(gram, SQUARED, replace(options, iterations=4000))[1]
    assert torch.equal(history[:4001], short)
    assert float(history[-1]) == pytest.approx(loss_at(gram.cpu(), found.cpu(), SQUARED), rel=1e-9)


def test_nan_in_a_gram_matrix_shows_in_the_history(device):
    gram = grams(40, 4, 0)
    gram[17, 2, 1] = torch.nan
    for optimizer in (SGD(lr=0.1, iterations=3), Converge(max_iterations=2)):
        assert not bool(cuda.descend(gram.to(device), SQUARED, optimizer)[1].isfinite().any())


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("k", [1, 2, 5, 8, 9])
def test_converge_finds_what_the_reference_finds(device, k, penalty):
    """Every pair of K, penalty and similarity, not every three: most of the time is the reference's."""
    gram = grams(35, k, k, spread=0.3)
    similarity = ("absolute", "squared")[(k + PENALTIES.index(penalty)) % 2]
    objective = Objective(similarity=similarity, penalty=penalty, alpha=1e-3)
    found, history = cuda.descend(gram.to(device), objective, Converge())
    expected = float(reference.descend(gram, objective, Converge())[1][-1])
    assert float(history[-1]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert float(history[-1]) == pytest.approx(loss_at(gram, found.cpu(), objective), rel=1e-6, abs=1e-9)
    assert float(history[0]) == pytest.approx(loss_at(gram, torch.zeros_like(found).cpu(), objective), rel=1e-9)
    assert bool((history.diff() <= 1e-12).all())


def test_converge_never_rises_on_awkward_groups(device):
    """Zero, identical and half-zero vectors, whose minima are many."""
    for k in (3, 9):
        gram = grams(35, k, k, awkward=True)
        found, history = cuda.descend(gram.to(device), Objective(), Converge())
        assert bool(found.isfinite().all())
        assert bool((history.diff() <= 1e-12).all())
        assert float(history[-1]) < 0.7 * float(history[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", ["row", "column"])
@pytest.mark.parametrize("k", [2, 5, 8, 10])
def test_merge_rows_is_its_three_operators(device, k, groups, dtype):
    for shape in ((67, 40), (33, 9), (1, 5)):
        base, models = made(shape, k, dtype, k, device)
        weights = torch.linspace(1.0, 0.2, k, dtype=torch.float64)
        for origin in (base, None):
            here = on_cpu(origin, models)
            gram = reference.gram(*here, groups)
            optimizer = checks.gentle(SGD(iterations=20), gram)
            for target in (dtype, torch.float32):
                found = ops.merge_rows(
                    origin, models, weights, SQUARED, optimizer, groups, dtype=target, backend="cuda"
                )
                check_gram(found.gram.cpu(), *here, groups)
                expected, losses = reference.descend(found.gram.cpu(), SQUARED, optimizer)
                if reference.group_view(models[0], groups).shape[1] >= k:  # else many coefficients give the same d
                    torch.testing.assert_close(found.coefficients.cpu(), expected, rtol=1e-6, atol=1e-9)
                torch.testing.assert_close(found.history.cpu(), losses, rtol=1e-9, atol=1e-14)
                factors = statistics.merge_weights(weights, found.coefficients.cpu())
                assert found.merged.dtype == target
                check_combine(found.merged.cpu(), *here, factors, groups)


def test_merge_rows_by_converge(device):
    base, models = made((40, 24), 4, torch.float32, 3, device)
    weights = torch.ones(4, dtype=torch.float64)
    found = ops.merge_rows(base, models, weights, SQUARED, Converge(), "row", backend="cuda")
    here = on_cpu(base, models)
    expected = reference.merge_rows(*here, weights, SQUARED, Converge(), "row", torch.float32)
    assert float(found.history[-1]) == pytest.approx(float(expected[3][-1]), rel=1e-4)
    check_combine(found.merged.cpu(), *here, statistics.merge_weights(weights, found.coefficients.cpu()), "row")


OPTIMIZERS = (
    Adam(lr=0.01, iterations=6),
    Adam(lr=0.01, betas=(0.5, 0.9), weight_decay=0.1, iterations=3),
    SGD(lr=0.5, iterations=5),
    SGD(lr=0.5, momentum=0.9, nesterov=True, iterations=5),
    SGD(lr=0.5, momentum=0.0, iterations=0),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 10])
def test_adam_rows_follow_the_reference(device, k, groups, dtype):
    """Groups that registers hold and, of ten models, those that they do not."""
    long, small = ((130, 3), (17, 3)) if groups == "column" else ((3, 130), (3, 17))
    for index, shape in enumerate(((5, 33), long, (1, 1), (4, 0), (0, 4)) if k < 10 else (small,)):
        base, models = made(shape, k, dtype, index, device)
        for at, optimizer in enumerate(OPTIMIZERS if index == 0 else OPTIMIZERS[:1]):
            both = SQUARED, Objective(similarity="squared", penalty="l1", alpha=1e-3)
            for objective in both if at == 0 else both[at % 2 :][:1]:  # each optimiser with one, by turns
                origin = None if at == 1 else base
                found = cuda.adam_rows(origin, models, objective, optimizer, groups)
                expected = reference.adam_rows(*on_cpu(origin, models), objective, optimizer, groups)
                compare_descents(found, expected, dtype)


def compare_descents(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """d, history, G, <t, d> and <d, d>."""
    size = 1e-8 if dtype == torch.float64 else 2e-4
    shift, history, gram, inner, square = (tensor.cpu() for tensor in found)
    assert shift.dtype == expected[0].dtype
    assert (shift - expected[0]).norm() <= size * expected[0].norm() + 1e-12
    torch.testing.assert_close(history, expected[1], rtol=size, atol=1e-9)
    torch.testing.assert_close(gram, expected[2], rtol=1e-12, atol=1e-12)
    scale = float(expected[3].abs().max()) if expected[3].numel() else 0.0
    torch.testing.assert_close(inner, expected[3], rtol=size, atol=size * scale + 1e-12)
    torch.testing.assert_close(square, expected[4], rtol=2 * size, atol=1e-12)


@pytest.mark.parametrize(("size", "dtype"), [(1600, torch.float32), (3100, torch.bfloat16), (1600, torch.float64)])
def test_adam_rows_hold_long_groups_in_other_ways(device, size, dtype):
    base, models = made((2, size), 2, dtype, 0, device)
    found = cuda.adam_rows(base, models, SQUARED, Adam(lr=0.01, iterations=3), "row")
    expected = reference.adam_rows(*on_cpu(base, models), SQUARED, Adam(lr=0.01, iterations=3), "row")
    compare_descents(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 8, 9, 18])
def test_a_step_follows_the_reference(device, k, dtype):
    for size in (1, 7, 64, 1003):
        base, models = made((size,), k, dtype, size, device)
        compute = reference.compute_dtype(dtype)
        for at, optimizer in enumerate(OPTIMIZERS[:4]):
            generator = torch.Generator().manual_seed(at)
            state = [torch.rand(size, generator=generator).to(compute) for _ in range(3)]
            slope = torch.randn(k + 1, generator=generator, dtype=torch.float64)
            given = [tensor.clone().to(device) for tensor in state]
            origin = None if at == 1 else base
            found = cuda.adam_step(origin, models, *given, slope.to(device), optimizer, 3, 0.05)
            expected = reference.adam_step(*on_cpu(origin, models), *state, slope, optimizer, 3, 0.05)
            bound = 1e-12 if dtype == torch.float64 else 1e-5
            for moved, right in zip(given, state, strict=True):
                torch.testing.assert_close(moved.cpu(), right, rtol=bound, atol=bound)
            torch.testing.assert_close(found.cpu(), expected, rtol=10 * bound, atol=10 * bound * (1 + size))


def test_a_step_leaves_what_it_does_not_use(device):
    base, models = made((50,), 3, torch.float32, 0, device)
    shift, slope = torch.rand(50).to(device), torch.randn(4, dtype=torch.float64).to(device)
    expected = shift.cpu().clone()
    optimizer = SGD(lr=0.5, momentum=0.0, weight_decay=0.1)
    version = shift._version
    cuda.adam_step(base, models, shift, None, None, slope, optimizer, 1, 0.0)
    reference.adam_step(*on_cpu(base, models), expected, None, None, slope.cpu(), optimizer, 1, 0.0)
    torch.testing.assert_close(shift.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert shift._version > version


@pytest.mark.parametrize("optimizer", [Adam(lr=0.01, iterations=5), SGD(lr=0.5, iterations=5)])
def test_a_group_over_many_tensors_streams(device, optimizer):
    parts = [
        made(shape, 3, torch.float32, seed, device) for seed, shape in enumerate(((20, 30), (7,), (0, 3), (90, 91)))
    ]
    for objective in (SQUARED, Objective(penalty="l1", alpha=1e-3)):
        shifts, gram, inner, square, history = cuda.descend_stream(parts, objective, optimizer)
        here = [on_cpu(base, models) for base, models in parts]
        vectors = torch.cat([reference.task_vectors(base, models, "tensor") for base, models in here], dim=2)
        exact, losses = reference.descend_elements(vectors.double(), objective, optimizer)
        found = torch.cat([shift.flatten() for shift in shifts]).cpu()
        assert (found - exact[0]).norm() <= 2e-4 * exact.norm()
        torch.testing.assert_close(history.cpu(), losses, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(gram.cpu().sum(dim=0), statistics.gram(vectors)[0], rtol=1e-6, atol=1e-6)
        expected = vectors[0].double() @ found.double()
        torch.testing.assert_close(inner.cpu().sum(dim=0), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        assert float(square.sum()) == pytest.approx(float(found.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("k", [3, 10])
def test_blocks_of_rows_are_those_of_the_whole(device, k):
    """By the fused kernel (of at most eight models), by three, and by Adam's; blocks end within a warp's groups."""
    given = made((75, 24), k, torch.float32, k, device)
    for optimizer in (SGD(lr=0.5, iterations=6), Converge(max_iterations=3)):
        arguments = (torch.ones(k), SQUARED, optimizer)
        check_blocks(ops.merge_rows, given, arguments, (40, 41), 3, tolerance=1e-9, backend="cuda")
    given = made((9, 24), k, torch.float32, k, device)
    for elementwise in (Adam(lr=0.01, iterations=3), SGD(lr=0.1, iterations=3)):
        check_blocks(ops.descend_groups, given, (SQUARED, elementwise), (4, 5), 1, tolerance=1e-6, backend="cuda")


def test_results_are_the_same_bits_again(device):
    base, models = made((70, 40), 5, torch.float32, 0, device)
    weights = torch.ones(5, dtype=torch.float64)
    for _ in range(2):
        runs = []
        for _ in range(2):
            found = [
                *cuda.merge_rows(base, models, weights, Objective(), SGD(lr=5.0, iterations=30), "row", base.dtype)
            ]
            found += cuda.adam_rows(base, models, Objective(), Adam(iterations=5), "row")
            found += cuda.descend(found[1], Objective(), Converge(max_iterations=20))
            runs.append(found)
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_too_many_models_are_refused_in_words(device):
    tensors = [torch.ones(3, device=device) for _ in range(130)]
    with pytest.raises(InputError, match="backend cuda cannot run gram: it takes at most 120 models"):
        ops.gram(None, tensors, backend="cuda")


def test_without_a_device_the_reason_is_said():
    if cuda.unavailable() is None:
        pytest.skip("there is a CUDA device")
    assert backends.unavailable("cuda")
    with pytest.raises(InputError, match="backend cuda cannot run gram: "):
        ops.gram(None, [torch.ones(3)], backend="cuda")
