"""Elements left out by chance, and the norms that rescaling restores: DARE's and DELLA's part of sparse merges."""

import math

import pytest
import torch

from awd_fast import ops
from awd_fast.ops import sparse_reference
from tests import sparse_cases
from tests.sparse_cases import drops, made, same
from tests.test_native import DTYPES

backend, instruction_set = sparse_cases.backend, sparse_cases.instruction_set


def test_random_numbers_are_those_of_philox():
    """The known answers of Random123 for Philox4x32-10: of counter and key 0; and no number twice."""
    found = sparse_reference.philox(0, 0, torch.tensor([0, 16, 32, 48]))
    assert found.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    counters = [sparse_reference.philox(5, 3, torch.arange(at, at + 64)) for at in (0, 64)]
    assert len({*torch.cat(counters).tolist()}) == 128
    assert sparse_reference.philox(5, 4, torch.arange(64)).tolist() != counters[0].tolist()
    assert sparse_reference.philox(2**40 + 5, 3, torch.arange(64)).tolist() != counters[0].tolist()


def test_chance_keeps_each_model_at_its_density(backend):
    base, models = torch.zeros(20000), [torch.ones(20000)] * 3
    for seed in (0, 1):
        for densities in ((0.1, 0.5, 1.0), (0.0, 0.9, 0.02)):
            norms = ops.sparse_norms(base, models, ops.Bernoulli(densities, seed), backend=backend)
            for density, (before, after) in zip(densities, norms.tolist(), strict=True):
                assert before == 20000.0
                assert abs(after - 20000 * density) <= 5.0 * math.sqrt(20000 * density * (1.0 - density))


def test_chance_does_not_depend_on_how_a_tensor_is_cut(backend):
    base, models = made(1500, 2, torch.float32)
    drop = ops.Bernoulli((0.4, 0.6), 9)
    whole = ops.sparse_merge(base, models, [1.0, 1.0], drop, offset=2**40, backend=backend)
    for begin, end in ((0, 7), (7, 640), (640, 1500)):
        part = base[begin:end], [model[begin:end] for model in models]
        found = ops.sparse_merge(*part, [1.0, 1.0], drop, offset=2**40 + begin, backend=backend)
        assert same(found, whole[begin:end])


def test_large_elements_are_kept_more_often_by_rank_in_their_row(backend):
    g = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(100, generator=g) for _ in range(3000)])
    t = (rows + 1.0) * torch.where(torch.rand(rows.shape, generator=g) > 0.5, 1.0, -1.0)
    merged = ops.sparse_merge(None, [t], [1.0], ops.MagPrune((0.5,), (0.3,), 3), backend=backend)
    often = torch.zeros(100).index_add_(0, rows.reshape(-1), (merged != 0).float().reshape(-1)) / 3000
    expected = 0.2 + 0.6 * torch.arange(100) / 99
    assert float((often - expected).abs().max()) < 5.0 * math.sqrt(0.25 / 3000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_in_rows_of_any_length(instruction_set, dtype):
    drop = ops.MagPrune((0.5, 0.4, 1.0), (0.4, 0.0, 0.3), 11)
    for seed, shape in enumerate(((0, 4), (4, 0), (9,), (), (3, 1), (31, 5), (6, 33), (3, 1001), (2, 3, 40))):
        base, models = made(shape, 3, dtype, seed)
        for origin in (base, None):
            call = (origin, models, [1.0, 2.0, -1.0], drop)
            expected = ops.sparse_merge(*call, consensus="sum", backend="reference")
            assert same(ops.sparse_merge(*call, consensus="sum", backend="native"), expected), shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_sums_of_magnitudes(instruction_set, dtype):
    for seed, shape in enumerate(((0,), (1,), (17,), (385,), (70, 1001))):
        base, models = made(shape, 3, dtype, seed)
        for drop in drops(base, models)[1:] if shape[0] < 70 else drops(base, models)[2:3]:
            found = ops.sparse_norms(base, models, drop, backend="native")
            expected = ops.sparse_norms(base, models, drop, backend="reference")
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
            merged = [ops.sparse_merge(base, [m], [1.0], None, dtype=torch.float64).double() - base for m in models]
            norms = torch.stack([t.abs().sum() for t in merged])
            torch.testing.assert_close(found[:, 0], norms, rtol=1e-2, atol=1e-2)


def test_rescales_restore_the_norm(backend):
    base, models = made((40, 50), 3, torch.float64)
    models[2] = base.clone()
    for drop in drops(base, models)[1:3]:
        norms = ops.sparse_norms(base, models, drop, backend=backend)
        rescales = ops.l1_rescales(norms)
        for index, (model, rescale) in enumerate(zip(models, rescales, strict=True)):
            weights = [float(i == index) for i in range(3)]
            found = ops.sparse_merge(base, models, weights, drop, rescales=rescales, backend=backend) - base
            expected = (model - base).abs().sum() if float(norms[index, 1]) else torch.tensor(0.0).double()
            torch.testing.assert_close(found.abs().sum(), expected, rtol=1e-9, atol=1e-9)
            assert rescale >= 1.0
