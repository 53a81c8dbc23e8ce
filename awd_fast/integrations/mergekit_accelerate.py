"""mergekit's own merge methods, with the arithmetic of `awd_fast.ops` where tensors are on the CPU.

    accelerate()    linear, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, della and
                    della_linear, and every other `GeneralizedTaskArithmeticMerge`, from now on in this process
    restore()       mergekit as it was

Options, defaults, checks and what is done with tensors that a model lacks stay mergekit's, since only what computes one
tensor is replaced: a method of a class and one of an object. What the operators do not take, or would decide otherwise
than mergekit does, goes to what was there before. docs/mergekit.md says what remains different.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awd_fast import ops
from awd_fast.integrations import MERGEKIT, replacing, require
from awd_fast.ops import backends

require(*MERGEKIT)

from mergekit.merge_methods.base import TensorGroup  # noqa: E402
from mergekit.merge_methods.dtype import align_dtype  # noqa: E402
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge  # noqa: E402
from mergekit.merge_methods.linear import linear_merge  # noqa: E402
from mergekit.sparsify import SparsificationMethod  # noqa: E402

LOG = logging.getLogger("awd_fast.mergekit")
_LINEAR = linear_merge.implementation
"""mergekit's kernel of `linear`: where somebody has put another one there, that is what is asked for."""
_MOST_SUBSETS = 10
"""Of how many weights with both signs all sums are looked at."""
_CANCELLED = 0.1
"""The relative difference that rounding of the weights may make to what is divided by."""


def accelerate() -> None:
    """Lets mergekit's methods compute with the compiled operators, in this process, until `restore`; twice is as once.

    It takes tensors of any shape in float32, bfloat16, float16 and float64 on the CPU that want no gradient; results
    have mergekit's dtypes and shapes, are computed in float32 (float64 for float64) and rounded once. Random methods
    draw one seed a tensor from torch's generator. Errors are mergekit's. Where the operators are not compiled a warning
    is logged, and nothing is faster. Source: mergekit 0.1.5, whose results these are; docs/sparse.md has the operators.
    """
    reason = backends.unavailable("native")
    if reason is not None:
        LOG.warning("mergekit's methods stay as they are: %s", reason)
    replacing.replace(_PLACES)


def restore() -> None:
    """Puts back what `accelerate` replaced; without an `accelerate` before, nothing happens."""
    replacing.put_back(_PLACES)


def accelerated() -> bool:
    """Whether mergekit's methods compute with the operators now."""
    return replacing.replaced(_PLACES)


def _any_task_arithmetic(before: Any) -> Any:
    @functools.wraps(before)
    def merge_group(self: GeneralizedTaskArithmeticMerge, group: TensorGroup, /, **parameters: Any) -> Tensor:
        merged = _task_arithmetic(self, group, parameters)
        return before(self, group, **parameters) if merged is None else merged

    return merge_group


def _any_linear(before: Any) -> Any:
    """Not the method's kernel: mergekit packs tensors of a shape for that, which costs more than it computes."""

    @functools.wraps(before)
    def execute(
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: Any,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        if linear_merge.implementation is not _LINEAR:
            return before(groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype)
        found = {}
        for index, (group, given, dtype) in enumerate(zip(groups, parameters, input_dtypes, strict=True)):
            merged = _linear(group, dtype, given)
            if merged is not None:
                found[index] = merged if out_dtype is None else merged.to(out_dtype)
        left = [index for index in range(len(groups)) if index not in found]
        if left:
            chosen = [[everything[index] for index in left] for everything in (groups, parameters, input_dtypes)]
            others = before(chosen[0], chosen[1], options, input_dtypes=chosen[2], out_dtype=out_dtype)
            found |= dict(zip(left, others, strict=True))
        return tuple(found[index] for index in range(len(groups)))

    return execute


def _linear(group: TensorGroup, dtype: torch.dtype | None, given: Mapping[str, Any]) -> Tensor | None:
    """sum_i w_i theta_i, divided by sum_i w_i where `normalize`; None where it is mergekit's."""
    if any(tensor.device.type != "cpu" for tensor in group.tensors):
        return None  # before it is copied to another dtype
    tensors = align_dtype(group, dtype).tensors
    if not _taken(tensors):
        return None
    weights, normalize = given["weight"].values_for(group.entries), given["normalize"]
    if not _finite(weights):
        return None
    if normalize and not (
        abs(math.fsum(weights)) >= 1e-8 and _divides(weights, ops.compute_dtype(tensors[0].dtype), consensus=False)
    ):
        return None  # where mergekit divides by 0, or by what rounding left
    return ops.sparse_merge(None, tensors, weights, normalize=normalize)


def _task_arithmetic(
    method: GeneralizedTaskArithmeticMerge, group: TensorGroup, given: Mapping[str, Any]
) -> Tensor | None:
    """The base and what is kept of the task vectors; None where it is mergekit's."""
    entries = group.non_base
    if not entries or group.base is None or not _taken(group.tensors):
        return None
    base, models = group.base.tensor, [entry.tensor for entry in entries]
    table = {name: [given[name][entry.id] for entry in entries] for name in _PER_MODEL if name in given}
    weights, scale, normalize = table["weight"], given["lambda"], given["normalize"]
    consensus = None if method.consensus_method is None else method.consensus_method.value
    if not all(map(_finite, table.values())) or not math.isfinite(scale):
        return None
    if normalize and not _divides(weights, base.dtype, consensus is not None):
        return None
    drop, rescales = None, None
    if method.sparsification_method is not None and any(density < 1.0 for density in table["density"]):
        make = _DROPS.get(method.sparsification_method)
        drop = None if make is None else make(base, models, table)
        if drop is None:
            return None
        if given["rescale"]:
            norms = ops.sparse_norms(base, models, drop)
            if not bool(norms.isfinite().all()):  # of which mergekit makes tensors of NaN
                return None
            found = zip(ops.l1_rescales(norms), table["density"], strict=True)
            rescales = [1.0 if density >= 1.0 else rescale for rescale, density in found]
    return ops.sparse_merge(
        base, models, weights, drop, rescales=rescales, consensus=consensus, normalize=normalize, scale=scale
    )


_PER_MODEL = ("weight", "density", "gamma", "epsilon")
_Table = Mapping[str, Sequence[float]]
"""A parameter's values, one for each model."""


def _magnitude(base: Tensor, models: Sequence[Tensor], table: _Table) -> ops.Drop | None:
    return ops.trim(base, models, [ops.kept(base.numel(), density) for density in table["density"]])


def _outliers(base: Tensor, models: Sequence[Tensor], table: _Table) -> ops.Drop | None:
    if min(table["density"]) < 0.0 or not all(0.0 <= gamma <= 1.0 for gamma in table["gamma"]):
        return None  # mergekit's slices count from the other end then
    pairs = zip(table["density"], table["gamma"], strict=True)
    return ops.trim(base, models, [ops.band(base.numel(), density, gamma) for density, gamma in pairs])


def _bernoulli(base: Tensor, models: Sequence[Tensor], table: _Table) -> ops.Drop | None:
    if min(table["density"]) < 0.0:
        return None  # an error
    return ops.Bernoulli(tuple(min(density, 1.0) for density in table["density"]), _seed())


def _magprune(base: Tensor, models: Sequence[Tensor], table: _Table) -> ops.Drop | None:
    densities = tuple(min(max(density, 0.0), 1.0) for density in table["density"])
    for density, epsilon in zip(densities, table["epsilon"], strict=True):
        if 0.0 < density < 1.0 and not 0.0 <= epsilon < min(density, 1.0 - density):
            return None  # an error
    if base.ndim not in (1, 2) or base.shape[-1] == 1:
        return None  # ranks along the second of more dimensions; rows of one element are an error
    return ops.MagPrune(densities, tuple(table["epsilon"]), _seed())


_DROPS = {
    SparsificationMethod.magnitude: _magnitude,
    SparsificationMethod.magnitude_outliers: _outliers,
    SparsificationMethod.random: _bernoulli,
    SparsificationMethod.della_magprune: _magprune,
}


def _seed() -> int:
    """From the generator that mergekit's --random-seed seeds."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def _taken(tensors: Sequence[Tensor]) -> bool:
    """Whether the compiled operators take these tensors, which mergekit has checked to be alike."""
    if not tensors or tensors[0].numel() == 0 or any(t.shape != tensors[0].shape for t in tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        return False
    return (backends.unavailable("native") or backends.refusal("native", "sparse_merge", [*tensors])) is None


def _finite(numbers: Sequence[float]) -> bool:
    return all(map(math.isfinite, numbers))


def _divides(weights: Sequence[float], dtype: torch.dtype, consensus: bool) -> bool:
    """Whether the sums of weights that are divided by are about the same in `dtype`, in which mergekit has them.

    consensus: sums of any of the weights, else of all. Weights of both signs may cancel: 0.3 - 0.1 - 0.2 is 0, 7e-9 or
    5e-4, by the dtype, and which of these divides decides about the result.
    """
    if min(weights) >= 0.0 or max(weights) <= 0.0:
        return True
    return _cancels_alike(tuple(weights), dtype, consensus)


@functools.lru_cache(maxsize=256)
def _cancels_alike(weights: tuple[float, ...], dtype: torch.dtype, consensus: bool) -> bool:
    count = len(weights)
    if consensus and count > _MOST_SUBSETS:
        return False
    numbers = torch.arange(1, 2**count)[:, None] if consensus else torch.tensor([[2**count - 1]])
    chosen = (numbers >> torch.arange(count) & 1).double()
    given = torch.tensor(weights, dtype=torch.float64)
    exact, rounded = chosen @ given, chosen @ given.to(dtype).double()
    if dtype == torch.float64 and bool((exact.abs() < 1e-6 * given.abs().max()).any()):
        return False  # nothing was rounded, but the order of a sum decides
    return bool(((rounded - exact).abs() <= _CANCELLED * exact.abs()).all())


_PLACES: replacing.Places = {
    (GeneralizedTaskArithmeticMerge, "merge_group"): _any_task_arithmetic,
    (linear_merge, "_execute"): _any_linear,
}
