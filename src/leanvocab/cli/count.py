"""`leanvocab count`: which vocabulary rows a data set uses."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.command import Answer, as_command, flag_of
from leanvocab.cli.data_counts import (
    DATA_HELP,
    ChoiceOptions,
    DataOptions,
    all_counts,
    config_beside,
    count_data,
    describe_coverage,
    describe_vocabulary,
    keep,
    kept_coverage,
    load_tokenizer,
)
from leanvocab.cli.printing import check_new_file, quiet_libraries, say_where_from
from leanvocab.extras import require

if TYPE_CHECKING:
    from rich.table import Table

    from leanvocab.vocabulary.counts import TokenCounts


@as_command
def count_command(
    *,
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of the text: a folder, or a name on the hub.")
    ] = None,
    reading: DataOptions,
    full_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of the full vocabulary. By default those of the tokenizer's model.")
    ] = None,
    choice: ChoiceOptions,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the partial vocabulary here.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw tokens by rank, and what the frequent ones cover, here (.png, .svg, .pdf)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over the output file.")] = False,
) -> Answer:
    """Count which vocabulary rows a data set uses, and write them as a partial vocabulary."""
    for path in (output, plot):
        check_new_file(path, overwrite)
    if plot is not None:
        require("matplotlib", extra="plot")
    chosen = choice.for_counts(has_tokenizer=tokenizer is not None)
    loaded = config = None
    if tokenizer:
        quiet_libraries()
        say_where_from(tokenizer)
        loaded, config = load_tokenizer(tokenizer), config_beside(tokenizer)
    counts = count_data(data, reading, loaded, config)
    used = {name: {"num_tokens": of.num_tokens, "used_rows": len(of.token_ids)} for name, of in counts.items()}
    summary: dict[str, Any] = {"data": data, "splits": used, "rows_to_cover": describe_coverage(all_counts(counts))}
    if counts.tokenized:
        summary["tokenized"] = counts.tokenized
    if tokenizer or full_size or output:
        vocabulary = keep(counts, loaded, config, full_size=full_size, **chosen)
        covered = kept_coverage(all_counts(counts), vocabulary)
        summary["vocabulary"] = describe_vocabulary(vocabulary) | covered
        if output is not None:
            vocabulary.save(output)
            summary["output"] = str(output)
            if not covered["missing_tokens"]:
                summary["to_train"] = _to_train(tokenizer, data, vars(reading), output)
    if plot is not None:
        _write_plot(counts, summary, plot)
    return Answer(summary, lambda: _printed(summary))


def _write_plot(counts: "dict[str, TokenCounts]", summary: dict[str, Any], plot: Path) -> None:
    from leanvocab.reports.plots import plot_vocabulary_use

    plot_vocabulary_use(all_counts(counts), plot, full_size=summary.get("vocabulary", {}).get("full_rows"))
    summary["plot"] = str(plot)


def _to_train(tokenizer: str | None, data: str, options: dict[str, Any], output: Path) -> str:
    """The command that trains with the vocabulary, to copy: it reads the same data by the same options."""
    words = ["leanvocab", "finetune", tokenizer or "MODEL", data]
    for name, value in options.items():
        if name != "token_columns" and value:
            flag = flag_of(name)
            for each in value if isinstance(value, list) else [value]:
                words += [flag] if each is True else [flag, str(each)]
    return shlex.join([*words, "--vocabulary", str(output), "--output-dir", "OUTPUT"])


def _printed(summary: dict[str, Any]) -> "list[Table | str]":
    from rich.table import Column, Table

    numbers = (Column(heading, justify="right") for heading in ("tokens", "rows used"))
    grid = Table("split", *numbers, title=summary["data"])
    for name, split in summary["splits"].items():
        grid.add_row(name, f"{split['num_tokens']:,}", f"{split['used_rows']:,}")
    covering = Table(*(Column(heading, justify="right") for heading in ("tokens covered", "by rows")))
    for percent, num_rows in summary["rows_to_cover"].items():
        covering.add_row(f"{percent} %", f"{num_rows:,}")
    parts: list[Table | str] = [grid, covering]
    if vocabulary := summary.get("vocabulary"):
        parts.append(
            f"kept with special ids: {vocabulary['kept_rows']:,} of {vocabulary['full_rows']:,} rows "
            f"({vocabulary['kept_ratio']:.1%})"
        )
        if missing := vocabulary["missing_tokens"]:
            parts.append(
                f"{missing:,} of the counted tokens are not kept: a vocabulary for trimming, with which training on these data "
                "would be an error"
            )
    parts += [f"written to {summary[name]}" for name in ("output", "plot") if name in summary]
    if "to_train" in summary:
        parts.append(f"to train with it: {summary['to_train']}")
    return parts
