"""Who takes a call: the backends, and in words why one cannot.

A backend asked for by name runs the call or raises; without a name the first that can takes it. Nothing is probed when
the package is imported.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from awd_fast.errors import InputError

PREFERENCE = ("native", "cuda", "triton", "reference")
MODULES = {"triton": "triton_backend"}
"""Backends whose module has another name."""
CPU_ALONE = ("trim", "sparse_norms", "sparse_merge")
"""Operators that are compiled for the CPU alone."""


@functools.cache
def module(name: str) -> ModuleType:
    """The module of backend `name`."""
    return importlib.import_module(f"awd_fast.ops.{MODULES.get(name, name)}")


def available() -> dict[str, str | None]:
    """Every backend's name with the reason why it cannot run here, or None where it can."""
    return {name: unavailable(name) for name in PREFERENCE}


def unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine, or None. Raises InputError where there is no such backend."""
    require_known(name)
    return None if name == "reference" else module(name).unavailable()


def require_known(name: object) -> None:
    """Raises InputError where a backend is asked for that does not exist; None asks for none."""
    if name is not None and name not in PREFERENCE:
        raise InputError(f"backend is {name!r}; expected one of {', '.join(PREFERENCE)}")


def select(operator: str, requested: str | None, tensors: list[Tensor]) -> ModuleType:
    """The backend that runs `operator` on these tensors.

    Raises InputError where the requested backend is unknown, cannot run here or does not take this call.
    """
    for name in PREFERENCE if requested is None else (requested,):
        reason = unavailable(name) or refusal(name, operator, tensors)
        if reason is None and (requested is not None or not only_by_name(name)):
            return module(name)
    raise InputError(f"backend {requested} cannot run {operator}: {reason}")


def only_by_name(name: str) -> bool:
    """Whether a call must name this backend to get it: Triton in its interpreter, which is for tests."""
    return name == "triton" and bool(module(name).only_by_name())


def refusal(name: str, operator: str, tensors: list[Tensor]) -> str | None:
    """Why backend `name` does not take this call, or None."""
    if name in ("cuda", "triton") and operator in CPU_ALONE:
        return f"there is no {operator} for a GPU, where the reference takes the call"
    return None if name == "reference" else module(name).refusal(operator, tensors)


def machine() -> list[str]:
    """What this machine has, one line each: threads, instruction set of the compiled module, devices."""
    lines = [f"threads: {torch.get_num_threads()}"]
    if unavailable("native") is None:
        lines += module("native").machine()
    for name in ("cuda", "triton"):
        if unavailable(name) is None:
            lines += module(name).machine()
    count = torch.cuda.device_count()
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)]
    return [*lines, f"devices: {', '.join(['cpu', *devices])}"]
