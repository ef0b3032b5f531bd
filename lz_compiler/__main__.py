"""`python -m lz_compiler` is `lz`."""

from .cli import main

main()
