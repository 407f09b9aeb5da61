"""Printing that commands share: results and errors, to a person or to a machine."""

import contextlib
import json
import logging as standard
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from leanvocab import __version__
from leanvocab.errors import (
    InterruptedRunError,
    LeanVocabError,
    LeanVocabWarning,
    SettingsError,
    first_line,
)
from leanvocab.files.presence import is_there

DEBUG_VARIABLE = "LEANVOCAB_DEBUG"

# Of torchao and bitsandbytes, where they are installed, which others import: of kernels that this machine has no use for. And of
# the hub's client: each of its attempts, where an error says at the end what came of them.
_LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu", "huggingface_hub.utils._http")
_TORCH_CANNOT_WRITE = "inline_container.cc"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@contextlib.contextmanager
def clean_errors(as_json: bool, reworded: Callable[[LeanVocabError], str] = str) -> Iterator[None]:
    """Says an error in one message and ends with 1, or with 2 where the command was given wrongly, 130 after Ctrl-C.

    On stderr; as JSON on stdout with `--json`. With `--debug` (or LEANVOCAB_DEBUG=1) the traceback is shown, and other packages'
    warnings are. Everything else that libraries print while a command runs goes to stderr: stdout is for results. `reworded`
    gives the words of an error of leanvocab's own.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), only_own_warnings():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(DEBUG_VARIABLE) or isinstance(error, typer.Exit):
            raise
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": _message(error, reworded)}})
        else:
            typer.echo(f"error: {_message(error, reworded)}", err=True)
        raise typer.Exit(_exit_code(error)) from None


@contextlib.contextmanager
def only_own_warnings() -> Iterator[None]:
    """Within the block leanvocab's warnings are shown in a line each, and those of other packages are not: a user of the command
    can do nothing about them."""
    if os.environ.get(DEBUG_VARIABLE):
        yield
        return
    shows, writes = warnings.showwarning, warnings.formatwarning

    def show(message: Any, category: type[Warning], *where: Any) -> None:
        if issubclass(category, LeanVocabWarning):
            shows(message, category, *where)

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for name in _LOGGERS:
        standard.getLogger(name).setLevel(standard.ERROR)
    try:
        yield
    finally:
        warnings.showwarning, warnings.formatwarning = shows, writes


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


class Note(str):
    """A sentence of the library's for a person, which a command says in the names of its options."""


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


def folded_at_dots(name: str, width: int) -> str:
    """A long name or path in lines of at most `width`, broken behind dots, slashes and underscores: rich breaks it anywhere."""
    lines = [""]
    for part in re.findall(r"[^./_]*[./_]?", name):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def quiet_libraries(*, quiet: bool = False) -> None:
    """transformers and datasets report what they load and save at length; a command has its own summary.

    With `quiet` there are neither bars nor a sign that they are loading.
    """
    if not quiet:
        typer.echo(f"leanvocab {__version__}: loading libraries …", err=True)  # they take seconds
    from transformers import logging

    logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
        with contextlib.suppress(ImportError):
            import datasets

            datasets.disable_progress_bars()


def say_where_from(*names: str) -> None:
    """Say which names are looked for on the hub: where it cannot be reached, that takes a while."""
    for name in names:
        if not is_there(name):
            typer.echo(f"{name} is no file or folder here: asking the hub …", err=True)
