"""`leanvocab count`: which vocabulary rows a data set uses."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.corpus import (
    DATA_HELP,
    ConfigName,
    MaxLength,
    TextColumns,
    TokenColumns,
    config_beside,
    count_data,
    keep,
    load_tokenizer,
)
from leanvocab.cli.shell import AsJson, check_new_file, clean_errors, print_json, print_rich, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table


def count(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of the text: a folder, or a name on the hub.")
    ] = None,
    config_name: ConfigName = None,
    text_columns: TextColumns = None,
    token_columns: TokenColumns = None,
    max_length: MaxLength = None,
    full_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of the full vocabulary. By default those of the tokenizer's model.")
    ] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Keep ids that occur at least so often.")] = 1,
    always_keep: Annotated[
        list[int] | None, typer.Option(help="Token id to keep in any case; several if given so.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the partial vocabulary here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over the output file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count which vocabulary rows a data set uses, and write them as a partial vocabulary."""
    with clean_errors(as_json):
        check_new_file(output, overwrite)
        if tokenizer:
            quiet_libraries()
        loaded = load_tokenizer(tokenizer) if tokenizer else None
        counts = count_data(data, config_name, text_columns, token_columns, loaded, max_length)
        config = config_beside(tokenizer) if tokenizer else None
        summary: dict[str, Any] = {
            "data": data,
            "splits": {
                name: {"num_tokens": each.num_tokens, "used_rows": len(each.token_ids)} for name, each in counts.items()
            },
        }
        if tokenizer or full_size or output:
            vocabulary = keep(
                counts, loaded, config, full_size=full_size, min_count=min_count, always_keep=always_keep or ()
            )
            summary["vocabulary"] = {
                "kept_rows": len(vocabulary),
                "full_rows": vocabulary.full_size,
                "kept_ratio": len(vocabulary) / vocabulary.full_size,
                "digest": vocabulary.digest,
            }
            if output is not None:
                vocabulary.save(output)
                summary["output"] = str(output)
    if as_json:
        print_json(summary)
    else:
        print_rich(*_tables(summary))


def _tables(summary: dict[str, Any]) -> "list[Table | str]":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(summary["data"]))
    table.add_column("split")
    table.add_column("tokens", justify="right")
    table.add_column("rows used", justify="right")
    for name, split in summary["splits"].items():
        table.add_row(escape(name), f"{split['num_tokens']:,}", f"{split['used_rows']:,}")
    parts: list[Table | str] = [table]
    if vocabulary := summary.get("vocabulary"):
        parts.append(
            f"kept with special ids: {vocabulary['kept_rows']:,} of {vocabulary['full_rows']:,} rows "
            f"({vocabulary['kept_ratio']:.1%})"
        )
    if "output" in summary:
        parts.append(f"written to {escape(summary['output'])}")
    return parts
