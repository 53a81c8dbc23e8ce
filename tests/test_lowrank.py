"""The mathematics of factors, against task vectors that are multiplied out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awd_fast import InputError, lowrank, ops, statistics
from awd_fast.lowrank import Factors
from awd_fast.ops import reference

GROUPS = ("row", "column", "tensor", "global")


def make(rows, columns, ranks, seed=0, dtype=torch.float32) -> list[Factors]:
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return [Factors(drawn(rows, r), drawn(r, columns), 0.1 + float(torch.rand((), generator=g))) for r in ranks]


def dense(factors) -> list[torch.Tensor]:
    """The task vectors in float64."""
    return [each.scale * (each.left.double() @ each.right.double()) for each in factors]


cases = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([1, 2, 3, 17, 33]),
        "columns": st.sampled_from([1, 2, 5, 16, 40]),
        "ranks": st.lists(st.integers(0, 16), min_size=1, max_size=8),
        "seed": st.integers(0, 1000),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    }
)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(case=cases, groups=st.sampled_from(GROUPS))
def test_gram_is_that_of_the_task_vectors(case, groups):
    factors = make(**case)
    got = lowrank.gram(factors, groups)
    want = statistics.gram(reference.task_vectors(None, dense(factors), groups))
    assert got.dtype == torch.float64
    assert got.shape == want.shape
    assert torch.equal(got, got.mT)
    # Relative to the norms of the factors, which is what the rounding of a product is relative to.
    sizes = lowrank.gram([Factors(each.left.abs(), each.right.abs(), each.scale) for each in factors], groups)
    norms = sizes.diagonal(dim1=1, dim2=2).sqrt()
    assert ((got - want).abs() <= 1e-12 * norms[:, :, None] * norms[:, None, :]).all()


def test_gram_of_ordinary_factors_is_right_to_twelve_digits_of_the_norms():
    factors = make(64, 96, [16, 8, 0, 3, 16], seed=3)
    for groups in GROUPS:
        want = statistics.gram(reference.task_vectors(None, dense(factors), groups))
        norms = statistics.norms(want)
        error = (lowrank.gram(factors, groups) - want).abs()
        assert (error <= 1e-12 * norms[:, :, None] * norms[:, None, :]).all()


def test_row_blocks_share_the_products_of_the_right_factors():
    factors = make(23, 9, [4, 0, 7])
    products = lowrank.cross([each.right for each in factors])
    blocks = [
        lowrank.gram_rows([each.rows(at, min(at + 5, 23)) for each in factors], products) for at in range(0, 23, 5)
    ]
    torch.testing.assert_close(torch.cat(blocks), lowrank.gram_rows(factors), rtol=1e-14, atol=1e-13)


def test_the_same_adapter_twice_has_exactly_the_same_products():
    one = make(20, 30, [8])[0]
    for groups in GROUPS:
        g = lowrank.gram([one, one], groups)
        assert (g == g[:, :1, :1]).all()


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(case=cases, groups=st.sampled_from(GROUPS), one=st.booleans())
def test_merged_factors_are_the_weighted_sum(case, groups, one):
    factors = make(**case)
    vectors = dense(factors)
    count = 1 if one else reference.group_count(vectors[0], groups)
    weights = torch.randn(count, len(factors), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    left, right = lowrank.merged_factors(factors, weights, groups)
    assert left.shape == (case["rows"], sum(case["ranks"]))
    assert right.shape == (sum(case["ranks"]), case["columns"])
    assert left.dtype == right.dtype == torch.float64
    want = ops.combine(None, vectors, weights, groups, backend="reference")
    torch.testing.assert_close(left @ right, want, rtol=1e-11, atol=1e-11)
    narrow = lowrank.merged_factors(factors, weights, groups, torch.float32)
    assert torch.equal(narrow[0], left.float())
    assert torch.equal(narrow[1], right.float())


def test_row_weights_of_a_block_of_rows():
    factors = make(12, 7, [3, 5])
    weights = torch.randn(12, 2, dtype=torch.float64)
    left, right = lowrank.merged_factors(factors, weights, "row")
    part, same = lowrank.merged_factors([each.rows(4, 9) for each in factors], weights[4:9], "row")
    assert torch.equal(part, left[4:9])
    assert torch.equal(same, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ranks", [[0], [1], [4, 0, 9]])
def test_add_rounds_once(dtype, ranks):
    factors = make(13, 11, ranks)
    base = torch.randn(13, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    left, right = lowrank.merged_factors(factors, torch.full((1, len(ranks)), 0.3), "tensor")
    got = lowrank.add(base, left, right)
    exact = base.double() + left @ right
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = (base.double().abs() + left.abs() @ right.abs()).max()
    assert got.dtype == dtype
    # One rounding to the dtype, and products whose terms are rounded in the arithmetic's dtype.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 4 * (sum(ranks) + 1) * torch.finfo(wide).eps * size
    assert ((got.double() - exact).abs() <= bound).all()
    blocks = torch.cat([lowrank.add(base[:6], left[:6], right), lowrank.add(base[6:], left[6:], right)])
    assert ((blocks.double() - exact).abs() <= bound).all()  # a BLAS may sum in another order


def test_add_gives_another_dtype_without_rounding_to_the_bases_first():
    base = torch.ones(1, 1, dtype=torch.bfloat16)
    left, right = torch.full((1, 1), 1e-3), torch.ones(1, 1)
    assert lowrank.add(base, left, right).item() == 1.0
    assert lowrank.add(base, left, right, torch.float32).item() == pytest.approx(1.001, abs=1e-7)
    wide = lowrank.add(base, torch.full((1, 1), 1e-3, dtype=torch.float64), right, torch.float64)
    assert wide.item() == pytest.approx(1.001, abs=1e-15)


def test_delta_is_a_task_vector():
    (one,) = make(6, 5, [3])
    torch.testing.assert_close(lowrank.delta(one, torch.float64), dense([one])[0], rtol=1e-14, atol=1e-14)
    assert lowrank.delta(one).dtype == torch.float32
    assert torch.equal(lowrank.delta(one.rows(2, 4), torch.float64), lowrank.delta(one, torch.float64)[2:4])
    torch.testing.assert_close(lowrank.delta(one.T, torch.float64), dense([one])[0].T)
    assert torch.equal(lowrank.delta(Factors.zero((3, 4))), torch.zeros(3, 4))


def test_nothing_of_the_tensors_size_is_made():
    """Rows and columns here are so many that a [R, C] matrix of float64 would be 80 GB."""
    factors = [Factors(torch.ones(100_000, 2), torch.ones(2, 100_000), 0.5) for _ in range(2)]
    assert lowrank.gram(factors, "row").shape == (100_000, 2, 2)
    assert lowrank.gram(factors, "column").shape == (100_000, 2, 2)
    assert lowrank.gram(factors, "tensor")[0, 0, 1] == 1e10
    left, right = lowrank.merged_factors(factors, torch.ones(100_000, 2), "row")
    assert left.shape == right.T.shape == (100_000, 4)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"the factors are \[3, 2\] and \[4, 5\]; expected \[R, r\] and \[r, C\]"):
        Factors(torch.zeros(3, 2), torch.zeros(4, 5))
    with pytest.raises(InputError, match="expected"):
        Factors(torch.zeros(3), torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("groups", "shape"), [("row", (5, 2)), ("column", (4, 2)), ("tensor", (4, 2)), ("row", (4, 3))]
)
def test_weights_that_do_not_fit_are_refused(groups, shape):
    with pytest.raises(InputError, match=r"weights are .* for 2 adapters; expected"):
        lowrank.merged_factors(make(4, 5, [1, 2]), torch.ones(shape), groups)
