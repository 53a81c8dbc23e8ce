"""FusionBench's own Task Arithmetic, TIES and AdaMerging, with the arithmetic of `awd_fast.ops`.

    accelerate()    TaskArithmeticAlgorithm, TiesMergingAlgorithm, and every AdaMerging that merges by FusionBench's
                    LayerWiseMergedModel or TaskWiseMergedModel (CLIP, Flan-T5, GPT-2, ...), from now on in this process
    restore()       FusionBench as it was

What is replaced is `run` of the two algorithms and `merge_weights` of the two modules. What the operators do not take
goes to what was there before. docs/fusion_bench.md says what remains different.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awd_fast import ops
from awd_fast.errors import InputError
from awd_fast.integrations import FUSION_BENCH, replacing, require
from awd_fast.integrations.fusion_bench_pool import Pool, opened
from awd_fast.ops import backends
from awd_fast.plan import Labelled, StateDict

require(*FUSION_BENCH)

from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm  # noqa: E402
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel  # noqa: E402
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel  # noqa: E402

LOG = logging.getLogger("awd_fast.fusion_bench")
_UNTAKEN = (torch.bool, torch.complex64, torch.complex128)
_PIECE = 1 << 22
"""Elements of a tensor on disk that are merged at a time."""


def accelerate() -> None:
    """Lets FusionBench compute with the operators, in this process, until `restore`; twice is as once.

    Results have FusionBench's types, names, dtypes and shapes; sums are float32 (float64 for float64) and rounded once.
    Task Arithmetic and TIES take models of any floating dtype on the CPU, AdaMerging those on a GPU too. Where the
    operators are not compiled a warning is logged, and nothing is faster. Source: FusionBench 0.2.33, whose results
    these are; docs/fusion_bench.md has the differences.
    """
    reason = backends.unavailable("native")
    if reason is not None:
        LOG.warning("FusionBench's methods stay as they are: %s", reason)
    replacing.replace(_PLACES)


def restore() -> None:
    """Puts back what `accelerate` replaced; without an `accelerate` before, nothing happens."""
    replacing.put_back(_PLACES)


def accelerated() -> bool:
    """Whether FusionBench computes with the operators now."""
    return replacing.replaced(_PLACES)


def _task_arithmetic(before: Any) -> Any:
    @functools.wraps(before)
    @torch.no_grad()
    def run(self: Any, modelpool: Any) -> nn.Module:
        scale = self.config.scaling_factor
        pool = _taken(modelpool)
        if pool is None or not (pool.files or pool.instances) or not isinstance(scale, (int, float)):
            return before(self, modelpool)
        with self.profile("load model"):
            base, models = pool.source(), _sources(pool)
        if models is None or not _alike(base, models, whole=False):
            return before(self, modelpool)
        with self.profile("merge weights"):
            weights = [1.0] * len(models)

            def merge(own: Tensor, others: list[Tensor], offset: int) -> Tensor:
                if not own.is_floating_point():
                    return own + scale * sum(other - own for other in others)
                return ops.sparse_merge(own, others, weights, scale=float(scale))

            merged = _merged(base, models, list(base.tensors), merge)
        self.print_profile_summary()
        return pool.finished(merged, self.inplace)

    return run


def _ties(before: Any) -> Any:
    @functools.wraps(before)
    @torch.no_grad()
    def run(self: Any, modelpool: Any, **kwargs: Any) -> nn.Module:
        config = self.config  # which FusionBench makes anew each time
        scale, how = config.scaling_factor, config.get("merge_func", "sum")
        pool = _taken(modelpool) if how in ("sum", "mean") and isinstance(scale, (int, float)) else None
        if pool is None:
            return before(self, modelpool, **kwargs)
        removed = [*config.get("remove_keys", [])]
        with self.profile("loading models"):
            base, models = pool.source(), _sources(pool)
        names = sorted(name for name in base.tensors if name not in removed)
        if models is None or not names or not _alike(base, models, whole=True):
            return before(self, modelpool, **kwargs)
        count = sum(base.tensors[name].count for name in names)
        most = _kept(count, self.threshold)
        if most is None:
            return before(self, modelpool, **kwargs)
        with self.profile("merging models"):
            held, rooms = {name: _whole(base, name, None) for name in names}, _Rooms()
            cuts = [_cut(held, model, most, count, rooms) for model in models]
            del rooms
            cut = ops.Cut(torch.cat([one.thresholds for one in cuts]), torch.cat([one.limits for one in cuts]))
            normalize, weights = how == "mean", [1.0] * len(models)

            def merge(own: Tensor, others: list[Tensor], offset: int) -> Tensor:
                return ops.sparse_merge(
                    own,
                    others,
                    weights,
                    cut,
                    consensus="sum",
                    normalize=normalize,
                    scale=float(scale),
                    offset=offset,
                )

            merged = _merged(base, models, names, merge)
        self.print_profile_summary()
        state = {name: merged[name] if name in merged else base.read(name) for name in base.tensors}
        if "transformer.shared.weight" in merged:  # of which FusionBench's TIES makes those that it removed
            state |= dict.fromkeys(removed, merged["transformer.shared.weight"])
        return pool.finished(state, True)

    return run


def _kept(count: int, threshold: float) -> int | None:
    """How many of `count` elements FusionBench keeps where none tie, or None where it raises an error."""
    share = threshold / 100 if threshold > 1 else threshold
    most = int(count * share) + 1
    return most if 1 <= most <= count else None


def _cut(base: Mapping[str, Tensor], model: Labelled, most: int, count: int, rooms: "_Rooms") -> ops.Cut:
    """The trim of a model over all its `count` elements together, with every one that ties at the threshold."""
    cut = ops.trim_together([(own, [_whole(model, name, rooms)]) for name, own in base.items()], [(0, most)])
    limits = cut.limits.clone()
    limits[:, 1] = count
    return ops.Cut(cut.thresholds, limits)


def _taken(modelpool: Any) -> Pool | None:
    """The pool where its models can be merged as sources; None where FusionBench is to say what is wrong with it."""
    if backends.unavailable("native") is not None:
        return None
    try:
        return opened(modelpool)
    except InputError:
        return None


def _sources(pool: Pool) -> list[Labelled] | None:
    """The fine-tuned models, or None where one is not on the CPU."""
    found: list[Labelled] = []
    for name in pool.names:
        model = pool.model(name)
        if isinstance(model, nn.Module):
            try:
                model = StateDict(name, model.state_dict())
            except InputError:
                return None
        found.append(model)
    return found


def _alike(base: Labelled, models: Sequence[Labelled], whole: bool) -> bool:
    """Whether all are on the CPU with the same names, shapes and dtypes; whole: of one floating dtype besides."""
    dtypes = {info.dtype for info in base.tensors.values()}
    if whole and (len(dtypes) != 1 or not all(dtype in ops.FLOATING for dtype in dtypes)):
        return False
    if any(dtype not in ops.FLOATING and (dtype.is_floating_point or dtype in _UNTAKEN) for dtype in dtypes):
        return False
    sources = (base, *models)
    return all(one.tensors == base.tensors for one in sources) and all(
        one.device(name).type == "cpu" for one in sources for name in one.tensors
    )


class _Rooms:
    """Memory that is read to again and again: fresh pages cost as much as to read."""

    def __init__(self) -> None:
        self._held: dict[Any, Tensor] = {}

    def of(self, key: Any, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements of what is kept under this key."""
        found = self._held.get((key, dtype))
        if found is None or found.numel() < count:
            found = self._held[key, dtype] = torch.empty(count, dtype=dtype)
        return found[:count]


def _whole(source: Labelled, name: str, rooms: _Rooms | None) -> Tensor:
    """A tensor, flat; in `rooms` where it is read."""
    info = source.tensors[name]
    room = None
    if not source.in_memory(name):
        room = torch.empty(info.count, dtype=info.dtype) if rooms is None else rooms.of(name, info.count, info.dtype)
    return source.elements(name, 0, info.count, room)


Merge = Callable[[Tensor, list[Tensor], int], Tensor]
"""(of the base, of each model, place of the first element among all) -> merged, of parts of a tensor."""


def _merged(base: Labelled, models: Sequence[Labelled], names: Sequence[str], merge: Merge) -> dict[str, Tensor]:
    """The merged tensors; those on disk are read and merged in pieces."""
    found, before, rooms = {}, 0, _Rooms()
    for name in names:
        info = base.tensors[name]
        found[name] = torch.empty(info.shape, dtype=info.dtype)
        flat = found[name].view(-1)
        for begin, own, others in _pieces((base, *models), name, rooms):
            flat[begin : begin + own.numel()] = merge(own, others, before + begin)
        before += info.count
    return found


def _pieces(sources: Sequence[Labelled], name: str, rooms: _Rooms) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """The first element, the base's and the models' of each piece of a tensor, until the next one is read."""
    info = sources[0].tensors[name]
    size = info.count if all(source.in_memory(name) for source in sources) else _PIECE
    for begin in range(0, info.count, max(1, size)):
        end = min(begin + size, info.count)
        own, *others = (
            one.elements(name, begin, end, None if one.in_memory(name) else rooms.of(index, end - begin, info.dtype))
            for index, one in enumerate(sources)
        )
        yield begin, own, others


def _learned(weights_of: Callable[[Any], Tensor], dimensions: int) -> Callable[[Any], Any]:
    """What makes the replacement of `merge_weights` of a module with these weights, [K], or [K, N] of N tensors."""

    def replacement(before: Any) -> Any:
        @functools.wraps(before)
        def merge_weights(self: Any, task_vector_mask: Any = None) -> Any:
            state = None if task_vector_mask is not None else _weighed(self, weights_of(self), dimensions)
            if state is None:
                return before(self, task_vector_mask=task_vector_mask)
            self._merged_state_dict = state
            return state

        return merge_weights

    return replacement


def _clamped(module: Any) -> Tensor:
    weight: Tensor = module.merge_weight
    return weight.clamp(0, 1) if module.clamp_weights else weight


def _by_layer(module: LayerWiseMergedModel) -> Tensor:
    weight = _clamped(module)
    return weight.softmax(dim=0) if module.nromalized_merging_weights else weight  # FusionBench's spelling


def _weighed(module: Any, weight: Tensor, dimensions: int) -> dict[str, Tensor] | None:
    """The merged state dict of these weights, [K], or [K, N] of N tensors, which gradients flow back to.

    None where the operators do not take it: sparse task vectors, parameters that want gradients of their own, models
    with different names, another number of weights.
    """
    vectors = [dict(vector.named_parameters()) for vector in module.task_vectors]
    state = module.pretrained_model.state_dict(keep_vars=True)
    names = list(vectors[0]) if vectors else []
    if not names or list(weight.shape) != [len(vectors), len(names)][:dimensions]:
        return None
    if any(list(vector) != names for vector in vectors) or any(name not in state for name in names):
        return None
    every = [(state[name], [vector[name] for vector in vectors]) for name in names]
    for base, models in every:
        if any(
            tensor.layout != torch.strided
            or tensor.requires_grad
            or tensor.dtype not in ops.FLOATING
            or (tensor.dtype, tensor.shape, tensor.device) != (base.dtype, base.shape, base.device)
            for tensor in (base, *models)
        ):
            return None
    if dimensions == 1:
        weight = weight[:, None].expand(-1, len(names))
    # A base and what is added to it are one sum, in which the base weighs 1.
    full = torch.cat([torch.ones_like(weight[:1]), weight]).T
    parameters = [(None, [base.detach(), *models]) for base, models in every]
    merged = ops.combine_many(parameters, list(full.split(1)), "tensor")
    return {**state, **dict(zip(names, merged, strict=True))}


_PLACES: replacing.Places = {
    (TaskArithmeticAlgorithm, "run"): _task_arithmetic,
    (TiesMergingAlgorithm, "run"): _ties,
    (LayerWiseMergedModel, "merge_weights"): _learned(_by_layer, 2),
    (TaskWiseMergedModel, "merge_weights"): _learned(_clamped, 1),
}
