"""Every kind of merge, for what must hold of all: of resuming, of memory, of several processes."""

import awd_fast

SGD = {"similarity": "absolute", "optimizer": awd_fast.SGD()}
OPTIONS = {
    "row": SGD,
    "column": SGD | {"groups": "column"},
    "tensor": SGD | {"groups": "tensor"},
    "global": awd_fast.PAPER,
    "converge": {"optimizer": awd_fast.Converge(), "similarity": "squared"},
    "adam": {"similarity": "absolute", "optimizer": awd_fast.Adam(iterations=5)},
    "adam global": {"similarity": "absolute", "groups": "global", "optimizer": awd_fast.Adam(iterations=3)},
    "wudi": {"method": "wudi"},
    "wudi columns": {"method": "wudi", "columns": 40, "scale": 1.3, "others_scale": 0.6, "weights": (1.0, -0.5)},
    "average": {"method": "average", "dtype": "bfloat16"},
}


def least_memory(options: dict, usual: float) -> float:
    """GB: what is solved as a whole takes more than the usual."""
    if options.get("method") == "wudi":
        return 6e-3
    return 2e-4 if isinstance(options.get("optimizer"), awd_fast.Adam) else usual
