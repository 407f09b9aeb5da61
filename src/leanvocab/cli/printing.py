"""Printing that commands share: results and errors, to a person or to a machine."""

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from leanvocab import __version__
from leanvocab.errors import CheckpointError, InterruptedRunError, LeanVocabError, SettingsError, first_line

DEBUG_VARIABLE = "LEANVOCAB_DEBUG"

_TORCH_CANNOT_WRITE = "inline_container.cc"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@contextlib.contextmanager
def clean_errors(as_json: bool, reworded: Callable[[LeanVocabError], str] = str) -> Iterator[None]:
    """Says an error in one message and ends with 1, or with 2 where the command was given wrongly, 130 after Ctrl-C.

    On stderr; as JSON on stdout with `--json`. With `--debug` (or LEANVOCAB_DEBUG=1) the traceback is shown. Everything
    else that libraries print while a command runs goes to stderr: stdout is for results. `reworded` gives the words of an error
    of leanvocab's own.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(DEBUG_VARIABLE) or isinstance(error, typer.Exit):
            raise
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": _message(error, reworded)}})
        else:
            typer.echo(f"error: {_message(error, reworded)}", err=True)
        raise typer.Exit(_exit_code(error)) from None


def _message(error: BaseException, reworded: Callable[[LeanVocabError], str]) -> str:
    if isinstance(error, InterruptedRunError):
        return f"{reworded(error)}\n  {shlex.join(['leanvocab', *_without_overwriting(sys.argv[1:])])}"
    if isinstance(error, LeanVocabError):
        return reworded(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:  # a full disk, no permission: the system's words say it
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if _TORCH_CANNOT_WRITE in str(error):  # torch has no word for a full disk
        return f"a file could not be written to its end, most likely because the disk is full ({first_line(error)})"
    return (
        f"{type(error).__name__}: {first_line(error)}. No error of leanvocab's own foresaw this; --debug (leanvocab --debug …) "
        "shows where it comes from"
    )


def _without_overwriting(arguments: list[str]) -> list[str]:
    kept = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return [*kept, "--resume"]


def _exit_code(error: BaseException) -> int:
    if isinstance(error, InterruptedRunError | KeyboardInterrupt):
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 2 if isinstance(error, SettingsError) else 1


def print_json(value: Any) -> None:
    """One JSON document on stdout; what JSON has no word for (NaN, infinity) is null."""
    plain = json.loads(json.dumps(value, default=os.fspath), parse_constant=lambda _: None)
    typer.echo(json.dumps(plain, indent=2))


def print_rich(*parts: Any) -> None:
    """Tables and lines for a person, on stdout. Brackets are no markup: they may stand in tokens and paths."""
    from rich.console import Console

    console = Console(markup=False)
    for part in parts:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))  # a line to copy is not cut


def quiet_libraries() -> None:
    """transformers and datasets report what they load and save at length; a command has its own summary."""
    import logging as standard

    typer.echo(f"leanvocab {__version__}: loading libraries …", err=True)  # they take seconds
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
