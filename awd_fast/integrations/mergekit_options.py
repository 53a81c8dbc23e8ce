"""A merge's options as parameters of mergekit: their names, their values, and the recipe that they make.

mergekit reads a list in a parameter as a gradient over the layers, and passes over names that no method has. This
module knows nothing of mergekit but that, and does not import it.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from awd_fast.config import PARAMETERS, TEXTS, number
from awd_fast.errors import InputError
from awd_fast.recipe import Recipe, make_recipe

SHARED = (*PARAMETERS, "lambda")
"""Options of the merge as a whole, by the names that they have in `awd-fast merge CONFIG.yml`."""
OF_A_MODEL = "weight"
LISTS = ("include", "exclude", "betas")
"""Options with several values, which mergekit's YAML has as one text with spaces between them."""


def value_of(name: str, value: Any) -> Any:
    """What mergekit calls "validated": a number that YAML 1.1 reads as text, such as 1e-6, as a number.

    All else is checked when the recipe is made, so that what is said of it is what `awd_fast.merge` says.
    """
    return value if name in TEXTS else number(value)


def as_text(value: Any) -> Any:
    """A list of patterns or numbers as one text; anything else as it is."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def check_names(method: str, where: str, names: Collection[str], of_a_model: bool = False) -> None:
    """Raises InputError for a name that mergekit would pass over.

    where: names the table of parameters. of_a_model: whether it is that of a model, where mergekit looks for `weight`
    only.
    """
    for name in names:
        if name != OF_A_MODEL and name not in SHARED:
            known = ", ".join(sorted((*SHARED, OF_A_MODEL)))
            raise InputError(f"{where} has the unknown option {name!r}; {method} has {known}")
        if of_a_model and name != OF_A_MODEL:
            raise InputError(f"{where} has the option {name!r}, which is one of the whole merge; expected weight only")


def recipe_of(
    method: str,
    given: Mapping[str, Any],
    weights: Sequence[Any],
    *,
    dtype: str | None = None,
    device: str = "cpu",
) -> Recipe:
    """The recipe of these parameters; None is an option's default.

    given: options by the names in `SHARED`; others are not looked at. weights: of the models, in order. dtype: of the
    output, by default that of the tensors; device: where these are. Raises InputError as `awd_fast.merge` does.
    """
    options = {name: given[name] for name in SHARED if given.get(name) is not None}
    if "lambda" in options:
        if "scale" in options:
            raise InputError("both scale and lambda are given, which mean the same; expected one of them")
        options["scale"] = options.pop("lambda")
    for name in LISTS:
        if isinstance(options.get(name), str):
            options[name] = tuple(options[name].split() if name in TEXTS else map(number, options[name].split()))
        elif isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    options |= {"method": method, "weights": tuple(weights), "dtype": dtype, "device": device}
    try:
        return _recipe(tuple(options.items()))
    except TypeError:  # a value that is not hashable, which may be right all the same
        return make_recipe(len(weights), **options)


@lru_cache(maxsize=256)
def _recipe(options: tuple[tuple[str, Any], ...]) -> Recipe:
    given = dict(options)
    return make_recipe(len(given["weights"]), **given)
