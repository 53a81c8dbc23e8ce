"""awd_fast inside other packages. The core never imports them; a module here is imported by who uses its package."""

import re
from importlib.metadata import PackageNotFoundError, version

from awd_fast.errors import MissingPackage

MERGEKIT = ("mergekit", "0.1.5", "0.2")
FUSION_BENCH = ("fusion_bench", "0.2.33", "0.3")
"""What `require` takes, for the modules that need these packages."""


def require(package: str, least: str, below: str) -> None:
    """Raises MissingPackage where `package` is not installed, or in a version outside [least, below).

    Versions are compared by their numbers alone: a pre-release counts as the release it comes before.
    """
    advice = f"pip install 'awd_fast[{package}]' brings {package}>={least},<{below}"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise MissingPackage(f"{package} is not installed; {advice}") from None
    if not _numbers(least) <= _numbers(found) < _numbers(below):
        raise MissingPackage(f"{package} {found} is installed, which awd_fast was not made for; {advice}")


def _numbers(text: str) -> tuple[int, ...]:
    numbers = re.match(r"[0-9]+(\.[0-9]+)*", text)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    return tuple(parts + [0] * (3 - len(parts)))
