"""What all ways to carry out a merge share: weights, the checks of what came out, and what a block's result is."""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from awd_fast import ops, solver, statistics, wudi
from awd_fast.blocks import Block, blocks_of
from awd_fast.errors import InputError
from awd_fast.ops import reference
from awd_fast.plan import FLOAT8, Source, Step
from awd_fast.progress import Progress
from awd_fast.ranks import Ranks
from awd_fast.recipe import Recipe
from awd_fast.report import Figures, Similarity, Tally
from awd_fast.solver import Solution


@dataclass(frozen=True)
class Result:
    """A block of the output: its elements, and, with the figures of its groups, what was done to the similarity.

    Figures of groups that are whole tensors come with a tensor's first block; those of wudi are the interference.
    on_cpu: whether it was computed on the CPU although a device was asked for.
    """

    block: Block
    tensor: Tensor
    similarity: Figures | None = None
    on_cpu: bool = False


class Merger:
    """Carries out a plan: `results(blocks)` gives the blocks of the output, in order.

    `prepare(blocks)` comes first, once, with all blocks that this process will ever be asked for, those that are
    already done among them: a group that spans blocks of several processes, as a global one does, is solved there.
    shared: the similarity of the global group, then.
    """

    def __init__(
        self,
        base: Source,
        models: Sequence[Source],
        recipe: Recipe,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.base, self.models, self.recipe = base, models, recipe
        self.progress = progress or Progress()
        self.ranks = ranks or Ranks()
        self.shared: Similarity | None = None
        self._weights = torch.tensor([recipe.weights], dtype=torch.float64)  # [1, K]
        self._copies: dict[torch.device, Tensor] = {}
        self._shared: Solution | None = None
        self._parts: dict[str, Similarity] = {}  # of tensors, their part in the global group
        self._shared_shift: dict[str, Tensor] = {}  # of tensors, d of the global group outside the span, flat

    def prepare(self, plan: Sequence[Step], blocks: Sequence[Block]) -> None:
        """Solves what is not solved block by block; `plan` holds all steps, `blocks` those of this process."""
        raise NotImplementedError

    def results(self, blocks: Sequence[Block]) -> Generator[Result, None, None]:
        """Each block's result, in order. To be closed by whoever stops before the end."""
        raise NotImplementedError

    def put_together(
        self, blocks: Sequence[Block], tally: Tally, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The merged tensors of all these blocks, after `prepare`; what was done to them goes to `tally`.

        device: where they are to be, by default each where the base's is.
        """
        merged: dict[str, Tensor] = {}
        with closing(self.results(blocks)) as results:
            for found in results:
                step, block = found.block.step, found.block
                place = device or self.base.device(step.name)
                if block.whole:
                    merged[step.name] = found.tensor.to(place).view(step.info.shape)
                else:
                    if block.first:
                        merged[step.name] = torch.empty(step.info.shape, dtype=step.dtype, device=place)
                    merged[step.name].view(-1)[block.begin : block.end] = found.tensor.view(-1)
                tally.add(step.name, block.begin, found.similarity, found.on_cpu)
        return merged

    def inspections(self, plan: Sequence[Step]) -> Generator[tuple[Step, Figures | None, bool], None, None]:
        """Of each step the similarity, and `on_cpu`, as `results` has them, in parts; nothing is combined."""
        raise NotImplementedError

    def indivisible(self, step: Step) -> bool:
        """Whether one process must have all blocks of a step."""
        raise NotImplementedError

    def bytes_to_read(self, plan: Sequence[Step], blocks: Sequence[Block], done: Sequence[Block]) -> int:
        """How many bytes `prepare` and then `results` for the blocks that are not done will read."""
        raise NotImplementedError

    def bytes_to_read_twice(self, blocks: Sequence[Block], done: Sequence[Block] = ()) -> int:
        """How many of these are read for the second time."""
        raise NotImplementedError

    def bytes_to_inspect(self, plan: Sequence[Step], blocks: Sequence[Block]) -> int:
        """How many bytes `prepare` and then `inspections` will read; `blocks` are those that are disentangled."""
        raise NotImplementedError

    @property
    def _all_shared(self) -> bool:
        """Whether the disentangled tensors make one group."""
        return self.recipe.method == "awd" and self.recipe.options.groups == "global"

    def _require_finite(self, step: Step) -> None:
        """Raises InputError where a tensor that is merged holds NaN or Inf.

        Every result shows that one did, so that values need not be checked before.
        """
        for source in (self.base, *self.models):
            if step.name in source.tensors:
                require_finite(source, step, self.recipe)

    def _require_sound(self, step: Step, result: Tensor) -> None:
        """Raises InputError where a result is not finite: for what went in, or for the step's dtype."""
        if not finite(result):
            self._require_finite(step)
            raise overflow(step)
        if step.dtype in FLOAT8 and result.dtype != step.dtype:  # torch rounds what is too large to the largest
            limits = torch.finfo(step.dtype)
            half_step = limits.eps * 2.0 ** math.floor(math.log2(limits.max)) / 2.0
            if result.numel() and max(map(abs, map(float, torch.aminmax(result)))) > limits.max + half_step:
                raise overflow(step)

    def _require_solved(self, step: Step, finite: Tensor | bool, solvable: Tensor | bool) -> None:
        """Raises InputError where wudi found no update: because of a tensor that is not finite, or of the ridge."""
        if not finite:
            self._require_finite(step)
            raise overflow(step)
        if not solvable:
            raise wudi.too_small(self.recipe.ridge, f" of tensor {step.name!r}")

    def _plain_weights(self, step: Step, device: torch.device) -> Tensor:
        """What the task vectors of a step are multiplied by, where that does not depend on them."""
        weights = self._weights_on(device)
        if self.recipe.method == "average":
            return weights / weights.sum()
        return (self.recipe.scale if step.selected else self.recipe.plain_scale) * weights

    def _awd_weights(self, coefficients: Tensor) -> Tensor:
        """What the task vectors are multiplied by, [R, K], for the d with coefficients a [R, K]; on their device."""
        return self.recipe.scale * statistics.merge_weights(self._weights_on(coefficients.device), coefficients)

    def _weights_on(self, device: torch.device) -> Tensor:
        """m [1, K] on a device; copied once, because the host waits for such a copy."""
        if device not in self._copies:
            self._copies[device] = self._weights.to(device)
        return self._copies[device]

    def _without(self, base: Tensor, models: Sequence[Tensor], shift: Tensor, dtype: torch.dtype) -> Tensor:
        """base + scale * sum_i m_i (t_i - d) for a d outside the span, which has the tensors' shape."""
        weights = self.recipe.scale * self._weights_on(base.device)
        plain = ops.combine(base, models, weights, "row", dtype=shift.dtype, backend=self.recipe.backend)
        plain -= float(self.recipe.scale * self._weights.sum()) * shift
        return plain.to(dtype)

    def _note_global(self, solution: Solution) -> None:
        """Keeps the solution of the global group, the same in all processes."""
        self._shared, self.shared = solution, Similarity.of(solution, self.recipe)

    def _note_parts(self, solution: Solution, grams: dict[str, Tensor]) -> None:
        """Notes the part of each tensor, by its own Gram matrix, in a global group in the span."""
        assert solution.coefficients is not None
        for name, gram in grams.items():
            part = solution.part(gram, *statistics.span_moments(gram, solution.coefficients))
            self._parts[name] = Similarity.of(part, self.recipe)


def group_count(step: Step, groups: str) -> int:
    """R of a step's tensor."""
    return reference.group_count(torch.empty(step.info.shape, device="meta"), groups)  # type: ignore[arg-type]


def overflow(step: Step) -> InputError:
    """What is said where a merged tensor is not finite although all that went into it is."""
    return InputError(
        f"the merged tensor {step.name!r} overflows {str(step.dtype).removeprefix('torch.')}; "
        "choose a smaller scale or a wider dtype"
    )


def finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor Inf, in one pass without a copy where its dtype has an order."""
    wide = tensor.float() if tensor.dtype in FLOAT8 else tensor
    return bool(solver.all_finite(wide))


def require_finite(source: Source, step: Step, recipe: Recipe) -> None:
    """Raises InputError where a source's tensor holds NaN or Inf, block by block."""
    count = 0
    dtype = source.tensors[step.name].dtype
    for block in blocks_of(step, recipe):
        room = None if source.in_memory(step.name) else torch.empty(block.count, dtype=dtype)
        part = source.elements(step.name, block.begin, block.end, room)
        part = part if part.dtype in ops.FLOATING else part.float()  # float8 has no isfinite
        count += int((~torch.isfinite(part)).sum())
    if count:
        raise InputError(
            f"{source.where(step.name)}: tensor {step.name!r} holds {count} NaN or Inf values; expected finite ones"
        )


def require_solved(merger: Merger, step: Step, solution: Solution) -> None:
    """Raises InputError where a solution is not finite: because of a tensor that is not, or because it diverged."""
    if not solver.all_finite(solution.gram) or not solution.finite():
        merger._require_finite(step)
        raise solver.diverged()
