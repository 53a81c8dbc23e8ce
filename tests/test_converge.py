"""Converge: its loss against SGD and Adam at ten step sizes, its derivatives, and that no scale matters."""

import pytest
import torch

from awd_fast import converge, ops, statistics
from awd_fast.objective import SGD, Adam, Converge, Objective
from awd_fast.ops import reference

STEP_SIZES = [1e-3 * 2.7**power for power in range(10)]  # 1e-3 to 7.6, in units of the vectors' mean square


def random_vectors(seed: int, r: int, k: int, d: int, common: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = common * torch.randn(r, 1, d, generator=generator, dtype=torch.float64)
    return shared + torch.randn(r, k, d, generator=generator, dtype=torch.float64)


def lowest(t: torch.Tensor, objective: Objective, sgd: float, sgd_iterations: int) -> float:
    """The lowest loss at any iteration of any run of SGD, at `sgd` times each step size, and of Adam.

    By the fastest backend: thousands of iterations, of which nothing but how far they get matters here.
    """
    models, losses = list(t.unbind(1)), []
    for step in STEP_SIZES:
        for optimizer in (
            SGD(lr=sgd * step, weight_decay=0.0, iterations=sgd_iterations),
            Adam(lr=0.05 * step, iterations=150),
        ):
            if isinstance(optimizer, SGD) and objective.penalty != "l1":
                history = ops.descend(statistics.gram(t), objective, optimizer)[1]
            else:
                history = ops.adam_rows(None, models, objective, optimizer, "row")[1]
            losses.append(history.min())
    return float(torch.stack(losses).min())


@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize(
    ("k", "d", "common", "penalty", "alpha"),
    [
        (2, 16, 0.5, "none", 0.0),
        (3, 48, 1.0, "l2", 1e-4),
        (4, 64, 0.3, "l2", 1e-6),
        (6, 40, 0.5, "squared_l2", 1e-4),
        (8, 96, 0.2, "none", 0.0),
    ],
)
def test_the_loss_is_never_above_the_best_of_sgd_and_adam(similarity, k, d, common, penalty, alpha):
    t = random_vectors(k, 12, k, d, common)
    objective = Objective(similarity=similarity, penalty=penalty, alpha=alpha)
    _, history = reference.descend(statistics.gram(t), objective, Converge())
    # Of SGD, since the loss of one group is divided by the number of groups.
    assert float(history[-1]) <= lowest(t, objective, 0.1 * d * len(t), 300) + 1e-4


def test_with_an_l1_penalty_too():
    t = random_vectors(1, 8, 4, 48, 0.5)
    objective = Objective(penalty="l1", alpha=1e-4)
    shift, history = reference.descend_elements(t, objective, Converge())
    assert float(history[-1]) <= lowest(t, objective, 48.0, 150) + 1e-4
    assert float(reference.loss(t, shift, objective, len(t))) == pytest.approx(float(history[-1]), abs=1e-9)


@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**10])  # exact: rounding may choose between minima of equal loss
def test_the_scale_of_the_vectors_does_not_matter(similarity, factor):
    t = random_vectors(5, 6, 4, 32, 0.4)
    objective = Objective(similarity=similarity, penalty="none", alpha=0.0, eps=0.0)
    a, history = reference.descend(statistics.gram(t), objective, Converge())
    b, scaled = reference.descend(statistics.gram(t * factor), objective, Converge())
    assert float(scaled[-1]) == pytest.approx(float(history[-1]), abs=1e-6)
    if similarity == "squared":
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_reported_loss_is_the_loss_of_the_returned_coefficients():
    t = random_vectors(6, 9, 5, 24, 0.4)
    gram, objective = statistics.gram(t), Objective(alpha=1e-3)
    a, history = reference.descend(gram, objective, Converge())
    inner, square = statistics.span_moments(gram, a)
    after = statistics.similarity(statistics.shifted_gram(gram, inner, square), objective)
    found = after.mean() + objective.alpha * statistics.penalty(square, objective).sum()
    assert float(found) == pytest.approx(float(history[-1]), rel=1e-9)
    assert (history.diff() <= 1e-15).all()


def test_it_settles_at_the_kinks():
    """Of three vectors all cosines can be zero, and the absolute similarity has its kink exactly there."""
    t = random_vectors(7, 20, 3, 128, 0.5)
    _, history = reference.descend(statistics.gram(t), Objective(alpha=0.0), Converge())
    assert float(history[-1]) < 1e-5


def test_a_strong_penalty_keeps_the_redundant_vector_at_zero():
    t = random_vectors(8, 3, 4, 16, 0.5)
    for similarity in ("absolute", "squared"):
        a, _ = reference.descend(statistics.gram(t), Objective(similarity=similarity, alpha=1e3), Converge())
        assert float(a.abs().max()) < 1e-9


def test_a_group_does_not_depend_on_the_others_in_the_call():
    t = random_vectors(9, 7, 4, 32, 0.3)
    gram, objective = statistics.gram(t), Objective(penalty="none")
    together, _ = converge.minimise_span(gram, objective, Converge(), 7)
    alone, _ = converge.minimise_span(gram[3:4], objective, Converge(), 7)
    torch.testing.assert_close(together[3:4], alone, rtol=1e-6, atol=1e-8)


def of_each_group(gram: torch.Tensor, a: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Each group's part of the loss [R]."""
    inner, square = statistics.span_moments(gram, a)
    after = statistics.similarity(statistics.shifted_gram(gram, inner, square), objective)
    return after / len(gram) + objective.alpha * statistics.penalty(square, objective)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_zero_rows_identical_models_and_single_columns_are_defined(k):
    generator = torch.Generator().manual_seed(k)
    cases = [
        torch.zeros(2, k, 6, dtype=torch.float64),
        torch.randn(2, 1, 6, generator=generator, dtype=torch.float64).expand(2, k, 6).clone(),
        torch.randn(2, k, 1, generator=generator, dtype=torch.float64),
    ]
    cases.append(cases[1].clone())
    cases[-1][:, 0] = 0.0
    gram = torch.cat([statistics.gram(t) for t in cases])  # groups do not depend on each other
    none = statistics.gram(torch.zeros(0, k, 6, dtype=torch.float64))
    for similarity in ("absolute", "squared"):
        for penalty in ("none", "l2", "squared_l2"):
            objective = Objective(similarity=similarity, penalty=penalty, alpha=1e-3)
            assert reference.descend(none, objective, Converge())[0].shape == (0, k)
            a, history = reference.descend(gram, objective, Converge())
            assert torch.isfinite(a).all()
            assert torch.isfinite(history).all()
            assert bool((of_each_group(gram, a, objective) <= of_each_group(gram, 0.0 * a, objective) + 1e-12).all())


@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("penalty", ["none", "l2", "squared_l2"])
def test_gradient_and_hessian_are_those_of_autograd(similarity, penalty):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    y = 0.2 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    mu, eps = torch.tensor([0.05, 0.3], dtype=torch.float64), torch.full((2,), 1e-2, dtype=torch.float64)
    alpha = torch.tensor([0.1, 0.4], dtype=torch.float64)
    problem = converge._Problem(x, eps, alpha, Objective(similarity=similarity, penalty=penalty))
    value, slope, pairs = converge._gradient(problem, y, mu)
    hessian = converge._hessian(problem, y, mu, pairs)
    expected = torch.autograd.functional.jacobian(lambda p: converge._value(problem, p, mu).sum(), y)
    second = torch.autograd.functional.hessian(lambda p: converge._value(problem, p, mu).sum(), y)
    torch.testing.assert_close(value, converge._value(problem, y, mu))
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-13)
    for r in range(2):
        torch.testing.assert_close(hessian[r], second[r, :, r], rtol=1e-10, atol=1e-12)
