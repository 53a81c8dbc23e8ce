"""The one exception that means: what the caller gave cannot be merged."""

LONGEST = 800
"""Characters of a message: names and values come from files, and may be of any length."""


class InputError(ValueError):
    """The caller's input is wrong; the message is one sentence: what, where (file, tensor), what was expected.

    The command line prints the message and exits with code 2; nothing has been written when it is raised. Characters
    that cannot be printed are escaped, and of a message that is too long the middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = _shortened(message)
        if not line.isprintable():
            line = _shortened("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))
        super().__init__(line)


class MissingPackage(InputError, ImportError):
    """What was asked for needs a package that is not installed here, or another version of it."""


def _shortened(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"
