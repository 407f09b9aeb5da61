"""The front of the command line: `leanvocab COMMAND`."""

import os
from typing import Annotated

import typer

from leanvocab import __version__
from leanvocab.cli.count import count_command
from leanvocab.cli.estimate import estimate_command
from leanvocab.cli.finetune import finetune_command
from leanvocab.cli.info import info_command
from leanvocab.cli.merge import delta_command, merge_command
from leanvocab.cli.options import ForgivingCommand
from leanvocab.cli.printing import DEBUG_VARIABLE
from leanvocab.cli.trim import trim_command

# In the help each paragraph is a line.
_FIRST_WORDS = "\n\n".join(
    (
        "For a start (MODEL is a folder, or a name on the hub; DATA.csv has the columns text and label):",
        "leanvocab estimate MODEL --data DATA.csv",
        "leanvocab finetune MODEL DATA.csv --validation-ratio 0.1 -o out",
        "leanvocab finetune MODEL CHATS.jsonl --task causal-lm --lora -o adapter",
        "leanvocab delta out MODEL small",
        "leanvocab merge MODEL small whole",
        "leanvocab count DATA.csv --tokenizer MODEL -o v.json",
        "leanvocab finetune MODEL DATA.csv --vocabulary v.json -o out",
        "leanvocab trim out --vocabulary v.json -o small",
        "A command says the next step at its end, and after Ctrl-C the line that goes on.",
    )
)
app = typer.Typer(
    name="leanvocab",
    help="Fine-tune language models with only the vocabulary rows that the data uses; get the whole model back.",
    epilog=_FIRST_WORDS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for name, command in {
    "count": count_command,
    "estimate": estimate_command,
    "finetune": finetune_command,
    "merge": merge_command,
    "delta": delta_command,
    "trim": trim_command,
    "info": info_command,
}.items():
    app.command(name, cls=ForgivingCommand)(command)


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
