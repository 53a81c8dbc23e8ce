"""What every operator asks of the tensors it is given."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.objective import Groups

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(base: Tensor | None, models: Sequence[Tensor], groups: Groups) -> list[Tensor]:
    """All tensors of a call. Raises InputError where they are not dense, floating and alike, or `groups` is unknown."""
    if groups not in get_args(Groups):
        raise InputError(f"groups is {groups!r}; expected one of {', '.join(get_args(Groups))}")
    if len(models) == 0:
        raise InputError("models is empty; expected at least one tensor")
    tensors = [*models] if base is None else [base, *models]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise InputError(f"a tensor is {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.dtype not in FLOATING:
            raise InputError(f"a tensor is {tensor.dtype}; expected one of {', '.join(str(d) for d in FLOATING)}")
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise InputError(f"a tensor is {tensor.layout} on {tensor.device}; expected a dense tensor with values")
    first = tensors[0]
    for tensor in tensors[1:]:
        if tensor.shape != first.shape or tensor.dtype != first.dtype or tensor.device != first.device:
            raise InputError(
                f"a tensor is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"expected {first.dtype} {list(first.shape)} on {first.device} as the first"
            )
    return tensors
