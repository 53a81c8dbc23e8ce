"""What `benchmarks.fuzz` asks of every case, and what safetensors itself finds in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import awd_fast
from benchmarks.fuzz_files import State

LONGEST = 1000
"""Characters of an error's sentence."""


class Violation(Exception):
    """Something that may not happen did."""


def sentence(error: BaseException, *names: str) -> str:
    """The message of an error, which must be an InputError, for the machine is well, in one line that names files."""
    if not isinstance(error, awd_fast.InputError):
        raise Violation(f"{type(error).__name__}: {str(error)[:500]!r}") from error
    words = str(error)
    if not words or len(words) > LONGEST or not words.isprintable():
        raise Violation(f"a message of {len(words)} characters that is not one line: {words[:500]!r}") from error
    if not all(name in words for name in names):
        raise Violation(f"the message does not name {names}: {words[:500]!r}") from error
    return words


def attempt(run: Callable[[], Any], *names: str) -> tuple[Any, str | None]:
    """What a call gives, or the sentence with which it was refused."""
    try:
        return run(), None
    except Exception as error:
        return None, sentence(error, *names)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)))


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def load(file: Path) -> State | None:
    """The file as safetensors itself reads it, or None where it does not."""
    try:
        return {name: _copy(tensor) for name, tensor in load_file(file).items()}
    except Exception:
        return None


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor at an even address, to the bit: `clone` makes a bool of each byte."""
    return tensor.view(torch.uint8).clone().view(torch.bool) if tensor.dtype == torch.bool else tensor.clone()
