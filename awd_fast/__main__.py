"""`python -m awd_fast` is `awd-fast`."""

from awd_fast.cli import main

main()
