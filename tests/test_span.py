"""The span solver follows the trajectory of autograd SGD, without ever touching the vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awd_fast import statistics
from awd_fast.objective import SGD, Objective
from awd_fast.ops import reference
from tests import oracle


def compare(vectors, groups, objective, optimizer):
    """Compares d at every iteration to 1e-10 of the vectors' size; returns how many iterations could be compared.

    The comparison ends where rounding decides the way on: with the absolute similarity where a cosine changes sign,
    with the norm as penalty where a group's d nearly vanishes, and where a vector t_i - d nearly does, because there
    its cosines jump.
    """
    points, signs, losses = oracle.trajectory(
        vectors,
        lambda p: torch.optim.SGD(
            p,
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            nesterov=optimizer.nesterov,
        ),
        optimizer.iterations,
        groups,
        similarity=objective.similarity,
        kind=objective.penalty,
        alpha=objective.alpha,
        eps=objective.eps,
    )
    t = reference.task_vectors(None, vectors, groups)
    descent = reference.SpanDescent(statistics.gram(t), objective, optimizer, len(t))
    size = max(float(t.abs().max()), 1e-30)
    for index, (point, sign, value) in enumerate(zip(points, signs, losses, strict=True)):
        if objective.similarity == "absolute" and not torch.equal(sign, signs[0]):
            return index
        delicate = [vector - point for vector in vectors] + [point] * (objective.penalty == "l2")
        lengths = torch.stack([torch.linalg.vector_norm(oracle.matrix(v, groups), dim=1) for v in delicate])
        if ((lengths > 0) & (lengths < 1e-7 * size)).any():
            return index
        d = reference.ungroup(torch.einsum("rk,rkd->rd", descent.coefficients, t), point.shape, groups)
        assert float((d - point).abs().max()) <= 1e-10 * max(size, float(point.abs().max())), index
        assert abs(float(descent.loss()) - value) <= 1e-10 * max(1.0, abs(value)), index
        descent.step()
    return len(points)


@st.composite
def problems(draw):
    k = draw(st.integers(1, 20))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    common = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    vectors = [0.5 * common + torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(k)]
    for _ in range(draw(st.integers(0, 2))):
        i, j = draw(st.integers(0, k - 1)), draw(st.integers(0, k - 1))
        kind = draw(st.sampled_from(["zero row", "zero everywhere", "identical"]))
        if kind == "zero row":
            vectors[i][draw(st.integers(0, rows - 1))] = 0.0
        elif kind == "zero everywhere":
            for vector in vectors:
                vector[0] = 0.0
        else:
            vectors[i] = vectors[j].clone()
    return vectors


@given(
    vectors=problems(),
    groups=st.sampled_from(["row", "column", "tensor", "global"]),
    similarity=st.sampled_from(["absolute", "squared"]),
    penalty=st.sampled_from(["none", "l2", "squared_l2"]),
    momentum=st.sampled_from([(0.0, False), (0.9, False), (0.8, True)]),
    decay=st.sampled_from([0.0, 1e-2]),
)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)  # the same problems in every run
def test_the_span_solver_and_autograd_sgd_follow_one_trajectory(vectors, groups, similarity, penalty, momentum, decay):
    objective = Objective(similarity=similarity, penalty=penalty, alpha=1e-2, eps=1e-8)
    optimizer = SGD(lr=5e-3, momentum=momentum[0], nesterov=momentum[1], weight_decay=decay, iterations=12)
    compare(vectors, groups, objective, optimizer)


@pytest.mark.parametrize("groups", ["row", "column", "tensor"])
@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("penalty", ["none", "l2", "squared_l2"])
def test_the_comparison_reaches_the_last_iteration(groups, similarity, penalty):
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    vectors = [3.0 * common + torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
    objective = Objective(similarity=similarity, penalty=penalty, alpha=1e-3)
    assert compare(vectors, groups, objective, SGD(lr=1e-2, momentum=0.9, weight_decay=1e-3, iterations=25)) == 26


def test_three_hundred_iterations_stay_together_with_the_squared_similarity():
    generator = torch.Generator().manual_seed(4)
    vectors = [torch.randn(2, 12, generator=generator, dtype=torch.float64) for _ in range(5)]
    objective = Objective(similarity="squared", penalty="l2", alpha=1e-3)
    assert compare(vectors, "row", objective, SGD(lr=0.2, momentum=0.9, weight_decay=1e-4, iterations=300)) == 301


@pytest.mark.parametrize("penalty", ["none", "l2", "squared_l2"])
@pytest.mark.parametrize("case", ["twenty", "zero row", "zero everywhere", "identical", "more models than columns"])
def test_awkward_groups_stay_together_too(case, penalty):
    generator = torch.Generator().manual_seed(5)
    k, columns = {"twenty": (20, 30), "more models than columns": (9, 2)}.get(case, (4, 7))
    vectors = [torch.randn(3, columns, generator=generator, dtype=torch.float64) for _ in range(k)]
    if case == "zero row":
        vectors[1][2] = 0.0
    if case == "zero everywhere":
        for vector in vectors:
            vector[1] = 0.0
    if case == "identical":
        vectors[2] = vectors[0].clone()
    objective = Objective(similarity="squared", penalty=penalty, alpha=1e-3)
    assert compare(vectors, "row", objective, SGD(lr=2e-2, momentum=0.9, iterations=30)) == 31


def test_a_single_column_is_defined():
    vectors = [torch.tensor([[1.0], [0.0], [-2.0]], dtype=torch.float64) * (i + 1) for i in range(3)]
    for groups in ("row", "column"):
        assert compare(vectors, groups, Objective(similarity="squared", penalty="squared_l2"), SGD(iterations=10)) == 11


def test_history_starts_at_the_undisturbed_loss_and_counts_every_iteration():
    gram = statistics.gram(torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    objective = Objective()
    _, history = reference.descend(gram, objective, SGD(lr=0.1, iterations=40))
    assert history.shape == (41,)
    assert float(history[0]) == pytest.approx(float(statistics.similarity(gram, objective).mean()), rel=1e-14)
    assert float(history[-1]) < float(history[0])
