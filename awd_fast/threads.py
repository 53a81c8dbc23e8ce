"""How many threads PyTorch's operations use, where it matters for the bits of a result."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(needed: bool = True) -> Iterator[None]:
    """A BLAS has the same bits for any number of threads only where it does not share out sums; Gram matrices are sums.

    So that a merge has the same bits on any machine of a kind, and in processes that torchrun gives one thread each.
    """
    before = torch.get_num_threads()
    if needed:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if needed:
            torch.set_num_threads(before)
