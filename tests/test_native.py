"""The compiled operators against the reference, on fresh random data, at tolerances derived from dtype and size."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awd_fast import ops, statistics
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Converge, Objective
from awd_fast.ops import native, reference

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GROUPS = ("row", "column", "tensor")
SHAPES = ((1,), (), (7, 33), (5, 1), (1, 9), (0, 5), (5, 0), (70, 300), (3, 5, 7), (2100, 40), (70001,))
TASKS = (1, 2, 3, 5, 8, 17, 33)
EPS = torch.finfo(torch.float64).eps
Combine = Callable[..., Tensor]


def instruction_sets() -> list[str]:
    """Those that this machine runs."""
    if native.unavailable() is not None:
        return ["none"]
    module, found = native._module(), []
    present = module.cpu_isa()
    for name in ("base", "avx2", "avx512"):
        try:
            module.choose_cpu_isa(name)
        except ValueError:
            continue
        found.append(name)
    module.choose_cpu_isa(present)
    return found


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    native._module().choose_cpu_isa(request.param)
    return request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results are allocated full of NaN, so that an element that a kernel leaves out is seen."""
    present = native._module().cpu_isa()
    empty = torch.empty
    monkeypatch.setattr(native.torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    yield
    native._module().choose_cpu_isa(present)  # whatever a test chose


def models_like(shape: tuple[int, ...], k: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A base and K models near it; the first row of each model is the base's, so that its task vectors are zero."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    models = [(base + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(k)]
    if len(shape) > 1 and shape[0]:
        for model in models:
            model[0] = base[0]
    return base, models


def grams(
    r: int, k: int, seed: int, *, d: int = 40, common: float = 0.5, spread: float = 0.0, awkward: bool = False
) -> Tensor:
    """G [R, K, K] of vectors with a common part, of length about 1 times lognormal factors of this spread.

    Awkward ones are zero, identical, or half zero.
    """
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(r, k, d, generator=generator, dtype=torch.float64)
    t = (t + common * torch.randn(r, 1, d, generator=generator, dtype=torch.float64)) / d**0.5
    t = t * (spread * torch.randn(r, k, 1, generator=generator, dtype=torch.float64)).exp()
    if awkward and r >= 4:
        t[0] = 0.0
        t[1] = t[1, :1]
        t[2, ::2] = 0.0
        t[3, -1] = t[3, 0]
    return t @ t.mT


def loss_at(gram: Tensor, coefficients: Tensor, objective: Objective) -> float:
    inner, square = statistics.span_moments(gram, coefficients)
    after = statistics.similarity(statistics.shifted_gram(gram, inner, square), objective).mean()
    return float(after + objective.alpha * statistics.penalty(square, objective).sum())


def check_gram(found: Tensor, base: Tensor | None, models: list[Tensor], groups: str) -> None:
    expected = reference.gram(base, models, groups)
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    size = reference.group_view(models[0], groups).shape[1]
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    bound = 4.0 * (size + 8) * EPS * norms[:, :, None] * norms[:, None, :]
    assert bool(((found - expected).abs() <= bound).all())


def check_combine(found: Tensor, base: Tensor | None, models: list[Tensor], weights: Tensor, groups: str) -> None:
    expected = reference.combine(base, models, weights, groups, found.dtype)
    assert found.shape == expected.shape
    t = reference.task_vectors(base, models, groups).double()  # [R, K, D]
    size = (weights.double()[:, :, None] * t).abs().sum(dim=1)
    compute = torch.finfo(reference.compute_dtype(models[0].dtype))
    stored = torch.finfo(found.dtype)
    bound = 2.0 * (len(models) + 1) * compute.eps * reference.ungroup(size, models[0].shape, groups)
    bound = bound + 2.0 * max(stored.eps, compute.eps) * expected.double().abs() + stored.smallest_normal * stored.eps
    assert bool(((found.double() - expected.double()).abs() <= bound).all())


def check_both(base: Tensor, models: list[Tensor], groups: str) -> None:
    check_gram(native.gram(base, models, groups), base, models, groups)
    weights = torch.rand(reference.group_view(base, groups).shape[0], len(models))
    check_combine(native.combine(base, models, weights, groups, base.dtype), base, models, weights, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", GROUPS)
def test_gram_and_combine_are_the_reference(groups, shape, dtype):
    counts = TASKS if torch.Size(shape).numel() < 1000 else (3, 8)
    for seed, k in enumerate(counts):
        base, models = models_like(shape, k, dtype, seed)
        for origin in (base, None):
            check_gram(native.gram(origin, models, groups), origin, models, groups)
            count = reference.group_view(base, groups).shape[0]
            weights = torch.randn(count, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for target in (dtype, torch.float32, torch.bfloat16) if k in (3, 8) else (dtype,):
                check_combine(native.combine(origin, models, weights, groups, target), origin, models, weights, groups)


@pytest.mark.parametrize("seed", range(3))
def test_every_instruction_set_agrees(instruction_set, seed):
    for dtype in DTYPES:
        base, models = models_like((37, 131), 5, dtype, seed)
        for groups in GROUPS:
            check_both(base, models, groups)


def test_one_row_of_weights_serves_every_group():
    base, models = models_like((9, 14), 3, torch.float32, 0)
    weights = torch.tensor([[0.3, -0.1, 0.7]])
    for groups in GROUPS:
        check_combine(native.combine(base, models, weights, groups, torch.float32), base, models, weights, groups)


def check_patterns(combine: Combine, dtype: torch.dtype, least: float = 0.0) -> None:
    """Every 16-bit value passes unchanged, but for those between 0 and `least`, which are not tried."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[(patterns == 0.0) | ~(patterns.abs() < least)]
    one = torch.ones(1, 1)
    for target in (torch.float32, dtype):
        expected = reference.combine(None, [patterns], one, "tensor", target)
        found = combine(None, [patterns], one, "tensor", target)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def check_rounding(combine: Combine, dtype: torch.dtype) -> None:
    """Ties go to even, and the largest and smallest numbers to where PyTorch rounds them."""
    halves = torch.arange(0, 0x7F00, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    middle = (halves[:-1] + halves[1:]) / 2  # ties, which go to even
    generator = torch.Generator().manual_seed(0)
    wild = torch.randint(-(1 << 31), 1 << 31, (50000,), generator=generator, dtype=torch.int64).to(torch.int32)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 1e-8, 2.9802322e-08, 6e-8, -0.0])
    values = torch.cat([middle, middle.nextafter(torch.tensor(0.0)), wild.view(torch.float32), special])
    found = combine(None, [values], torch.ones(1, 1), "tensor", dtype)
    torch.testing.assert_close(found, (values + 0.0).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_values_pass_unchanged_and_rounding_is_pytorchs(instruction_set, dtype):
    check_patterns(native.combine, dtype)
    check_rounding(native.combine, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_and_transposed_tensors(dtype):
    flat, several = models_like((4 * 77 + 3,), 3, dtype, 1)
    for start in (1, 3):
        base = flat[start : start + 4 * 77].view(4, 77)
        models = [model[start : start + 4 * 77].view(4, 77) for model in several]
        for groups in GROUPS:
            check_both(base, models, groups)
            check_both(base.T, [model.T for model in models], groups)
            check_both(base[:, ::2], [model[:, ::2] for model in models], groups)


def run_everything() -> list[Tensor]:
    """Every operator, with more items of work than threads."""
    results = []
    for shape in ((301, 70), (2, 40000), (140001,)):
        base, models = models_like(shape, 3, torch.float32, 5)
        for groups in GROUPS:
            results.append(native.gram(base, models, groups))
            weights = torch.linspace(-1, 1, 3 * results[-1].shape[0]).view(-1, 3)
            results.append(native.combine(base, models, weights, groups, torch.bfloat16))
    gram = grams(203, 5, 5, awkward=True)
    for similarity in ("absolute", "squared"):
        objective = Objective(similarity=similarity, alpha=1e-3)
        results += native.descend(gram, objective, SGD(lr=5.0, iterations=40))
        results += native.descend(gram, objective, Converge())
    results += native.descend(grams(70, 5, 5, d=16, spread=1.2), Objective(), Converge())
    results += native.descend(gram[:70], Objective(), SGD(lr=5.0, iterations=20000))  # more than one stretch
    return results


def test_threads_do_not_change_a_bit():
    present = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 8, 8):
            torch.set_num_threads(threads)
            runs.append(run_everything())
    finally:
        torch.set_num_threads(present)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("penalty", ["none", "l2", "squared_l2"])
@pytest.mark.parametrize("k", TASKS)
def test_sgd_with_the_squared_similarity_follows_the_reference(instruction_set, k, penalty):
    gram = grams(11, k, k, common=1.0)  # far from d = 0, where the norm has a kink too
    objective = Objective(similarity="squared", penalty=penalty, alpha=1e-3)
    for options in (
        SGD(lr=0.2, iterations=100),
        SGD(lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-2, iterations=40),
        SGD(lr=2.0, momentum=0.0, weight_decay=0.0, iterations=40),
        SGD(iterations=0),
    ):
        found, history = native.descend(gram, objective, options)
        expected, losses = reference.descend(gram, objective, options)
        assert found.shape == expected.shape
        assert history.shape == losses.shape
        assert (found - expected).norm() <= 1e-9 * expected.norm()
        torch.testing.assert_close(history, losses, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(("iterations", "momentum"), [(16383, 0.9), (16384, 0.0), (40000, 0.9)])
def test_long_runs_of_sgd_continue_from_stretch_to_stretch(instruction_set, iterations, momentum):
    """The losses are recorded in stretches of 16384; on the way to the minimum they are those of fewer iterations."""
    gram = grams(37, 2, 3, common=1.0)
    objective = Objective(similarity="squared", alpha=1e-3)
    options = SGD(lr=2e-3, momentum=momentum, weight_decay=0.0, iterations=iterations)
    found, history = native.descend(gram, objective, options)
    assert len(history) == iterations + 1
    short = native.descend(gram, objective, replace(options, iterations=16000))[1]
    assert torch.equal(history[:16001], short)
    assert bool((history.diff() <= 1e-13).all())
    assert loss_at(gram, found, objective) == pytest.approx(float(history[-1]), rel=1e-9)


@pytest.mark.parametrize("k", [2, 3, 8, 17])
def test_sgd_with_the_absolute_similarity_reaches_the_same_loss(instruction_set, k):
    gram = grams(20, k, 100 + k)
    for options in (SGD(lr=0.01, iterations=300), SGD(lr=0.1, momentum=0.0, iterations=300)):
        _, history = native.descend(gram, Objective(alpha=1e-3), options)
        _, losses = reference.descend(gram, Objective(alpha=1e-3), options)
        torch.testing.assert_close(history, losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", [SGD(lr=1.0, iterations=50), Converge()])
@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_awkward_groups_are_defined(instruction_set, k, eps, similarity, optimizer):
    gram = grams(9, k, k, awkward=True)
    objective = Objective(similarity=similarity, eps=eps, alpha=1e-3)
    found, history = native.descend(gram, objective, optimizer)
    assert bool(found.isfinite().all())
    assert bool(history.isfinite().all())
    expected = reference.descend(gram, objective, SGD(iterations=0))[1][0]
    assert float(history[0]) == pytest.approx(float(expected), rel=1e-12)
    assert bool((found[0] == 0.0).all())


@pytest.mark.parametrize("optimizer", [SGD(iterations=5), Converge()])
def test_no_groups_at_all(optimizer):
    found, history = native.descend(torch.zeros(0, 3, 3, dtype=torch.float64), Objective(), optimizer)
    assert found.shape == (0, 3)
    assert len(history) >= 1
    assert bool((history == 0.0).all())


@pytest.mark.parametrize(
    ("k", "similarity", "penalty"),
    [
        (k, similarity, penalty)
        for k in (2, 3, 5, 8, 17)
        for similarity in ("squared", "absolute")
        for penalty in ("none", "l2", "squared_l2")
        # Seconds of the reference: awkward groups of every K; what a penalty is does not depend on it.
        if similarity == "squared" or penalty == "l2" or (k, penalty) in ((2, "none"), (5, "squared_l2"))
    ],
)
def test_converge_finds_the_minima_of_the_reference(k, similarity, penalty):
    # Rounding decides which of several kinks a group reaches, so that only the mean of many groups agrees.
    gram = grams(21 if similarity == "squared" else 200, k, 10 + k, awkward=penalty == "l2")
    objective = Objective(similarity=similarity, penalty=penalty, alpha=1e-3)
    found, history = native.descend(gram, objective, Converge())
    _, losses = reference.descend(gram, objective, Converge())
    tolerance = 1e-9 if similarity == "squared" else 5e-3
    assert float(history[0]) == pytest.approx(float(losses[0]), rel=1e-12)
    assert float(history[-1]) == pytest.approx(float(losses[-1]), rel=tolerance, abs=1e-7)
    assert bool((history[1:] <= history[:-1] * (1 + 1e-13)).all())
    assert loss_at(gram, found, objective) == pytest.approx(float(history[-1]), rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("similarity", ["squared", "absolute"])
def test_converge_with_unequal_norms_is_as_good_as_the_reference(similarity):
    """Rounding decides at which kinks a group ends, so that only averages over many groups agree."""
    objective, excess = Objective(similarity=similarity), []
    smooth = similarity == "squared"
    for k in (3, 5, 8):
        # Of more vectors than dimensions the squares have many minima, some where a vector becomes 0: a kink too.
        parts = [grams(100, k, 100 * k + d, d=d, spread=1.2) for d in (3, 16, 64) if not smooth or k <= d]
        gram = torch.cat(parts)
        expected, losses = reference.descend(gram, objective, Converge())
        for name in instruction_sets():
            native._module().choose_cpu_isa(name)
            found, history = native.descend(gram, objective, Converge())
            assert float(history[0]) == pytest.approx(float(losses[0]), rel=1e-12)
            assert float(history[-1]) == pytest.approx(float(losses[-1]), rel=1e-7 if smooth else 1e-2)
            assert bool((history[1:] <= history[:-1] * (1 + 1e-13)).all())
            for part, mine, theirs in zip(parts, found.split(100), expected.split(100), strict=True):
                excess.append(loss_at(part, mine, objective) / loss_at(part, theirs, objective) - 1.0)
    assert abs(sum(excess)) / len(excess) <= (1e-7 if smooth else 1e-3)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_converge_makes_the_ways_that_are_needed(iterations):
    """Every way offers one point, and one after each Newton step."""
    orthogonal = torch.eye(4, dtype=torch.float64).expand(5, 4, 4)  # the loss is 0 from the start
    unequal = grams(5, 4, 4)
    unequal[2, 1] *= 1e-3
    unequal[2, :, 1] *= 1e-3
    for gram, ways in ((orthogonal, 2), (grams(5, 4, 4), 3), (unequal, 5)):
        history = native.descend(gram, Objective(), Converge(max_iterations=iterations))[1]
        losses = reference.descend(gram, Objective(), Converge(max_iterations=iterations))[1]
        torch.testing.assert_close(history[: 1 + iterations], losses[: 1 + iterations], rtol=1e-9, atol=1e-15)
        assert len(history) == len(losses) == ways * (1 + iterations)


def test_the_history_of_many_newton_steps_is_bounded():
    size = native._module().converge_history_size
    assert size(10_000_000) == size(10_000) == 5 * 10_001
    history = native.descend(grams(40, 5, 1, d=3, spread=1.2), Objective(), Converge(max_iterations=10_000_000))[1]
    assert bool((history[1:] <= history[:-1] * (1 + 1e-13)).all())


@pytest.mark.parametrize("optimizer", [SGD(lr=1.0, momentum=0.0, weight_decay=0.0, iterations=50), Converge()])
def test_a_group_does_not_depend_on_the_others(instruction_set, optimizer):
    gram = grams(19, 5, 7)
    gram[::3] = grams(7, 5, 7, d=16, spread=1.2)  # lanes that need more descents than their neighbours
    gram[1::4] = torch.eye(5, dtype=torch.float64)  # and less
    objective = Objective(penalty="none")
    whole = native.descend(gram, objective, optimizer)[0]
    if isinstance(optimizer, SGD):  # the mean over the groups scales the step
        optimizer = SGD(lr=optimizer.lr / 19, momentum=0.0, weight_decay=0.0, iterations=50)
        torch.testing.assert_close(native.descend(gram[6:7], objective, optimizer)[0], whole[6:7], rtol=1e-9, atol=0)
        return
    for group in range(6, 12):
        assert torch.equal(native.descend(gram[group : group + 1], objective, optimizer)[0], whole[group : group + 1])
    assert torch.equal(native.descend(gram[3:], objective, optimizer)[0], whole[3:])


@pytest.mark.parametrize("optimizer", [SGD(iterations=3), Converge(max_iterations=3)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_gram_that_is_not_finite_has_no_finite_loss(k, value, optimizer):
    for i, j in ((0, 0), (k - 1, 0)):
        gram = grams(9, k, 1)
        gram[4, i, j] = gram[4, j, i] = value
        found, history = native.descend(gram, Objective(), optimizer)
        assert bool(history.isnan().all())
        assert bool(found[torch.arange(9) != 4].isfinite().all())
        assert bool(reference.descend(gram, Objective(), optimizer)[1].isnan().all())


def test_a_pending_change_of_sign_is_carried_out():
    base, models = models_like((9, 14), 3, torch.float32, 0)
    weights = torch.rand(9, 3, dtype=torch.float32)
    for values in (weights, weights.double()):
        found = native.combine(base, models, torch._neg_view(values), "row", torch.float32)
        assert torch.equal(found, native.combine(base, models, -values, "row", torch.float32))
    gram = grams(9, 3, 0)
    for optimizer in (SGD(lr=1.0, iterations=5), Converge()):
        found, history = native.descend(torch._neg_view(-gram), Objective(), optimizer)
        expected, losses = native.descend(gram, Objective(), optimizer)
        assert torch.equal(found, expected)
        assert torch.equal(history, losses)


def test_what_it_does_not_take_is_said_in_words():
    class Marked(Tensor):
        pass

    plain = torch.ones(2, 3)
    cases = {
        "Marked": plain.as_subclass(Marked),
        "on the CPU": plain.to("meta"),
        "dense": plain.to_sparse(),
        "does not take torch.int32": plain.int(),
        "no multiple of 4 bytes": torch.frombuffer(bytearray(32), dtype=torch.float32, offset=2, count=6),
    }
    for words, tensor in cases.items():
        assert words in str(native.refusal("gram", [plain, tensor]))
    assert native.refusal("gram", [plain, torch.nn.Parameter(plain, requires_grad=False)]) is None
    with pytest.raises(InputError, match="backend native cannot run gram"):
        ops.gram(None, [cases["no multiple of 4 bytes"]], backend="native")
