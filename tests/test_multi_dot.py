"""Inner products with a gradient: every backend against float64, on fresh data, at tolerances from dtype and size."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from awd_fast import ops
from awd_fast.ops import backends, cuda, gradients, native, reference
from tests import emulated, interpreted
from tests.guards import LAYOUTS, guarded, laid_out
from tests.test_native import DTYPES, GROUPS, SHAPES, instruction_sets, models_like

EPS = torch.finfo(torch.float64).eps
FEW = tuple(shape for shape in SHAPES if torch.Size(shape).numel() < 5000)


def exact(base: Tensor | None, models: list[Tensor], gradient: Tensor, groups: str) -> tuple[Tensor, Tensor]:
    """The products in float64 of task vectors as they are rounded, and a bound of what sums in any order may differ."""
    compute = reference.compute_dtype(models[0].dtype)
    t = reference.task_vectors(base, models, groups).double()
    products = t * reference.group_view(gradient.to(compute), groups).double()[:, None, :]
    return products.sum(dim=2), 2.0 * (products.shape[2] + 8) * EPS * products.abs().sum(dim=2)


def check(found: Tensor, base: Tensor | None, models: list[Tensor], gradient: Tensor, groups: str) -> None:
    expected, bound = exact(base, models, gradient, groups)
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert bool(((found.cpu() - expected).abs() <= bound).all())


def gradient_like(models: list[Tensor], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(models[0].shape, generator=generator).to(dtype)


@pytest.fixture(params=["reference", "native", "triton", "emulated"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Each on tensors of the CPU; what it allocates is full of NaN."""
    if request.param == "emulated":
        if emulated.why_not() is not None:
            pytest.skip(str(emulated.why_not()))
        with emulated.running(emulated.load()):
            yield cuda
        return
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter was not chosen")
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    if request.param == "triton":
        interpreted.prepare_once(monkeypatch)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    yield reference if request.param == "reference" else backends.module(request.param)


# Triton's interpreter takes milliseconds for each program of a launch. Fewer of them still are several blocks of a row
# and parts of a column (of more than 256 elements); of "tensor" the longest has parts.
INTERPRETED = {
    "row": {(70, 300): (3, 300), (2100, 40): (17, 40), (70001,): (5001,)},
    "column": {(70, 300): (20, 300), (2100, 40): (260, 40), (70001,): (5001,)},
    "tensor": {(70, 300): (35, 300), (2100, 40): (300, 40)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", GROUPS)
def test_the_products_are_those_of_float64(backend, groups, shape, dtype):
    counts, large = (1, 2, 3, 5, 8, 17), (True, False)
    if backend.__name__.endswith("triton_backend"):
        shape = INTERPRETED[groups].get(shape, shape)
        turn = DTYPES.index(dtype)
        counts, large = ((1, 3, 17), (2, 3, 5), (1, 3, 8), (2, 3, 17))[turn], (turn % 2 == 0,)
    small = torch.Size(shape).numel() < 1000
    for seed, k in enumerate(counts if small else (3,)):
        base, models = models_like(shape, k, dtype, seed)
        for of in {dtype, torch.float32} if small and k == 3 else {dtype}:
            gradient = gradient_like(models, of, seed)
            for based in (True, False) if small else large:
                origin = base if based else None
                check(backend.multi_dot(origin, models, gradient, groups), origin, models, gradient, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", DTYPES)
def test_gradients_of_any_dtype(backend, dtype, of):
    for shape in ((5, 40), (6, 7)):
        base, models = models_like(shape, 3, dtype, 0)
        gradient = gradient_like(models, of, 0)
        for groups in GROUPS:
            check(backend.multi_dot(base, models, gradient, groups), base, models, gradient, groups)


@pytest.mark.parametrize(("shape", "groups"), [((2, 17001), "row"), ((2500, 38), "column"), ((18, 1000), "tensor")])
def test_long_groups_are_cut_and_added_in_order(backend, shape, groups):
    base, models = models_like(shape, 3, torch.float32, 0)
    gradient = gradient_like(models, torch.float32, 0)
    found = backend.multi_dot(base, models, gradient, groups)
    check(found, base, models, gradient, groups)
    assert torch.equal(found, backend.multi_dot(base, models, gradient, groups))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(backend, value):
    base, models = models_like((4, 9), 2, torch.float32, 0)
    gradient = gradient_like(models, torch.float32, 0)
    gradient[2, 3] = value
    found = backend.multi_dot(base, models, gradient, "row")
    assert found.isfinite().all(dim=1).tolist() == [True, True, False, True]


def test_views_with_gaps_and_a_pending_sign(backend):
    base, models = models_like((8, 12), 3, torch.float32, 0)
    gradient = gradient_like(models, torch.float32, 0)
    for view in (lambda t: t.T, lambda t: t[:, ::2], lambda t: torch._neg_view(t), lambda t: t[1:]):
        for groups in GROUPS:
            own = view(base), [view(model) for model in models], view(gradient)
            check(backend.multi_dot(*own, groups), *own, groups)


needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@needs_native
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_nothing_is_written_outside_the_result(instruction_set, layout, offset):
    for seed, dtype in enumerate(DTYPES):
        for shape in ((5, 37), (3, 400), (70, 9)):
            base, models = models_like(shape, 5, dtype, seed)
            gradient = gradient_like(models, torch.float32 if seed % 2 else dtype, seed)
            own = laid_out(base, layout, offset), [laid_out(model, layout, offset) for model in models]
            slope = laid_out(gradient, layout, offset)
            for groups in GROUPS:
                with guarded(offset, instruction_set, 2):
                    found = native.multi_dot(*own, slope, groups)
                check(found, *own, slope, groups)


@needs_native
def test_threads_and_alignment_do_not_change_a_bit():
    for shape, groups in (((70, 300), "row"), ((2100, 300), "column"), ((300, 1000), "tensor")):
        base, models = models_like(shape, 9, torch.float32, 0)
        gradient = gradient_like(models, torch.float32, 0)
        found = []
        for threads, offset in ((1, 0), (2, 1), (3, 3)):
            torch.set_num_threads(threads)
            own = laid_out(base, "dense", offset), [laid_out(model, "dense", offset) for model in models]
            found.append(native.multi_dot(*own, gradient, groups))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@needs_native
def test_one_float64_alone_is_refused_by_the_module():
    tensor = torch.zeros(4)
    with pytest.raises(ValueError, match="only one of gradient and tensors is float64"):
        native._module().multi_dot(0, 0, [tensor.data_ptr()], 1, 4, False, tensor.data_ptr(), 3, 0, 1)


def test_parameters_of_a_model_in_one_call_are_each_their_own(backend, request):
    """More of them than a table of a launch holds."""
    name = {"emulated": "cuda"}.get(request.node.callspec.params["backend"], request.node.callspec.params["backend"])
    shapes = [(3, 8), (5, 12), (0, 4), (33, 7), (2, 0), (1, 1)] * (50 if name == "cuda" else 2)
    parameters = [models_like(shape, 2, torch.float32, seed) for seed, shape in enumerate(shapes)]
    slopes = [gradient_like(m, torch.bfloat16 if i % 3 else torch.float32, i) for i, (_, m) in enumerate(parameters)]
    for groups in GROUPS:
        found = ops.multi_dot_many(parameters, slopes, groups, backend=name)
        for one, (base, models), gradient in zip(found, parameters, slopes, strict=True):
            check(one, base, models, gradient, groups)
    assert ops.multi_dot_many([], [], backend=name) == []


def test_combine_has_its_gradient_from_it(monkeypatch):
    asked = []
    operator = torch.ops.awd_fast.multi_dot.default

    class Asking:
        default = staticmethod(lambda *given: asked.append(given[-2:]) or operator(*given))

    monkeypatch.setattr(gradients.torch.ops.awd_fast, "multi_dot", Asking)
    base, models = models_like((4, 6), 3, torch.float32, 0)
    for rows, backend in ((4, None), (1, "reference")):
        weights = torch.rand(rows, 3, requires_grad=True)
        ops.combine(base, models, weights, backend=backend).square().sum().backward()
    assert asked == [("row", None), ("tensor", "reference")]
