"""The definition of correct of the operators that leave elements of task vectors out, in plain PyTorch.

Kernels give the same bits as these functions, but for the sums of `sparse_norms`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awd_fast.ops.reference import compute_dtype

NAN_KEYS = {torch.float32: (torch.int32, 0x7F800001), torch.float64: (torch.int64, 0x7FF0000000000001)}
CHANCE_BITS = 31
PHILOX_FACTORS, PHILOX_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


class Drop(NamedTuple):
    """What is left out, for all backends: awd::Drop of csrc/kernels.h.

    thresholds [K, 2] float64 and limits [K, 2] int64: the cuts, or None. chances: [K, 1] int32, or [K, columns] where
    the rank in a row of a matrix chooses, or None. offset: the position of the first element.
    """

    thresholds: Tensor | None
    limits: Tensor | None
    chances: Tensor | None
    seed: int
    offset: int


class Vote(NamedTuple):
    """How signs are elected, for all backends: awd::Vote of csrc/kernels.h. election: "none", "sum" or "count"."""

    election: str
    normalize: bool
    divisor: float
    scale: float


def task_vector(base: Tensor | None, model: Tensor) -> Tensor:
    """t [n] float32 (float64 for float64 storage)."""
    compute = compute_dtype(model.dtype)
    flat = model.to(compute).reshape(-1)
    return flat if base is None else flat - base.to(compute).reshape(-1)


def keys(t: Tensor) -> Tensor:
    """Integers in the order of |t|; those of NaN are equal and behind infinity's."""
    kind, nan = NAN_KEYS[t.dtype]
    return t.abs().view(kind).clamp(max=nan)


def trim(
    bases: Sequence[Tensor], models: Sequence[Sequence[Tensor]], ranks: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Thresholds [K, 2] float64 and limits [K, 2] int64; models: K for each parameter; bases: as many, or none."""
    compute, device = compute_dtype(models[0][0].dtype), models[0][0].device
    thresholds = torch.empty(len(ranks), 2, dtype=torch.float64, device=device)
    limits = torch.empty(len(ranks), 2, dtype=torch.int64, device=device)
    origins = [*bases] if bases else [None] * len(models)
    for index, wanted in enumerate(ranks):
        parts = [task_vector(base, own[index]) for base, own in zip(origins, models, strict=True)]
        order = keys(torch.cat(parts))
        falling = order.sort(descending=True, stable=True).values
        for cut, rank in enumerate(wanted):
            if rank in (0, len(order)):
                thresholds[index, cut], limits[index, cut] = (0.0 if rank else torch.nan), rank
                continue
            threshold = falling[rank - 1]
            equal = (order == threshold).nonzero().reshape(-1)
            before = rank - int((order > threshold).sum())
            thresholds[index, cut] = threshold.view(compute).double()
            limits[index, cut] = len(order) if before == len(equal) else equal[before - 1] + 1
    return thresholds, limits


def philox(seed: int, stream: int, positions: Tensor) -> Tensor:
    """Philox4x32-10 numbers (below 2^32, int64) of these positions: awd's csrc/cpu/philox.h says which is whose."""
    counter = (positions >> 6) * 16 + (positions & 15)
    x = [counter & LOW, counter >> 32, torch.full_like(counter, stream), torch.zeros_like(counter)]
    k0, k1 = seed & LOW, seed >> 32
    for _ in range(10):
        (low_a, high_a), (low_b, high_b) = _product(x[0], PHILOX_FACTORS[0]), _product(x[2], PHILOX_FACTORS[1])
        x = [high_b ^ x[1] ^ k0, low_b, high_a ^ x[3] ^ k1, low_a]
        k0, k1 = (k0 + PHILOX_STEPS[0]) & LOW, (k1 + PHILOX_STEPS[1]) & LOW
    return torch.stack(x, dim=-1).gather(-1, (positions >> 4 & 3).unsqueeze(-1)).squeeze(-1)


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of a product, none of whose parts overflows 63 bits."""
    small, large = (x & 0xFFFF) * factor, (x >> 16) * factor
    high = (large + (small >> 16)) >> 16
    return ((large << 16) + small) & LOW, high


def kept(t: Tensor, model: int, drop: Drop) -> Tensor:
    """Which elements of one task vector [n] are kept."""
    positions = torch.arange(drop.offset, drop.offset + len(t), device=t.device)
    found = torch.ones_like(t, dtype=torch.bool)
    if drop.thresholds is not None and drop.limits is not None:
        order, place = keys(t), keys(drop.thresholds.to(t.dtype))[model]
        before = [(order > p) | ((order == p) & (positions < end)) for p, end in zip(place, drop.limits[model])]  # noqa: B905
        found = before[1] & ~before[0]
    if drop.chances is not None:
        chance, columns = drop.chances[model], drop.chances.shape[1]
        if columns > 1:
            rising = keys(t).reshape(-1, columns).argsort(dim=1, stable=True)
            chance = torch.empty_like(rising, dtype=chance.dtype).scatter_(1, rising, chance.expand_as(rising))
        found &= philox(drop.seed, model, positions) >> 1 <= chance.reshape(-1)
    return found


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
    first = task_vector(base, models[0])
    zero = torch.zeros_like(first)
    positive, negative, positive_weight, negative_weight, votes = (zero.clone() for _ in range(5))
    for index, model in enumerate(models):
        t = task_vector(base, model)
        v = torch.where(kept(t, index, drop), t, zero) * t.new_tensor(factors[index])
        weight = t.new_tensor(weights[index])
        if vote.election == "none":
            positive += v
            continue
        positive += torch.where(v <= 0, zero, v)  # a NaN counts on either side
        negative += torch.where(v >= 0, zero, v)
        positive_weight += torch.where(v > 0, weight, zero)
        negative_weight += torch.where(v < 0, weight, zero)
        votes += (v > 0).to(v.dtype) - (v < 0).to(v.dtype)
    found, divisor = positive, torch.full_like(zero, vote.divisor)
    if vote.election != "none":
        elected = (votes if vote.election == "count" else positive + negative) >= 0
        found = torch.where(elected, positive, negative)
        divisor = torch.where(elected, positive_weight, negative_weight)
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    if vote.normalize:
        found = found / divisor
    found = found * zero.new_tensor(vote.scale)
    if base is not None:
        found = found + base.to(found.dtype).reshape(-1)
    return found.reshape(models[0].shape).to(dtype)


def sparse_norms(base: Tensor | None, models: Sequence[Tensor], drop: Drop) -> Tensor:
    """The sums of |t_i| over all elements and over those that are kept: [K, 2] float64."""
    found = []
    for index, model in enumerate(models):
        t = task_vector(base, model)
        size = t.abs().double()
        found.append(torch.stack([size.sum(), torch.where(kept(t, index, drop), size, torch.zeros_like(size)).sum()]))
    return torch.stack(found)
