"""Printing that commands share: results and errors, to a person or to a machine."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from leanvocab.errors import CheckpointError, LeanVocabError, SettingsError

DEBUG_VARIABLE = "LEANVOCAB_DEBUG"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@contextlib.contextmanager
def clean_errors(as_json: bool) -> Iterator[None]:
    """Says an error of leanvocab in one message and exits with 1, or with 2 where the command was given wrongly.

    On stderr; as JSON on stdout with `--json`. With `--debug` (or LEANVOCAB_DEBUG=1) the traceback is shown. Everything
    else that libraries print while a command runs goes to stderr: stdout is for results.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except LeanVocabError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, SettingsError) else 1) from None


def print_json(value: Any) -> None:
    """One JSON document on stdout; what JSON has no word for (NaN) is null."""
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def print_rich(*parts: Any) -> None:
    """Tables and lines for a person, on stdout."""
    from rich.console import Console

    console = Console()
    for part in parts:
        console.print(part, highlight=False)


def quiet_libraries() -> None:
    """transformers and datasets report what they load and save at length; a command has its own summary."""
    import logging as standard

    # torchao and bitsandbytes, where they are installed, which others import: of kernels that this machine has no use for.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu"):
        standard.getLogger(name).setLevel(standard.ERROR)
    from transformers import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        with contextlib.suppress(ImportError):
            import datasets

            datasets.disable_progress_bars()


def check_new_file(path: Path | None, overwrite: bool) -> None:
    """Before long work: a file to write is not there yet, and its folder is.

    Raises:
        CheckpointError: it is there and not to be overwritten, or cannot be written.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise CheckpointError(f"cannot write {path}: it is a folder")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} is there already; give --overwrite, or name another")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and value != value else value  # NaN is not itself
