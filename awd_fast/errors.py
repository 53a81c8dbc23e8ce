"""The one exception that means: what the caller gave cannot be merged."""


class InputError(ValueError):
    """The caller's input is wrong; the message is one sentence: what, where (file, tensor), what was expected.

    The command line prints the message and exits with code 2; nothing has been written when it is raised.
    """
