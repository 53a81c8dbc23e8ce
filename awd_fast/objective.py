"""What is minimised, and how: the objective of AWD and the options of its optimisers.

The redundant vector d of a group of K task vectors t_i minimises (arXiv 2411.18729, equations 9 to 11)

    L(d) = mean over pairs i < j, and over groups, of |cos(t_i - d, t_j - d)|  +  alpha * sum over groups of R(d)

Every variant is a frozen dataclass that checks itself when it is made, so that no later code meets a bad option.
This module imports no torch: the command line reads it to print its help.
"""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from awd_fast.errors import InputError

Groups = Literal["row", "column", "tensor", "global"]
Similarity = Literal["absolute", "squared"]
Penalty = Literal["none", "l2", "squared_l2", "l1"]
MOST_ITERATIONS = 10_000_000


def _choice(name: str, value: object, allowed: Any) -> None:
    if value not in get_args(allowed):
        options = ", ".join(get_args(allowed))
        raise InputError(f"{name} is {value!r}; expected one of {options}")


def _number(options: object, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Checks the option `name` and stores it as a float, so that 1 and 1.0 are the same option."""
    value = getattr(options, name)
    object.__setattr__(options, name, real(name, value))
    if not (low < value if open_low else low <= value) or not value < high:
        raise InputError(f"{name} is {value!r}; expected a number in {'(' if open_low else '['}{low}, {high})")


def real(name: str, value: object) -> float:
    """`value` as a float. Raises InputError where it is not a finite number."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} is {value!r}; expected a finite number")
    return number


def whole(name: str, value: object, most: int) -> int:
    """`value` as an int. Raises InputError where it is not an integer from 0 to `most`."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else -1
    if not 0 <= number <= most:
        raise InputError(f"{name} is {value!r}; expected an integer from 0 to {most}")
    return number


def _count(options: object, name: str) -> None:
    """Checks the option `name` and stores it as an int. The bound keeps a typing error from filling the memory."""
    object.__setattr__(options, name, whole(name, getattr(options, name), MOST_ITERATIONS))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of one parameter's groups.

    similarity: "absolute" is |cos| (equation 9), "squared" is cos^2.
    penalty: R(d), the Euclidean norm "l2", its square "squared_l2" (no factor 1/2), the sum of absolute values "l1",
        or "none"; summed over the groups.
    alpha: weight of the penalty, at least 0.
    eps: added to every norm in the denominator of a cosine, in units of the task vectors; a zero vector has cosine 0.
    """

    similarity: Similarity = "absolute"
    penalty: Penalty = "l2"
    alpha: float = 1e-6
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _choice("similarity", self.similarity, Similarity)
        _choice("penalty", self.penalty, Penalty)
        _number(self, "alpha", 0.0, math.inf)
        _number(self, "eps", 0.0, math.inf)

    @property
    def euclidean(self) -> bool:
        """True where the penalty's gradient is a multiple of d, so that gradient steps stay in the vectors' span."""
        return self.penalty != "l1" or self.alpha == 0.0


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Gradient descent with the semantics of `torch.optim.SGD` (dampening 0), from d = 0.

    lr: step size, in units of (task vector)^2 per unit of loss. The defaults are the AWD authors' (later code).
    """

    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    iterations: int = 300

    def __post_init__(self) -> None:
        _number(self, "lr", 0.0, math.inf)
        _number(self, "momentum", 0.0, 1.0)
        _number(self, "weight_decay", 0.0, math.inf)
        _count(self, "iterations")
        if not isinstance(self.nesterov, bool):
            raise InputError(f"nesterov is {self.nesterov!r}; expected True or False")
        if self.nesterov and self.momentum == 0.0:
            raise InputError("nesterov needs a momentum above 0, got momentum 0")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (arXiv 1412.6980) with the semantics of `torch.optim.Adam`, from d = 0.

    lr: step size, in units of the task vectors' elements. Steps have a fixed size per element whatever the gradient,
        so an lr near the root mean square of those elements leaves noise in d that the merge multiplies by K.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    iterations: int = 300

    def __post_init__(self) -> None:
        _number(self, "lr", 0.0, math.inf)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise InputError(f"betas is {self.betas!r}; expected two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(real("betas", beta) for beta in self.betas))
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise InputError(f"betas is {self.betas!r}; expected two numbers in [0, 1)")
        _number(self, "eps", 0.0, math.inf, open_low=True)
        _number(self, "weight_decay", 0.0, math.inf)
        _count(self, "iterations")


@dataclass(frozen=True, kw_only=True)
class Converge:
    """Minimise to convergence, with no step size to tune to the norms of the task vectors.

    tolerance: how near to a local minimum a group's mean similarity must be (the criterion: `awd_fast.converge`).
    max_iterations: upper bound on the Newton steps of one group on each of the ways that are tried.
    """

    tolerance: float = 1e-6
    max_iterations: int = 200

    def __post_init__(self) -> None:
        _number(self, "tolerance", 0.0, 1.0, open_low=True)
        _count(self, "max_iterations")


Optimizer = SGD | Adam | Converge

OPTIMIZERS: dict[str, type[SGD] | type[Adam] | type[Converge]] = {"sgd": SGD, "adam": Adam, "converge": Converge}


def make_optimizer(name: str, **options: Any) -> Optimizer:
    """The optimiser called `name` ("sgd", "adam", "converge") with those of its options that are not None.

    Raises InputError for an unknown name or an option that this optimiser does not have.
    """
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise InputError(f"optimizer is {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    given = {key: value for key, value in options.items() if value is not None}
    known = {f.name for f in fields(kind)}
    for key in given:
        if key not in known:
            raise InputError(f"optimizer {name} has no option {key}; it has {', '.join(sorted(known))}")
    return kind(**given)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that decides the redundant vector: which elements form a group, the objective, the optimiser.

    Objective and optimiser have to be given: what a user gets who gives none is in `awd_fast.defaults`.
    """

    groups: Groups = "row"
    objective: Objective
    optimizer: Optimizer

    def __post_init__(self) -> None:
        _choice("groups", self.groups, Groups)
        if not isinstance(self.optimizer, (SGD, Adam, Converge)):
            raise InputError(f"optimizer is {self.optimizer!r}; expected awd_fast.SGD, Adam or Converge")

    @property
    def spans(self) -> bool:
        """True where d stays in the span of the task vectors, so that K numbers per group describe it."""
        return self.objective.euclidean and not isinstance(self.optimizer, Adam)

    @property
    def fuses(self) -> bool:
        """True where groups fit a cache besides, so that one pass over the data does everything."""
        return self.spans and self.groups in ("row", "column")


PAPER: dict[str, Any] = {
    "groups": "global",
    "similarity": "absolute",
    "penalty": "l2",
    "alpha": 0.1,
    "eps": 1e-8,
    "optimizer": SGD(lr=0.01, momentum=0.0, weight_decay=0.0, nesterov=False, iterations=300),
    "include": ("*",),
    "exclude": (),
}
"""AWD as published (equations 9 to 11, algorithm 1): one group over all floating tensors, gradient descent."""

ROWS: dict[str, Any] = {
    "groups": "row",
    "similarity": "absolute",
    "penalty": "l2",
    "alpha": 1e-6,
    "eps": 1e-8,
    "optimizer": SGD(lr=1e-4, momentum=0.9, weight_decay=1e-4, nesterov=False, iterations=300),
}
"""The options of the AWD authors' later code: rows of the 2-D weights, momentum, a small penalty."""

PRESETS: dict[str, dict[str, Any]] = {"paper": PAPER, "rows": ROWS}
