"""merge_rows: one pass over rows or columns, on awkward groups and sizes, against its operators and the reference.

Of every case here there are enough groups for the fused pass (`native.FUSED_GROUPS`), and too few.
"""

import pytest
import torch
from torch import Tensor

from awd_fast import checks, ops, statistics
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Objective
from awd_fast.ops import native, reference
from tests.blocks import check_blocks
from tests.guards import guarded
from tests.test_native import DTYPES, check_combine, check_gram, instruction_sets, loss_at, models_like

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

FEW, MANY = native.FUSED_GROUPS - 1, native.FUSED_GROUPS + 13
SQUARED = Objective(similarity="squared", alpha=1e-3)
OPTIMIZERS = (SGD(lr=0.5, iterations=12), Converge(max_iterations=5))


@pytest.fixture(params=instruction_sets(), autouse=True)
def guards(request: pytest.FixtureRequest):
    with guarded(3, request.param, 1):
        yield


def laid_out(groups: str, base: Tensor | None, models: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """The rows of these matrices as groups of this kind."""
    if groups == "row":
        return base, models
    return None if base is None else base.T.contiguous(), [model.T.contiguous() for model in models]


def check(base, models, groups, objective, optimizer, *, target=torch.float32) -> ops.Merged:
    """What holds of every call: G and the merge by their formulas, the losses those of d = 0 and of the result."""
    weights = torch.linspace(1.0, 0.2, len(models), dtype=torch.float64)
    found = ops.merge_rows(base, models, weights, objective, optimizer, groups, dtype=target, backend="native")
    check_gram(found.gram, base, models, groups)
    factors = statistics.merge_weights(weights, found.coefficients)
    assert found.merged.dtype == target
    check_combine(found.merged, base, models, factors, groups)
    assert bool(found.history.isfinite().all())
    nothing = torch.zeros_like(found.coefficients)
    first = loss_at(found.gram, nothing, objective) if len(nothing) else 0.0
    assert float(found.history[0]) == pytest.approx(first, rel=1e-9, abs=1e-12)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", ["row", "column"])
@pytest.mark.parametrize("count", [FEW, MANY])
def test_it_is_the_reference_in_every_dtype(count, groups, dtype):
    base, models = models_like((count, 33), 5, dtype, 0)
    for origin in (base, None):
        given = laid_out(groups, origin, models)
        optimizer = checks.gentle(SGD(iterations=30), reference.gram(*given, groups))
        for target in DTYPES:
            found = check(*given, groups, SQUARED, optimizer, target=target)
        weights = torch.linspace(1.0, 0.2, 5, dtype=torch.float64)
        expected = reference.merge_rows(*given, weights, SQUARED, optimizer, groups, dtype)
        assert (found.coefficients - expected[2]).norm() <= 1e-6 * expected[
            2
        ].norm()  # models alike are nearly dependent
        torch.testing.assert_close(found.history, expected[3], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("groups", ["row", "column"])
def test_every_number_of_tasks(groups, k):
    base, models = laid_out(groups, *models_like((MANY, 100), k, torch.float32, k))
    gram = reference.gram(base, models, groups)
    for objective in (SQUARED, Objective()):
        optimizer = checks.gentle(SGD(iterations=checks.COMPARED), gram)
        found = check(base, models, groups, objective, optimizer)
        reason = checks.wrong_losses(gram, found.history, objective, optimizer)
        assert reason is None, reason
        assert loss_at(found.gram, found.coefficients, objective) == pytest.approx(float(found.history[-1]), rel=1e-6)
        check(base, models, groups, objective, Converge(max_iterations=3))


@pytest.mark.parametrize("count", [64, 65, 71, 72, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("size", [1, 7, 8, 64, 1025])
def test_counts_that_are_no_multiple_of_a_block(count, size):
    for groups in ("row", "column"):
        base, models = laid_out(groups, *models_like((count, size), 3, torch.bfloat16, size))
        found = check(base, models, groups, SQUARED, SGD(lr=0.5, iterations=3), target=torch.bfloat16)
        assert bool(found.coefficients.isfinite().all())


def test_rows_wider_than_a_segment_and_columns_longer_than_one():
    for groups, shape in (("row", (66, 70001)), ("column", (70, 66)), ("column", (66, 5003))):
        base, models = laid_out(groups, *models_like(shape, 2, torch.float32, 1))
        check(base, models, groups, SQUARED, SGD(lr=0.5, iterations=2))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((), "row"), ((1,), "column"), ((77,), "row"), ((77,), "column"), ((77, 1), "row"), ((1, 77), "column")]
    + [((7, 11, 5), groups) for groups in ("row", "column")]
    + [
        ((3, 2, 80), "column"),
        ((0, 5), "row"),
        ((0, 77), "column"),
        ((77, 0), "row"),
        ((5, 0), "column"),
        ((0,), "row"),
    ],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tensors_that_are_no_matrix_or_empty(shape, groups, optimizer):
    base, models = models_like(shape, 3, torch.float32, 0)
    assert check(base, models, groups, SQUARED, optimizer).merged.shape == shape


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("objective", [SQUARED, Objective(eps=0.0), Objective(penalty="none"), Objective(alpha=0.1)])
@pytest.mark.parametrize("groups", ["row", "column"])
def test_zero_and_identical_groups_beside_others(groups, objective, optimizer):
    """Of groups in the same block of lanes: all vectors 0, one 0, two the same, all the same, and others."""
    base, models = models_like((MANY, 40), 4, torch.float32, 2)
    for model in models:
        model[::5] = base[::5]
        model[3] = models[0][3]
    models[2][1::7] = base[1::7]
    models[3][2::6] = models[1][2::6]
    base, models = laid_out(groups, base, models)
    found = check(base, models, groups, objective, optimizer)
    assert bool((found.coefficients[::5] == 0.0).all())
    merged = reference.group_view(found.merged, groups)[::5]
    assert torch.equal(merged, reference.group_view(base, groups)[::5])
    several = check(base, [models[0]] * 4, groups, objective, optimizer)
    assert bool(several.coefficients.isfinite().all())
    nothing = check(base, [base] * 4, groups, objective, optimizer)
    assert bool((nothing.history == 0.0).all())
    assert torch.equal(nothing.merged, base)


@pytest.mark.parametrize("penalty", ["none", "l2", "squared_l2"])
@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_exactly_orthogonal_vectors_stay(backend, similarity, penalty):
    """sign(0) = 0: where every pair is orthogonal d = 0 is a fixed point; where one is not, it is left."""
    objective = Objective(similarity=similarity, penalty=penalty)
    supports = [torch.zeros(MANY, 40) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for index, model in enumerate(supports):
        model[:, 10 * index : 10 * index + 10] = torch.randn(MANY, 10, generator=generator)
    weights = torch.ones(3)
    for optimizer in (SGD(lr=0.5, iterations=20), SGD(lr=0.5, momentum=0.0, iterations=20), Converge(max_iterations=9)):
        found = ops.merge_rows(None, supports, weights, objective, optimizer, backend=backend)
        assert bool((found.coefficients == 0.0).all())
        assert bool((found.history <= 1e-300).all())  # which stands for 0 in awd_fast/converge.py
        assert torch.equal(found.merged, supports[0] + supports[1] + supports[2])
    mixed = [model.clone() for model in supports]
    mixed[1][::3, :10] = mixed[0][::3, :10]  # these groups move, their neighbours in the lanes do not
    found = ops.merge_rows(None, mixed, weights, objective, SGD(lr=0.5, iterations=3), backend=backend)
    moved = found.coefficients.abs().amax(dim=1) > 0.0
    assert bool(moved[::3].all())
    assert int(moved.sum()) == len(moved[::3])
    expected = reference.descend(found.gram, objective, SGD(lr=0.5, iterations=3))[0]
    torch.testing.assert_close(found.coefficients, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_models_that_are_not_finite_have_no_finite_loss_and_spoil_one_group(k, value, optimizer):
    for count in (FEW, MANY):
        base, models = models_like((count, 20), k, torch.float32, 0)
        models[k - 1][9, 3] = value
        found = ops.merge_rows(base, models, torch.ones(k), Objective(), optimizer, backend="native")
        assert bool(found.history.isnan().all())
        others = torch.arange(count) != 9
        assert bool(found.coefficients[others].isfinite().all())
        assert bool(found.merged[others].isfinite().all())


def test_no_iterations_change_nothing():
    base, models = models_like((MANY, 20), 3, torch.float32, 0)
    for optimizer in (SGD(iterations=0), Converge(max_iterations=0)):
        found = check(base, models, "row", Objective(), optimizer)
        if isinstance(optimizer, SGD):
            assert len(found.history) == 1
            assert bool((found.coefficients == 0.0).all())


def test_weights_of_any_kind():
    base, models = models_like((MANY, 20), 3, torch.float32, 0)
    weights = torch.tensor([0.5, -0.25, 1.0])
    arguments = (Objective(), SGD(iterations=5))
    expected = ops.merge_rows(base, models, weights, *arguments)
    for same in (weights.double(), weights.bfloat16(), torch._neg_view(-weights)):
        assert torch.equal(ops.merge_rows(base, models, same, *arguments).merged, expected.merged)


def test_mistakes_are_said_in_words():
    base, models = models_like((6, 4), 2, torch.float32, 0)
    weights = torch.ones(2)
    cases = [
        ((base, models, weights, Objective(), SGD(), "tensor"), "groups is 'tensor'; expected row or column"),
        ((base, models, weights, Objective(), SGD(), "rows"), "groups is 'rows'"),
        ((base, models, torch.ones(3), Objective(), SGD()), r"weights is torch.float32 \[3\] on cpu; expected \[2\]"),
        ((base, models, [1.0, 1.0], Objective(), SGD()), "weights is list; expected a torch.Tensor"),
        ((base, models, torch.ones(2, dtype=torch.int64), Objective(), SGD()), "weights is torch.int64"),
        ((base, models, weights, Objective(), Adam()), "Adam with penalty l2 leaves the span"),
        ((base, models, weights, Objective(penalty="l1"), SGD()), "SGD with penalty l1 leaves the span"),
        ((base, [], weights, Objective(), SGD()), "models is empty"),
        ((base, [base, base.double()], weights, Objective(), SGD()), r"models\[1\] is torch.float64"),
        ((base, [base, base[:3]], weights, Objective(), SGD()), r"models\[1\] is torch.float32"),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError, match=words):
            ops.merge_rows(*arguments)
    with pytest.raises(InputError, match=r"dtype is torch\.int8"):
        ops.merge_rows(base, models, weights, Objective(), SGD(), dtype=torch.int8)
    with pytest.raises(InputError, match="merge_rows has no gradient, and a tensor requires one"):
        ops.merge_rows(base.requires_grad_(), models, weights, Objective(), SGD(), backend="native")


@pytest.mark.parametrize("similarity", ["absolute", "squared"])
@pytest.mark.parametrize("optimizer", [SGD(lr=2.0, iterations=30), Converge(max_iterations=8)])
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_have_the_bits_of_the_whole(dtype, k, optimizer, similarity):
    """The last blocks are below FUSED_GROUPS, and the second whole is; G alone is descended in blocks too."""
    weights = torch.linspace(1.0, 0.2, k, dtype=torch.float64)
    for objective in (Objective(similarity=similarity, alpha=1e-3), Objective(similarity=similarity, penalty="none")):
        for count, cuts in ((203, (70, 139, 198)), (45, (8, 9, 30))):
            given = models_like((count, 100), k, dtype, k)
            gram = ops.gram(*given, backend="native")
            check_blocks(ops.merge_rows, given, (weights, objective, optimizer), cuts, 3, backend="native")
            check_blocks(ops.descend, (gram,), (objective, optimizer), cuts, 1, backend="native")


@pytest.mark.parametrize("optimizer", [SGD(lr=0.5, iterations=10), Converge(max_iterations=3)])
def test_blocks_of_rows_are_those_of_the_whole_in_the_reference(optimizer):
    given = models_like((21, 33), 3, torch.float32, 0)
    arguments = (torch.ones(3), SQUARED, optimizer)
    check_blocks(ops.merge_rows, given, arguments, (4, 5, 16), 3, tolerance=1e-9, backend="reference")
