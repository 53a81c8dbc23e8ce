"""Replacing functions of another package for as long as the user wants, and putting back what was there.

A place is an attribute of a class or an object; for each there is a function that makes the replacement of what is
found there. What was replaced is kept on the replacement itself, where it is found again when a module was reloaded.
"""

from collections.abc import Callable, Mapping
from typing import Any

Places = Mapping[tuple[Any, str], Callable[[Any], Any]]
BEFORE = "before_awd_fast"
"""The attribute of a replacement that holds what the place itself had; None where it had it from its class."""


def replace(places: Places) -> None:
    """Replaces what is not replaced yet."""
    for (place, name), make in places.items():
        present = getattr(place, name)
        if not hasattr(present, BEFORE):
            replacement = make(present)
            setattr(replacement, BEFORE, vars(place).get(name))
            setattr(place, name, replacement)


def put_back(places: Places) -> None:
    """Puts back what was replaced; nothing happens where nothing was."""
    for place, name in places:
        present = vars(place).get(name)
        if not hasattr(present, BEFORE):
            continue
        before = getattr(present, BEFORE)
        if before is None:
            delattr(place, name)
        else:
            setattr(place, name, before)


def replaced(places: Places) -> bool:
    """Whether all are replaced now."""
    return all(hasattr(getattr(place, name), BEFORE) for place, name in places)
