"""The reference path against the loss written out pair by pair, autograd and torch.optim, in float64."""

import pytest
import torch

from awd_fast import statistics
from awd_fast.objective import SGD, Adam, Objective
from awd_fast.ops import reference
from tests import oracle

GROUPS = ("row", "column", "tensor", "global")


def random_vectors(seed: int, k: int, *shape: int, zero: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    vectors = [0.4 * common + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(k)]
    if zero:
        vectors[0].reshape(-1, shape[-1])[0] = 0.0
    return vectors


def stacked(vectors: list[torch.Tensor], groups: str) -> torch.Tensor:
    return reference.task_vectors(None, vectors, groups)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("kind", ["none", "l2", "squared_l2", "l1"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_loss_and_gradient_equal_autograd_of_the_pairwise_loss(groups, similarity, kind, k):
    vectors = random_vectors(k, k, 3, 7, zero=True)
    d = 0.3 * random_vectors(99, 1, 3, 7)[0]
    d.requires_grad_()
    expected = oracle.loss(vectors, d, groups=groups, similarity=similarity, kind=kind, alpha=0.2, eps=1e-3)
    (slope,) = torch.autograd.grad(expected, d)
    objective = Objective(similarity=similarity, penalty=kind, alpha=0.2, eps=1e-3)
    t = stacked(vectors, groups)
    shift = reference.group_view(d.detach(), groups)
    found = reference.loss(t, shift, objective, len(t))
    gradient = reference.ungroup(reference.gradient(t, shift, objective, len(t)), d.shape, groups)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient, slope, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 3, 5), (2, 3, 2, 4), (0, 4), (4, 0)])
def test_group_views_cover_every_element_once_and_undo(shape):
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    columns = shape[-1] if shape else 1
    rows = torch.Size(shape[:-1]).numel() if len(shape) > 1 else 1
    for groups, expected in (("row", (rows, columns)), ("column", (columns, rows)), ("tensor", (1, rows * columns))):
        view = reference.group_view(tensor, groups)
        assert view.shape == expected
        assert torch.equal(reference.ungroup(view, shape, groups), tensor)


def test_a_row_group_is_a_row_and_a_column_group_a_column():
    matrix = torch.arange(12.0).reshape(3, 4)
    assert reference.group_view(matrix, "row")[1].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert reference.group_view(matrix, "column")[1].tolist() == [1.0, 5.0, 9.0]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_follows_torch_adam(groups, similarity, decay):
    vectors = random_vectors(3, 4, 3, 5)
    adam = Adam(lr=1e-2, betas=(0.8, 0.95), eps=1e-7, weight_decay=decay, iterations=20)
    points, _, losses = oracle.trajectory(
        vectors,
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-7, weight_decay=decay),
        20,
        groups,
        similarity=similarity,
        kind="l2",
        alpha=0.05,
    )
    objective = Objective(similarity=similarity, alpha=0.05)
    shift, history = reference.descend_elements(stacked(vectors, groups), objective, adam)
    torch.testing.assert_close(reference.ungroup(shift, (3, 5), groups), points[-1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(history, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l1_penalty_with_sgd_follows_torch_sgd(momentum):
    vectors = random_vectors(4, 3, 4, 6)
    points, _, losses = oracle.trajectory(
        vectors, lambda p: torch.optim.SGD(p, lr=0.05, momentum=momentum), 25, "row", kind="l1", alpha=1e-3
    )
    objective = Objective(penalty="l1", alpha=1e-3)
    sgd = SGD(lr=0.05, momentum=momentum, weight_decay=0.0, iterations=25)
    shift, history = reference.descend_elements(stacked(vectors, "row"), objective, sgd)
    torch.testing.assert_close(shift, points[-1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(history, torch.tensor(losses, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_blocks_of_groups_do_not_change_the_result(monkeypatch):
    vectors = stacked(random_vectors(5, 3, 40, 6), "row")
    objective, gram = Objective(alpha=0.1), statistics.gram(vectors)
    whole = reference.descend(gram, objective, SGD(lr=1.0, iterations=30))
    elements = reference.descend_elements(vectors, objective, Adam(lr=1e-2, iterations=10))
    monkeypatch.setattr(reference, "BLOCK_NUMBERS", 64)
    parts = reference.descend(gram, objective, SGD(lr=1.0, iterations=30))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        reference.descend_elements(vectors, objective, Adam(lr=1e-2, iterations=10))[0], elements[0], rtol=1e-12, atol=0
    )


def test_zero_vectors_have_cosine_and_gradient_zero():
    gram = torch.zeros(2, 3, 3, dtype=torch.float64)
    gram[1, 1, 1] = 4.0
    objective = Objective(eps=0.0)
    assert torch.equal(statistics.cosines(gram, 0.0), torch.zeros_like(gram))
    assert torch.equal(statistics.pull(gram, objective), torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(statistics.similarity(gram, objective), torch.zeros(2, dtype=torch.float64))


def test_combine_is_the_weighted_sum_in_float64_of_every_storage_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(8)
        base, *models = (torch.randn(5, 9, generator=generator).to(dtype) for _ in range(4))
        weights = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        for groups, w in (("row", weights), ("row", weights[:1]), ("tensor", weights[:1])):
            exact = base.double() + sum(w[:, i, None] * (m.double() - base.double()) for i, m in enumerate(models))
            found = reference.combine(base, models, w, groups, dtype)
            assert found.dtype == dtype
            unit = torch.finfo(dtype).eps + 8 * torch.finfo(reference.compute_dtype(dtype)).eps
            torch.testing.assert_close(found.double(), exact, rtol=unit, atol=unit)
