"""How the steps of a merge are cut into parts that fit the memory of a device, and what a part needs there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from awd_fast import ops, wudi
from awd_fast.blocks import matrix
from awd_fast.objective import Groups
from awd_fast.ops import backends, reference
from awd_fast.plan import Source, Step, common_dtype
from awd_fast.recipe import Recipe
from awd_fast.transfer import ALIGNMENT, Link, Load

SHARE = 3
"""The part of the free device memory that a merge uses unless it is told how much: one in this many."""
BATCH_BYTES = 256 << 20
"""Of one launch: enough to fill a GPU, and so little that models of usual sizes make several, whose copies overlap."""
REFERENCE_BYTES = 24
"""Per element of a task vector, what the reference path needs beside its arguments, in float32 and float64."""
STATE_BYTES = 32
"""Per element of d, what iterating on it needs: d, the optimiser's state and the combination before it is rounded."""
PRODUCT_BYTES = 32
"""Per entry of the Gram matrices: these, those of the disentangled vectors, cosines, and one to spare."""
SMALLEST = 64
"""Elements of a piece of a tensor that may be cut anywhere, however little memory there is."""


@dataclass(frozen=True)
class Part:
    """Elements `begin` to `end` of a step's tensors, seen as `shape`, and what is done with them.

    way: the method of `awd_fast.batches.BatchMerger` that does it, for several parts in a call. groups: of the tensors
    as they are seen. solves: it completes the step's solution. combines: it gives these elements of the merged tensor.
    fresh: it depends on an earlier part of the step, so that they must not be in one work. cost: bytes of device memory
    for what is sent and what comes back. beside: bytes that operators need meanwhile.
    """

    step: Step
    way: str
    begin: int
    end: int
    shape: tuple[int, ...]
    groups: Groups
    solves: bool
    combines: bool
    fresh: bool = False
    cost: int = 0
    beside: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is all of the step's tensor."""
        return self.end - self.begin == self.step.info.count

    @property
    def last(self) -> bool:
        """Whether it ends where the tensor ends."""
        return self.end == self.step.info.count


class Cutter:
    """Cuts steps into parts.

    sources: the base and the models. budget: bytes of device memory for everything; capacity: those for one work,
    because while it is computed the next is on its way.
    """

    def __init__(self, sources: Sequence[Source], recipe: Recipe, link: Link) -> None:
        self.sources, self.recipe, self.link = sources, recipe, link
        given = recipe.device_memory
        self.budget = link.free() // SHARE if given is None else max(int(given * 1e9), 1)
        self.capacity = self.budget // 2
        probe = [torch.empty(1, device=link.device)]
        self._slow = recipe.backend == "reference" or (
            recipe.backend is None and backends.select("gram", None, probe) is backends.module("reference")
        )

    def whole(self, step: Step, way: str, groups: Groups, *, combines: bool) -> Part:
        """All of a step's tensor, with its solution, as one part."""
        rows = reference.matrix_size(torch.empty(step.info.shape, device="meta"))[0]
        sizes = self._sizes(step, groups, rows, step.info.count)
        return Part(step, way, 0, step.info.count, step.info.shape, groups, True, combines, False, *sizes)

    def fits(self, part: Part) -> bool:
        """Whether a part fits the memory of one work."""
        return part.cost + part.beside <= self.capacity

    def split(self, step: Step, way: str, groups: Groups, *, flat: bool, combines: bool) -> list[Part]:
        """The step as parts that fit and have no solution: the whole, else some rows each, or with `flat` any elements.

        A part has at least one row, or `SMALLEST` elements.
        """
        whole = replace(self.whole(step, way, groups, combines=combines), solves=False)
        if self.fits(whole):
            return [whole]
        count, unit = step.info.count, 1 if flat else math.prod(step.info.shape[-1:])

        def sizes(units: int) -> tuple[int, int]:
            return self._sizes(step, groups, 1 if flat else units, units * unit)

        one, two = sum(sizes(1)), sum(sizes(2))
        units = max((self.capacity - one) // (two - one) + 1, SMALLEST if flat else 1)
        parts = []
        for begin in range(0, count, units * unit):
            size = min(units * unit, count - begin)
            shape = step.info.shape if size == count else (size,) if flat else (size // unit, unit)
            cost, beside = sizes(size // unit)
            parts.append(replace(whole, begin=begin, end=begin + size, shape=shape, cost=cost, beside=beside))
        return parts

    def _sizes(self, step: Step, groups: Groups, rows: int, elements: int) -> tuple[int, int]:
        """`cost` and `beside` of a part of a step; what is cut anywhere counts as one row."""
        k, awd = len(self.sources) - 1, step.action == "awd"
        per_element = 0 if self.stays(step) else step.dtype.itemsize
        for source in self.sources:
            uploaded = not self.link.holds(source.device(step.name))
            per_element += uploaded * common_dtype(self.sources, step.name).itemsize
        products = 0
        if awd:
            products = PRODUCT_BYTES * k * k * {"row": rows, "column": math.prod(step.info.shape[-1:])}.get(groups, 1)
        cost = elements * per_element + products + (k + 2) * ALIGNMENT
        if step.action == "wudi":
            wide = ops.compute_dtype(common_dtype(self.sources, step.name))
            sums = wudi.needed_bytes(*matrix(step), self.recipe.columns, wide)
            return cost, sums + elements * wide.itemsize  # and the update with its scale
        state = STATE_BYTES if awd and not self.recipe.options.spans else 0
        return cost, elements * (state + (REFERENCE_BYTES * k if self._slow else 0))

    def together(self, parts: Sequence[Part]) -> list[list[Part]]:
        """The parts in order, as many in a list as the memory of a work allows."""
        works: list[list[Part]] = []
        cost = beside = 0
        for part in parts:
            cost, beside = cost + part.cost, max(beside, part.beside)  # the reference path takes one after the other
            if works and not part.fresh and cost <= BATCH_BYTES and cost + beside <= self.capacity:
                works[-1].append(part)
            else:
                works.append([part])
                cost, beside = part.cost, part.beside
        return works

    def loads(self, part: Part) -> list[Load]:
        """The elements of the base and the models."""
        dtype = common_dtype(self.sources, part.step.name)

        def read(source: Source) -> Tensor:
            name = part.step.name
            stored = source.tensors[name].dtype
            room = None if source.in_memory(name) else torch.empty(part.end - part.begin, dtype=stored)
            return source.elements(name, part.begin, part.end, room).view(part.shape)

        return [Load(partial(read, source), part.shape, dtype) for source in self.sources]

    def stays(self, step: Step) -> bool:
        """Whether the result is wanted on the device itself."""
        return self.link.holds(self.sources[0].device(step.name))
