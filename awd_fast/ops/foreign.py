"""Tensors that no operator can take, by class, layout or device, each refused in a sentence that says what to do.

Of a class with a dispatch of its own, as DTensor, PyTorch would say that "awd_fast.gram has no sharding strategy", or
less. `refuse` has the operators of `torch.ops` say it in these words, whoever calls them.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from awd_fast.errors import InputError

PLAIN = (Tensor, torch.nn.Parameter)
DTENSOR = "torch.distributed.tensor"
FOREIGN = {
    "DTensor": "sharded among processes; expected a plain tensor: give its .full_tensor(), or its .to_local() where "
    "each process holds whole groups",
    "MaskedTensor": "whose mask would be lost; expected a plain tensor: give its .to_tensor(value)",
    "NestedTensor": "of several shapes; expected tensors of one shape: give the tensors of its .unbind()",
}
"""PyTorch's subclasses that no operator takes, and what to do instead."""


def foreign(tensor: Tensor) -> str | None:
    """What is said of a tensor whose class no operator takes ("a DTensor, ..."), or None."""
    kind = type(tensor)
    if kind in PLAIN:
        return f"a nested tensor, {FOREIGN['NestedTensor']}" if tensor.is_nested else None
    if kind.__name__ in FOREIGN:
        return f"a {kind.__name__}, {FOREIGN[kind.__name__]}"
    return None


def unfit(tensor: Tensor, *, values: bool = True) -> str | None:
    """Why the elements of a tensor are not there to be read ("torch.sparse_coo; ..."), or None.

    values: whether it must hold values, as tensors on the device "meta" do not.
    """
    reason = foreign(tensor)
    if reason is not None:
        return reason
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype}); expected floating numbers: give its .dequantize()"
    if tensor.layout != torch.strided:
        return f"{tensor.layout} on {tensor.device}; expected a dense tensor with values: give its .to_dense()"
    if values and tensor.device.type == "meta":
        return f"{tensor.layout} on {tensor.device}; expected a dense tensor with values"
    return None


def refuse(qualified: str) -> None:
    """Has an operator of `torch.ops` refuse the tensors of FOREIGN in their own words, which PyTorch would in others.

    Where PyTorch is too old for such rules (before 2.6), it refuses them itself.
    """

    def refused(*call: Any, **options: Any) -> Any:
        for leaf in torch.utils._pytree.tree_leaves((call, options)):
            reason = foreign(leaf) if isinstance(leaf, Tensor) else None
            if reason is not None:
                raise InputError(f"a tensor given to {qualified.partition('::')[2].partition('.')[0]} is {reason}")
        return NotImplemented

    for place in ("CPU", "CUDA"):
        torch.library.impl(qualified, f"NestedTensor{place}", refused)
    rule = getattr(torch.library, "register_torch_dispatch", None)
    if rule is None:
        return

    def register(kind: str, module: ModuleType) -> None:
        rule(qualified, getattr(module, kind), refused)

    for module, kind in (
        ("torch.nested._internal.nested_tensor", "NestedTensor"),
        ("torch.masked.maskedtensor.core", "MaskedTensor"),
        (DTENSOR, "DTensor"),
    ):
        when_imported(module, functools.partial(register, kind))


class _Awaiting(importlib.abc.MetaPathFinder):
    """Waits for the import of a module that takes half a second to import, and that few programs need."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.then: list[Callable[[ModuleType], object]] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, whose loader calls what waits for it; None of any other module."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for each in self.then:
                each(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, then: Callable[[ModuleType], object]) -> None:
    """Calls `then` with a module: now, or once somebody has imported it."""
    if name in sys.modules:
        then(sys.modules[name])
        return
    waiting = next((finder for finder in sys.meta_path if isinstance(finder, _Awaiting) and finder.name == name), None)
    if waiting is None:
        waiting = _Awaiting(name)
        sys.meta_path.insert(0, waiting)
    waiting.then.append(then)
