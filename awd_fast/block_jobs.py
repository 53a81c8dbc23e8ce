"""What is read, and how much memory it takes, to do something with a block or a whole tensor on the CPU."""

import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from awd_fast import ops, wudi
from awd_fast.blocks import Block, blocks_of, matrix
from awd_fast.errors import InputError
from awd_fast.merger import Merger
from awd_fast.plan import FLOAT8, Step, common_dtype
from awd_fast.prefetch import Job, Read, threads_of_a_job

STATE_BYTES = 48
"""Per element of d, what iterating on it needs: d, the optimiser's state, and the combination before it is rounded."""

GRAM_BYTES = 48
"""Per entry of the Gram matrices: these, those of the disentangled vectors, their cosines, and what is made of them."""

Tensors = tuple[Tensor, list[Tensor]]
"""The base's and the models' elements."""


class JobMaker(Merger):
    """A merger that works by jobs of `awd_fast.prefetch`, in the memory of the recipe."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._threads = threads_of_a_job()  # now, because they are fewer while jobs are carried out

    def indivisible(self, step: Step) -> bool:
        if step.action == "wudi":
            return len(blocks_of(step, self.recipe)) > 1
        if not self._together(step) or len(blocks_of(step, self.recipe)) == 1:
            return False
        options = self.recipe.options
        return not options.spans or options.groups == "column"

    def bytes_to_read(self, plan: Sequence[Step], blocks: Sequence[Block], done: Sequence[Block]) -> int:
        return self._bytes_to_read_once(blocks, done) + self.bytes_to_read_twice(blocks, done)

    def bytes_to_inspect(self, plan: Sequence[Step], blocks: Sequence[Block]) -> int:
        return self._bytes_to_read_once(blocks, ())  # nothing is combined, which is what is read for again

    def _bytes_to_read_once(self, blocks: Sequence[Block], done: Sequence[Block]) -> int:
        finished, once = set(done), 0
        for step, same in groupby(blocks, lambda block: block.step):
            own = list(same)
            left = [block for block in own if block not in finished]
            if left and (step.action == "wudi" or (self._together(step) and self._fits(step))):
                left = own  # which are read as one
            once += sum(self.size(step, block.count) for block in left)
        return once

    def bytes_to_read_twice(self, blocks: Sequence[Block], done: Sequence[Block] = ()) -> int:
        finished, twice = set(done), 0
        for step, same in groupby(blocks, lambda block: block.step):
            own = list(same)
            if step.action == "wudi" and not finished.issuperset(own):
                twice += self._bytes_of_base_again(step)
            if step.action != "awd":
                continue
            needed = any(block not in finished for block in own) and self._together(step) and not self._fits(step)
            if needed or self._all_shared:
                twice += sum(self.size(step, block.count) for block in own)
        return twice

    def _bytes_of_base_again(self, step: Step) -> int:
        """How much of the base is read again for a step of wudi."""
        raise NotImplementedError

    def _together(self, step: Step) -> bool:
        """Whether a step's groups do not lie each in one block, so that its blocks are solved together."""
        if step.action != "awd" or self._all_shared or len(blocks_of(step, self.recipe)) == 1:
            return False
        return not {"row": matrix(step)[0] > 1, "column": matrix(step)[0] == 1}.get(self.recipe.options.groups, False)

    def _fits(self, step: Step) -> bool:
        """Whether a step's tensors fit the memory whole."""
        return self._whole(step, lambda tensors: None).cost <= self._most

    @property
    def _most(self) -> int:
        """Bytes for jobs under way: a quarter of the memory is left to results that wait to be written.

        Whoever has the models in memory, and does not say how much more may be used, has enough.
        """
        sources = (self.base, *self.models)
        if self.recipe.memory is None and all(source.in_memory(next(iter(source.tensors), "")) for source in sources):
            return sys.maxsize
        return self.recipe.buffers - self.recipe.buffers // 4

    def _job(self, block: Block, run: Callable[[Block, Tensors], Any]) -> Job:
        reads = self._reads(block)
        return Job(reads, lambda tensors: run(block, (tensors[0], tensors[1:])), self._beside(block.step, block.count))

    def _whole(self, step: Step, run: Callable[[Tensors], Any]) -> Job:
        """A job on a step's whole tensors, as matrices."""
        block = Block(step, 0, step.info.count, matrix(step))
        reads = self._reads(block)
        return Job(reads, lambda tensors: run((tensors[0], tensors[1:])), self._beside(step, block.count))

    def _reads(self, block: Block) -> list[Read]:
        dtype = common_dtype((self.base, *self.models), block.step.name)
        place = (block.step.name, block.begin, block.end, block.shape, dtype)
        return [Read(source, *place) for source in (self.base, *self.models)]

    def _beside(self, step: Step, count: int) -> int:
        """Bytes that a job needs beside what it reads: for its result, for d, and for Gram matrices."""
        if step.action == "wudi":
            dtype = ops.compute_dtype(common_dtype((self.base, *self.models), step.name))
            return count * step.dtype.itemsize + wudi.needed_bytes(
                *matrix(step), self.recipe.columns, dtype, self._threads
            )
        if step.action != "awd":
            return count * step.dtype.itemsize
        width, groups = matrix(step)[1], self.recipe.options.groups
        matrices = {"row": -(-count // max(width, 1)), "column": min(width, count)}.get(groups, 1)
        state = 0 if self.recipe.options.spans else STATE_BYTES
        return count * (step.dtype.itemsize + state) + matrices * len(self.models) ** 2 * GRAM_BYTES

    def _rounded(self, step: Step, merged: Callable[[torch.dtype], Tensor]) -> Tensor:
        """What is computed in the step's dtype, checked."""
        narrow = step.dtype in FLOAT8
        result = merged(torch.float32 if narrow else step.dtype)
        self._require_sound(step, result)
        return result.to(step.dtype) if narrow else result

    def _count(self, job: Job) -> None:
        if job.reads:
            self.progress.read(sum(read.size for read in job.reads), job.reads[0].name)

    def size(self, step: Step, count: int) -> int:
        """Bytes that are read for so many elements of a step's tensors."""
        if step.action == "base" and step.info.dtype.is_floating_point:
            return count * step.info.dtype.itemsize
        sources = [source for source in (self.base, *self.models) if step.name in source.tensors]
        return sum(count * source.tensors[step.name].dtype.itemsize for source in sources)

    def _too_large(self, needed: int, what: str) -> InputError:
        optimizer = type(self.recipe.options.optimizer).__name__
        return InputError(
            f"{optimizer} with penalty {self.recipe.options.objective.penalty} keeps {what} in memory, which takes "
            f"{needed * 4 / 3e9:.3g} GB where {self.recipe.buffers / 1e9:.3g} GB may be used; give more (--memory), "
            "or use SGD or Converge with a Euclidean penalty"
        )
