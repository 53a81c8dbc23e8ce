"""What all Triton kernels share: how tensors reach them, which blocks they work in, and how they are launched.

A kernel is given its K + 1 tensors as a table of addresses on the device, [base, models.., numbers..] of int64, so that
one compiled kernel serves any tensors and no copy of them is made. The numbers are float64 in the same table, as their
bits: a float argument of a Triton kernel would be rounded to float32, and a new value must not mean a new compilation.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from awd_fast.objective import Groups, Objective
from awd_fast.ops import reference

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
VECTOR = 16  # bytes of the widest load of a thread


@triton.jit
def pointer(table, index, ALIGNED: tl.constexpr, STORED: tl.constexpr):
    """The address in the table at `index`, a scalar or a block, as a pointer of type STORED."""
    found = tl.load(table + index).to(STORED)
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def pointers(table, first, K: tl.constexpr, KP: tl.constexpr, ALIGNED: tl.constexpr, STORED: tl.constexpr):
    """The models' pointers [KP] from number `first` on; those behind the K-th are null, and must not be read."""
    index = first + tl.arange(0, KP)
    found = tl.load(table + 1 + index, mask=index < K, other=0).to(STORED)
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def vectors(models, base, at, used, inside, BASE: tl.constexpr, COMPUTE: tl.constexpr):
    """t [KP, N] at elements `at` [1, N] of models [KP, 1]: differences rounded once; 0 where not `inside` [1, N].

    Rows that are not `used` [KP, 1] hold no task vector, and what they hold must not be used.
    """
    found = tl.load(models + at, mask=inside & used, other=0.0).to(COMPUTE)
    if BASE:
        found = found - tl.load(base + at, mask=inside, other=0.0).to(COMPUTE)
    return found


@triton.jit
def number(table, K: tl.constexpr, index: tl.constexpr):
    """Number `index` behind the K + 1 addresses, float64."""
    return tl.load(table + 1 + K + index).to(tl.float64, bitcast=True)


@dataclass(frozen=True)
class Matrix:
    """The row-major matrix whose rows, or columns, are the groups: `reference.group_view` without moving an element.

    Groups of one element are given as the columns of one row, so that they are worked on side by side.
    """

    rows: int
    columns: int
    by_column: bool

    @classmethod
    def of(cls, tensor: Tensor, groups: Groups) -> "Matrix":
        if groups in ("tensor", "global"):
            return cls(1, tensor.numel(), False)
        rows, columns = reference.matrix_size(tensor)
        if columns == 1:
            return cls(1, rows, groups == "row")
        return cls(rows, columns, groups == "column")

    @property
    def groups(self) -> int:
        return self.columns if self.by_column else self.rows

    @property
    def size(self) -> int:
        """Elements of a group."""
        return self.rows if self.by_column else self.columns


class Inputs:
    """Base and models as a kernel reads them, held while it may; copied where they are not dense."""

    def __init__(self, base: Tensor | None, models: Sequence[Tensor]) -> None:
        self.models = [dense(model) for model in models]
        self.base = None if base is None else dense(base)
        self.device, self.k = models[0].device, len(models)
        self._addresses = [0 if self.base is None else self.base.data_ptr(), *(m.data_ptr() for m in self.models)]
        self.constants: dict[str, Any] = {
            "K": self.k,
            "BASE": base is not None,
            # Triton knows this of its pointer arguments by itself, and of those in a table only if it is told.
            "ALIGNED": all(address % VECTOR == 0 for address in self._addresses),
            "STORED": tl.pointer_type(TYPES[models[0].dtype]),
            "COMPUTE": TYPES[reference.compute_dtype(models[0].dtype)],
        }

    def table(self, numbers: Sequence[float] = ()) -> Tensor:
        """The addresses and these numbers, int64 on the device."""
        return on_device(self._addresses, numbers, self.device)


def on_device(addresses: Sequence[int], numbers: Sequence[float], device: torch.device) -> Tensor:
    """A table on the device. From pinned memory the copy is ordered with the kernels, and the host goes on."""
    bits = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
    table = torch.cat([torch.tensor(addresses, dtype=torch.int64), bits])
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def dense(tensor: Tensor) -> Tensor:
    """Its values as they are read, in order: no lazy sign, no gaps."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_neg().contiguous()


def power_of_two(number: int) -> int:
    """The smallest one that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def objective_constants(objective: Objective) -> dict[str, Any]:
    """What kernels are compiled for; an l1 penalty is the elementwise optimiser's."""
    euclidean = objective.penalty if objective.alpha and objective.penalty != "l1" else "none"
    return {"SQUARED": objective.similarity == "squared", "PENALTY": ("none", "l2", "squared_l2").index(euclidean)}


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, threads: int, **constants: Any) -> None:
    """`programs` programs of `threads` threads, or of one warp where that has more, on the device's current stream.

    No product is fused with a sum unless `enable_fp_fusion` says so: roundings are then those of the reference, on
    every GPU. It is named at every launch because Triton's default has changed.
    """
    if programs:
        options = {"enable_fp_fusion": False} | constants
        with _current(device):
            kernel[(programs,)](*arguments, num_warps=max(1, threads // _lanes(device)), **options)


@functools.cache
def _lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on some of AMD's GPUs. What a thread has of a block must not depend on that."""
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()
