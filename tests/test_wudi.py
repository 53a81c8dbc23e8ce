"""The closed form of WUDI against its normal equations, autograd and iterative optimisers, and in whole merges."""

import itertools

import pytest
import torch

import awd_fast
from awd_fast import InputError, threads, wudi

SHAPES = ((40, 24), (24, 40), (1, 9), (9, 1), (1, 1), (33, 33), (530, 17), (17, 530), (600, 521))
KINDS = ("random", "low rank")


def layer(rows: int, width: int, k: int = 4, kind: str = "random", seed: int = 0, dtype=torch.float64):
    """K task vectors [rows, width] with a part in common and norms that differ."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, width, generator=g, dtype=torch.float64)
    rank = max(min(rows, width) // 8, 1)
    found = []
    for index in range(k):
        own = torch.randn(rows, width, generator=g, dtype=torch.float64)
        if kind == "low rank":
            own = 0.01 * own + torch.randn(rows, rank, generator=g, dtype=torch.float64) @ torch.randn(
                rank, width, generator=g, dtype=torch.float64
            )
        found.append(((0.3 * common + own) * 0.01 * (1 + index)).to(dtype))
    return found


def normal_equations(vectors, ridge: float = 0.1, columns: int = 0):
    """tau in float64, by the formulas as they are written, block by block of the columns; zero vectors left out."""
    vectors = [t.double() for t in vectors if t.abs().max() > 0]
    if not vectors:
        return None
    width = vectors[0].shape[1]
    plain = sum(vectors)
    e = ridge * len(vectors) / width
    parts = []
    for block in wudi.cuts(width, columns):
        a = sum(t[:, block].T @ t[:, block] / t.square().sum() for t in vectors)
        b = sum(t[:, block] @ t[:, block].T @ t[:, block] / t.square().sum() for t in vectors)
        right = b + e * plain[:, block]
        parts.append(torch.linalg.solve(a + e * torch.eye(len(a), dtype=torch.float64), right.T).T)
    return torch.cat(parts, dim=1)


def bound(vectors, ridge: float, dtype=torch.float32) -> float:
    """Relative to |tau|: what rounding of the products in `dtype` can do, amplified by the condition of A + e I."""
    width = vectors[0].shape[1]
    a = sum(t.double().T @ t.double() / t.double().square().sum() for t in vectors)
    e = ridge * len(vectors) / width
    return 2.0 * torch.finfo(dtype).eps * (float(torch.linalg.eigvalsh(a)[-1]) + e) / e * width**0.5


def off(found, expected) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ridge", [0.1, 1e-3, 10.0])
def test_the_update_solves_the_normal_equations(shape, kind, ridge):
    for dtype in (torch.float64, torch.float32):
        vectors = layer(*shape, kind=kind, dtype=dtype)
        error = off(wudi.update(vectors, ridge=ridge), normal_equations(vectors, ridge))
        assert error <= bound(vectors, ridge, dtype), (dtype, error)
        assert ridge < 0.1 or error < 1e-4


@pytest.mark.parametrize("columns", [1, 7, 24, 39, 40, 100])
def test_fewer_columns_are_solved_alone(columns):
    vectors = layer(30, 40)
    found = wudi.update(vectors, columns=columns)
    torch.testing.assert_close(found, normal_equations(vectors, columns=columns), rtol=1e-9, atol=1e-14)
    whole = normal_equations(vectors)
    assert (off(found, whole) > 1e-3) == (columns < 40)
    sizes = [block.stop - block.start for block in wudi.cuts(40, columns)]
    assert sum(sizes) == 40
    assert max(sizes) <= columns or columns > 40
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [0.1, 1e-2])
def test_the_gradient_is_zero_at_the_update(kind, ridge):
    vectors = layer(20, 31, kind=kind)
    plain, e = sum(vectors), ridge * len(vectors) / 31
    tau = wudi.update(vectors, ridge=ridge).requires_grad_()
    (wudi.interference(tau, vectors) + e * (tau - plain).square().sum()).backward()
    start = plain.clone().requires_grad_()
    wudi.interference(start, vectors).backward()
    assert tau.grad.norm() < 1e-10 * start.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_no_iteration_gets_lower(kind):
    vectors = layer(16, 24, kind=kind)
    plain, e = sum(vectors), 0.1 * len(vectors) / 24

    def objective(tau):
        return wudi.interference(tau, vectors) + e * (tau - plain).square().sum()

    best = float(objective(wudi.update(vectors)))
    tau = plain.clone().requires_grad_()
    descent = torch.optim.LBFGS([tau], lr=0.5, max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18)

    def closure():
        descent.zero_grad()
        value = objective(tau)
        value.backward()
        return value

    descent.step(closure)
    reached = float(objective(tau.detach()))
    assert best <= reached * (1 + 1e-9)
    assert reached == pytest.approx(best, rel=1e-3), "an independent way finds the same minimum"
    adam = plain.clone().requires_grad_()  # as the paper goes, at another step size for other norms
    steps = torch.optim.Adam([adam], lr=1e-3)
    for _ in range(300):
        steps.zero_grad()
        wudi.interference(adam, vectors).backward()
        steps.step()
    small = wudi.update(vectors, ridge=1e-6)
    assert float(wudi.interference(small, vectors)) <= float(wudi.interference(adam.detach(), vectors))


def test_the_interference_is_what_it_says():
    vectors = layer(5, 7, k=3)
    tau = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = sum(
        sum(float((tau - t)[r] @ t[s]) ** 2 for r, s in itertools.product(range(5), repeat=2)) / float((t * t).sum())
        for t in vectors
    )
    assert float(wudi.interference(tau, vectors)) == pytest.approx(expected, rel=1e-12)
    assert float(wudi.interference(tau, [torch.zeros(5, 7, dtype=torch.float64)])) == 0.0


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (530, 600)], ids=str)
@pytest.mark.parametrize("columns", [0, 11])
def test_the_figures_are_those_of_the_objective(shape, columns):
    vectors, weights = layer(*shape, k=3), (1.0, -0.5, 2.0)
    found = wudi.Layer(*shape, columns=columns, dtype=torch.float64)
    for vector, weight in zip(vectors, weights, strict=True):
        found.add(weight, lambda rows, vector=vector: vector[rows])
    solved = found.solve(0.1)
    weighted = [w * t for w, t in zip(weights, vectors, strict=True)]
    plain, tau = sum(weighted), solved.update

    def restricted(update):
        total = 0.0
        for t, block in itertools.product(weighted, wudi.cuts(shape[1], columns)):
            total += float(((update - t)[:, block] @ t[:, block].T).square().sum() / t.square().sum())
        return total

    expected = [restricted(plain), restricted(tau), *(float((a * b).sum()) for a, b in [(plain,) * 2, (plain, tau)])]
    expected.append(float(tau.square().sum()))
    torch.testing.assert_close(solved.figures, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-15)
    if columns == 0:
        assert float(wudi.interference(tau, weighted)) == pytest.approx(expected[1], rel=1e-9)


def test_weights_multiply_the_task_vectors():
    vectors, weights = layer(20, 30), (1.0, -0.5, 2.0, 0.25)
    weighted = [w * t for w, t in zip(weights, vectors, strict=True)]
    torch.testing.assert_close(wudi.update(vectors, weights), normal_equations(weighted), rtol=1e-9, atol=1e-14)


def test_a_weight_of_zero_and_a_zero_task_vector_leave_a_model_out():
    vectors = layer(20, 30)
    expected = wudi.update(vectors[:3])
    assert torch.equal(wudi.update(vectors, (1.0, 1.0, 1.0, 0.0)), expected)
    assert torch.equal(wudi.update([*vectors[:3], torch.zeros(20, 30, dtype=torch.float64)]), expected)
    for shape in ((20, 30), (1, 1), (30, 20)):
        nothing = wudi.update([torch.zeros(shape), torch.zeros(shape)])
        assert torch.equal(nothing, torch.zeros(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_task_vector_is_its_own_update(shape):
    (vector,) = layer(*shape, k=1)
    torch.testing.assert_close(wudi.update([vector]), vector, rtol=1e-9, atol=1e-12)
    narrow = vector.float()
    assert off(wudi.update([narrow]), vector) < bound([vector], 0.1)
    twice = wudi.update([vector, vector])  # and what two agree on is not added up in the directions that they have
    assert (
        float(wudi.interference(twice, [vector, vector])) < 0.2 * float(wudi.interference(2 * vector, [vector, vector]))
        or min(shape) > 1
    )


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e12, 1e25])
def test_norms_of_any_size(size):
    vectors = layer(20, 30)
    found = wudi.update([(t * size).float() for t in vectors])
    assert off(found, normal_equations(vectors) * size) < 1e-4


@pytest.mark.parametrize("shape", [(700, 1100), (1100, 700)], ids=str)
def test_neither_threads_change_a_bit(shape):
    vectors = layer(*shape, k=2, dtype=torch.float32)
    alone = wudi.update(vectors)
    for count in (2, 3):
        torch.set_num_threads(count)  # the fixture one_thread sets it back
        assert torch.equal(wudi.update(vectors), alone)
        assert torch.get_num_threads() == count


def test_one_thread_sets_the_number_back():
    torch.set_num_threads(2)
    with threads.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_what_cannot_be_solved_is_said():
    vectors = layer(20, 30, dtype=torch.float32)
    with pytest.raises(InputError, match="ridge is 1e-30, too small to solve for the update in this precision"):
        wudi.update([torch.ones(20, 30), torch.ones(20, 30)], ridge=1e-30)
    vectors[1][3, 4] = torch.nan
    with pytest.raises(InputError, match="a task vector holds NaN or Inf values"):
        wudi.update(vectors)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ridge": 0}, "ridge is 0; expected a number above 0"),
        ({"ridge": -1.0}, "ridge is -1; expected a number above 0"),
        ({"ridge": float("nan")}, "ridge is nan; expected a finite number"),
        ({"columns": -1}, "columns is -1; expected an integer from 0"),
        ({"columns": 1.5}, r"columns is 1\.5; expected an integer from 0"),
        ({"others_scale": float("inf")}, "others_scale is inf; expected a finite number"),
    ],
)
def test_bad_options_are_named(options, sentence):
    with pytest.raises(InputError, match=sentence):
        awd_fast.merge({"a": torch.ones(2, 2)}, [{"a": torch.ones(2, 2)}], method="wudi", **options)
