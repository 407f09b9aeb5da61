"""`python -m leanvocab` is `leanvocab`."""

from leanvocab.cli import main

main()
