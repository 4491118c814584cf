"""`python -m dressage` is `dressage`."""

from dressage.cli import main

main()
