"""The operators that leave elements out as `torch.ops.awd_fast.*`: schemas, implementations, shapes for tracing.

    trim(bases, models, ranks, k, backend)                                      -> thresholds, limits
    sparse_norms(base, models, DROP, offset, backend)                           -> [K, 2]
    sparse_merge(base, models, weights, rescales, DROP, offset, consensus, normalize, scale, dtype, backend)

The arguments are those of the functions of the same names in `awd_fast.ops.sparse`; of `trim`, bases is empty or one
per parameter, models has k for each, one parameter after the other, and ranks is first, last of each model in a row.
DROP stands for thresholds, limits, densities, epsilons, seed: cuts where there are thresholds, chance where there are
densities, by rank where there are epsilons as well.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.ops import backends, checks, library, native, sparse_native, sparse_reference
from awd_fast.ops.sparse_reference import CHANCE_BITS, Drop, Vote

DROP = "Tensor? thresholds, Tensor? limits, float[] densities, float[] epsilons, int seed"
MOST = 2**63


def _chosen(operator: str, backend: str | None, tensors: list[Tensor]) -> ModuleType:
    chosen = backends.select(operator, backend, tensors)
    return sparse_native if chosen is native else sparse_reference


def _ranks(ranks: list[int], k: int, size: int) -> list[tuple[int, int]]:
    pairs = list(zip(ranks[::2], ranks[1::2], strict=False))
    if len(ranks) != 2 * k or any(not 0 <= first <= last <= size for first, last in pairs):
        raise InputError(f"ranks is {ranks}; expected {k} pairs, 0 <= first <= last <= {size}")
    return pairs


def _trim(
    bases: list[Tensor], models: list[Tensor], ranks: list[int], k: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    parameters = checks.check_many(bases, models, k, "tensor")
    pairs = _ranks(ranks, k, sum(tensors[0].numel() for tensors in parameters))
    own = [tensors[-k:] for tensors in parameters]
    every = [tensor for tensors in parameters for tensor in tensors]
    thresholds, limits = _chosen("trim", backend, every).trim(bases, own, pairs)
    return thresholds, limits


def _trim_fake(
    bases: list[Tensor], models: list[Tensor], ranks: list[int], k: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    checks.check_many(bases, models, k, "tensor", values=False)
    return models[0].new_empty((k, 2), dtype=torch.float64), models[0].new_empty((k, 2), dtype=torch.int64)


def _drop(
    models: list[Tensor],
    thresholds: Tensor | None,
    limits: Tensor | None,
    densities: Sequence[float],
    epsilons: Sequence[float],
    seed: int,
    offset: int,
) -> Drop:
    """What is left out. Raises InputError where the arguments do not fit."""
    k, device = len(models), models[0].device
    if (thresholds is None) != (limits is None):
        raise InputError("only one of thresholds and limits is given; expected both or neither")
    for name, tensor, dtype in (("thresholds", thresholds, torch.float64), ("limits", limits, torch.int64)):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != (k, 2)):
            raise InputError(f"{name} is {checks.described(tensor)}; expected {dtype} [{k}, 2]")
    if not 0 <= seed < MOST or not 0 <= offset < MOST - models[0].numel():
        raise InputError(f"seed is {seed} and offset {offset}; expected integers of 0 or more, positions below 2^63")
    chances = None
    if len(densities) or len(epsilons):
        chances = _chances(densities, epsilons, models[0], k).to(device)
    if thresholds is not None and limits is not None:
        thresholds, limits = thresholds.to(device), limits.to(device)
    return Drop(thresholds, limits, chances, seed, offset)


def _chances(densities: Sequence[float], epsilons: Sequence[float], like: Tensor, k: int) -> Tensor:
    """[K, 1], or by rank [K, columns], int32: an element is kept where 31 random bits are no larger than this."""
    if len(densities) != k or not all(0.0 <= density <= 1.0 for density in densities):
        raise InputError(f"densities is {[*densities]}; expected {k} numbers from 0 to 1, one per model")
    chances = torch.tensor([*densities], dtype=torch.float64)[:, None]
    if len(epsilons):
        pairs = list(zip(densities, epsilons, strict=False))
        if len(epsilons) != k or not all(
            density in (0.0, 1.0) or 0.0 <= epsilon < min(density, 1.0 - density) for density, epsilon in pairs
        ):
            raise InputError(
                f"epsilons is {[*epsilons]}; expected {k} numbers, density - epsilon and density + epsilon in (0, 1)"
            )
        columns = like.shape[-1] if like.ndim else 1
        if columns > 1:
            rise = torch.arange(columns, dtype=torch.float64) / (columns - 1)
            spread = torch.tensor([0.0 if density in (0.0, 1.0) else epsilon for density, epsilon in pairs])
            chances = chances + spread.double()[:, None] * (2.0 * rise - 1.0)
    return (chances * 2**CHANCE_BITS).round().sub(1).to(torch.int64).clamp(-1, 2**CHANCE_BITS - 1).to(torch.int32)


def _sparse_merge(
    base: Tensor | None,
    models: list[Tensor],
    weights: list[float],
    rescales: list[float],
    thresholds: Tensor | None,
    limits: Tensor | None,
    densities: list[float],
    epsilons: list[float],
    seed: int,
    offset: int = 0,
    consensus: str | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    tensors = checks.check(base, models, "tensor")
    drop = _drop(models, thresholds, limits, densities, epsilons, seed, offset)
    if consensus not in (None, "sum", "count"):
        raise InputError(f"consensus is {consensus!r}; expected sum, count or None")
    for name, numbers in (("weights", weights), ("rescales", rescales)):
        if len(numbers) != len(models) or not all(math.isfinite(number) for number in numbers):
            raise InputError(f"{name} is {[*numbers]}; expected {len(models)} finite numbers, one per model")
    dtype = models[0].dtype if dtype is None else dtype
    checks.check_dtype(dtype)
    total = math.fsum(weights)
    vote = Vote(consensus or "none", normalize, 1.0 if abs(total) < 1e-8 else total, scale)
    factors = [weight * rescale for weight, rescale in zip(weights, rescales, strict=True)]
    chosen = _chosen("sparse_merge", backend, tensors)
    found: Tensor = chosen.sparse_merge(base, models, drop, factors, weights, vote, dtype)
    return found.contiguous()


def _sparse_merge_fake(
    base: Tensor | None,
    models: list[Tensor],
    weights: list[float],
    rescales: list[float],
    thresholds: Tensor | None,
    limits: Tensor | None,
    densities: list[float],
    epsilons: list[float],
    seed: int,
    offset: int = 0,
    consensus: str | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    checks.check(base, models, "tensor", values=False)
    return models[0].new_empty(models[0].shape, dtype=models[0].dtype if dtype is None else dtype)


def _sparse_norms(
    base: Tensor | None,
    models: list[Tensor],
    thresholds: Tensor | None,
    limits: Tensor | None,
    densities: list[float],
    epsilons: list[float],
    seed: int,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    tensors = checks.check(base, models, "tensor")
    drop = _drop(models, thresholds, limits, densities, epsilons, seed, offset)
    found: Tensor = _chosen("sparse_norms", backend, tensors).sparse_norms(base, models, drop)
    return found


def _sparse_norms_fake(
    base: Tensor | None,
    models: list[Tensor],
    thresholds: Tensor | None,
    limits: Tensor | None,
    densities: list[float],
    epsilons: list[float],
    seed: int,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    checks.check(base, models, "tensor", values=False)
    return models[0].new_empty((len(models), 2), dtype=torch.float64)


def _define() -> None:
    found = "(Tensor thresholds, Tensor limits)"
    schema = f"(Tensor[] bases, Tensor[] models, int[] ranks, int k, str? backend=None) -> {found}"
    library._register("trim", schema, _trim, _trim_fake)
    rest = "int offset=0, str? consensus=None, bool normalize=False, float scale=1.0, ScalarType? dtype=None"
    schema = f"({library.INPUTS}, float[] weights, float[] rescales, {DROP}, {rest}, str? backend=None) -> Tensor"
    library._register("sparse_merge", schema, _sparse_merge, _sparse_merge_fake)
    schema = f"({library.INPUTS}, {DROP}, int offset=0, str? backend=None) -> Tensor"
    library._register("sparse_norms", schema, _sparse_norms, _sparse_norms_fake)
    for name in ("trim", "sparse_merge", "sparse_norms"):
        library._refuse_gradients(name)


if not hasattr(torch.ops.awd_fast, "trim"):
    _define()
