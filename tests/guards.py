"""Memory between guard zones, at any alignment, for the results and the inputs of the compiled operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from awd_fast.ops import native

MARGIN = 256  # bytes on either side: whole cache lines
CANARY = 0xA7
LAYOUTS = ("dense", "transposed", "sliced", "expanded")


class Guards:
    """Stands for torch in `awd_fast.ops.native`: what it allocates is full of NaN and lies between guard zones.

    Results begin `offset` elements behind a cache line's start.
    """

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.zones: list[tuple[Tensor, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, dtype: torch.dtype) -> Tensor:
        shape = torch.Size(size if not size or isinstance(size[0], int) else size[0])
        count = shape.numel() * dtype.itemsize
        buffer = torch.full((count + 2 * MARGIN + 64 + self.offset * dtype.itemsize,), CANARY, dtype=torch.uint8)
        begin = MARGIN + -buffer.data_ptr() % 64 + self.offset * dtype.itemsize
        self.zones.append((buffer, begin, begin + count))
        return buffer[begin : begin + count].view(dtype).view(shape).fill_(torch.nan)

    def intact(self) -> bool:
        return all(
            bool((buffer[:begin] == CANARY).all() and (buffer[end:] == CANARY).all())
            for buffer, begin, end in self.zones
        )


@contextmanager
def guarded(offset: int, instruction_set: str, threads: int) -> Iterator[Guards]:
    """Runs the compiled operators so; fails where they wrote outside their results."""
    module, present, before = native._module(), native._module().cpu_isa(), torch.get_num_threads()
    guards = Guards(offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "torch", guards)
        module.choose_cpu_isa(instruction_set)
        torch.set_num_threads(threads)
        try:
            yield guards
        finally:
            torch.set_num_threads(before)
            module.choose_cpu_isa(present)
    assert guards.intact()


def placed(values: Tensor, offset: int) -> Tensor:
    """The same values `offset` elements behind a cache line's start, with NaN around them."""
    buffer = torch.full((values.numel() + 192 + offset,), torch.nan, dtype=values.dtype)
    begin = 64 + -buffer.data_ptr() % 64 // values.element_size() + offset
    return buffer[begin : begin + values.numel()].view(values.shape).copy_(values)


def laid_out(values: Tensor, layout: str, offset: int) -> Tensor:
    """Values of this shape in memory that is laid out so; `expanded` repeats the first along the first dimension."""
    if values.ndim == 0 or layout == "dense":
        return placed(values, offset)
    if layout == "transposed":
        return placed(values.transpose(0, -1), offset).transpose(0, -1)
    if layout == "sliced":
        return placed(values.repeat_interleave(3, dim=-1), offset)[..., 1::3]
    return placed(values[:1], offset).expand(values.shape)
