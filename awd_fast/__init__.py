"""awd_fast: model merging by Adaptive Weight Disentanglement (arXiv 2411.18729).

Importing the package does no work: a name is loaded, and torch with it, when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from awd_fast.errors import InputError
from awd_fast.objective import PAPER, ROWS, SGD, Adam, Converge
from awd_fast.version import __version__

if TYPE_CHECKING:
    from awd_fast.adamerging import AdaMerged, adamerge
    from awd_fast.disentangling import Disentangled, disentangle
    from awd_fast.merging import merge
    from awd_fast.modules import merge_models
    from awd_fast.ops.backends import available as backends
    from awd_fast.optimizer import RedundantVector
    from awd_fast.pipeline import merge_checkpoints
    from awd_fast.recipe import DEFAULT_EXCLUDE
    from awd_fast.report import MergeReport

_LATE = {
    "AdaMerged": ("awd_fast.adamerging", "AdaMerged"),
    "DEFAULT_EXCLUDE": ("awd_fast.recipe", "DEFAULT_EXCLUDE"),
    "Disentangled": ("awd_fast.disentangling", "Disentangled"),
    "MergeReport": ("awd_fast.report", "MergeReport"),
    "RedundantVector": ("awd_fast.optimizer", "RedundantVector"),
    "adamerge": ("awd_fast.adamerging", "adamerge"),
    "backends": ("awd_fast.ops.backends", "available"),
    "disentangle": ("awd_fast.disentangling", "disentangle"),
    "merge": ("awd_fast.merging", "merge"),
    "merge_checkpoints": ("awd_fast.pipeline", "merge_checkpoints"),
    "merge_models": ("awd_fast.modules", "merge_models"),
    "ops": ("awd_fast.ops", None),
}

__all__ = [
    "DEFAULT_EXCLUDE",
    "PAPER",
    "ROWS",
    "SGD",
    "AdaMerged",
    "Adam",
    "Converge",
    "Disentangled",
    "InputError",
    "MergeReport",
    "RedundantVector",
    "__version__",
    "adamerge",
    "backends",
    "disentangle",
    "merge",
    "merge_checkpoints",
    "merge_models",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'awd_fast' has no attribute {name!r}")
    module, attribute = _LATE[name]
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
