"""The commands. Nothing heavy is imported before a command runs, so that `leanvocab --help` answers at once."""

from leanvocab.cli.app import app as main

__all__ = ["main"]
