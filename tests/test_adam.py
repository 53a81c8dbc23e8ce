"""Adam and SGD on the elements of d, compiled: against the reference, torch.optim and float64, in both ways of running.

Adam divides a gradient by its own size, so where one is nearly 0 rounding decides the direction of a step: elements are
compared in float64 storage, and in narrower ones by the distance to what float64 finds.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from awd_fast import ops, solver, statistics
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Objective, Options
from awd_fast.ops import native, reference
from tests import oracle
from tests.blocks import check_blocks
from tests.test_native import DTYPES, GROUPS, instruction_sets, models_like

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

TASKS = (1, 2, 3, 5, 8, 17)
OPTIMIZERS = (
    Adam(lr=1e-3, iterations=50),
    Adam(lr=2e-3, betas=(0.0, 0.5), eps=1e-4, weight_decay=0.1, iterations=9),
    SGD(lr=1e-2, momentum=0.0, iterations=20),
    SGD(lr=1e-2, momentum=0.9, iterations=20),
    SGD(lr=1e-2, momentum=0.5, nesterov=True, weight_decay=0.2, iterations=20),
)
OBJECTIVES = (
    Objective(alpha=1e-3),
    Objective(similarity="squared", penalty="squared_l2", alpha=0.1),
    Objective(similarity="squared", penalty="l1", alpha=1e-2),
    Objective(penalty="none", eps=0.0),
)


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> str:
    native._module().choose_cpu_isa(request.param)
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results are allocated full of NaN, so that an element that a kernel leaves out is seen."""
    present, empty = native._module().cpu_isa(), torch.empty
    monkeypatch.setattr(native.torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    yield
    native._module().choose_cpu_isa(present)  # whatever a test chose


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def check_rows(base, models, groups, objective, optimizer, tolerance=1e-9, backend="native", sets=None):
    """sets: instruction sets, by default the present one; the reference is that of all of them."""
    expected = ops.descend_groups(base, models, objective, optimizer, groups, backend="reference")
    for instructions in sets or (None,):
        if instructions is not None:
            native._module().choose_cpu_isa(instructions)
        found = ops.descend_groups(base, models, objective, optimizer, groups, backend=backend)
        for name, mine, theirs in zip(found._fields, found, expected, strict=True):
            assert mine.shape == theirs.shape, (name, instructions)
            assert mine.dtype == theirs.dtype, (name, instructions)
            assert distance(mine, theirs) <= tolerance, (name, instructions)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("k", TASKS)
@pytest.mark.parametrize("groups", GROUPS)
def test_rows_follow_the_reference_in_float64(groups, k, optimizer):
    base, models = models_like((7, 33), k, torch.float64, k)
    for index, objective in enumerate(OBJECTIVES):
        given = models if index % 2 else [model - base for model in models]
        check_rows(base if index % 2 else None, given, groups, objective, optimizer, sets=instruction_sets())


@pytest.mark.parametrize(
    "shape", [(1, 2, 2), (2, 2), (40, 2), (19, 15), (70, 300), (3, 5, 7), (0, 5), (5, 0), (300, 17)]
)
@pytest.mark.parametrize("groups", GROUPS)
def test_rows_of_every_size(groups, shape):
    base, models = models_like(shape, 3, torch.float64, 0)
    # In a group of one element that is not 0, gradients are rounding and a small part of the penalty.
    check_rows(base, models, groups, OBJECTIVES[1], Adam(lr=1e-3, iterations=30), 1e-7)
    check_rows(base, models, groups, OBJECTIVES[2], SGD(lr=1e-2, iterations=10))


@pytest.mark.parametrize("shape", [(1,), (), (5, 1), (1, 9)])
def test_groups_of_one_element_have_the_loss_of_the_reference(shape):
    """Their cosines are 1 or -1 wherever d is: the gradient is rounding, and only the loss means something."""
    base, models = models_like(shape, 3, torch.float64, 0)
    for groups in GROUPS:
        shift, history = ops.adam_rows(base, models, Objective(), Adam(lr=1e-3, iterations=20), groups)
        expected = reference.adam_rows(base, models, Objective(), Adam(lr=1e-3, iterations=20), groups)[1]
        assert bool(shift.isfinite().all())
        torch.testing.assert_close(history, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("k", [2, 5, 8])
def test_rows_in_narrow_storage_are_as_near_to_float64_as_the_reference(k, optimizer, dtype):
    base, models = models_like((21, 133), k, dtype, k)
    unit = torch.finfo(torch.float32).eps
    # A step of Adam may go the other way at the few elements whose gradient is a float32 rounding error.
    flipped = 0.1 if isinstance(optimizer, Adam) else 100 * unit
    for index, groups in enumerate(GROUPS):
        exact = reference.task_vectors(base, models, groups).double()
        objective = OBJECTIVES[(index + k + DTYPES.index(dtype)) % 3]  # by turns: each with every other option
        near, near_history = reference.adam_rows(base, models, objective, optimizer, groups)[:2]
        truth, losses = reference.descend_elements(exact, objective, optimizer)
        truth = reference.ungroup(truth, base.shape, groups)
        most = 4.0 * distance(near, truth) + flipped
        most_loss = 4.0 * distance(near_history, losses) + 1e-2 * flipped + 10 * unit
        for name in instruction_sets():
            native._module().choose_cpu_isa(name)
            shift, history = ops.adam_rows(base, models, objective, optimizer, groups, backend="native")
            assert shift.dtype == torch.float32
            assert distance(shift, truth) <= most, name
            assert distance(history, losses) <= most_loss, name


@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("groups", GROUPS)
def test_rows_follow_torch_adam_on_the_autograd_loss(groups, decay, similarity):
    _, vectors = models_like((3, 5), 4, torch.float64, 3)
    points, _, losses = oracle.trajectory(
        vectors,
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-7, weight_decay=decay),
        20,
        groups,
        similarity=similarity,
        kind="l1",
        alpha=0.05,
    )
    adam = Adam(lr=1e-2, betas=(0.8, 0.95), eps=1e-7, weight_decay=decay, iterations=20)
    objective = Objective(similarity=similarity, penalty="l1", alpha=0.05)
    shift, history = ops.adam_rows(None, vectors, objective, adam, groups, backend="native")
    torch.testing.assert_close(shift, points[-1], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(history, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_zero_and_identical_task_vectors(isa):
    base, models = models_like((40, 37), 5, torch.float32, 2)
    models[3] = models[1]
    models[2] = base
    for optimizer in (Adam(lr=1e-3, iterations=30), SGD(lr=1e-2, iterations=30)):
        for objective in (*OBJECTIVES, Objective(eps=0.0)):
            for same in (models, [models[1]] * 4, [base] * 3):
                shift, history = ops.adam_rows(base, same, objective, optimizer, backend="native")
                assert bool(shift.isfinite().all())
                assert bool((shift[0] == 0.0).all())  # the first rows are the base's
                expected = reference.adam_rows(base, same, objective, SGD(iterations=0), "row")[1]
                torch.testing.assert_close(history[:1], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_and_transposed_tensors(dtype):
    flat, several = models_like((4 * 77 + 3,), 3, dtype, 1)
    optimizer = SGD(lr=1e-2, iterations=10)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for start in (1, 3):
        base = flat[start : start + 4 * 77].view(4, 77)
        models = [model[start : start + 4 * 77].view(4, 77) for model in several]
        for groups in GROUPS:
            check_rows(base, models, groups, OBJECTIVES[1], optimizer, tolerance)
            check_rows(base.T, [model.T for model in models], groups, OBJECTIVES[1], optimizer, tolerance)
            check_rows(base[:, ::2], [model[:, ::2] for model in models], groups, OBJECTIVES[1], optimizer, tolerance)


def test_a_group_larger_than_the_cache_and_many_iterations():
    base, models = models_like((3, 100001), 8, torch.float64, 4)
    for groups in ("row", "column"):
        check_rows(base[:, :20001], [m[:, :20001] for m in models], groups, OBJECTIVES[1], Adam(lr=1e-4, iterations=3))
    check_rows(base, models, "row", OBJECTIVES[1], Adam(lr=1e-4, iterations=3))
    small = [(model - base)[:, :50].contiguous() for model in models]
    history = ops.adam_rows(None, small, OBJECTIVES[1], Adam(lr=1e-6, iterations=70000), backend="native")[1]
    assert len(history) == 70001
    assert float(history.diff()[60000:].abs().max()) < 1e-6 * float(history[0])  # no step at 65536
    assert float(history[-1]) < float(history[0])


def states(like: Tensor, seed: int, offset: int = 0) -> list[Tensor]:
    """d, velocity and square of an optimiser that is on its way, at an address of its own."""
    generator = torch.Generator().manual_seed(seed)
    dtype, size = reference.compute_dtype(like.dtype), like.numel()
    made = [0.01 * torch.randn(size, generator=generator, dtype=dtype) for _ in range(2)]
    made.append(1e-3 * torch.rand(size, generator=generator, dtype=dtype) + 1e-4)
    return [torch.cat([torch.ones(offset, dtype=dtype), value])[offset:].view(like.shape) for value in made]


def check_step(base, models, mine, theirs, slope, optimizer, step, l1, backend="native"):
    """mine, theirs: the same d, velocity and square, which the operators change."""
    k, size = len(models), models[0].numel()
    eps = torch.finfo(mine[0].dtype).eps
    before = mine[0].reshape(-1).double()
    versions = [tensor._version for tensor in mine]
    found = ops.adam_step(base, models, *mine, slope, optimizer, step, l1=l1, backend=backend)
    ops.adam_step(base, models, *theirs, slope, optimizer, step, l1=l1, backend="reference")
    t = reference.task_vectors(base, models, "tensor")[0].double()
    terms = 2.0 * (slope[:k].abs() @ t.abs()) + 2.0 * before.abs() + l1
    rounding = 4.0 * (k + 4) * eps * terms
    for name, a, b in zip(("shift", "velocity", "square"), mine, theirs, strict=True):
        scale = {"shift": 100.0 * optimizer.lr, "velocity": 1.0, "square": 2.0 * float(terms.sum())}[name]
        bound = scale * rounding + 8.0 * eps * (b.reshape(-1).double().abs() + before.abs())
        assert bool(((a - b).reshape(-1).double().abs() <= bound).all()), name
    d = mine[0].reshape(-1).double()
    exact = torch.cat([t @ d, torch.stack([d @ d, d.abs().sum()])])
    bound = 4.0 * (size + 8) * torch.finfo(torch.float64).eps * torch.cat([t.abs() @ d.abs(), exact[k:]])
    assert bool(((found - exact).abs() <= bound).all())
    used = [True, isinstance(optimizer, Adam) or optimizer.momentum > 0.0, isinstance(optimizer, Adam)]
    assert [tensor._version > version for tensor, version in zip(mine, versions, strict=True)] == used


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("size", [0, 1, 15, 511, 70001])
def test_a_step_is_that_of_the_reference(isa, size, optimizer, dtype):
    for k in TASKS if size < 1000 else (3, 8):
        base, models = models_like((size + 1,), k, dtype, k)
        base, models = base[1:], [model[1:] for model in models]  # not aligned to anything but an element
        slope = torch.linspace(-0.7, 1.3, k + 1, dtype=torch.float64)
        mine, theirs = states(base, k, offset=1), states(base, k)
        check_step(base, models, mine, theirs, slope, optimizer, 3, 0.05 if k % 2 else 0.0)


def test_sgd_needs_no_state_that_it_does_not_use():
    base, models = models_like((40,), 3, torch.float32, 0)
    slope = torch.ones(4, dtype=torch.float64)
    for optimizer, velocity in ((SGD(momentum=0.0), None), (SGD(), torch.zeros(40))):
        found = []
        for backend in ("native", "reference"):
            shift = torch.zeros(40)
            ops.adam_step(base, models, shift, velocity, None, slope, optimizer, 1, backend=backend)
            found.append(shift)
            velocity = None if velocity is None else torch.zeros(40)
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("optimizer", [Adam(lr=1e-4, iterations=25), SGD(lr=1e-2, iterations=25)])
@pytest.mark.parametrize("objective", OBJECTIVES[:3])
def test_streaming_is_one_group_over_all_parts(monkeypatch, objective, optimizer):
    parts = [models_like(shape, 3, torch.float64, seed) for seed, shape in enumerate([(30, 41), (7,), (900,), (0, 4)])]
    options = Options(groups="global", objective=objective, optimizer=optimizer)
    vectors = torch.cat([reference.task_vectors(*part, "tensor") for part in parts], dim=2)
    shift, history = reference.descend_elements(vectors, objective, optimizer)
    for backend in ("native", "reference"):
        solution, found = solver.solve_parts(parts, options, backend)
        assert distance(torch.cat([part.shift for part in found], dim=1), shift) <= 1e-9
        torch.testing.assert_close(solution.history, history, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(solution.gram, statistics.gram(vectors))
        inner, square = solver.element_moments(vectors, shift)
        assert distance(solution.inner, inner) <= 1e-9
        assert distance(solution.square, square) <= 1e-9
        assert distance(torch.cat([part.inner for part in found]).sum(dim=0, keepdim=True), inner) <= 1e-9
    if options.spans:
        return
    whole = solver.solve(*parts[0], options, "native")
    monkeypatch.setattr(solver, "RESIDENT", 100)
    streamed = solver.solve(*parts[0], options, "native")
    assert distance(streamed.shift, whole.shift) <= 1e-9
    torch.testing.assert_close(streamed.history, whole.history, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_blocks_of_rows_have_the_bits_of_the_whole(k, dtype, backend):
    """Blocks are iterated another number of groups at a time than the whole; the reference rounds otherwise then."""
    count, cuts = (203, (70, 71, 192)) if backend == "native" else (21, (5, 6))
    given = models_like((count, 37), k, dtype, k)
    tolerance = None if backend == "native" else 1e-6
    l1 = [Objective(similarity=kind, penalty="l1", alpha=1e-3) for kind in ("absolute", "squared")]
    for arguments in (
        (OBJECTIVES[1], Adam(iterations=9)),
        *((objective, SGD(lr=0.1, iterations=9)) for objective in l1),
    ):
        check_blocks(ops.descend_groups, given, arguments, cuts, 1, tolerance=tolerance, backend=backend)


@pytest.mark.parametrize("optimizer", [SGD(lr=0.5, iterations=6), Adam(iterations=6), Converge(max_iterations=4)])
@pytest.mark.parametrize("penalty", ["l2", "l1"])
def test_the_solver_is_told_how_many_groups_the_whole_has(monkeypatch, penalty, optimizer):
    """A block of one long row is no single group, which would stream."""
    monkeypatch.setattr(solver, "RESIDENT", 10)
    objective = Objective(similarity="squared", penalty=penalty, alpha=0.1)
    options = Options(groups="row", objective=objective, optimizer=optimizer)

    def solved(base: Tensor, models: list[Tensor], total: int | None = None) -> list[Tensor]:
        found = solver.solve(base, models, options, total=total)
        d = found.coefficients if found.shift is None else found.shift
        assert d is not None
        return [d, found.history, found.gram, found.inner, found.square]

    check_blocks(solved, models_like((9, 17), 3, torch.float64, 0), (), (4, 5), 1, tolerance=1e-9)


def test_threads_do_not_change_a_bit():
    present, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 8):
            torch.set_num_threads(threads)
            run = []
            for shape in ((301, 70), (2, 40000), (200001,)):
                base, models = models_like(shape, 3, torch.float32, 5)
                for groups in GROUPS:
                    run += ops.descend_groups(base, models, Objective(), Adam(iterations=4), groups, backend="native")
                state = states(base, 1)
                slope = torch.linspace(-1, 1, 4, dtype=torch.float64)
                run.append(ops.adam_step(base, models, *state, slope, Adam(), 2, l1=0.1, backend="native"))
                run += state
            runs.append(run)
    finally:
        torch.set_num_threads(present)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_a_group_does_not_depend_on_the_others():
    _, models = models_like((300, 37), 3, torch.float32, 6)
    sgd = SGD(lr=1e-2, momentum=0.0, weight_decay=0.0, iterations=20)
    whole = ops.adam_rows(None, models, Objective(penalty="none"), sgd, backend="native")[0]
    # The mean over the groups scales the step.
    few = SGD(lr=1e-2 * 5 / 300, momentum=0.0, weight_decay=0.0, iterations=20)
    part = ops.adam_rows(None, [m[7:12] for m in models], Objective(penalty="none"), few, backend="native")[0]
    assert distance(part, whole[7:12]) <= 1e-4


def test_mistakes_are_said_in_words():
    base, models = models_like((6,), 2, torch.float32, 0)
    slope, adam = torch.zeros(3, dtype=torch.float64), Adam()
    shift, velocity, square = states(base, 0)
    cases = [
        ((shift.double(), velocity, square, slope, adam, 1), "shift is torch.float64"),
        ((shift[:5], velocity, square, slope, adam, 1), "shift is torch.float32"),
        ((torch.zeros(12)[::2], velocity, square, slope, adam, 1), "shift is not contiguous"),
        ((shift, None, square, slope, adam, 1), "velocity is NoneType"),
        ((shift, velocity, None, slope, adam, 1), "square is NoneType"),
        ((shift, shift, square, slope, adam, 1), "shift shares memory"),
        ((shift, models[0], square, slope, adam, 1), "velocity shares memory"),
        ((shift, velocity, square, slope.float(), adam, 1), "slope is torch.float32"),
        ((shift, velocity, square, slope[:2], adam, 1), "slope is torch.float64"),
        ((shift, velocity, square, slope, Converge(), 1), "expected awd_fast.SGD or Adam"),
        ((shift, velocity, square, slope, adam, 0), "step is 0"),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError, match=words):
            ops.adam_step(base, models, *arguments)
    with pytest.raises(InputError, match="l1 is -1"):
        ops.adam_step(base, models, shift, velocity, square, slope, adam, 1, l1=-1.0)
    with pytest.raises(InputError, match="expected awd_fast"):
        ops.adam_rows(base, models, Objective(), Converge())
    with pytest.raises(InputError, match="adam_rows has no gradient, and a tensor requires one"):
        ops.adam_rows(base, [model.clone().requires_grad_() for model in models], Objective(), adam, backend="native")
    options = Options(objective=Objective(penalty="l1"), optimizer=Converge())
    with pytest.raises(InputError, match="backend native has no Converge with penalty l1"):
        solver.solve(base, models, options, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eps_that_rounds_to_nothing_leaves_groups_of_any_size_finite(isa, dtype):
    base, models = models_like((40, 37), 3, dtype, 1)
    base, models = base[1:], [model[1:] for model in models]  # the first rows have no gradient: 0 / 0
    for groups in GROUPS:
        for found in ops.descend_groups(base, models, Objective(), Adam(eps=1e-60, iterations=5), groups):
            assert bool(found.isfinite().all())


@pytest.mark.parametrize("optimizer", [Adam(iterations=3), SGD(iterations=3), SGD(momentum=0.0, iterations=3)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_models_that_are_not_finite_have_no_finite_loss(isa, k, value, optimizer):
    base, models = models_like((21, 13), k, torch.float32, 0)
    models[0][7, 3] = value
    for objective in OBJECTIVES:
        for groups in GROUPS:
            for backend in ("native", "reference"):
                found = ops.descend_groups(base, models, objective, optimizer, groups, backend=backend)
                assert bool(found.history.isnan().all())
