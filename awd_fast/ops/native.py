"""The compiled CPU operators: allocates results, hands addresses to `awd_fast._C`, says in words what it will not take.

This is the only file that imports the extension, and after torch: both then share torch's OpenMP runtime and threads.
Tensors that are not contiguous are copied first. A call holds the GIL only while it gathers addresses.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from awd_fast import statistics
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective
from awd_fast.ops import reference

EXTENSION = "awd_fast._C"
FUSED_ITERATIONS = 4096
"""More than these are not run in the fused pass, whose memory grows with them; the data's time is then nothing."""
FUSED_GROUPS = 64
"""Fewer groups than these keep too few threads busy in the fused pass, which divides only the groups among them."""
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The codes of awd::Dtype in csrc/kernels.h."""


@functools.cache
def _load() -> ModuleType | str:
    """The compiled module, or why there is none."""
    if importlib.util.find_spec(EXTENSION) is None:
        return (
            "the compiled module is not built; with a C++17 compiler at hand, run `pip install .` in the source folder "
            "(or `AWD_FAST_BUILD=require python setup.py build_ext --inplace` to see why it fails)"
        )
    try:
        return importlib.import_module(EXTENSION)
    except ImportError as error:
        return f"the compiled module does not load: {error}"


def unavailable() -> str | None:
    """Why the compiled operators cannot run here, or None."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    try:
        loaded.cpu_isa()
    except ValueError as error:
        return f"AWD_FAST_CPU_ISA is wrong: {error}"
    return None


def refusal(operator: str, tensors: list[Tensor]) -> str | None:
    """Why `operator` does not take these tensors, or None."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"it takes plain tensors, not {type(tensor).__name__}"
        if tensor.device.type != "cpu":
            return f"it takes tensors on the CPU, not on {tensor.device}"
        if tensor.layout != torch.strided:
            return f"it takes dense tensors, not {tensor.layout}"
        if tensor.dtype not in CODES:
            return f"it does not take {tensor.dtype}"
        if tensor.data_ptr() % tensor.element_size():
            return f"a tensor of {tensor.dtype} lies at an address that is no multiple of {tensor.element_size()} bytes"
    return None


def build_info() -> dict[str, object]:
    """How the module was built and what it runs: the keys of `_C.build_info`, and instruction_set."""
    module = _module()
    return {**module.build_info(), "instruction_set": module.cpu_isa()}


def machine() -> list[str]:
    """The same in words, one line each."""
    info: dict[str, Any] = build_info()
    threads = "OpenMP" if info["openmp"] else "no OpenMP, one thread"
    cuda = f"CUDA {info['cuda']} for {', '.join(info['cuda_archs'])}" if info["cuda"] else _module().cuda_why_not()
    return [f"instruction set: {info['instruction_set']}", f"compiled module: {info['compiler']}, {threads}; {cuda}"]


def gram(base: Tensor | None, models: Sequence[Tensor], groups: Groups) -> Tensor:
    """G [R, K, K] float64."""
    tensors, shape, count = _Tensors(base, models), _shape(models[0], groups), reference.group_count(models[0], groups)
    out = torch.empty(count, len(models), len(models), dtype=torch.float64)
    _module().gram(
        **tensors.addresses,
        **shape,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def descend(
    gram: Tensor, objective: Objective, optimizer: SGD | Converge, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients a [R, K] of the redundant vectors d = sum_j a_j t_j, and the loss at d_0, d_1, ... (float64)."""
    gram = _dense(gram)
    count, k = gram.shape[:2]
    coefficients = torch.empty(count, k, dtype=torch.float64)
    history = torch.empty(_history_size(optimizer), dtype=torch.float64)
    used = _module().descend(
        gram=gram.data_ptr(),
        groups=count,
        k=k,
        **_objective(objective),
        total=reference.total_groups(total, count),
        **_optimizer(optimizer),
        coefficients=coefficients.data_ptr(),
        history=history.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return coefficients, history[:used].clone()


def combine(
    base: Tensor | None, models: Sequence[Tensor], weights: Tensor, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """base + sum_j w_rj t_j in the models' shape, rounded to `dtype`; without a base, sum_j w_rj t_j."""
    tensors = _Tensors(base, models)
    # One row of weights is the same for every group: then the whole tensor is one row.
    shape = _shape(models[0], groups if weights.shape[0] > 1 else "tensor")
    factors = weights.detach().to(reference.compute_dtype(models[0].dtype))
    factors = _dense(factors.T if shape["by_column"] else factors)
    out = torch.empty(models[0].shape, dtype=dtype)
    _module().combine(
        **tensors.addresses,
        **shape,
        weights=factors.data_ptr(),
        out_dtype=CODES[dtype],
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def multi_dot(base: Tensor | None, models: Sequence[Tensor], gradient: Tensor, groups: Groups) -> Tensor:
    """<g_r, t_rj> [R, K] float64."""
    tensors, count = _Tensors(base, models), reference.group_count(models[0], groups)
    factors = _dense(as_gradient(gradient, models[0].dtype))
    out = torch.empty(count, len(models), dtype=torch.float64)
    _module().multi_dot(
        **tensors.addresses,
        **_shape(models[0], groups),
        gradient=factors.data_ptr(),
        gradient_dtype=CODES[factors.dtype],
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def as_gradient(gradient: Tensor, stored: torch.dtype) -> Tensor:
    """A gradient in a dtype that is float64 exactly where the tensors are, as the kernels read it."""
    compute = reference.compute_dtype(stored)
    wide = reference.compute_dtype(gradient.dtype) != compute
    return gradient.detach().to(compute) if wide else gradient.detach()


def merge_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Tensor,
    objective: Objective,
    optimizer: SGD | Converge,
    groups: Groups,
    dtype: torch.dtype,
    total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base + sum_i m_i (t_i - d) for weights m [K], G [R, K, K], a [R, K] and the history, in one pass."""
    shape, count, k = _shape(models[0], groups), reference.group_count(models[0], groups), len(models)
    steps = optimizer.max_iterations if isinstance(optimizer, Converge) else optimizer.iterations
    whole = reference.total_groups(total, count)
    if whole < FUSED_GROUPS or steps > FUSED_ITERATIONS:  # the whole decides: its blocks then have its bits
        g = gram(base, models, groups)
        coefficients, history = descend(g, objective, optimizer, total)
        factors = statistics.merge_weights(weights, coefficients)
        return combine(base, models, factors, groups, dtype), g, coefficients, history
    tensors = _Tensors(base, models)
    out = torch.empty(models[0].shape, dtype=dtype)
    g = torch.empty(count, k, k, dtype=torch.float64)
    coefficients = torch.empty(count, k, dtype=torch.float64)
    history = torch.empty(_history_size(optimizer), dtype=torch.float64)
    used = _module().merge_rows(
        **tensors.addresses,
        **shape,
        factors=weights.tolist(),
        **_objective(objective),
        total=whole,
        **_optimizer(optimizer),
        out_dtype=CODES[dtype],
        out=out.data_ptr(),
        gram=g.data_ptr(),
        coefficients=coefficients.data_ptr(),
        history=history.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out, g, coefficients, history[:used].clone()


def adam_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    objective: Objective,
    optimizer: SGD | Adam,
    groups: Groups,
    total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, its history, and the products at the end: the fields of `awd_fast.ops.Descent`."""
    tensors, count, k = _Tensors(base, models), reference.group_count(models[0], groups), len(models)
    shift = torch.empty(models[0].shape, dtype=reference.compute_dtype(models[0].dtype))
    history = torch.empty(optimizer.iterations + 1, dtype=torch.float64)
    gram, inner, square = (torch.empty(*size, dtype=torch.float64) for size in ((count, k, k), (count, k), (count,)))
    _module().adam_rows(
        **tensors.addresses,
        **_shape(models[0], groups),
        **_objective(objective),
        total=reference.total_groups(total, count),
        optimizer=_elementwise(optimizer, objective.alpha if objective.penalty == "l1" else 0.0),
        iterations=optimizer.iterations,
        shift=shift.data_ptr(),
        history=history.data_ptr(),
        gram=gram.data_ptr(),
        inner=inner.data_ptr(),
        square=square.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return shift, history, gram, inner, square


def adam_step(
    base: Tensor | None,
    models: Sequence[Tensor],
    shift: Tensor,
    velocity: Tensor | None,
    square: Tensor | None,
    slope: Tensor,
    optimizer: SGD | Adam,
    step: int,
    l1: float,
) -> Tensor:
    """<t_i, d>, <d, d> and sum |d| after a step of shift, velocity and square, which are changed in place."""
    tensors = _Tensors(base, models)
    factors = _dense(slope)
    moments = torch.empty(len(models) + 2, dtype=torch.float64)
    _module().adam_step(
        **tensors.addresses,
        size=shift.numel(),
        optimizer=_elementwise(optimizer, l1),
        step=step,
        slope=factors.data_ptr(),
        shift=shift.data_ptr(),
        velocity=_address(velocity),
        square=_address(square),
        moments=moments.data_ptr(),
        threads=torch.get_num_threads(),
    )
    _changed(shift, velocity, square)
    return moments


def _changed(*tensors: Tensor | None) -> None:
    """Tells autograd, which would not see it, that these tensors have changed."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _elementwise(optimizer: SGD | Adam, l1: float) -> dict[str, object]:
    """The fields of awd::Elementwise in csrc/kernels.h."""
    adam = isinstance(optimizer, Adam)
    beta1, beta2 = optimizer.betas if isinstance(optimizer, Adam) else (optimizer.momentum, 0.0)
    return {
        "adam": adam,
        "lr": optimizer.lr,
        "momentum": beta1,
        "beta2": beta2,
        "eps": optimizer.eps if isinstance(optimizer, Adam) else 0.0,
        "weight_decay": optimizer.weight_decay,
        "nesterov": isinstance(optimizer, SGD) and optimizer.nesterov,
        "l1": l1,
    }


def _objective(objective: Objective) -> dict[str, object]:
    """What the compiled module is told of an objective; an l1 penalty is the elementwise optimiser's."""
    return {
        "similarity": objective.similarity,
        "penalty": objective.penalty if objective.alpha and objective.penalty != "l1" else "none",
        "alpha": objective.alpha,
        "eps": objective.eps,
    }


def _optimizer(optimizer: SGD | Converge) -> dict[str, object]:
    """The same of an optimiser in the span."""
    module = _module()
    if isinstance(optimizer, Converge):
        return {"sgd": None, "converge": module.Converge(optimizer.tolerance, optimizer.max_iterations)}
    options = (optimizer.lr, optimizer.momentum, optimizer.weight_decay, optimizer.nesterov, optimizer.iterations)
    return {"sgd": module.Sgd(*options), "converge": None}


def _history_size(optimizer: SGD | Converge) -> int:
    if isinstance(optimizer, Converge):
        return int(_module().converge_history_size(optimizer.max_iterations))
    return optimizer.iterations + 1


def _module() -> ModuleType:
    loaded = _load()
    if isinstance(loaded, str):
        raise ImportError(loaded)
    return loaded


class _Tensors:
    """Base and models, copied where they are not dense, and held for as long as their addresses are in use."""

    def __init__(self, base: Tensor | None, models: Sequence[Tensor]) -> None:
        self._base, self._models = None if base is None else _dense(base), [_dense(model) for model in models]
        self.base_address, self.model_addresses = _address(self._base), [_address(model) for model in self._models]
        self.addresses = {
            "dtype": CODES[models[0].dtype],
            "base": self.base_address,
            "models": self.model_addresses,
        }


def _dense(tensor: Tensor) -> Tensor:
    """Its values as they are read, in order: no lazy sign, no gaps."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_neg().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _shape(tensor: Tensor, groups: Groups) -> dict[str, int]:
    """Rows, columns, and whether columns are the groups, of the matrix that `reference.group_view` sees.

    Groups of one element are given as the columns of one row, so that they are worked on side by side.
    """
    by_column = False
    if groups in ("tensor", "global"):
        rows, columns = 1, tensor.numel()
    else:
        rows, columns = reference.matrix_size(tensor)
        by_column = groups == "column"
        if columns == 1:
            rows, columns, by_column = 1, rows, not by_column
    return {"rows": rows, "columns": columns, "by_column": by_column}
