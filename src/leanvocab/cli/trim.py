"""`leanvocab trim`: a checkpoint and its tokenizer with the kept rows alone, for good."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.command import Answer, as_command
from leanvocab.cli.merge import next_step
from leanvocab.errors import CheckpointError, SettingsError
from leanvocab.reports.memory_estimate import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from leanvocab.trimming.export import TrimResult


@dataclass(frozen=True)
class TrimOptions:
    """Options of trimming, by a vocabulary or by a recipe."""

    vocabulary: Annotated[
        Path | None, typer.Option(help="The rows to keep: a file of `leanvocab count -o`, or of vocabulary.save.")
    ] = None
    recipe: Annotated[
        Path | None, typer.Option(help="A trimming.json, to make the same bytes again, in the place of --vocabulary.")
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the tokenizer. By default the base's own.", show_default=False)
    ] = None
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Trim the model alone.")] = False
    pad_to_multiple_of: Annotated[
        int | None, typer.Option(min=1, help="Add rows that no id reaches until their number is a multiple.")
    ] = None
    allow_rounding: Annotated[
        bool, typer.Option("--allow-rounding", help="Round values of DELTA that the base's dtype cannot hold.")
    ] = False
    verify: Annotated[
        list[str] | None,
        typer.Option(
            help="Prove the result before it appears, with a file or folder of texts; several if given so. Loads both models.",
            show_default=False,
        ),
    ] = None
    text_columns: Annotated[
        list[str] | None,
        typer.Option("--text-column", help="Column of these texts; twice for pairs. By default usual names."),
    ] = None
    language_column: Annotated[
        str | None, typer.Option(help="Column of these texts that says the language of each: the proof goes by it.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in the output.")] = False


@as_command
def trim_command(
    *,
    base: Annotated[
        str | None,
        typer.Argument(help="The checkpoint: a folder, or a name in the hub's cache. By default the recipe's."),
    ] = None,
    delta: Annotated[Path | None, typer.Argument(help="Folder of a delta over it, whose rows are taken.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to make; it appears whole or not at all.", show_default=False)
    ],
    options: TrimOptions,
) -> Answer:
    """Make a model and its tokenizer that hold the kept rows alone, for good: smaller on disk, and loaded anywhere."""
    trim = _trimming(base, delta, options)
    try:
        result = trim(output)
    except OSError as error:  # a full disk, a folder that is read-only: nothing has changed
        raise CheckpointError(f"nothing was written: {error}") from error
    proof = None if result.proof is None else result.proof.to_dict()
    summary = vars(result) | {"proof": proof, "to_make_again": _to_make_again(result.output)}
    return Answer(summary, lambda: _printed(result, summary["to_make_again"]))


def _trimming(base: str | None, delta: Path | None, options: TrimOptions) -> Any:
    """What makes the output; raises `SettingsError` where options contradict one another."""
    given = {name: value for name, value in vars(options).items() if value not in (None, False)}
    if ("vocabulary" in given) == ("recipe" in given):
        raise SettingsError("give --vocabulary, the rows to keep, or --recipe, to make the same again: one of the two")
    if options.no_tokenizer and options.tokenizer is not None:
        raise SettingsError("give --tokenizer or --no-tokenizer, not both")
    if options.verify is None and (options.text_columns or options.language_column):
        raise SettingsError("give --verify, the texts that have it, with --text-column and --language-column")
    columns = options.text_columns
    common = {
        "delta": delta,
        "overwrite": options.overwrite,
        "verify": _texts(options.verify),
        "columns": [tuple(columns)] if columns and len(columns) == 2 else columns,
        "language_column": options.language_column,
    }
    if options.recipe is not None:
        of_the_recipe = {"pad_to_multiple_of", "allow_rounding", "no_tokenizer"} & given.keys()
        if of_the_recipe:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(of_the_recipe))
            raise SettingsError(f"the recipe says this: leave {named} out")
        from leanvocab.trimming.export import trim_by_recipe

        recipe = options.recipe
        return lambda output: trim_by_recipe(recipe, output, base=base, tokenizer=options.tokenizer, **common)
    if base is None or options.vocabulary is None:
        raise SettingsError("give BASE, the checkpoint to trim: a folder, or a name in the hub's cache")
    from leanvocab.trimming.export import export_trimmed

    vocabulary, tokenizer = options.vocabulary, False if options.no_tokenizer else options.tokenizer
    common |= {name: given[name] for name in ("pad_to_multiple_of", "allow_rounding") if name in given}
    return lambda output: export_trimmed(base, vocabulary, output, tokenizer=tokenizer, **common)


def _texts(paths: list[str] | None) -> Any:
    """Texts of all paths; None where there are none."""
    if not paths:
        return None
    from leanvocab.cli.printing import quiet_libraries
    from leanvocab.texts.data_files import load_splits

    quiet_libraries()
    if len(paths) == 1:
        return paths[0]
    return {f"{path} {name}": split for path in paths for name, split in load_splits(path).items()}


def _to_make_again(output: Path) -> str:
    return shlex.join(["leanvocab", "trim", "--recipe", str(output / "trimming.json"), "--output", "OUTPUT"])


def _printed(result: "TrimResult", to_make_again: str) -> "list[Table | str]":
    from rich.table import Column, Table

    if result.already_there:
        return [f"{result.output} is this trimming's result already; nothing was written", *next_step(result.output)]
    grid = Table("", Column(overflow="fold"), title=str(result.output), show_header=False)
    ratio = result.rows_after / result.rows_before
    grid.add_row("rows", f"{result.rows_after:,} of {result.rows_before:,} ({ratio:.1%})")
    for number, why in (
        (result.rows_for_model, "beside those given, which the model inserts or computes with"),
        (result.rows_for_splits, "that the tokenizer needs, so that what is kept splits as it did"),
        (result.rows_of_padding, "of padding at the end"),
    ):
        if number:
            grid.add_row("", f"{number:,} {why}")
    grid.add_row("weights", f"{format_bytes(result.bytes_after)} of {format_bytes(result.bytes_before)}")
    grid.add_row("tensors that were cut", ", ".join(result.tensors))
    grid.add_row("tokenizer", ", ".join(result.tokenizer_files) or "none")
    if result.left_out:
        grid.add_row("left out", ", ".join(result.left_out))
    proof = [] if result.proof is None else result.proof.printed()
    return [grid, *proof, *next_step(result.output), f"to make it again: {to_make_again}"]
