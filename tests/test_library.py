"""The operators in torch.ops.awd_fast: registrations, shapes for tracing, torch.compile, gradients, mistakes."""

import importlib
import shutil

import pytest
import torch
import torch._inductor.config
from torch import Tensor

import awd_fast
from awd_fast import converge, ops
from awd_fast.errors import InputError
from awd_fast.objective import SGD, Adam, Converge, Objective
from awd_fast.ops import backends, library, reference
from tests.test_native import SHAPES, models_like

AWD = torch.ops.awd_fast
BACKENDS = [name for name in ("native", "reference") if backends.unavailable(name) is None]  # those of the CPU
OVERLOADS = (
    AWD.gram.default,
    AWD.combine.default,
    AWD.multi_dot.default,
    AWD.descend.sgd,
    AWD.descend.converge,
    AWD.merge_rows.sgd,
    AWD.merge_rows.converge,
    AWD.adam_rows.sgd,
    AWD.adam_rows.adam,
    AWD.adam_step.sgd,
    AWD.adam_step.adam,
)
DIFFERENTIABLE = OVERLOADS[:3]
NAMES = [str(operator).removeprefix("awd_fast.") for operator in OVERLOADS]
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""torch.compile leaves results of unknown length alone unless told (2.4, 2.5), compiles numbers once more (2.4)."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call(operator, shape=(4, 6), dtype=torch.float32, *, groups="row", based=True, k=3, backend=None):
    """Arguments for an operator: a tuple and a dict."""
    base, models = models_like(shape, k, dtype, 0)
    inputs = (base if based else None, models)
    count = reference.group_count(base, groups)
    options = {"alpha": 1e-3, "backend": backend}
    few = {"max_iterations" if operator._overloadname == "converge" else "iterations": 3}
    match operator._schema.name.removeprefix("awd_fast::"):
        case "gram":
            return inputs, {"groups": groups, "backend": backend}
        case "combine":
            weights = torch.linspace(-1.0, 1.0, count * k).view(count, k)
            return (*inputs, weights), {"groups": groups, "dtype": torch.bfloat16, "backend": backend}
        case "multi_dot":
            return (*inputs, base.flip(-1) if base.ndim else base.clone()), {"groups": groups, "backend": backend}
        case "descend":
            return (reference.gram(*inputs, groups),), options | few
        case "merge_rows":
            return (*inputs, torch.full((k,), 0.3)), options | few | {"groups": groups}
        case "adam_rows":
            return inputs, options | few | {"groups": groups}
    moved = 3 if operator._overloadname == "adam" else 2
    state = [torch.full(shape, 0.01, dtype=reference.compute_dtype(dtype)) for _ in range(moved)]
    return (*inputs, *state, torch.ones(k + 1, dtype=torch.float64), 2), {"backend": backend, "l1": 0.1}


def groups_of(operator):
    return ("row", "column") if "merge_rows" in str(operator) else ("row", "column", "tensor")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OVERLOADS, ids=NAMES)
def test_opcheck(operator, backend):
    last = groups_of(operator)[-1]
    cases = [(torch.bfloat16, "column", False), (torch.float32, "row", True), (torch.float64, last, True)]
    for dtype, groups, based in cases if backend == BACKENDS[0] else cases[:1]:
        arguments, options = call(operator, dtype=dtype, groups=groups, based=based, backend=backend)
        torch.library.opcheck(operator, arguments, options)


@pytest.mark.parametrize("operator", DIFFERENTIABLE, ids=NAMES[:3])
def test_opcheck_with_gradients(operator):
    for groups, based in (("row", True), ("column", False)):
        arguments, options = call(operator, dtype=torch.float64, groups=groups, based=based)
        for tensor in tensors_of(arguments):
            tensor.requires_grad_()
        torch.library.opcheck(operator, arguments, options)


def tensors_of(arguments) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OVERLOADS, ids=NAMES)
def test_traced_shapes_are_the_real_ones(operator, backend, monkeypatch):
    monkeypatch.setattr(converge, "ANNEAL_STEPS", 3)  # of the reference: seconds, and no shape depends on them
    for shape in SHAPES[:9] if backend == "native" else (SHAPES[1], *SHAPES[3:7], SHAPES[8]):
        for groups in groups_of(operator):
            arguments, options = call(operator, shape, torch.float16, groups=groups, k=2, backend=backend)
            real = operator(*arguments, **options)
            with torch._subclasses.FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()) as mode:
                fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments), **options)
            for index, (made, traced) in enumerate(zip(tensors_of(real), tensors_of(fake), strict=True)):
                assert made.is_contiguous()
                assert (made.dtype, made.device, made.ndim) == (traced.dtype, traced.device, traced.ndim)
                free = operator._overloadname == "converge" and index == len(operator._schema.returns) - 1
                assert free or made.shape == traced.shape, (shape, groups)


def test_meta_tensors_have_shapes():
    base, models = (torch.empty(4, 6, device="meta") for _ in range(2))
    found = ops.merge_rows(base, [models] * 3, torch.ones(3, device="meta"), Objective(), SGD(iterations=7), "column")
    assert [tuple(tensor.shape) for tensor in found] == [(4, 6), (6, 3, 3), (6, 3), (8,)]
    assert all(tensor.is_meta for tensor in found)


def everything(base, models, weights, objective, optimizer, groups="row"):
    """Every operator but adam_step, with PyTorch's own between them."""
    g = ops.gram(base, models, groups) * 2.0
    a, history = ops.descend(g, objective, optimizer)
    found = ops.combine(base, models, weights - a, groups, dtype=torch.bfloat16).float() + 1.0
    dots = ops.multi_dot(base, models, found, groups) + 1.0
    merged = ops.merge_rows(base, models, weights[0], objective, optimizer, groups)
    shift, losses = ops.adam_rows(base, models, objective, Adam(iterations=4), groups)
    return found, dots, history.sum(), merged.merged * 2.0, merged.history[-1], shift + base, losses


@pytest.mark.parametrize(
    ("optimizer", "dynamic"),
    [(SGD(lr=1e-2, iterations=9), None), (SGD(lr=1e-2, iterations=9), True), (Converge(max_iterations=20), None)],
)
def test_compiled_whole(optimizer, dynamic):
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    weights = torch.rand(1, 3, dtype=torch.float64)
    for shape, objective in (((4, 6), Objective()), ((5, 9), Objective(alpha=1e-2)), ((8, 3), Objective(alpha=0.1))):
        arguments = (*models_like(shape, 3, torch.float32, 0), weights, objective, optimizer)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=OLD):
            torch.testing.assert_close(compiled(*arguments), everything(*arguments), rtol=0, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_compiled_by_inductor(monkeypatch):
    # One thread: else inductor starts a pool of interpreters, each of which imports PyTorch.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    arguments = (*models_like((4, 6), 3, torch.float32, 0), torch.rand(1, 3, dtype=torch.float64), Objective(), SGD())
    torch.testing.assert_close(torch.compile(everything, fullgraph=True)(*arguments), everything(*arguments))


def test_operators_compiled_directly():
    def merge(base, models):
        g = AWD.gram(base, models)
        a, _ = AWD.descend.sgd(g, similarity="squared", lr=1e-2, iterations=100)
        return AWD.combine(base, models, 0.3 - 0.9 * a, "row")

    base, models = models_like((4, 6), 3, torch.float32, 0)
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(base, models), merge(base, models))
    a = ops.descend(ops.gram(base, models), Objective(similarity="squared"), SGD(lr=1e-2, iterations=100))[0]
    assert torch.equal(merge(base, models), ops.combine(base, models, 0.3 - 0.9 * a))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", [Adam(lr=1e-3), SGD(lr=1e-2), SGD(lr=1e-2, momentum=0.0)])
def test_steps_change_their_state_once(optimizer, backend):
    def step(base, models, shift, velocity, square, slope, number):
        shift = shift.mul_(1.0)
        return ops.adam_step(base, models, shift, velocity, square, slope, optimizer, number, backend=backend) * 2.0

    base, models = models_like((40,), 3, torch.float32, 0)
    slope = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)
    mine, theirs = ([torch.full((40,), 0.01) for _ in range(3)] for _ in range(2))
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=compiles)
    used = [True, not isinstance(optimizer, SGD) or optimizer.momentum > 0.0, isinstance(optimizer, Adam)]
    for number in range(1, 6):
        before = [tensor._version for tensor in (*mine, *theirs)]
        found = compiled(base, models, *mine, slope, number)
        torch.testing.assert_close(found, step(base, models, *theirs, slope, number), rtol=0, atol=0)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        after = [tensor._version for tensor in (*mine, *theirs)]
        changes = [b - a for a, b in zip(before, after, strict=True)]
        assert [change > 0 for change in changes] == used * 2
        assert changes[3:] == [2, *map(int, used[1:])]  # one of mul_, one of each step
    assert compiles.frame_count <= 2 + OLD  # the number of the step is no reason to compile again


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", ["row", "column", "tensor"])
@pytest.mark.parametrize("based", [True, False])
def test_gradients(based, groups, backend):
    base, models = models_like((3, 4), 3, torch.float64, 0)
    count = reference.group_count(base, groups)
    tensors = [tensor.clone().requires_grad_() for tensor in (base, *models)]

    def gram(base, *models):
        return ops.gram(base if based else None, models, groups, backend=backend)

    def combine(weights, base, *models):
        return ops.combine(base if based else None, models, weights, groups, backend=backend)

    def multi_dot(gradient, base, *models):
        return ops.multi_dot(base if based else None, models, gradient, groups, backend=backend)

    first = tensors if based else [base, *tensors[1:]]
    slope = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(multi_dot, (slope, *first))
    assert torch.autograd.gradgradcheck(multi_dot, (slope, *first))
    assert torch.autograd.gradcheck(gram, first)
    assert torch.autograd.gradgradcheck(gram, first)
    for rows in {1, count}:
        weights = torch.rand(rows, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(combine, (weights, *first))
        assert torch.autograd.gradgradcheck(combine, (weights, *first))
    assert torch.autograd.gradcheck(combine, (weights.detach(), base, tensors[1], *models[1:]))


def test_gradients_of_narrow_storage_and_when_compiled():
    base, models = models_like((3, 4), 3, torch.bfloat16, 0)

    def learn(weights):
        return ops.combine(base, models, weights).float().square().sum()

    slopes = []
    for function in (learn, torch.compile(learn, fullgraph=True, backend="aot_eager")):
        weights = torch.full((1, 3), 0.3, requires_grad=True)
        function(weights).backward()
        slopes.append(weights.grad)
    assert torch.equal(*slopes)
    exact = torch.full((1, 3), 0.3, dtype=torch.float64, requires_grad=True)
    ops.combine(base.double(), [model.double() for model in models], exact).square().sum().backward()
    torch.testing.assert_close(slopes[0].double(), exact.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("operator", OVERLOADS[3:], ids=NAMES[3:])
def test_without_a_gradient_there_is_an_error(operator):
    arguments, options = call(operator)
    tensors = tensors_of(arguments)
    for tensor in tensors:
        tensor.requires_grad_()
        with pytest.raises(InputError, match="has no gradient, and a tensor requires one"):
            operator(*arguments, **options)
        with torch.no_grad():
            operator(*arguments, **options)
        tensor.requires_grad_(False)


@pytest.mark.parametrize("operator", OVERLOADS[:-2], ids=NAMES[:-2])
def test_functional_transforms_are_refused(operator):
    """Their gradients would be 0. (Of adam_step, which changes its arguments, PyTorch warns.)"""
    arguments, options = call(operator)
    where = 0 if isinstance(arguments[0], Tensor) else 1

    def first(tensor):
        given = [*arguments]
        given[where] = tensor if where == 0 else [tensor, *arguments[1][1:]]
        found = operator(*given, **options)
        return (found if isinstance(found, Tensor) else found[0]).sum()

    with pytest.raises((RuntimeError, InputError)):
        torch.func.grad(first)(arguments[where] if where == 0 else arguments[1][0])


def test_parameters_are_merged_without_autograd():
    base, models = ({"w": torch.nn.Parameter(t)} for t in torch.randn(2, 4, 6))
    merged = awd_fast.merge(base, [models, models])
    assert not merged["w"].requires_grad
    found = awd_fast.disentangle([base["w"], models["w"]])
    assert not found.redundant.requires_grad
    assert torch.equal(found.redundant, awd_fast.disentangle([base["w"].data, models["w"].data]).redundant)


def test_mistakes_are_said_in_words_whoever_calls():
    base, (one, *_) = models_like((4, 6), 1, torch.float32, 0)
    ones = torch.ones(1, 1)
    cases = [
        (
            lambda: AWD.gram(base, [one, one[:2]]),
            r"models\[1\] is torch.float32 \[2, 6\] on cpu; expected torch.float32 \[4, 6\] on cpu as base",
        ),
        (lambda: AWD.gram(base, []), "models is empty"),
        (lambda: AWD.gram(base, [one], "diagonal"), "groups is 'diagonal'"),
        (lambda: AWD.gram(base, [one], "row", "abacus"), "backend is 'abacus'"),
        (lambda: AWD.gram(base, [one.to_sparse()]), "expected a dense tensor"),
        (lambda: AWD.combine(base, [one], torch.ones(2, 1)), r"weights is \[2, 1\]"),
        (lambda: AWD.combine(base, [one], ones, dtype=torch.int32), "dtype is torch.int32"),
        (
            lambda: AWD.multi_dot(base, [one], one[:2]),
            r"gradient is torch.float32 \[2, 6\] on cpu; expected a floating",
        ),
        (lambda: AWD.multi_dot(base, [one], one.int()), "gradient is torch.int32"),
        (lambda: AWD.multi_dot(base, [one], one.to_sparse()), "gradient is torch.sparse_coo on cpu; expected a dense"),
        (lambda: ops.multi_dot(base, [one], None), "gradient is NoneType"),
        (lambda: ops.multi_dot_many([(base, [one])], []), "gradients has 0 tensors; expected 1"),
        (lambda: AWD.descend.sgd(ones), "gram is torch.float32"),
        (lambda: AWD.descend.sgd(ones[None].double(), penalty="l1"), "leaves the span"),
        (lambda: AWD.descend.sgd(ones[None].double(), penalty="l3"), "penalty is 'l3'"),
        (lambda: AWD.descend.converge(ones[None].double(), tolerance=-1.0), "tolerance is -1.0"),
        (lambda: AWD.merge_rows.sgd(base, [one], ones[0], groups="tensor"), "expected row or column"),
        (lambda: AWD.merge_rows.sgd(base, [one], ones), "one number per model"),
        (lambda: AWD.adam_rows.adam(base, [one], betas=[0.9, 1.0]), "betas is"),
        (lambda: AWD.adam_step.sgd(base, [one], one, None, torch.ones(2).double(), 1, momentum=0.0), "shares memory"),
        (lambda: AWD.adam_step.sgd(base, [one], one * 0, None, torch.ones(2).double(), 0, momentum=0.0), "step is 0"),
        (
            lambda: AWD.descend.sgd(ones.expand(2, 1, 1).double(), total=1),
            "total is 1; expected an integer of 2 or more",
        ),
        (
            lambda: AWD.merge_rows.converge(base, [one], ones[0], total=3),
            "total is 3; expected an integer of 4 or more",
        ),
        (lambda: AWD.adam_rows.adam(base, [one], groups="column", total=5), "total is 5; expected an integer of 6"),
        (lambda: AWD.adam_rows.sgd(base[:0], [one[:0]], total=0), "total is 0; expected an integer of 1 or more"),
        (lambda: ops.descend(ones[None].double(), Objective(), SGD(), total=1.0), "total is 1.0; expected an integer"),
        (lambda: ops.merge_rows(base, [one], ones[0], Objective(), SGD(), total="4"), "total is '4'"),
        (lambda: ops.adam_rows(base, [one], Objective(), Adam(), total=True), "total is True"),
        (lambda: ops.descend_elements(ones[None], Objective(), Adam(), total=0), "total is 0"),
        (lambda: ops.gram(base, [one, 3]), r"models\[1\] is int; expected a torch.Tensor or a numpy array"),
        (lambda: ops.gram(base, [one], 5), "groups is 5"),
        (lambda: ops.gram(base, [one], backend=5), "backend is 5"),
        (lambda: ops.combine(base, [one], [1.0]), "weights is list"),
        (lambda: ops.combine(base, [one], ones, dtype="float32"), "dtype is float32"),
        (lambda: ops.descend(3, Objective(), SGD()), "gram is int"),
    ]
    for mistaken, words in cases:
        with pytest.raises(InputError, match=words):
            mistaken()


def test_schemas_have_the_defaults_of_the_dataclasses():
    gram = reference.gram(None, [torch.ones(2, 3), torch.eye(2, 3)], "row")
    for operator, optimizer in ((AWD.descend.sgd, SGD()), (AWD.descend.converge, Converge())):
        torch.testing.assert_close(operator(gram), ops.descend(gram, Objective(), optimizer), rtol=0, atol=0)
    _, models = models_like((4, 6), 3, torch.float32, 0)
    options = {"lr": 1e-3, "betas": [0.5, 0.25], "adam_eps": 1e-3, "iterations": 5, "alpha": 0.1, "eps": 1e-2}
    adam = Adam(lr=1e-3, betas=(0.5, 0.25), eps=1e-3, iterations=5)
    expected = ops.descend_groups(None, models, Objective(alpha=0.1, eps=1e-2), adam)
    torch.testing.assert_close(AWD.adam_rows.adam(None, models, **options), tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("operator", OVERLOADS[3:-2], ids=NAMES[3:-2])
def test_the_total_is_last_and_by_default_what_is_given(operator):
    assert [argument.name for argument in operator._schema.arguments][-2:] == ["backend", "total"]
    arguments, options = call(operator)
    expected = operator(*arguments, **options)
    torch.testing.assert_close(operator(*arguments, **options, total=4), expected, rtol=0, atol=0)
    torch.library.opcheck(operator, arguments, options | {"total": 8})


def test_loading_the_module_again_is_harmless():
    importlib.reload(library)
    assert AWD.gram(None, [torch.ones(2, 3)]).shape == (2, 1, 1)
