"""WUDI on the CPU: a tensor's task vectors one by one, from one read of all or, in less memory, model by model.

The sums are made in the same order either way, so that the memory changes no bit of a result.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from awd_fast import ops, wudi
from awd_fast.block_jobs import JobMaker, Tensors
from awd_fast.blocks import Block, matrix
from awd_fast.errors import InputError
from awd_fast.merger import Result
from awd_fast.plan import Step, common_dtype
from awd_fast.prefetch import Job
from awd_fast.report import Interference


class WudiJobs(JobMaker):
    """The jobs of the steps whose action is "wudi"."""

    def _wudi_jobs(self, step: Step, wanted: Sequence[Block]) -> Iterator[Job]:
        """Jobs that give the wanted blocks of a step. Raises InputError where they do not fit the memory."""
        if self._fits(step):
            yield self._whole(step, partial(self._at_once, step, wanted))
            return
        if self._one_model(step, 0).cost > self._most:
            raise self._layer_too_large(step)
        yield from self._model_by_model(step, wanted)

    def _bytes_of_base_again(self, step: Step) -> int:
        return 0 if self._fits(step) else (len(self.models) - 1) * step.info.size

    def _at_once(self, step: Step, wanted: Sequence[Block], tensors: Tensors) -> list[Result]:
        layer = self._layer(step)
        for weight, part in zip(self.recipe.weights, self._vectors(step, tensors), strict=True):
            layer.add(weight, part)
        return self._merged(step, wanted, tensors[0], layer)

    def _vectors(self, step: Step, tensors: Tensors) -> list[wudi.Part]:
        """The task vectors of a step, from its whole tensors."""
        base, models = tensors
        return [partial(difference, base, model) for model in models]

    def _model_by_model(self, step: Step, wanted: Sequence[Block]) -> Iterator[Job]:
        held: list[wudi.Layer] = []
        last = len(self.models) - 1

        def run(index: int, tensors: list[Tensor]) -> list[Result]:
            base, model = tensors
            if index == 0:
                held.append(self._layer(step))
            held[0].add(self.recipe.weights[index], partial(difference, base, model))
            return self._merged(step, wanted, base, held.pop()) if index == last else []

        for index in range(len(self.models)):
            job = self._one_model(step, index)
            # In order, because sums are; and what the first makes is counted with each.
            yield Job(job.reads, partial(run, index), job.beside, fresh=index > 0)

    def _one_model(self, step: Step, index: int) -> Job:
        """A job that reads the base and one model."""
        reads = self._reads(Block(step, 0, step.info.count, matrix(step)))
        return Job([reads[0], *reads[1 + index : 2 + index]], lambda tensors: None, self._beside(step, step.info.count))

    def _layer(self, step: Step) -> wudi.Layer:
        return wudi.Layer(*matrix(step), columns=self.recipe.columns, dtype=self._wide(step))

    def _wide(self, step: Step) -> torch.dtype:
        return ops.compute_dtype(common_dtype((self.base, *self.models), step.name))

    def _merged(self, step: Step, wanted: Sequence[Block], base: Tensor, layer: wudi.Layer) -> list[Result]:
        solved = layer.solve(self.recipe.ridge)
        self._require_solved(step, solved.finite, solved.solvable)
        found = Interference.from_figures(solved.figures)
        base, update, scale = base.reshape(-1), solved.update.view(-1), self.recipe.scale
        results = []
        for block in wanted:
            part = slice(block.begin, block.end)

            def merged(dtype: torch.dtype, part: slice = part) -> Tensor:
                return (base[part] + scale * update[part]).to(dtype)

            tensor = self._rounded(step, merged).view(block.shape)
            results.append(Result(block, tensor, found if block.first else None))
        return results

    def _layer_too_large(self, step: Step) -> InputError:
        needed = self._one_model(step, 0).cost
        return InputError(
            f"wudi keeps sums of tensor {step.name!r} in memory, which takes {needed * 4 / 3e9:.3g} GB where "
            f"{self.recipe.buffers / 1e9:.3g} GB may be used; give more (--memory), or solve fewer columns together "
            "(--columns)"
        )


def difference(base: Tensor, model: Tensor, rows: slice) -> Tensor:
    """Some rows of a task vector, in the dtype of products."""
    wide = ops.compute_dtype(base.dtype)
    return model[rows].to(wide) - base[rows].to(wide)
