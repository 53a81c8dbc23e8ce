"""The operators as `torch.ops.awd_fast.*`: schemas, implementations, shapes for tracing, gradients.

    gram(base, models, groups, backend)
    combine(base, models, weights, groups, dtype, backend)
    multi_dot(base, models, gradient, groups, backend)
    descend.sgd, descend.converge(gram, OBJECTIVE, OPTIMIZER, backend, total)
    merge_rows.sgd, merge_rows.converge(base, models, weights, OBJECTIVE, OPTIMIZER, groups, dtype, backend, total)
    adam_rows.sgd, adam_rows.adam(base, models, OBJECTIVE, OPTIMIZER, groups, backend, total)
    adam_step.sgd(base, models, shift, velocity, slope, step, OPTIMIZER, l1, backend)
    adam_step.adam(base, models, shift, velocity, square, slope, step, OPTIMIZER, l1, backend)

The arguments are those of the functions of the same names in `awd_fast.ops`, which call these operators and have no
other way. OBJECTIVE and OPTIMIZER stand for the fields of `awd_fast.objective.Objective` and of SGD, Adam or Converge,
in their order, by their names and with their defaults; only the eps of Adam is called adam_eps, and adam_step has no
iterations. For example

    torch.ops.awd_fast.descend.sgd(gram, similarity="squared", lr=1e-2, iterations=100)

An implementation checks its arguments (InputError), lets `awd_fast.ops.backends` choose who runs the call, and returns
new contiguous tensors. gram, combine and multi_dot, and their _many (`awd_fast.ops.many_library`), are differentiable
by backward(); the others refuse tensors that require a gradient. None knows forward-mode differentiation or the
transforms of torch.func. PyTorch 2.4 and 2.5 compile Converge only with
torch._dynamo.config.capture_dynamic_output_shape_ops: how long its history becomes depends on the data.
Operators are registered once per process: a module that is loaded anew uses those that are there.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from awd_fast.objective import OPTIMIZERS, SGD, Adam, Converge, Groups, Objective
from awd_fast.ops import backends, checks, foreign, gradients
from awd_fast.ops.reference import compute_dtype, group_count

NAMESPACE = "awd_fast"
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
INPUTS = "Tensor? base, Tensor[] models"
ROW_GROUPS = {"groups": ("str", "row")}
DTYPE = {"dtype": ("ScalarType?", None)}
BACKEND = {"backend": ("str?", None)}
TOTAL = {"total": ("int?", None)}  # last, so that calls by position from before it was there stay right
SCHEMA_TYPES = {str: "str", bool: "bool", int: "int", float: "float", tuple: "float[]"}
FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in (Objective, *OPTIMIZERS.values())}


def flat(options: object, kind: type) -> list[Any]:
    """The fields of an objective or optimiser, in the order of the schemas."""
    return [getattr(options, name) for name in FIELDS[kind]]


@functools.lru_cache(maxsize=256)
def _made(kind: type, values: tuple[Any, ...]) -> Any:
    """The inverse of `flat`: a checked objective or optimiser. Trailing fields may be missing."""
    return kind(**dict(zip(FIELDS[kind], values, strict=False)))


class _Tail:
    """The arguments behind the tensors of an operator: the fields of `kinds`, then `extra`, all with defaults.

    The dispatcher leaves out arguments at the end that have their defaults; `read` puts them back.
    """

    def __init__(self, kinds: Sequence[type], extra: dict[str, tuple[str, Any]], without: Sequence[str] = ()) -> None:
        arguments: list[tuple[str, str, Any]] = []  # type, name, default
        self._ends = []
        for kind in kinds:
            for field in (field for field in fields(kind) if field.name not in without):
                name = "adam_eps" if (kind, field.name) == (Adam, "eps") else field.name
                arguments.append((SCHEMA_TYPES[type(field.default)], name, field.default))
            self._ends.append((kind, len(arguments)))
        arguments += [(written, name, default) for name, (written, default) in extra.items()]
        self._defaults = tuple(default for *_, default in arguments)
        self.schema = ", ".join(f"{written} {name}={_literal(default)}" for written, name, default in arguments)

    def read(self, given: Sequence[Any]) -> list[Any]:
        """The objects of the kinds, then the values of `extra`."""
        values = [tuple(value) if isinstance(value, list) else value for value in given]
        values += self._defaults[len(values) :]
        found, begin = [], 0
        for kind, end in self._ends:
            found.append(_made(kind, tuple(values[begin:end])))
            begin = end
        return [*found, *values[begin:]]


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return str(list(value) if isinstance(value, tuple) else value)


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=TAGS)
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, fake)
    foreign.refuse(qualified)


def _refuse_gradients(name: str) -> None:
    """Autograd asks for what it would keep for a gradient where one is required. torch.func meets an error too.

    PyTorch 2.4 asks for it always; then nothing comes before this call in the graph.
    """

    def refuse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if any(node is not None for node, _ in ctx.next_functions):
            raise checks.no_gradient(name.partition(".")[0])

    torch.library.register_autograd(f"{NAMESPACE}::{name}", lambda ctx, *slopes: None, setup_context=refuse)


def _numbers(like: Tensor, *size: int) -> Tensor:
    """A float64 result of this size on the device of `like`, for tracing."""
    return like.new_empty(size, dtype=torch.float64)


def _losses(optimizer: SGD | Adam | Converge, like: Tensor) -> Tensor:
    """A history for tracing, on the device of `like`; how long that of Converge becomes depends on the data."""
    if isinstance(optimizer, Converge):
        size: Any = torch.library.get_ctx().new_dynamic_size(min=1)
    else:
        size = optimizer.iterations + 1
    return torch.empty((size,), dtype=torch.float64, device=like.device)


def _gram(base: Tensor | None, models: list[Tensor], groups: Groups = "row", backend: str | None = None) -> Tensor:
    tensors = checks.check(base, models, groups)
    found: Tensor = backends.select("gram", backend, tensors).gram(base, models, groups)
    return found.contiguous()


def _gram_fake(base: Tensor | None, models: list[Tensor], groups: Groups = "row", backend: str | None = None) -> Tensor:
    checks.check(base, models, groups, values=False)
    return _numbers(models[0], group_count(models[0], groups), len(models), len(models))


def _combine(
    base: Tensor | None,
    models: list[Tensor],
    weights: Tensor,
    groups: Groups = "row",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    tensors = checks.check(base, models, groups)
    checks.check_weights(weights, models, groups)
    dtype = models[0].dtype if dtype is None else dtype
    checks.check_dtype(dtype)
    weights = weights.to(models[0].device)
    chosen = backends.select("combine", backend, [*tensors, weights])
    found: Tensor = chosen.combine(base, models, weights, groups, dtype)
    return found.contiguous()


def _combine_fake(
    base: Tensor | None,
    models: list[Tensor],
    weights: Tensor,
    groups: Groups = "row",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    checks.check(base, models, groups, values=False)
    checks.check_weights(weights, models, groups)
    dtype = models[0].dtype if dtype is None else dtype
    checks.check_dtype(dtype)
    return models[0].new_empty(models[0].shape, dtype=dtype)


def _multi_dot(
    base: Tensor | None, models: list[Tensor], gradient: Tensor, groups: Groups = "row", backend: str | None = None
) -> Tensor:
    tensors = checks.check(base, models, groups)
    checks.check_gradient(gradient, models[0])
    chosen = backends.select("multi_dot", backend, [*tensors, gradient])
    found: Tensor = chosen.multi_dot(base, models, gradient, groups)
    return found.contiguous()


def _multi_dot_fake(
    base: Tensor | None, models: list[Tensor], gradient: Tensor, groups: Groups = "row", backend: str | None = None
) -> Tensor:
    checks.check(base, models, groups, values=False)
    checks.check_gradient(gradient, models[0])
    return _numbers(models[0], group_count(models[0], groups), len(models))


def _define_descend(kind: type) -> None:
    tail = _Tail((Objective, kind), BACKEND | TOTAL)

    def read(gram: Tensor, given: Sequence[Any]) -> list[Any]:
        objective, optimizer, backend, total = tail.read(given)
        checks.check_gram(gram)
        checks.check_total(total, gram.shape[0])
        checks.require_span(objective, optimizer, "descend")
        return [objective, optimizer, total, backend]

    def run(gram: Tensor, *given: Any) -> tuple[Tensor, ...]:
        *options, backend = read(gram, given)
        chosen = backends.select("descend", backend, [gram])
        return _contiguous(chosen.descend(gram, *options))

    def fake(gram: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        optimizer = read(gram, given)[1]
        return _numbers(gram, *gram.shape[:2]), _losses(optimizer, gram)

    schema = f"(Tensor gram, {tail.schema}) -> (Tensor coefficients, Tensor history)"
    _register(f"descend.{_name(kind)}", schema, run, fake)
    _refuse_gradients(f"descend.{_name(kind)}")


def _merge_rows_fake(
    models: list[Tensor], optimizer: SGD | Converge, groups: Groups, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    first, k = models[0], len(models)
    count = group_count(first, groups)
    merged = first.new_empty(first.shape, dtype=dtype)
    return merged, _numbers(first, count, k, k), _numbers(first, count, k), _losses(optimizer, first)


def _define_merge_rows(kind: type) -> None:
    tail = _Tail((Objective, kind), ROW_GROUPS | DTYPE | BACKEND | TOTAL)

    def read(
        base: Tensor | None, models: list[Tensor], weights: Tensor, given: Sequence[Any], values: bool
    ) -> list[Any]:
        objective, optimizer, groups, dtype, backend, total = tail.read(given)
        tensors = checks.check(base, models, groups, values=values)
        checks.check_rows(weights, models, groups)
        checks.check_total(total, group_count(models[0], groups))
        checks.require_span(objective, optimizer, "merge_rows")
        dtype = models[0].dtype if dtype is None else dtype
        checks.check_dtype(dtype)
        return [tensors, objective, optimizer, groups, dtype, total, backend]

    def run(base: Tensor | None, models: list[Tensor], weights: Tensor, *given: Any) -> tuple[Tensor, ...]:
        tensors, *options, backend = read(base, models, weights, given, True)
        weights = weights.detach().to("cpu", torch.float64)
        chosen = backends.select("merge_rows", backend, tensors)
        return _contiguous(chosen.merge_rows(base, models, weights, *options))

    def fake(base: Tensor | None, models: list[Tensor], weights: Tensor, *given: Any) -> tuple[Tensor, ...]:
        _, _, optimizer, groups, dtype, *_ = read(base, models, weights, given, False)
        return _merge_rows_fake(models, optimizer, groups, dtype)

    found = "(Tensor merged, Tensor gram, Tensor coefficients, Tensor history)"
    _register(f"merge_rows.{_name(kind)}", f"({INPUTS}, Tensor weights, {tail.schema}) -> {found}", run, fake)
    _refuse_gradients(f"merge_rows.{_name(kind)}")


def _define_adam_rows(kind: type) -> None:
    tail = _Tail((Objective, kind), ROW_GROUPS | BACKEND | TOTAL)

    def read(base: Tensor | None, models: list[Tensor], given: Sequence[Any], values: bool) -> list[Any]:
        objective, optimizer, groups, backend, total = tail.read(given)
        tensors = checks.check(base, models, groups, values=values)
        checks.check_total(total, group_count(models[0], groups))
        return [tensors, objective, optimizer, groups, total, backend]

    def run(base: Tensor | None, models: list[Tensor], *given: Any) -> tuple[Tensor, ...]:
        tensors, *options, backend = read(base, models, given, True)
        chosen = backends.select("adam_rows", backend, tensors)
        return _contiguous(chosen.adam_rows(base, models, *options))

    def fake(base: Tensor | None, models: list[Tensor], *given: Any) -> tuple[Tensor, ...]:
        _, _, optimizer, groups, *_ = read(base, models, given, False)
        first, k = models[0], len(models)
        count = group_count(first, groups)
        shift = first.new_empty(first.shape, dtype=compute_dtype(first.dtype))
        products = _numbers(first, count, k, k), _numbers(first, count, k), _numbers(first, count)
        return shift, _losses(optimizer, first), *products

    found = "(Tensor shift, Tensor history, Tensor gram, Tensor inner, Tensor square)"
    _register(f"adam_rows.{_name(kind)}", f"({INPUTS}, {tail.schema}) -> {found}", run, fake)
    _refuse_gradients(f"adam_rows.{_name(kind)}")


def _define_adam_step(kind: type) -> None:
    tail = _Tail((kind,), {"l1": ("float", 0.0)} | BACKEND, without=("iterations",))
    names = ("shift", "velocity", "square") if kind is Adam else ("shift", "velocity")

    def read(base: Tensor | None, models: list[Tensor], rest: Sequence[Any], values: bool) -> list[Any]:
        *moved, slope, step = rest[: len(names) + 2]
        optimizer, l1, backend = tail.read(rest[len(names) + 2 :])
        state = dict(zip(names, moved, strict=True))
        if kind is SGD and optimizer.momentum == 0.0:
            del state["velocity"]
        tensors = [*checks.check(base, models, "tensor", values=values), slope]
        state = checks.check_state(state, models[0])
        checks.require_constant("adam_step", [*tensors, *state.values()])
        checks.check_slope(slope, len(models))
        checks.check_l1(l1)
        return [tensors, state, slope, optimizer, step, l1, backend]

    def run(base: Tensor | None, models: list[Tensor], *rest: Any) -> Tensor:
        tensors, state, *options, backend = read(base, models, rest, True)
        checks.check_step(rest[len(names) + 1])
        checks.check_apart(state, tensors)
        chosen = backends.select("adam_step", backend, [*tensors, *state.values()])
        changed = (state.get(name) for name in ("shift", "velocity", "square"))
        # The dispatcher does not tell autograd that they have changed: the backends do.
        found: Tensor = chosen.adam_step(base, models, *changed, *options)
        return found.contiguous()

    def fake(base: Tensor | None, models: list[Tensor], *rest: Any) -> Tensor:
        read(base, models, rest, False)
        return _numbers(models[0], len(models) + 2)

    moved = "Tensor(a!) shift, Tensor(b!)? velocity" + (", Tensor(c!)? square" if kind is Adam else "")
    schema = f"({INPUTS}, {moved}, Tensor slope, SymInt step, {tail.schema}) -> Tensor moments"
    _register(f"adam_step.{_name(kind)}", schema, run, fake)


def _contiguous(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in found)


def _name(kind: type) -> str:
    return next(name for name, known in OPTIMIZERS.items() if known is kind)


def _define() -> None:
    tail = _Tail((), ROW_GROUPS | BACKEND)
    _register("gram", f"({INPUTS}, {tail.schema}) -> Tensor", _gram, _gram_fake)
    tail = _Tail((), ROW_GROUPS | DTYPE | BACKEND)
    _register("combine", f"({INPUTS}, Tensor weights, {tail.schema}) -> Tensor", _combine, _combine_fake)
    tail = _Tail((), ROW_GROUPS | BACKEND)
    _register("multi_dot", f"({INPUTS}, Tensor gradient, {tail.schema}) -> Tensor", _multi_dot, _multi_dot_fake)
    for name, backward, keep in (
        ("gram", gradients.gram_backward, gradients.keep_gram),
        ("combine", gradients.combine_backward, gradients.keep_combine),
        ("multi_dot", gradients.multi_dot_backward, gradients.keep_multi_dot),
    ):
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=keep)
    for spanning in (SGD, Converge):
        _define_descend(spanning)
        _define_merge_rows(spanning)
    for elementwise in (SGD, Adam):
        _define_adam_rows(elementwise)
        _define_adam_step(elementwise)


if not hasattr(torch.ops.awd_fast, "gram"):
    _define()
