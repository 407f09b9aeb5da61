"""The front of the command line: `leanvocab COMMAND`."""

import os
from typing import Annotated

import typer

from leanvocab._version import __version__
from leanvocab.cli import count, estimate, finetune, info, merge
from leanvocab.cli.shell import DEBUG_VARIABLE

app = typer.Typer(
    name="leanvocab",
    help="Fine-tune language models with only the vocabulary rows that the data uses; get the whole model back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("count")(count.count)
app.command("estimate")(estimate.estimate)
app.command("finetune")(finetune.finetune)
app.command("merge")(merge.merge)
app.command("info")(info.info)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"leanvocab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def main() -> None:
    """The entry point `leanvocab`."""
    app()
