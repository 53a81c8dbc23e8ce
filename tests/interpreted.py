"""Triton's interpreter in less time: it prepares `triton.language` once for a launch, not for every call in a kernel.

`triton.runtime.interpreter._patch_lang` exchanges the functions of the language for those that run in NumPy, by going
through everything in it. For a launch that is undone afterwards, but it is done again for each function that a kernel
calls, where all is exchanged already: a third of the time of the tests.
"""

from typing import Any

import pytest
import torch

from awd_fast.ops import triton_backend


def prepare_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where kernels do not run in the interpreter, or where it is not as it was in triton 3.9."""
    if not triton_backend.interpreted():
        return
    from triton.runtime import interpreter

    prepare = getattr(interpreter, "_patch_lang", None)
    nothing = getattr(interpreter, "_LangPatchScope", None)
    if prepare is None or nothing is None:
        return
    core = interpreter.tl.core

    def once(function: Any) -> Any:
        seen = [one for one in function.__globals__.values() if one is interpreter.tl or one is core]
        prepared = seen and not any(core.is_builtin(one.load) for one in seen)
        return nothing() if prepared else prepare(function)

    monkeypatch.setattr(interpreter, "_patch_lang", once)


def poison_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are allocated full of NaN, so that an element that a kernel leaves out is seen."""
    empty = torch.empty

    def full_of_nan(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)
