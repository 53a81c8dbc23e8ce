"""`disentangle` and `RedundantVector`: what a user of one parameter sees."""

import pytest
import torch

import awd_fast
from awd_fast import Adam, Converge, InputError, RedundantVector, disentangle
from tests import oracle


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    return [0.01 * (common + torch.randn(5, 8, generator=generator, dtype=torch.float64)) for _ in range(4)]


@pytest.mark.parametrize("groups", ["row", "column", "tensor", "global"])
@pytest.mark.parametrize("optimizer", [awd_fast.SGD(lr=1e-5), Adam(lr=1e-4), Converge()])
@pytest.mark.parametrize(("similarity", "size"), [("absolute", torch.abs), ("squared", torch.square)])
def test_it_lowers_the_similarity_it_reports(vectors, groups, optimizer, similarity, size):
    result = disentangle(vectors, groups=groups, similarity=similarity, optimizer=optimizer)
    before = size(oracle.cosines(vectors, torch.zeros(5, 8, dtype=torch.float64), groups)).mean()
    after = size(oracle.cosines(vectors, result.redundant, groups)).mean()
    assert result.similarity_before == pytest.approx(float(before), rel=1e-10)
    assert result.similarity_after == pytest.approx(float(after), rel=1e-5)
    assert result.similarity_after < result.similarity_before
    assert float(result.history[-1]) <= float(result.history[0])
    assert (result.coefficients is None) == isinstance(optimizer, Adam)


def test_by_default_the_squared_similarity_converges(vectors):
    plain, named = disentangle(vectors), disentangle(vectors, similarity="squared", optimizer=Converge())
    assert torch.equal(plain.coefficients, named.coefficients)
    assert plain.similarity_after < 0.25 * plain.similarity_before


def test_the_parts_add_up(vectors):
    result = disentangle(torch.stack(vectors), optimizer=Converge())
    for i, vector in enumerate(vectors):
        torch.testing.assert_close(result.disentangled(i) + result.redundant, vector, rtol=1e-12, atol=1e-15)
    d = torch.einsum("rk,krd->rd", result.coefficients, torch.stack(vectors))
    torch.testing.assert_close(result.redundant, d, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_redundant_vector_has_shape_and_dtype_of_a_task_vector(dtype):
    generator = torch.Generator().manual_seed(1)
    for shape in ((), (1,), (7,), (3, 5), (2, 3, 4), (0, 3)):
        result = disentangle([torch.randn(shape, generator=generator).to(dtype) for _ in range(3)])
        assert result.redundant.shape == shape
        assert result.redundant.dtype == dtype
        assert torch.isfinite(result.redundant).all()


def test_one_vector_has_nothing_to_be_disentangled_from(vectors):
    result = disentangle(vectors[:1])
    assert result.similarity_before == result.similarity_after == 0.0
    assert not result.redundant.any()


def test_the_same_call_gives_the_same_bits(vectors):
    for optimizer in (awd_fast.SGD(), Adam(), Converge()):
        first, second = (disentangle(vectors, optimizer=optimizer).redundant for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ([], "task_vectors is empty"),
        (3, "task_vectors is int"),
        ([torch.ones(2), "x"], r"task_vectors\[1\] is str"),
        ([torch.ones(2), torch.ones(3)], r"torch.float32 \[3\]"),
        ([torch.ones(2), torch.ones(2, dtype=torch.float64)], "torch.float64"),
        ([torch.ones(2, dtype=torch.int64)] * 2, "torch.int64"),
        ([torch.ones(2), torch.tensor([1.0, float("nan")])], r"task_vectors\[1\] holds NaN or Inf"),
        ([torch.ones(2), torch.tensor([1.0, float("inf")])], r"task_vectors\[1\] holds NaN or Inf"),
    ],
)
def test_bad_vectors_are_named(bad, sentence):
    with pytest.raises(InputError, match=sentence):
        disentangle(bad)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"groups": "block"}, "groups is 'block'; expected one of row, column, tensor, global"),
        ({"similarity": "cosine"}, "similarity is 'cosine'"),
        ({"penalty": "l3"}, "penalty is 'l3'"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"eps": "small"}, "eps is 'small'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected awd_fast.SGD"),
        ({"backend": "magic"}, "backend is 'magic'; expected one of native, cuda, triton, reference"),
        (
            {"backend": "native", "optimizer": Converge(), "penalty": "l1"},
            "backend native has no Converge with penalty l1",
        ),
    ],
)
def test_bad_options_are_named(vectors, options, sentence):
    with pytest.raises(InputError, match=sentence):
        disentangle(vectors, **options)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: awd_fast.SGD(lr=-1), "lr is -1"),
        (lambda: awd_fast.SGD(momentum=1.0), "momentum is 1.0"),
        (lambda: awd_fast.SGD(iterations=1.5), "iterations is 1.5"),
        (lambda: awd_fast.SGD(nesterov=True, momentum=0.0), "nesterov needs a momentum"),
        (lambda: Adam(betas=(0.9,)), "betas is"),
        (lambda: Adam(betas=(0.9, 1.0)), "betas is"),
        (lambda: Adam(eps=0.0), "eps is 0.0"),
        (lambda: Converge(tolerance=0.0), "tolerance is 0.0"),
    ],
)
def test_optimisers_check_themselves(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


@pytest.mark.parametrize("optimizer", [awd_fast.SGD(lr=1e-5), awd_fast.SGD(lr=1e-5, momentum=0.0), Adam(lr=1e-4)])
@pytest.mark.parametrize("options", [{"penalty": "l2"}, {"penalty": "l1"}, {"similarity": "absolute"}], ids=str)
def test_steps_lead_where_disentangle_leads(vectors, optimizer, options):
    whole = disentangle(vectors, optimizer=optimizer, backend="reference", **options)
    stepwise = RedundantVector(vectors, optimizer=optimizer, **options)
    losses = [stepwise.step() for _ in range(optimizer.iterations)]
    torch.testing.assert_close(stepwise.redundant, whole.redundant, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(torch.tensor([*losses, stepwise.loss], dtype=torch.float64), whole.history)


@pytest.mark.parametrize("optimizer", [awd_fast.SGD(lr=1e-5), Adam(lr=1e-4)])
def test_a_saved_state_continues_bitwise(vectors, optimizer):
    first = RedundantVector(vectors, optimizer=optimizer)
    for _ in range(5):
        first.step()
    saved = first.state_dict()
    second = RedundantVector(vectors, optimizer=optimizer)
    second.load_state_dict(saved)
    for _ in range(5):
        assert first.step() == second.step()
    assert torch.equal(first.redundant, second.redundant)
    with pytest.raises(InputError, match="the state holds"):
        second.load_state_dict({"steps": 3})
    other = RedundantVector([v[:2] for v in vectors], optimizer=optimizer)
    with pytest.raises(InputError, match="expected"):
        other.load_state_dict(saved)


def test_converge_has_no_steps(vectors):
    with pytest.raises(InputError, match="Converge has no steps"):
        RedundantVector(vectors, optimizer=Converge())
