"""How the output's tensors are cut into blocks, which are computed, written and noted as finished one by one.

The cut depends on nothing but the shapes and the number of models. So neither the memory that a merge may use nor the
number of processes changes a bit of a result, sums over a tensor among them: they are made block by block, in order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from awd_fast.plan import Step
from awd_fast.recipe import Recipe

NUMBERS = 1 << 24
"""Of a block, in the base and all models together: so much work that what a block costs besides does not count, and so
little that what is read, computed and written at a time fits any machine."""


@dataclass(frozen=True)
class Block:
    """Elements `begin` to `end` of a step's tensors, seen as a matrix of `shape`."""

    step: Step
    begin: int
    end: int
    shape: tuple[int, int]

    @property
    def count(self) -> int:
        """How many elements."""
        return self.end - self.begin

    @property
    def first(self) -> bool:
        """Whether the tensor begins with it."""
        return self.begin == 0

    @property
    def last(self) -> bool:
        """Whether the tensor ends with it."""
        return self.end == self.step.info.count

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.first and self.last

    @property
    def rows(self) -> slice:
        """The rows of the tensor's matrix that it holds, where it holds whole ones."""
        return slice(self.begin // self.shape[1], self.end // self.shape[1])


def matrix(step: Step) -> tuple[int, int]:
    """Rows and columns of a step's tensors: the last dimension, and all before it; a vector is one row."""
    shape = step.info.shape
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def by_rows(step: Step, recipe: Recipe) -> bool:
    """Whether the tensor must be cut between rows, because rows or columns are its groups."""
    return step.action == "awd" and recipe.options.groups in ("row", "column") and matrix(step)[0] > 1


def blocks_of(step: Step, recipe: Recipe) -> list[Block]:
    """The blocks of a step in order: some rows each, or, where no group is cut by it, any elements."""
    count = step.info.count
    rows, width = matrix(step)
    k = len(recipe.weights)
    most = max(_power_of_two(NUMBERS // (k + 1)), 1)
    if step.action == "awd" and recipe.options.groups == "row" and rows > 1:  # which have a matrix of K x K each
        most = min(most, max(_power_of_two(NUMBERS // (4 * k * k)), 1) * width)
    if count <= most or count == 0:
        return [Block(step, 0, count, (rows, width))]
    if by_rows(step, recipe) or width <= most:
        size = max(most // width, 1) * width
        return [
            Block(step, begin, min(begin + size, count), ((min(begin + size, count) - begin) // width, width))
            for begin in range(0, count, size)
        ]
    ends = [min(begin + most, count) for begin in range(0, count, most)]
    return [Block(step, end - (end - 1) % most - 1, end, (1, (end - 1) % most + 1)) for end in ends]


def cut(steps: Sequence[Step], recipe: Recipe) -> list[Block]:
    """The blocks of all steps in order."""
    return [block for step in steps for block in blocks_of(step, recipe)]


def _power_of_two(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)
