"""What may be given to a public function where a tensor is expected.

The public functions of `awd_fast.ops` take numpy arrays of float16, float32 or float64 beside tensors, and read them
where they lie: nothing is copied, so that an array whose elements PyTorch cannot address is refused.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.ops.foreign import foreign

ARRAYS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def given(name: str, value: Any, *, changed: bool = False) -> Tensor:
    """A single argument as a tensor. changed: whether the call writes to it.

    Raises InputError where it is neither a tensor nor an array whose memory can be read as one, or of a class that
    hides its elements.
    """
    if isinstance(value, Tensor):
        reason = foreign(value)
        if reason is not None:
            raise InputError(f"{name} is {reason}")
        return value
    if isinstance(value, np.ndarray):
        return _shared(name, value, changed)
    raise InputError(f"{name} is {type(value).__name__}; expected a torch.Tensor or a numpy array")


def taken(base: Any, models: Sequence[Any]) -> tuple[Tensor | None, list[Tensor]]:
    """The base and the models of a call as tensors. Raises InputError as `given`."""
    base = None if base is None else given("base", base)
    return base, [given(f"models[{index}]", model) for index, model in enumerate(models)]


def _shared(name: str, array: np.ndarray, changed: bool) -> Tensor:
    """The elements of an array as a tensor, in the memory where they are."""
    if torch.compiler.is_compiling():  # which knows arrays as tensors already, and none of the attributes below
        return torch.from_numpy(array)
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            f"{name} is a masked array, whose mask would be lost; expected a plain one: give its .filled()"
        )
    if array.dtype not in ARRAYS:
        raise InputError(
            f"{name} is a numpy array of {array.dtype.str.lstrip('=<|')} ({array.dtype}); expected float16, float32 or "
            f"float64 in the byte order of this machine"
        )
    size = array.itemsize
    if not array.flags.aligned or any(step < 0 or step % size for step in array.strides):
        raise InputError(
            f"{name} is a numpy array with strides of {list(array.strides)} bytes; expected steps forward of whole, "
            "aligned elements: give numpy.ascontiguousarray of it"
        )
    if not array.flags.writeable:
        if changed:
            raise InputError(f"{name} is a read-only numpy array; expected one that can be written to")
        # torch.from_numpy warns of memory that it could write to, which nothing here does to an input.
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


class _Writable:
    """A read-only array as numpy reads one of somebody else's, without the mark. It keeps the array alive."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        address = array.__array_interface__["data"][0]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
