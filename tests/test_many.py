"""Operators over many parameters: registrations, torch.compile, gradients, parameters of several kinds, mistakes."""

import pytest
import torch

from awd_fast import ops
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Converge, Objective
from awd_fast.ops import backends, reference
from tests import test_library
from tests.test_library import tensors_of
from tests.test_native import models_like

AWD = torch.ops.awd_fast
BACKENDS = [name for name in ("native", "reference") if backends.unavailable(name) is None]
SHAPES = ((3, 4), (5,), (2, 2, 3))
fresh_compiler = test_library.fresh_compiler
OPERATORS = (
    AWD.gram_many.default,
    AWD.combine_many.default,
    AWD.multi_dot_many.default,
    AWD.merge_rows_many.sgd,
    AWD.merge_rows_many.converge,
)
NAMES = [str(operator).removeprefix("awd_fast.") for operator in OPERATORS]


def made(dtype=torch.float32, k=3):
    return [models_like(shape, k, dtype, seed) for seed, shape in enumerate(SHAPES)]


def call(operator, dtype=torch.float32, *, based=True, backend=None):
    """Arguments for an operator: a tuple and a dict."""
    parameters = made(dtype)
    bases, models = [base for base, _ in parameters], [model for _, models in parameters for model in models]
    own = {
        "gram_many": [],
        "combine_many": [[torch.rand(rows, 3) for rows in (3, 1, 1)]],
        "multi_dot_many": [[base.flip(-1) for base in bases]],
        "merge_rows_many": [torch.full((3,), 0.3)],
    }[operator._schema.name.removeprefix("awd_fast::")]
    few = {"default": {}, "sgd": {"iterations": 3}, "converge": {"max_iterations": 3}}[operator._overloadname]
    return (bases if based else [], models, *own, 3), few | {"backend": backend}


@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_opcheck(operator):
    for dtype, based, backend in ((torch.bfloat16, False, "reference"), (torch.float32, True, BACKENDS[0])):
        arguments, options = call(operator, dtype, based=based, backend=backend)
        torch.library.opcheck(operator, arguments, options)
    if operator in OPERATORS[:3]:
        for based in (True, False):
            arguments, options = call(operator, torch.float64, based=based)
            for tensor in tensors_of(arguments):
                tensor.requires_grad_()
            torch.library.opcheck(operator, arguments, options)


@pytest.mark.parametrize("operator", OPERATORS[3:], ids=NAMES[3:])
def test_without_a_gradient_there_is_an_error(operator):
    arguments, options = call(operator)
    for tensor in tensors_of(arguments)[::5]:
        tensor.requires_grad_()
        with pytest.raises(InputError, match="merge_rows_many has no gradient, and a tensor requires one"):
            operator(*arguments, **options)
        tensor.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_all_kinds_are_each_their_own(backend):
    """Of several K, dtypes, results' dtypes, with a base and without."""
    parameters = [*made(), *made(torch.bfloat16, 2), (None, made()[0][1]), made(torch.float64)[1]]
    counts = [reference.group_count(models[0], "row") for _, models in parameters]
    weights = [torch.rand(count if index % 2 else 1, len(parameters[index][1])) for index, count in enumerate(counts)]
    dtypes = [torch.float16 if index % 3 == 0 else None for index in range(len(parameters))]
    gradients = [models[0] * 0.5 for _, models in parameters]
    found = (
        ops.gram_many(parameters, backend=backend),
        ops.combine_many(parameters, weights, dtypes=dtypes, backend=backend),
        ops.multi_dot_many(parameters, gradients, backend=backend),
    )
    for index, (base, models) in enumerate(parameters):
        expected = (
            ops.gram(base, models, backend=backend),
            ops.combine(base, models, weights[index], dtype=dtypes[index], backend=backend),
            ops.multi_dot(base, models, gradients[index], backend=backend),
        )
        torch.testing.assert_close([each[index] for each in found], [*expected], rtol=0, atol=0)
    rows = ops.merge_rows_many(parameters[:3], torch.ones(3), Objective(), Converge(), dtypes=dtypes[:3])
    for merged, (base, models), dtype in zip(rows, parameters, dtypes, strict=False):
        expected = ops.merge_rows(base, models, torch.ones(3), Objective(), Converge(), dtype=dtype)
        torch.testing.assert_close(tuple(merged), tuple(expected), rtol=0, atol=0)
    assert ops.combine_many([], []) == []


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("groups", ["row", "column", "tensor"])
def test_gradients(groups, based):
    parameters = [models_like(shape, 2, torch.float64, seed) for seed, shape in enumerate(((2, 3), (2,)))]
    count = reference.group_count(parameters[0][0], groups)
    tensors = [tensor.requires_grad_() for base, models in parameters for tensor in (base, *models)]

    def pairs(given):
        return [(given[0] if based else None, given[1:3]), (given[3] if based else None, given[4:6])]

    def combine(one, other, *given):
        return tuple(ops.combine_many(pairs(given), [one, other], groups))

    def multi_dot(one, other, *given):
        return tuple(ops.multi_dot_many(pairs(given), [one, other], groups))

    def gram(*given):
        return tuple(ops.gram_many(pairs(given), groups))

    weights = [torch.rand(rows, 2, dtype=torch.float64, requires_grad=True) for rows in (count, 1)]
    slopes = [torch.randn_like(base, requires_grad=True) for base, _ in parameters]
    for function, inputs in ((combine, (*weights, *tensors)), (multi_dot, (*slopes, *tensors)), (gram, tensors)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    tensors[1].requires_grad_(False)
    weights[0].requires_grad_(False)
    assert torch.autograd.gradcheck(combine, (*weights, *tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_a_loop_over_the_operator(backend):
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [*made(dtype), *made(dtype, 2)]
        slopes = []
        for many in (True, False):
            weights = [
                torch.full((1 + 2 * (i == 0), len(m)), 0.3, requires_grad=True) for i, (_, m) in enumerate(parameters)
            ]
            given = zip(parameters, weights, strict=True)
            found = (
                ops.combine_many(parameters, weights, backend=backend)
                if many
                else [ops.combine(*parameter, factors, backend=backend) for parameter, factors in given]
            )
            sum(tensor.float().square().sum() for tensor in found).backward()
            slopes.append([factors.grad for factors in weights])
        torch.testing.assert_close(*slopes, rtol=0, atol=0)


OBJECTIVE, STEPS = Objective(), SGD(iterations=3)  # made here: the compiler of PyTorch 2.4 cannot


def everything(parameters, weights):
    """A loss of all differentiable operators over many parameters, then what the others and sparse merges give."""
    found = [tensor * 2.0 for tensor in ops.combine_many(parameters, weights)]
    every = (*found, *ops.multi_dot_many(parameters, found), *ops.gram_many(parameters, "tensor"))
    rows = ops.merge_rows_many(parameters, weights[0][0].detach(), OBJECTIVE, STEPS)
    base, models = parameters[0]
    cut, together = ops.trim(base, models, [(0, 3)] * 3), ops.trim_together(parameters, [(0, 9)] * 3)
    sparse = ops.sparse_merge(base, models, [0.5, 1.0, 2.0], cut, consensus="sum", normalize=True)
    norms = ops.sparse_norms(base, models, ops.MagPrune((0.5,) * 3, (0.1,) * 3)).sum()
    return sum(tensor.sum() for tensor in every), rows, together.thresholds, together.limits, sparse, norms


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_whole(dynamic):
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shapes in (SHAPES, ((4, 5), (3,), (2, 1, 6)))[: 2 if dynamic else 1]:
        parameters = [models_like(shape, 3, torch.float32, seed) for seed, shape in enumerate(shapes)]
        slopes = []
        for function in (everything, compiled):
            weights = [torch.full((1, 3), 0.3, requires_grad=True) for _ in shapes]
            loss, *others = function(parameters, weights)
            loss.backward()
            slopes.append(([factors.grad for factors in weights], others))
        torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6, equal_nan=True)  # cuts of rank 0 are NaN


def test_mistakes_are_named():
    base, models = models_like((4, 6), 2, torch.float32, 0)
    fits, other = (base, models), (base, [models[0], models[1].double()])
    ones = torch.ones(1, 2)
    cases = [
        (lambda: ops.gram_many([fits, other]), r"^parameter 1: models\[1\] is torch.float64"),
        (lambda: ops.gram_many([fits, (base, [])]), "^parameter 1: models is empty"),
        (lambda: ops.gram_many([fits, (base, [None])]), r"^parameter 1: models\[0\] is NoneType"),
        (lambda: ops.gram_many([fits], "diagonal"), "groups is 'diagonal'"),
        (lambda: ops.gram_many([], backend="abacus"), "backend is 'abacus'"),
        (lambda: ops.combine_many([fits], []), "weights has 0 tensors; expected 1, one per parameter"),
        (lambda: ops.combine_many([fits], [None]), r"weights\[0\] is NoneType"),
        (lambda: ops.combine_many([fits], [ones], dtypes=[]), "dtypes has 0 entries"),
        (lambda: ops.multi_dot_many([fits], [ones]), "gradient is torch.float32"),
        (lambda: ops.merge_rows_many([fits], None, Objective(), SGD()), "weights is NoneType"),
        (lambda: AWD.gram_many([base], [*models, base], 2), "there are 3 models and 1 bases; expected 2 models"),
        (lambda: AWD.gram_many([], [models[0], models[0].double()], 1), "parameters differ in dtype or device"),
        (lambda: AWD.combine_many([base], models, [ones, ones], 2), "weights has 2 tensors; expected 1"),
        (lambda: AWD.multi_dot_many([base], models, [], 2), "gradients has 0 tensors; expected 1"),
    ]
    for mistaken, words in cases:
        with pytest.raises(InputError, match=words):
            mistaken()
    meta = [tensor.to("meta") for tensor in (base, *models)]
    assert ops.gram_many([(meta[0], meta[1:])])[0].shape == (4, 2, 2)
