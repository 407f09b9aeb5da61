"""`leanvocab count`: which vocabulary rows a data set uses."""

import shlex
from dataclasses import dataclass, replace
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
from leanvocab.cli.printing import quiet_libraries, say_where_from
from leanvocab.errors import LeanVocabError, SettingsError
from leanvocab.extras import require
from leanvocab.files.presence import check_new_file

if TYPE_CHECKING:
    from rich.table import Table

    from leanvocab.vocabulary.counts import TokenCounts
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


@dataclass(frozen=True)
class FileOptions:
    """Options that name the files to write."""

    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the partial vocabulary here.")] = None
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw tokens by rank, and what the frequent ones cover, here (.png, .svg, .pdf)."),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write a report here, a page for a browser (.html): coverage, scripts, unused ids, what splits lack, memory."
        ),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over files that are there.")] = False

    def check(self, *, knows_size: bool) -> None:
        """Raises, before long work, for a file that cannot be written or must not be."""
        for path in (self.output, self.plot):
            check_new_file(path, self.overwrite)
        if self.plot is not None:
            require("matplotlib", extra="plot")
        if self.report is not None:
            from leanvocab.reports.html_report import check_page

            check_page(self.report, self.overwrite)
            if not knows_size:
                raise SettingsError("a report tells used rows from all of them: give --tokenizer, or --full-size")


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
    files: FileOptions,
) -> Answer:
    """Count which vocabulary rows a data set uses, and write them as a partial vocabulary."""
    files.check(knows_size=bool(tokenizer or full_size))
    chosen = choice.for_counts(has_tokenizer=tokenizer is not None)
    loaded, config = _load(tokenizer) if tokenizer else (None, None)
    counts = count_data(data, reading, loaded, config)
    used = {name: {"num_tokens": of.num_tokens, "used_rows": len(of.token_ids)} for name, of in counts.items()}
    summary: dict[str, Any] = {"data": data, "splits": used, "rows_to_cover": describe_coverage(all_counts(counts))}
    if counts.tokenized:
        summary["tokenized"] = counts.tokenized
    if tokenizer or full_size or files.output:
        vocabulary = keep(counts, loaded, config, full_size=full_size, **chosen)
        covered = kept_coverage(all_counts(counts), vocabulary)
        summary["vocabulary"] = describe_vocabulary(vocabulary) | covered
        if files.output is not None:
            vocabulary.save(files.output)
            summary["output"] = str(files.output)
            if not covered["missing_tokens"]:
                summary["to_train"] = _to_train(tokenizer, data, vars(reading), files.output)
        if files.report is not None:
            others = {"title": f"Vocabulary of {data}", **_memory(config, vocabulary, reading)}
            _write_report(files.report, counts, vocabulary, loaded, **others)
            summary["report"] = str(files.report)
    if files.plot is not None:
        _write_plot(counts, summary, files.plot)
    return Answer(summary, lambda: _printed(summary))


def _load(tokenizer: str) -> tuple[Any, Any]:
    """The tokenizer, and the config of its model, if there is one."""
    quiet_libraries()
    say_where_from(tokenizer)
    return load_tokenizer(tokenizer), config_beside(tokenizer)


def _write_plot(counts: "dict[str, TokenCounts]", summary: dict[str, Any], plot: Path) -> None:
    from leanvocab.reports.plots import plot_vocabulary_use

    plot_vocabulary_use(all_counts(counts), plot, full_size=summary.get("vocabulary", {}).get("full_rows"))
    summary["plot"] = str(plot)


def _write_report(
    path: Path, counts: "dict[str, TokenCounts]", vocabulary: "PartialVocabulary", tokenizer: Any, **others: Any
) -> None:
    from leanvocab.reports.data_report import report_on_data
    from leanvocab.reports.html_report import write_report

    size, kept = vocabulary.full_size, len(vocabulary)
    write_report(report_on_data(counts, full_size=size, kept_rows=kept, tokenizer=tokenizer, **others), path)


def _memory(config: Any, vocabulary: "PartialVocabulary", reading: DataOptions) -> dict[str, Any]:
    """Fields of a report: what fine-tuning the tokenizer's model holds, or a note that says why that is not known."""
    if config is None:
        return {"notes": ("What training holds is not told: no config of a model lies beside the tokenizer.",)}
    from leanvocab.finetune.pretrained import estimate_run

    try:
        memory = estimate_run(config, vocabulary, reading.settings(), None)
    except LeanVocabError as error:
        return {"notes": (f"What training holds is not told: {error}",)}
    return {"memory": replace(memory, model=Path(config.name_or_path).name or memory.model)}


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
    parts += [f"written to {summary[name]}" for name in ("output", "plot", "report") if name in summary]
    if "to_train" in summary:
        parts.append(f"to train with it: {summary['to_train']}")
    return parts
