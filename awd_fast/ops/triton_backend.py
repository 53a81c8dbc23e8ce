"""The operators in Triton, for GPUs without a compiled binary of theirs: AMD's and Intel's too.

Results are allocated here and in the launchers beside the kernels (`triton_gram`, `triton_combine`, `triton_descend`,
`triton_adam`); all stay on the device of the inputs, and nothing here waits for it. Sums run in a fixed order without
atomics: results are bitwise the same from call to call. Block sizes are chosen by shape alone, without trials.
Tensors that are not contiguous are copied first. triton is imported when a GPU, or its interpreter, is first asked for.

With TRITON_INTERPRET=1 in the environment before that, the kernels run on CPU tensors in Triton's interpreter, which is
for tests: such a backend takes only calls that name it.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from awd_fast import statistics
from awd_fast.objective import SGD, Adam, Converge, Groups, Objective
from awd_fast.ops import reference

MOST_TASKS = 32
"""Tasks that every operator takes: the K x K matrices of a group are held in registers."""
SPARE = {"gram": 1, "combine": 2, "multi_dot": 2, "merge_rows": 1, "adam_rows": 1, "adam_step": 5}
"""Tensors of a call beside its models, at most: a base, weights or slope, the optimiser's state."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OLDEST = (7, 0)
BFLOAT16 = (8, 0)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def only_by_name() -> bool:
    """Whether a call must name this backend to get it."""
    return interpreted()


@functools.cache
def unavailable() -> str | None:
    """Why no Triton kernel can run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` on Linux, or the torch build for your GPU, brings it"
    if interpreted():
        return None
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "torch finds no GPU (CUDA, ROCm or XPU) that Triton could compile for"
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "gcc", "clang")):
        return "triton needs a C compiler to start kernels, and neither gcc nor clang is there (nor does CC name one)"
    return None


def refusal(operator: str, tensors: list[Tensor]) -> str | None:
    """Why `operator` does not take these tensors, or None."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"it takes plain tensors, not {type(tensor).__name__}"
        if tensor.layout != torch.strided:
            return f"it takes dense tensors, not {tensor.layout}"
        if tensor.dtype not in DTYPES:
            return f"it does not take {tensor.dtype}"
        reason = _device_refusal(tensor)
        # The slope of adam_step, K + 1 numbers, may come from the CPU, where the K x K mathematics may be.
        if reason is not None and not (operator == "adam_step" and tensor.device.type == "cpu" and tensor.ndim == 1):
            return reason
        if tensor.data_ptr() % tensor.element_size():
            return f"a tensor of {tensor.dtype} lies at an address that is no multiple of {tensor.element_size()} bytes"
    tasks = tensors[0].shape[1] if operator == "descend" else len(tensors) - SPARE[operator]
    return f"it takes up to {MOST_TASKS} tasks, not {tasks}" if tasks > MOST_TASKS else None


def _device_refusal(tensor: Tensor) -> str | None:
    kind = tensor.device.type
    if interpreted():
        return None if kind == "cpu" else f"its interpreter takes tensors on the CPU, not on {tensor.device}"
    if kind not in ("cuda", "xpu"):
        return f"it takes tensors on a GPU, not on {tensor.device}"
    if kind == "xpu":
        has_double = getattr(torch.xpu.get_device_properties(tensor.device), "has_fp64", True)
        return None if has_double else f"{tensor.device} has no float64, in which sums are made"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(tensor.device)
        needed = BFLOAT16 if tensor.dtype == torch.bfloat16 else OLDEST
        if capability < needed:
            return f"{tensor.dtype} in Triton needs compute capability {needed[0]}.{needed[1]}, not {capability}"
    return None


def machine() -> list[str]:
    """What compiles the kernels, or runs them, in words."""
    where = ", in its interpreter on the CPU, for calls that name the backend" if interpreted() else ""
    return [f"Triton: {importlib.metadata.version('triton')}{where}"]


def gram(base: Tensor | None, models: Sequence[Tensor], groups: Groups) -> Tensor:
    """G [R, K, K] float64."""
    launching = _kernels("launch")
    found: Tensor = _kernels("gram").gram(launching.Inputs(base, models), launching.Matrix.of(models[0], groups))
    return found


def descend(
    gram: Tensor, objective: Objective, optimizer: SGD | Converge, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients a [R, K] of the redundant vectors d = sum_j a_j t_j, and the loss at d_0, d_1, ... (float64).

    Converge, which works on G alone, is that of `awd_fast.converge` on the device: many small operations of torch,
    which wait for the device, where SGD is one kernel.
    """
    if isinstance(optimizer, Converge):
        coefficients, history = reference.descend(gram, objective, optimizer, total)
        return coefficients, history.to(gram.device)
    whole = reference.total_groups(total, gram.shape[0])
    dense = _kernels("launch").dense(gram)
    found: tuple[Tensor, Tensor] = _kernels("descend").descend(dense, objective, optimizer, whole)
    return found


def combine(
    base: Tensor | None, models: Sequence[Tensor], weights: Tensor, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """base + sum_j w_rj t_j in the models' shape, rounded to `dtype`; without a base, sum_j w_rj t_j."""
    launching = _kernels("launch")
    # One row of weights is the same for every group: then the whole tensor is one row.
    shape = launching.Matrix.of(models[0], groups if weights.shape[0] > 1 else "tensor")
    factors = weights.detach().to(reference.compute_dtype(models[0].dtype))
    factors = launching.dense(factors.T if shape.by_column else factors)
    out = torch.empty(models[0].shape, dtype=dtype, device=models[0].device)
    found: Tensor = _kernels("combine").combine(launching.Inputs(base, models), shape, factors, out)
    return found


def multi_dot(base: Tensor | None, models: Sequence[Tensor], gradient: Tensor, groups: Groups) -> Tensor:
    """<g_r, t_rj> [R, K] float64."""
    launching = _kernels("launch")
    inputs, shape = launching.Inputs(base, models), launching.Matrix.of(models[0], groups)
    found: Tensor = _kernels("multi_dot").multi_dot(inputs, shape, launching.dense(gradient.detach()))
    return found


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
    """base + sum_i m_i (t_i - d) for weights m [K], G [R, K, K], a [R, K] and the history: three operators in turn."""
    g = gram(base, models, groups)
    coefficients, history = descend(g, objective, optimizer, total)
    factors = statistics.merge_weights(weights.to(g.device, non_blocking=True), coefficients)
    return combine(base, models, factors, groups, dtype), g, coefficients, history


def adam_rows(
    base: Tensor | None,
    models: Sequence[Tensor],
    objective: Objective,
    optimizer: SGD | Adam,
    groups: Groups,
    total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, its history, and the products at the end: the fields of `awd_fast.ops.Descent`."""
    launching = _kernels("launch")
    inputs, shape = launching.Inputs(base, models), launching.Matrix.of(models[0], groups)
    g = _kernels("gram").gram(inputs, shape)
    shift = torch.empty(models[0].shape, dtype=reference.compute_dtype(models[0].dtype), device=g.device)
    whole = reference.total_groups(total, shape.groups)
    history, inner, square = _kernels("adam").adam_rows(inputs, shape, g, objective, optimizer, shift, whole)
    return shift, history, g, inner, square


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
    launching = _kernels("launch")
    state = (shift, velocity, square)
    factors = launching.dense(slope.detach().to(shift.device, non_blocking=True))
    found: Tensor = _kernels("step").adam_step(launching.Inputs(base, models), state, factors, optimizer, step, l1)
    for tensor in state:
        if tensor is not None and not tensor.is_inference():  # autograd would not see that it has changed
            torch.autograd.graph.increment_version(tensor)
    return found


def _kernels(name: str) -> ModuleType:
    """The module of kernels `name`, which imports triton."""
    return importlib.import_module(f"awd_fast.ops.triton_{name}")
