"""What the tests of sparse merges share: inputs with ties, drops, comparisons to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from awd_fast import ops
from awd_fast.ops import backends, native, sparse_native
from tests.test_native import instruction_sets

BACKENDS = [name for name in ("native", "reference") if backends.unavailable(name) is None]
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@contextmanager
def poisoned(instruction_set: str) -> Iterator[None]:
    """Runs native on an instruction set; its results are allocated full of NaN."""
    if instruction_set == "none":
        pytest.skip("the compiled module is not there")
    present, empty = native._module().cpu_isa(), torch.empty
    native._module().choose_cpu_isa(instruction_set)

    def full(*size: Any, **options: Any) -> Tensor:
        found = empty(*size, **options)
        return found.fill_(torch.nan if found.is_floating_point() else -7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_native.torch, "empty", full)
        yield
    native._module().choose_cpu_isa(present)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    with poisoned(request.param):
        yield request.param


def made(shape: tuple[int, ...] | int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and k models near it, of which a tenth of the elements is the base's; magnitudes tie in 16-bit dtypes."""
    g = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    base = torch.randn(shape, generator=g)
    models = [base + 0.1 * torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.1) for _ in range(k)]
    return base.to(dtype), [model.to(dtype) for model in models]


def awkward() -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Magnitudes that are equal, zero, not finite or subnormal."""
    base, models = made(1000, 3, torch.float32)
    signs = torch.ones(1000)
    signs[::3] = -1.0
    special = models[0].clone()
    special[5], special[7], special[900], special[400:410] = torch.nan, torch.inf, -torch.inf, torch.nan
    tiny = torch.linspace(-1.0, 1.0, 1000) * 1e-40
    return {
        "equal": (torch.zeros(1000), [signs, -signs, 0.5 * signs]),
        "zero": (base, [base.clone(), models[0], base.clone()]),
        "not finite": (base, [special, models[1], special.flip(0)]),
        "subnormal": (torch.zeros(1000), [tiny, 3.0 * tiny, -tiny]),
    }


def same(found: Tensor, expected: Tensor) -> bool:
    """To the bit, but that all NaN are equal."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    bits = [torch.where(tensor != tensor, 1, tensor).contiguous().view(kind) for tensor in (found, expected)]
    return found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(*bits)


def ranks_of(size: int) -> list[tuple[int, int]]:
    return [(0, 0), (0, size), (0, size // 2), (size // 10, size // 2), (size // 3, size // 3), (size // 2, size)]


def drops(base: Tensor, models: list[Tensor]) -> list[object]:
    k, size = len(models), base.numel()
    densities = tuple((0.3, 1.0, 0.7, 0.0)[i % 4] for i in range(k))
    ranks = (ranks_of(size) * k)[:k]
    cut = ops.trim(base, models, ranks, backend="reference")
    return [None, cut, ops.Bernoulli(densities, 7), ops.MagPrune(densities, (0.2,) * k, 2**40)]
