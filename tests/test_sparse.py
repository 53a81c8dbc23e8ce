"""Sparse merges: kernels against the reference to the bit, the reference against plain evaluations, exact counts."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from awd_fast import ops
from awd_fast.errors import InputError
from awd_fast.ops import sparse_native
from awd_fast.ops.sparse import Cut
from tests import sparse_cases
from tests.guards import LAYOUTS, guarded, laid_out
from tests.sparse_cases import awkward, drops, made, needs_native, ranks_of, same
from tests.test_native import DTYPES, instruction_sets

SIZES = (0, 1, 2, 15, 17, 383, 384, 385, 1001)
backend, instruction_set = sparse_cases.backend, sparse_cases.instruction_set


def assert_same_cut(found: Cut, expected: Cut) -> None:
    assert same(found.thresholds, expected.thresholds)
    assert torch.equal(found.limits, expected.limits)


def chosen(t: Tensor, cut: Cut, model: int) -> Tensor:
    """Which elements of a task vector a cut keeps, from what is said of cuts."""
    nan, sizes, positions = t.isnan().reshape(-1), t.abs().double().reshape(-1), torch.arange(t.numel())
    before = []
    for threshold, limit in zip(cut.thresholds[model].tolist(), cut.limits[model].tolist(), strict=True):
        larger = (sizes > threshold) | nan if not math.isnan(threshold) else torch.zeros_like(nan)
        equal = nan if math.isnan(threshold) else (sizes == threshold) & ~nan
        before.append(larger | (equal & (positions < limit)))
    return (before[1] & ~before[0]).reshape(t.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trim_is_the_reference_to_the_bit(instruction_set, dtype):
    for seed, size in enumerate((*SIZES, 70001) if dtype == torch.float32 else SIZES):
        base, models = made(size, 6, dtype, seed)
        for origin in (base, None):
            found = ops.trim(origin, models, ranks_of(size), backend="native")
            assert_same_cut(found, ops.trim(origin, models, ranks_of(size), backend="reference"))


@pytest.mark.parametrize("name", awkward())
def test_trim_of_awkward_magnitudes(instruction_set, name):
    base, models = awkward()[name]
    for k in (0, 1, 2, 11, 12, 13, 333, 500, 900, 999, 1000):
        for ranks in ([(0, k)] * 3, [(k // 2, k)] * 3):
            found = ops.trim(base, models, ranks, backend="native")
            assert_same_cut(found, ops.trim(base, models, ranks, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_trim_of_tensors_large_enough_to_be_sampled(instruction_set, dtype):
    """Smooth ones, and some whose magnitudes are those of blocks, so that samples mislead."""
    g = torch.Generator().manual_seed(0)
    size, half = 2**18 + 5, 2**17
    blocks = torch.randn(4, size // 1500 + 1, generator=g).repeat_interleave(1500, dim=1)[:, :size]
    models = [*torch.randn(2, size, generator=g), *blocks, blocks[0] + 1e-3 * torch.randn(size, generator=g)]
    models = [model.to(dtype) for model in models]
    ranks = [(1000, half), (0, size - 1), (half, half + 1), (10000, half), (0, 100), (0, half), (size // 3, half)]
    expected = ops.trim(None, models, ranks, backend="reference")
    assert_same_cut(ops.trim(None, models, ranks, backend="native"), expected)
    parts = [(None, [model[begin:end] for model in models]) for begin, end in ((0, 9), (9, 9), (9, half), (half, size))]
    assert_same_cut(ops.trim_together(parts, ranks, backend="native"), expected)


def test_exactly_as_many_are_kept_the_largest_and_the_first_of_equal_ones(backend):
    cases = [
        *awkward().values(),
        made((7, 33), 3, torch.bfloat16),
        made(1001, 3, torch.float64),
        made((), 3, DTYPES[0]),
    ]
    for base, models in cases:
        size = base.numel()
        for ranks in ranks_of(size):
            cut = ops.trim(base, models, [ranks] * 3, backend=backend)
            for index, model in enumerate(models):
                t = (model.double() - base.double()) if base.dtype == torch.float64 else model.float() - base.float()
                sizes = [(math.inf, 1) if math.isnan(x) else (abs(x), 0) for x in t.reshape(-1).tolist()]
                order = sorted(range(size), key=lambda e, sizes=sizes: (-sizes[e][0], -sizes[e][1], e))
                kept = chosen(t, cut, index).reshape(-1)
                assert int(kept.sum()) == ranks[1] - ranks[0]
                assert sorted(order[slice(*ranks)]) == kept.nonzero().reshape(-1).tolist()


def test_tensors_taken_together_are_one_long_vector(backend):
    for dtype in DTYPES:
        parameters = [made(shape, 3, dtype, seed) for seed, shape in enumerate(((5, 8), (), (0, 4), (33, 70), (1, 1)))]
        size = sum(base.numel() for base, _ in parameters)
        ranks = [(0, size // 5), (size // 9, size // 2), (0, size)]
        base = torch.cat([base.reshape(-1) for base, _ in parameters])
        models = [torch.cat([own[i].reshape(-1) for _, own in parameters]) for i in range(3)]
        cut = ops.trim_together(parameters, ranks, backend=backend)
        assert_same_cut(cut, ops.trim(base, models, ranks, backend=backend))
        expected = ops.sparse_merge(base, models, [1.0] * 3, cut, consensus="sum", backend=backend)
        offset = 0
        for origin, own in parameters:
            options = {"consensus": "sum", "offset": offset, "backend": backend}
            found = ops.sparse_merge(origin, own, [1.0] * 3, cut, **options)
            assert same(found.reshape(-1), expected[offset : offset + origin.numel()])
            offset += origin.numel()


VOTES = [
    {"consensus": consensus, "normalize": normalize, "scale": scale}
    for consensus, (normalize, scale) in itertools.product((None, "sum", "count"), ((False, 1.0), (True, 0.7)))
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_merge_is_the_reference_to_the_bit(instruction_set, dtype):
    for seed, size in enumerate((0, 1, 17, 385)):
        for k in (1, 8, 17) if size == 17 else (3,):
            base, models = made(size, k, dtype, seed)
            weights = [(0.3, -0.5, 1.1, 0.0, 2.0)[i % 5] for i in range(k)]
            rescales = [1.0 + i for i in range(k)] if seed % 2 else None
            for index, (drop, vote) in enumerate(itertools.product(drops(base, models), VOTES)):
                call = (None if (index + seed) % 5 == 0 else base, models, weights, drop)
                options = vote | {"rescales": rescales}
                expected = ops.sparse_merge(*call, **options, backend="reference")
                assert same(ops.sparse_merge(*call, **options, backend="native"), expected), (size, k, vote)


@pytest.mark.parametrize("name", awkward())
def test_sparse_merge_of_awkward_elements(instruction_set, name):
    base, models = awkward()[name]
    for drop, vote in itertools.product(drops(base, models), VOTES):
        call = (base, models, [1.0, 1.0, 0.5], drop)
        expected = ops.sparse_merge(*call, **vote, backend="reference")
        assert same(ops.sparse_merge(*call, **vote, backend="native"), expected), vote


def plain_ties(base: Tensor, models: list[Tensor], k: int, weights: list[float], how: str, normalize: bool) -> Tensor:
    """TIES an element at a time, by sorting and in float64."""
    t = [[a - b for a, b in zip(m.double().tolist(), base.double().tolist(), strict=True)] for m in models]
    for vector in t:
        order = sorted(range(len(vector)), key=lambda e, v=vector: (-abs(v[e]), e))
        for e in order[k:]:
            vector[e] = 0.0
    out = []
    for e, origin in enumerate(base.double().tolist()):
        v = [w * vector[e] for w, vector in zip(weights, t, strict=True)]
        total = sum(v) if how == "sum" else sum((x > 0) - (x < 0) for x in v)
        agree = [i for i, x in enumerate(v) if (x > 0 if total >= 0 else x < 0)]
        divisor = sum(weights[i] for i in agree) or 1.0
        out.append(origin + sum(v[i] for i in agree) / (divisor if normalize else 1.0))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("how", ["sum", "count"])
@pytest.mark.parametrize("normalize", [False, True])
def test_ties_is_what_a_plain_loop_makes_of_it(backend, how, normalize):
    for seed, (k, weights) in enumerate(((1, [0.5]), (4, [0.5, 1.0, 0.25, 1.0]), (3, [1.0, 1.0, 1.0]))):
        base, models = made(301, k, torch.float64, seed)
        cut = ops.trim(base, models, [ops.kept(301, 0.4)] * k, backend=backend)
        options = {"consensus": how, "normalize": normalize, "backend": backend}
        found = ops.sparse_merge(base, models, weights, cut, **options)
        torch.testing.assert_close(
            found, plain_ties(base, models, 120, weights, how, normalize), rtol=1e-12, atol=1e-12
        )


def test_without_a_drop_and_a_consensus_it_is_task_arithmetic(backend):
    for dtype in DTYPES:
        base, models = made((5, 37), 4, dtype)
        weights = [0.3, -0.2, 0.5, 1.0]
        expected = ops.combine(base, models, torch.tensor([weights]), backend="reference")
        found = ops.sparse_merge(base, models, weights, backend=backend)
        torch.testing.assert_close(found, expected)
        half = ops.sparse_merge(base, models, weights, normalize=True, scale=0.8, backend=backend)
        torch.testing.assert_close(
            half.double(), (base.double() + (found.double() - base.double()) / 2.0), rtol=2e-2, atol=2e-2
        )
        assert ops.sparse_merge(base, models, weights, dtype=torch.float64, backend=backend).dtype == torch.float64


def test_what_is_dropped_leaves_no_trace_and_what_is_kept_shows(backend):
    base, models = made(100, 3, torch.float32)
    models[1][10] = torch.nan
    for consensus in (None, "sum", "count"):
        dropped = ops.trim(base, models, [(0, 50), (1, 50), (0, 50)], backend=backend)
        kept = ops.trim(base, models, [(0, 50)] * 3, backend=backend)
        found = [
            ops.sparse_merge(base, models, [1.0] * 3, c, consensus=consensus, backend=backend) for c in (dropped, kept)
        ]
        assert bool(found[0].isfinite().all())
        assert found[1].isnan().nonzero().reshape(-1).tolist() == [10]


@needs_native
def test_threads_do_not_change_a_bit():
    base, models = made((331, 700), 3, torch.float32)
    models = [(base + (model - base).bfloat16().float()) for model in models]  # ties
    ranks, found = [(0, 100000), (1000, 70000), (0, 231)], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cut = ops.trim(base, models, ranks, backend="native")
        found.append((cut, ops.sparse_merge(base, models, [1.0] * 3, cut, consensus="sum", backend="native")))
    for cut, merged in found[1:]:
        assert_same_cut(cut, found[0][0])
        assert same(merged, found[0][1])
    assert_same_cut(found[0][0], ops.trim(base, models, ranks, backend="reference"))


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_nothing_is_written_outside_the_result(layout, offset, monkeypatch):
    for seed, dtype in enumerate(DTYPES):
        for shape in ((5, 37), (70, 9)):
            base, models = made(shape, 5, dtype, seed)
            own = laid_out(base, layout, offset), [laid_out(model, layout, offset) for model in models]
            for drop in drops(*own):
                expected = ops.sparse_merge(*own, [1.0] * 5, drop, consensus="sum", backend="reference")
                with guarded(offset, instruction_sets()[-1], 2) as guards:
                    monkeypatch.setattr(sparse_native, "torch", guards)
                    found = ops.sparse_merge(*own, [1.0] * 5, drop, consensus="sum", backend="native")
                    monkeypatch.setattr(sparse_native, "torch", torch)
                assert same(found, expected)


def test_streamed_results_are_those_of_small_ones(backend):
    base, models = made(70001, 2, torch.float32)
    cut = ops.trim(base, models, [(0, 7000)] * 2, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        options = {"consensus": "sum", "dtype": dtype, "backend": backend}
        whole = ops.sparse_merge(base, models, [1.0, 1.0], cut, **options)
        for begin, end in ((0, 30001), (30001, 70001)):
            part = base[begin:end], [model[begin:end] for model in models]
            assert same(ops.sparse_merge(*part, [1.0, 1.0], cut, offset=begin, **options), whole[begin:end])


def test_numbers_kept_are_those_of_mergekit():
    assert [ops.kept(*given) for given in ((10, 0.25), (10, 0.01), (10, 0.0), (10, 1.0), (0, 0.5))] == [
        (0, 2),
        (0, 1),
        (0, 0),
        (0, 10),
        (0, 0),
    ]
    assert [ops.band(*given) for given in ((100, 0.5, 0.1), (100, 0.95, 0.1), (100, 1.0, 0.1), (3, 0.4, 0.0))] == [
        (10, 60),
        (5, 100),
        (0, 100),
        (0, 1),
    ]


def test_mistakes_are_named():
    base, models = made((2, 3), 2, torch.float32)
    cut = ops.trim(base, models, [(0, 2), (1, 3)])
    wrong = Cut(cut.thresholds.float(), cut.limits)
    cases = [
        (lambda: ops.trim(base, models, [(0, 7), (0, 1)]), "ranks is"),
        (lambda: ops.trim(base, models, [(0, 2)]), "ranks is"),
        (lambda: ops.trim(base, [], []), "there are 0 models"),
        (lambda: ops.trim_together([], []), "parameters is empty"),
        (lambda: ops.trim_together([(base, models), (None, models)], [(0, 1)] * 2), "parameters differ in K"),
        (lambda: ops.trim_together([(base, models), (base.half(), [m.half() for m in models])], [(0, 1)] * 2), "dtype"),
        (lambda: ops.trim(base, models, [(0, 1)] * 2, backend="cuda"), "backend cuda cannot run trim"),
        (lambda: ops.sparse_merge(base, models, [1.0]), "weights is"),
        (lambda: ops.sparse_merge(base, models, [1.0, math.nan]), "weights is"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, rescales=[1.0]), "rescales is"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, wrong), "thresholds is"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, ops.Bernoulli((0.5,))), "densities is"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, ops.Bernoulli((0.5, 1.5))), "densities is"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, ops.Bernoulli((0.5, 0.5), -1)), "seed is"),
        (lambda: ops.sparse_norms(base, models, ops.MagPrune((0.5, 0.5), (0.1, 0.5))), "epsilons is"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, offset=-1), "offset -1"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, 0.5), "drop is float"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, consensus="mean"), "consensus is"),
        (lambda: ops.sparse_merge(base, models, [1.0] * 2, dtype=torch.int8), "dtype is"),
        (lambda: ops.sparse_merge(base.requires_grad_(), models, [1.0] * 2), "sparse_merge has no gradient"),
    ]
    for mistaken, words in cases:
        with pytest.raises(InputError, match=words):
            mistaken()


def test_opcheck(backend):
    awd = torch.ops.awd_fast
    base, models = made((3, 5), 2, torch.float32)
    torch.library.opcheck(awd.trim.default, ([base], models, [2, 3, 1, 9], 2, backend))  # of rank 0 it is NaN
    cut = ops.trim(base, models, [(0, 3), (1, 9)], backend=backend)
    drop = (cut.thresholds, cut.limits, [], [], 0)
    arguments = (base, models, [0.5, 1.0], [1.0, 1.0], *drop)
    torch.library.opcheck(awd.sparse_merge.default, arguments, {"consensus": "sum", "backend": backend})
    torch.library.opcheck(awd.sparse_norms.default, (base, models, *drop, 0, backend))
    meta = [tensor.to("meta") for tensor in (base, *models)]
    assert ops.sparse_merge(meta[0], meta[1:], [1.0, 1.0], dtype=torch.float16).shape == (3, 5)
