"""Sparse merges of task vectors: TIES, DARE, Model Breadcrumbs and DELLA, whose elements are left out on the way.

`trim` finds which elements of a task vector are large enough, `sparse_norms` what a drop leaves of it, and
`sparse_merge` drops, weighs, elects signs, sums and adds to the base in one pass over base and models; no task vector
is ever in memory. docs/sparse.md says which method is which call. They run compiled on the CPU (`native`) and in
PyTorch anywhere else (`reference`): there is no CUDA or Triton version, so that tensors on a GPU go to the reference.
None is differentiable.

An element's position is its place in its tensor, row by row, plus `offset`: where a tensor is a part of something, what
lies before it. Random numbers are Philox4x32-10 (Salmon et al. 2011) of seed, model and position, so that they depend
neither on the backend nor on threads or on how a tensor is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.ops import sparse_library  # noqa: F401 - registers torch.ops.awd_fast.trim and the others
from awd_fast.ops.backends import require_known as require_backend
from awd_fast.ops.checks import typed
from awd_fast.ops.many import Parameter

Consensus = Literal["sum", "count"]


@dataclass(frozen=True, eq=False)
class Cut:
    """Keeps the elements between two places in the order of |t|, as `trim` gives it.

    thresholds: [K, 2] float64, limits: [K, 2] int64. Before a cut are the elements larger than its threshold, and those
    equal to it at a position below its limit; kept is what is before the second and not before the first.
    """

    thresholds: Tensor
    limits: Tensor


@dataclass(frozen=True)
class Bernoulli:
    """Keeps each element of model i with probability densities[i] (DARE, arXiv 2311.03099). seed: below 2^63."""

    densities: tuple[float, ...]
    seed: int = 0


@dataclass(frozen=True)
class MagPrune:
    """Keeps an element with a probability that grows with the rank of |t| in its row (DELLA, arXiv 2406.11617).

    From densities[i] - epsilons[i] for the smallest to densities[i] + epsilons[i] for the largest, equal ones by
    position; densities[i] in rows of one element. A row is the last dimension of a tensor; a vector is one.
    """

    densities: tuple[float, ...]
    epsilons: tuple[float, ...]
    seed: int = 0


Drop = Cut | Bernoulli | MagPrune


def kept(size: int, density: float) -> tuple[int, int]:
    """The ranks that TIES keeps of `size` elements, as mergekit 0.1.5 counts: 0 and int(density size), at least 1.

    All where the density is 1 or more, none where it is 0 or less.
    """
    if density >= 1.0 or size == 0:
        return 0, size
    return (0, max(1, int(density * size))) if density > 0.0 else (0, 0)


def band(size: int, density: float, gamma: float) -> tuple[int, int]:
    """The ranks that Model Breadcrumbs keeps (arXiv 2312.06795), as mergekit 0.1.5 counts.

    Those of int(density size) elements behind the int(gamma size) largest, or behind fewer where too few are left.
    """
    if density >= 1.0:
        return 0, size
    count = max(int(density * size), 0)
    first = size - max(0, size - count - int(gamma * size)) - count
    return max(first, 0), max(first, 0) + count


def trim(
    base: Tensor | None,
    models: Sequence[Tensor],
    ranks: Sequence[tuple[int, int]],
    *,
    backend: str | None = None,
) -> Cut:
    """The cuts that keep of each task vector t_i = models[i] - base the elements of rank first to last - 1 by |t|.

    base: a floating tensor of any shape, or None where `models` are task vectors already. models: K tensors like it.
    ranks: (first, last) of each model, 0 <= first <= last <= the number of elements; rank 0 is the largest, and equal
    magnitudes are ranked by position, so that exactly last - first elements are kept. (0, k) is the trim of TIES (Yadav
    et al. 2023, arXiv 2306.01708). |t| is rounded once to float32 (float64 for float64 storage); NaN counts as larger
    than infinity. Returns a `Cut` for `sparse_merge` and `sparse_norms`.
    """
    return trim_together([(base, models)], ranks, backend=backend)


def trim_together(
    parameters: Sequence[Parameter], ranks: Sequence[tuple[int, int]], *, backend: str | None = None
) -> Cut:
    """`trim` of all parameters of a model taken together, as if each model were one long vector.

    parameters: of each a base (all have one, or none has) and K models, of one dtype and device. ranks: as in `trim`,
    of the elements of all. A parameter's `offset` in the calls that use the cut is the number of elements before it.
    """
    require_backend(backend)
    parameters = [typed(base, models) for base, models in parameters]
    if not parameters:
        raise InputError("parameters is empty; expected at least one")
    k = len(parameters[0][1])
    bases = [base for base, _ in parameters if base is not None]
    if any(len(models) != k for _, models in parameters) or len(bases) not in (0, len(parameters)):
        raise InputError("parameters differ in K or in whether they have a base; expected all alike")
    flat = [number for pair in ranks for number in pair]
    every = [model for _, models in parameters for model in models]
    return Cut(*torch.ops.awd_fast.trim.default(bases, every, flat, k, backend))


def sparse_norms(
    base: Tensor | None,
    models: Sequence[Tensor],
    drop: Drop,
    *,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The l1 norms of each task vector and of what is kept of it: [K, 2] float64, on the inputs' device.

    base, models: as in `trim`. drop, offset: as in `sparse_merge`. Sums are float64. `l1_rescales` makes of them the
    rescales with which mergekit 0.1.5 restores the norm.
    """
    base, models = typed(base, models)
    require_backend(backend)
    found: Tensor = torch.ops.awd_fast.sparse_norms.default(base, models, *_flat(drop), offset, backend)
    return found


def l1_rescales(norms: Tensor, eps: float = 1e-7) -> list[float]:
    """norms[:, 0] / norms[:, 1], and 1 where either is below `eps`; norms: of `sparse_norms`, or sums of such."""
    return [1.0 if before < eps or after < eps else before / after for before, after in norms.tolist()]


def sparse_merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Sequence[float],
    drop: Drop | None = None,
    *,
    rescales: Sequence[float] | None = None,
    consensus: Consensus | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """base + scale * sum_i v_i / divisor, with v_i = weights_i rescales_i t_i where an element is kept, else 0.

    base, models: as in `trim`; without a base the sum alone. drop: what is left out, None for nothing; offset: the
    position of the first element in what the drop counts. rescales: default 1.

    consensus: only v_i of the elected sign are summed: + where the positive v_i sum to no less than the negative ones
    ("sum": TIES) or are no fewer ("count"). normalize: the divisor is the sum of the weights of the models summed at an
    element, 1 where that is 0; without a consensus the sum of all weights, 1 where below 1e-8 in magnitude.

    dtype: of the result, default the models'. All arithmetic is float32 (float64 for float64 storage), each operation
    rounded, over i in order: results are the same bits in every backend. A NaN or infinity that is kept shows in the
    result as IEEE arithmetic has it, where "sum" elects - for a sum that is NaN; one that is dropped leaves no trace.
    """
    base, models = typed(base, models)
    require_backend(backend)
    factors = [1.0] * len(models) if rescales is None else rescales
    options = (*_flat(drop), offset, consensus, normalize, scale, dtype, backend)
    found: Tensor = torch.ops.awd_fast.sparse_merge.default(base, models, [*weights], [*factors], *options)
    return found


def _flat(drop: Drop | None) -> tuple[Tensor | None, Tensor | None, list[float], list[float], int]:
    """The arguments of the operators for a drop: thresholds, limits, densities, epsilons, seed."""
    if drop is None:
        return None, None, [], [], 0
    if isinstance(drop, Cut):
        return drop.thresholds, drop.limits, [], [], 0
    if isinstance(drop, (Bernoulli, MagPrune)):
        epsilons = [*drop.epsilons] if isinstance(drop, MagPrune) else []
        return None, None, [*drop.densities], epsilons, drop.seed
    raise InputError(f"drop is {type(drop).__name__}; expected Cut, Bernoulli, MagPrune or None")
