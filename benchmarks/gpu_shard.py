"""A plugin of pytest that runs every n-th test: AWD_FAST_SHARD=2/8 pytest -p benchmarks.gpu_shard.

Neighbours are often the same test with other parameters, which take as long: dealt out in turns, all shards do.
"""

import os
from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keeps the tests of this shard; "2/8" is the third of eight."""
    index, count = map(int, os.environ["AWD_FAST_SHARD"].split("/"))
    left_out = [item for at, item in enumerate(items) if at % count != index]
    items[:] = items[index::count]
    config.hook.pytest_deselected(items=left_out)
