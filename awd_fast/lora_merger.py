"""Merging LoRA adapters on the CPU: from their factors, with the base alone read block by block.

All K x K work needs only Gram matrices, which the factors give; so no task vector is made but by Adam and the l1
penalty, for the rows of a block, and by wudi. Rows are solved with their block; all else once for a tensor, or for all,
by each process for itself, which costs less than it would to share it. What adapters store whole is merged as in
`awd_fast.stream`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from awd_fast import lowrank, ops, solver, wudi
from awd_fast.adapter_models import adapters_of, by_factors
from awd_fast.block_jobs import Tensors
from awd_fast.blocks import Block, blocks_of, cut, matrix
from awd_fast.lowrank import Cross, Factors
from awd_fast.merger import Result, require_finite
from awd_fast.ops import reference
from awd_fast.plan import FLOAT8, Source, Step
from awd_fast.prefetch import Job, Read
from awd_fast.report import Interference, Similarity, Tally
from awd_fast.stream import StreamMerger
from awd_fast.threads import one_thread

GRAM_NUMBERS = 1 << 22
"""Of the K x K matrices that are solved at a time."""


SMALL = 1 << 18
"""Elements of a product up to which one thread makes it: of larger ones a BLAS shares out elements, not their sums."""


class LoraMerger(StreamMerger):
    """Carries out a plan of adapters (`awd_fast.adapter_models.plan_adapters`), all models being `AdapterModel`s."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._adapters = adapters_of(self.models)

    def indivisible(self, step: Step) -> bool:
        return not by_factors(step, self._adapters) and super().indivisible(step)

    def bytes_to_read_twice(self, blocks: Sequence[Block], done: Sequence[Block] = ()) -> int:
        return super().bytes_to_read_twice(self._merged_whole(blocks), done)

    def bytes_to_inspect(self, plan: Sequence[Step], blocks: Sequence[Block]) -> int:
        return super().bytes_to_inspect(plan, self._merged_whole(blocks))

    def _merged_whole(self, blocks: Sequence[Block]) -> list[Block]:
        return [block for block in blocks if not by_factors(block.step, self._adapters)]

    def stored_whole(self, plan: Sequence[Step], tally: Tally) -> dict[str, Tensor]:
        """The merge of what adapters store whole, by the base's names, and all that `as_factors` needs before it."""
        blocks = cut([step for step in plan if any(model.stores(step.name) for model in self._adapters)], self.recipe)
        self.progress.begin("merging", self.bytes_to_read(plan, blocks, ()))
        self.prepare(plan, blocks)
        return self.put_together(blocks, tally, torch.device("cpu"))

    def as_factors(self, plan: Sequence[Step], tally: Tally) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each step that merges factors, left [R, r] and right [r, C] float64 of the merged task vector.

        tally: to which what became of the similarity is added.
        """
        for step in plan:
            if by_factors(step, self._adapters):
                self._require_copies(step)
                if step.action == "wudi":
                    left, right, interference = self._wudi_factors(step)
                    tally.add(step.name, 0, interference)
                    yield step.name, left, right
                    continue
                product = _Product(self, step)
                similarity: Similarity | None
                if product.alone:
                    weights, similarity = self._solve_lines(product, 0, matrix(step)[0])
                    product.weights = self._awd_weights(weights)
                else:
                    similarity = self._solve_once(product)
                tally.add(step.name, 0, similarity)
                yield step.name, *product.merged()

    def _wudi_factors(self, step: Step) -> tuple[Tensor, Tensor, Interference]:
        """WUDI's update tau = left @ right, left [R, q] and right [q, C] float64 with q = min(sum of the ranks, C).

        With an orthonormal basis Q' of the rows of all A_i, t_i = (t_i Q) Q', and tau = (tau of the t_i Q) Q': A, B and
        S of the t_i are those of the t_i Q between Q and Q', and across the rest tau is S, which is 0 there. e is the
        same with a ridge for q columns instead of C.
        """
        factors = self._factors_of(step)
        with one_thread():
            basis, triangle = torch.linalg.qr(lowrank.merged_right(factors).T)  # [C, q], [q, sum]
        width, rank = basis.shape
        layer = wudi.Layer(factors[0].shape[0], rank, dtype=torch.float64)
        end = 0
        for weight, each in zip(self.recipe.weights, factors, strict=True):
            end += each.rank
            own = Factors(each.left, triangle[:, end - each.rank : end].T, each.scale)
            layer.add(weight, partial(_rows_of, own, torch.float64))
        solved = layer.solve(self.recipe.ridge * rank / width)
        if not (solved.finite and solved.solvable):  # factors are finite when they are read
            raise wudi.too_small(self.recipe.ridge, f" of tensor {step.name!r}")
        return self.recipe.scale * solved.update, basis.T, Interference.from_figures(solved.figures)

    def size(self, step: Step, count: int) -> int:
        if by_factors(step, self._adapters):
            return count * step.info.dtype.itemsize
        if step.action == "base":
            return count * step.info.dtype.itemsize * (1 + len(self._to_compare(step)))
        return super().size(step, count)

    def _together(self, step: Step) -> bool:
        return not by_factors(step, self._adapters) and super()._together(step)

    def _to_compare(self, step: Step) -> Sequence[Source]:
        # Adapters that do not store a tensor would give the base's.
        return [] if step.info.dtype.is_floating_point else [m for m in self._adapters if m.stores(step.name)]

    def _require_finite(self, step: Step) -> None:
        for source in (self.base, *(model for model in self._adapters if model.stores(step.name))):
            require_finite(source, step, self.recipe)

    def _global_parts(self, steps: Sequence[Step], mine: Sequence[Block]) -> dict[str, Tensor]:
        whole = [step for step in steps if not by_factors(step, self._adapters)]
        chosen = set(whole)
        read = super()._global_parts(whole, [block for block in mine if block.step in chosen]) if whole else {}
        with one_thread():
            return {
                step.name: read[step.name] if step in chosen else lowrank.gram_tensor(self._factors_of(step))
                for step in steps
            }

    def _factors_of(self, step: Step) -> list[Factors]:
        return [model.bound.factors(step.name) for model in self._adapters]

    def _jobs(self, blocks: Sequence[Block]) -> Iterator[Job]:
        for step, same in groupby(blocks, lambda block: block.step):
            if by_factors(step, self._adapters) and step.action != "wudi":
                yield from self._adding(step, list(same))
            else:
                yield from super()._jobs(list(same))

    def _reads(self, block: Block) -> list[Read]:
        if not by_factors(block.step, self._adapters):
            return super()._reads(block)
        dtype = block.step.info.dtype
        wide = torch.float32 if dtype in FLOAT8 else dtype
        return [Read(self.base, block.step.name, block.begin, block.end, block.shape, wide)]

    def _vectors(self, step: Step, tensors: Tensors) -> list[wudi.Part]:
        if not by_factors(step, self._adapters):
            return super()._vectors(step, tensors)
        self._require_same_base(Block(step, 0, step.info.count, matrix(step)), tensors[0])
        return [partial(_rows_of, factors, self._wide(step)) for factors in self._factors_of(step)]

    def _adding(self, step: Step, blocks: Sequence[Block]) -> Iterator[Job]:
        """Jobs that read the base's blocks and add the merged task vector to them."""
        product = _Product(self, step)
        elementwise = step.action == "awd" and not self.recipe.options.spans
        known = None if product.alone or elementwise else self._solve_once(product)
        for block in blocks:
            yield self._adding_to(block, product, known if block.first else None, elementwise)

    def _adding_to(self, block: Block, product: "_Product", known: Similarity | None, elementwise: bool) -> Job:
        step = block.step
        wide = product.wide.itemsize
        beside = step.dtype.itemsize + 2 * wide
        if elementwise:
            beside = self._beside(step, 1) + (len(self.models) + 1) * wide

        def run(tensors: list[Tensor]) -> list[Result]:
            (base,) = tensors
            self._require_same_base(block, base)
            if elementwise:
                return [self._add_elements(block, product, base)]
            similarity, weights = known, product.weights
            if product.alone:
                coefficients, similarity = self._solve_lines(product, block.rows.start, block.rows.stop)
                weights = self._awd_weights(coefficients)
            merged = self._rounded(step, lambda narrow: product.added(block, base, weights, narrow))
            return [Result(block, merged, similarity)]

        return Job(self._reads(block), run, block.count * beside)

    def _require_same_base(self, block: Block, base: Tensor) -> None:
        """An adapter of an embedding may hold a copy of the base's: see `BoundAdapter.require_base`."""
        for model in self._adapters:
            if block.step.name in model.bound.copied:
                for rows, columns, part in pieces(block):
                    found = base.view(-1)[part].view(rows.stop - rows.start, -1)
                    model.bound.require_base(block.step.name, found, rows.start, columns.start)

    def _require_copies(self, step: Step) -> None:
        """`_require_same_base` where the base is not read otherwise."""
        if any(step.name in model.bound.copied for model in self._adapters):
            for block in blocks_of(step, self.recipe):
                room = torch.empty(block.count, dtype=step.info.dtype)
                self._require_same_base(block, self.base.elements(step.name, block.begin, block.end, room))

    def _solve_once(self, product: "_Product") -> Similarity | None:
        """Gives a step its weights, where they are not those of rows; what became of its similarity."""
        step, options = product.step, self.recipe.options
        if step.action != "awd":
            product.weights = self._plain_weights(step, torch.device("cpu"))
            return None
        if self._all_shared:
            product.weights = self._factors[""]
            return self._parts[step.name]
        if options.groups == "column":
            coefficients, similarity = self._solve_lines(product, 0, matrix(step)[1])
        else:
            with one_thread():
                gram = lowrank.gram_tensor(product.factors)
            solution = solver.solve_span(gram, options, self.recipe.backend)
            assert solution.coefficients is not None
            coefficients, similarity = solution.coefficients, Similarity.of(solution, self.recipe)
        product.weights = self._awd_weights(coefficients)
        return similarity

    def _solve_lines(self, product: "_Product", start: int, stop: int) -> tuple[Tensor, Similarity]:
        """The coefficients [stop - start, K] of some rows, or columns, of a step, solved some at a time."""
        lines, total = product.lines, product.lines[0].shape[0]
        most = max(GRAM_NUMBERS // len(lines) ** 2, 1)
        found: list[Tensor] = []
        whole: Similarity | None = None
        for begin in range(start, stop, most):
            part = [each.rows(begin, min(begin + most, stop)) for each in lines]
            with one_thread():
                gram = lowrank.gram_rows(part, product.products)
            solution = solver.solve_span(gram, self.recipe.options, self.recipe.backend, total)
            assert solution.coefficients is not None
            similarity = Similarity.of(solution, self.recipe)
            found.append(solution.coefficients)
            whole = similarity if whole is None else whole + similarity
        assert whole is not None
        return torch.cat(found), whole

    # Elements of d: rows whose task vectors are made for a block.

    def _add_elements(self, block: Block, product: "_Product", base: Tensor) -> Result:
        solution, vectors = self._solve_elements(block, product)
        assert solution.shift is not None
        shift = reference.ungroup(solution.shift, block.shape, "row")
        plain = self._plain_weights(block.step, torch.device("cpu"))
        update = ops.combine(None, vectors, plain, "row", dtype=product.wide, backend=self.recipe.backend)
        update -= float(self.recipe.scale * self._weights.sum()) * shift
        merged = self._rounded(block.step, lambda dtype: (base.to(product.wide) + update).to(dtype))
        return Result(block, merged, Similarity.of(solution, self.recipe))

    def _solve_elements(self, block: Block, product: "_Product") -> tuple[solver.Solution, list[Tensor]]:
        rows = block.rows
        with one_thread(block.count < SMALL):
            vectors = [lowrank.delta(each.rows(rows.start, rows.stop), product.wide) for each in product.factors]
        total = None if block.whole else matrix(block.step)[0]
        return solver.solve(None, vectors, self.recipe.options, self.recipe.backend, total), vectors

    # Inspections.

    def _inspecting(self, step: Step) -> Iterator[Job]:
        if step.action != "awd" or self._all_shared or not by_factors(step, self._adapters):
            yield from super()._inspecting(step)
            return
        product = _Product(self, step)
        if self.recipe.options.spans and not product.alone:
            known = self._solve_once(product)
            yield Job((), lambda tensors: (step, known))
            return

        def job(block: Block) -> Job:
            return Job((), lambda tensors: (step, self._inspect_rows(block, product)))

        yield from map(job, blocks_of(step, self.recipe))

    def _inspect_rows(self, block: Block, product: "_Product") -> Similarity:
        if self.recipe.options.spans:
            return self._solve_lines(product, block.rows.start, block.rows.stop)[1]
        return Similarity.of(self._solve_elements(block, product)[0], self.recipe)


def _rows_of(factors: Factors, dtype: torch.dtype, rows: slice) -> Tensor:
    return lowrank.delta(factors.rows(rows.start, rows.stop), dtype)


class _Product:
    """The merged task vector of a step, as factors. weights: [R, K], [C, K] or [1, K], once they are known.

    alone: whether rows are groups of their own, solved with the block in which they lie. lines: the factors whose rows
    are the groups. wide: the dtype of products.
    """

    def __init__(self, merger: LoraMerger, step: Step) -> None:
        self.step, self.factors = step, merger._factors_of(step)
        groups = merger.recipe.options.groups if step.action == "awd" else "tensor"
        self.alone = groups == "row" and matrix(step)[0] > 1
        self.wide = torch.float64 if torch.float64 in (step.info.dtype, step.dtype) else torch.float32
        self.weights: Tensor | None = None
        self._by_columns = groups == "column"
        self.lines = [each.T for each in self.factors] if self._by_columns else self.factors
        self._products: Cross | None = None
        self._right: Tensor | None = None

    @property
    def products(self) -> Cross:
        """The products of the other factors, which all lines share."""
        if self._products is None:
            self._products = lowrank.cross([each.right for each in self.lines])
        return self._products

    def merged(self) -> tuple[Tensor, Tensor]:
        """left [R, r] and right [r, C] float64."""
        assert self.weights is not None
        if self._by_columns:
            return lowrank.merged_left(self.factors, None), lowrank.merged_right(self.factors, self.weights)
        return lowrank.merged_left(self.factors, self.weights), lowrank.merged_right(self.factors)

    def added(self, block: Block, base: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """A block of the base with the merged task vector added. weights: for its rows, or for all."""
        if self._right is None:
            self._right = lowrank.merged_right(self.factors, weights if self._by_columns else None).to(self.wide)
        found = []
        for rows, columns, part in pieces(block):
            factors = [each.rows(rows.start, rows.stop) for each in self.factors]
            left = lowrank.merged_left(factors, None if self._by_columns else weights).to(self.wide)
            own = base.view(-1)[part].view(rows.stop - rows.start, -1)
            with one_thread(own.numel() < SMALL):
                found.append(lowrank.add(own, left, self._right[:, columns], dtype).view(-1))
        return (found[0] if len(found) == 1 else torch.cat(found)).view(block.shape)


def pieces(block: Block) -> list[tuple[slice, slice, slice]]:
    """The rectangles of a block that need not hold whole rows: rows, columns, and which of the block's elements."""
    width = matrix(block.step)[1]
    if block.begin % width == 0 and block.end % width == 0:
        return [(slice(block.begin // width, block.end // width), slice(0, width), slice(0, block.count))]
    found = []
    begin = block.begin
    while begin < block.end:
        row = begin // width
        end = min((row + 1) * width, block.end)
        columns = slice(begin - row * width, end - row * width)
        found.append((slice(row, row + 1), columns, slice(begin - block.begin, end - block.begin)))
        begin = end
    return found
