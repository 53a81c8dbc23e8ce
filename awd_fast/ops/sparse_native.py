"""The compiled operators that leave elements out; `awd_fast.ops.native` says what it takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awd_fast.ops import native
from awd_fast.ops.sparse_reference import Drop, Vote


def trim(
    bases: Sequence[Tensor], models: Sequence[Sequence[Tensor]], ranks: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Thresholds [K, 2] float64 and limits [K, 2] int64 of `awd_fast.ops.trim`."""
    origins = [*bases] if bases else [None] * len(models)
    held = [native._Tensors(base, own) for base, own in zip(origins, models, strict=True)]
    wanted = torch.tensor(ranks, dtype=torch.int64)
    thresholds = torch.empty(len(ranks), 2, dtype=torch.float64)
    limits = torch.empty(len(ranks), 2, dtype=torch.int64)
    native._module().trim(
        dtype=native.CODES[models[0][0].dtype],
        bases=[one.base_address for one in held],
        models=[one.model_addresses for one in held],
        sizes=[own[0].numel() for own in models],
        ranks=wanted.data_ptr(),
        thresholds=thresholds.data_ptr(),
        limits=limits.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return thresholds, limits


def sparse_merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    drop: Drop,
    factors: Sequence[float],
    weights: Sequence[float],
    vote: Vote,
    dtype: torch.dtype,
) -> Tensor:
    """base + scale * the elected sums of factors_i t_i over their divisors, in the models' shape, as `dtype`."""
    tensors = native._Tensors(base, models)
    left_out, held = _drop(drop)
    out = torch.empty(models[0].shape, dtype=dtype)
    native._module().sparse_merge(
        **tensors.addresses,
        size=models[0].numel(),
        drop=left_out,
        factors=[*factors],
        weights=[*weights],
        vote=native._module().Vote(*vote),
        out_dtype=native.CODES[dtype],
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    del held
    return out


def sparse_norms(base: Tensor | None, models: Sequence[Tensor], drop: Drop) -> Tensor:
    """The sums of |t_i| over all elements and over those that are kept: [K, 2] float64."""
    tensors = native._Tensors(base, models)
    left_out, held = _drop(drop)
    out = torch.empty(len(models), 2, dtype=torch.float64)
    native._module().sparse_norms(
        **tensors.addresses,
        size=models[0].numel(),
        drop=left_out,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    del held
    return out


def _drop(drop: Drop) -> tuple[Any, list[Tensor | None]]:
    """awd::Drop, and the tensors that hold what it points to."""
    held = [None if tensor is None else native._dense(tensor) for tensor in drop[:3]]
    columns = 1 if drop.chances is None else drop.chances.shape[1]
    addresses = [native._address(tensor) for tensor in held]
    return native._module().Drop(*addresses, columns, drop.seed, drop.offset), held
