"""`python -m onetrunk` is the command line."""

from .cli.app import main

main()
