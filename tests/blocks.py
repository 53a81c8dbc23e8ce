"""A large parameter's row groups a block at a time, told how many the whole has: the rows of the whole."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def check_blocks(
    operator: Callable[..., Sequence[Tensor]],
    inputs: tuple[Any, ...],
    arguments: tuple[Any, ...],
    cuts: Sequence[int],
    history: int,
    *,
    tolerance: float | None = None,
    **options: Any,
) -> None:
    """operator(*inputs, *arguments, total=.., **options): results by row, but for the one in place `history`.

    inputs: tensors and lists of tensors of R rows. cuts: where blocks of rows begin, beside row 0. Results by row are
    the same bits, or within a relative `tolerance`; the first and the last losses of blocks add up to the whole's.
    """
    count = len(tree_leaves(inputs)[0])
    whole = operator(*inputs, *arguments, **options)
    parts = []
    for begin, end in pairwise([0, *cuts, count]):
        here = tree_map(lambda tensor, block=slice(begin, end): tensor[block], inputs)
        parts.append(operator(*here, *arguments, total=count, **options))
    for at, expected in enumerate(whole):
        if at == history:
            for index in (0, -1):
                total = sum(float(part[at][index]) for part in parts)
                assert total == pytest.approx(float(expected[index]), rel=tolerance or 1e-12, abs=0.0)
            continue
        found = torch.cat([part[at] for part in parts])
        if tolerance is None:
            assert torch.equal(found, expected), at
        else:
            assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm(), at
