"""Data on the command line, tokenized or as text → counts, and the vocabulary to keep."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.errors import DataError, ModelError, VocabularyError, first_line
from leanvocab.finetune.settings import FineTuneSettings

if TYPE_CHECKING:
    from leanvocab.vocabulary.counts import TokenCounts
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

DATA_HELP = (
    "A CSV, JSON lines, Parquet or text file, a folder of them with splits in their names, or a name on the hub; "
    "tokenized, or as text with a tokenizer."
)


TokenColumns = Annotated[
    list[str] | None,
    typer.Option("--token-column", help="Column with token ids of tokenized data; several if given so."),
]


Validation = Annotated[Path | None, typer.Option(help="File of the validation split.")]
Test = Annotated[Path | None, typer.Option(help="File of a test split, to count its tokens too.")]


@dataclass(frozen=True)
class DataOptions:
    """Options that say what is read beside the data, and how."""

    validation: Validation = None
    test: Test = None
    config_name: Annotated[str | None, typer.Option(help="Configuration of the data set, such as cola in glue.")] = None
    text_columns: Annotated[
        list[str] | None,
        typer.Option("--text-column", help="Column with the text; twice for pairs. By default usual names."),
    ] = None
    token_columns: TokenColumns = None
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens to which a text, or a pair, is cut. By default none is cut; for language models as finetune does.",
        ),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            help="Task that the text is for: causal-lm (chats, prompts with completions, texts), seq2seq-lm or masked-lm. "
            "By default single texts or pairs are counted, whatever their labels."
        ),
    ] = None
    prompt_column: Annotated[str | None, typer.Option(help="Column with prompts, or sources (seq2seq-lm).")] = None
    completion_column: Annotated[str | None, typer.Option(help="Column with completions, or targets.")] = None
    messages_column: Annotated[str | None, typer.Option(help="Column with chats.")] = None
    chat_template_kwargs: Annotated[str | None, typer.Option(help="Values for the chat template, as JSON.")] = None
    max_target_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens to which a target is cut (seq2seq-lm), as finetune does.")
    ] = None
    packing: Annotated[bool, typer.Option("--packing", help="Join and cut texts, as finetune does (causal-lm).")] = (
        False
    )

    def settings(self) -> FineTuneSettings:
        """The same options, as a run has them; raises SettingsError where they contradict each other."""
        of_runs = {field.name for field in fields(FineTuneSettings)}
        return FineTuneSettings(**{name: value for name, value in vars(self).items() if name in of_runs and value})


def source_of(
    data: Any, validation: Path | None, test: Path | None, config_name: str | None, texts: Collection[str]
) -> Any:
    """What `load_splits` takes: the data, with files of their own for other splits."""
    from leanvocab.texts.data_files import load_splits

    files = {name: file for name, file in (("validation", validation), ("test", test)) if file is not None}
    if not files:
        return data
    splits = load_splits(data, config_name, texts)
    splits.update(files)  # in place: the splits know what was made strings in their files
    return splits


@dataclass(frozen=True)
class ChoiceOptions:
    """Options that choose which of the counted ids are kept, and which others."""

    min_count: Annotated[int, typer.Option(min=1, help="Keep ids that occur at least so often.")] = 1
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Keep the most frequent ids, up to so many percent of the tokens (99.9, say). By default all."
        ),
    ] = None
    keep_scripts: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-script",
            help="Script of Unicode whose tokens are all kept: Latin, Han, …; Common has digits and signs. Several if given so.",
        ),
    ] = None
    always_keep: Annotated[
        list[int] | None, typer.Option(help="Token id to keep in any case; several if given so.")
    ] = None

    def for_counts(self, *, has_tokenizer: bool) -> dict[str, Any]:
        """The same, as `PartialVocabulary.from_counts` takes them; raises VocabularyError for what no counts could meet."""
        from leanvocab.vocabulary.coverage import check_coverage
        from leanvocab.vocabulary.scripts import check_scripts

        if self.coverage is not None:
            check_coverage(self.coverage)
        scripts = check_scripts(self.keep_scripts or ())
        if scripts and not has_tokenizer:
            raise VocabularyError("keep_scripts needs the tokenizer, which says what a token is: give --tokenizer")
        return vars(self) | {"keep_scripts": scripts, "always_keep": self.always_keep or ()}


class CountedSplits(dict[str, "TokenCounts"]):
    """Counts of each split; `tokenized` says how texts were counted, None where they were not, or by a task."""

    tokenized: str | None = None


def count_data(data: Any, options: DataOptions, tokenizer: Any, config: Any = None) -> CountedSplits:
    """Counts of each split; `config` is that of the tokenizer's model, which may take texts of some length alone.

    Raises:
        DataError: there are neither token ids nor text with a tokenizer, or the tokenizer does not know the text.
        SettingsError: the options contradict each other.
    """
    settings = options.settings()
    from leanvocab.texts.data_files import load_splits
    from leanvocab.vocabulary.counts import count_tokens

    source = source_of(data, options.validation, options.test, options.config_name, settings.texts)
    splits = load_splits(source, options.config_name, settings.texts)
    first = next(iter(splits.values()))
    if options.token_columns or (not options.text_columns and "input_ids" in first.column_names):
        return CountedSplits(
            (name, count_tokens(split, options.token_columns or None)) for name, split in splits.items()
        )
    if tokenizer is None:
        raise DataError(
            f"{data} holds no column input_ids but {', '.join(first.column_names)}: name the columns of token ids "
            "(--token-column), or the tokenizer of its text (--tokenizer)"
        )
    if not settings.is_language_model:
        return _count_texts(splits, settings.text_columns, tokenizer, options.max_length)
    from leanvocab.finetune.pretrained import fit_lengths
    from leanvocab.finetune.reading import read_examples

    train = settings.train_split if settings.train_split in splits else next(iter(splits))
    lengths, _ = fit_lengths(settings, config, tokenizer)
    examples = read_examples(splits, tokenizer, replace(settings, train_split=train, **lengths))
    for said in splits.said_of_strings(examples.columns):
        typer.echo(said, err=True)
    by_task = examples.encoded.items()
    return CountedSplits((name, count_tokens(split, examples.task.token_columns)) for name, split in by_task)


def _count_texts(splits: Any, wanted: tuple[str, ...], tokenizer: Any, max_length: int | None) -> CountedSplits:
    """Counts of texts and pairs, whatever their labels; nothing of a run is loaded for it."""
    from leanvocab.texts.counting import count_tokens, way_of_counting
    from leanvocab.texts.fitting import ROWS_LOOKED_AT, check_known
    from leanvocab.texts.text_columns import check_texts, find_text_columns, tokenize

    text_columns = find_text_columns(next(iter(splits.values())), wanted)
    for said in splits.said_of_strings(text_columns):
        typer.echo(said, err=True)
    for name, split in splits.items():
        check_texts(name, split, text_columns)
        first = split.select(range(min(ROWS_LOOKED_AT, len(split))))
        check_known(name, tokenize(first, name, text_columns, tokenizer, max_length), tokenizer)
    columns: Any = [text_columns] if len(text_columns) == 2 else text_columns
    counts = CountedSplits()
    for name, split in splits.items():
        counts[name] = count_tokens(split, columns, tokenizer=tokenizer, max_length=max_length)
    counts.tokenized = way_of_counting(tokenizer, max_length)
    return counts


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or a name on the hub.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what lies in its files: readers raise whatever they meet
        raise ModelError(f"there is no tokenizer in {name!r}: {first_line(error)}") from error


def config_beside(name: str) -> Any:
    """The model config that lies beside a tokenizer: it knows the rows of the embeddings. None where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception:  # what lies in its files: readers raise whatever they meet
        return None


def all_counts(counts: "dict[str, TokenCounts]") -> "TokenCounts":
    """The counts of all splits together."""
    return reduce(add, counts.values())


def keep(counts: "dict[str, TokenCounts]", tokenizer: Any, config: Any, **options: Any) -> "PartialVocabulary":
    """The vocabulary of all splits: counted ids, and those that the tokenizer or the model can insert.

    Options go to `PartialVocabulary.from_counts`.
    """
    from leanvocab.texts.fitting import check_sizes
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

    if tokenizer is not None and config is not None:
        check_sizes(tokenizer, config, tokenizer.name_or_path)
    return PartialVocabulary.from_counts(all_counts(counts), tokenizer=tokenizer, model=config, **options)


def describe_coverage(counts: "TokenCounts") -> dict[str, int]:
    """Shares of all tokens, in percent → the fewest rows that cover them; plain values, ready for JSON."""
    from leanvocab.vocabulary.coverage import rows_to_cover

    return {f"{percent:g}": num_rows for percent, num_rows in rows_to_cover(counts.counts).items()}


def kept_coverage(counts: "TokenCounts", vocabulary: "PartialVocabulary") -> dict[str, Any]:
    """Plain values: how many of the counted tokens have no kept row, and which share of them has one."""
    of_rows = counts.counts[: vocabulary.full_size]  # placeholders beyond the table have no row in any vocabulary
    kept = vocabulary.token_ids[vocabulary.token_ids < len(of_rows)]
    missing, total = int(of_rows.sum() - of_rows[kept].sum()), int(of_rows.sum())
    return {"missing_tokens": missing, "kept_tokens_ratio": 1 - missing / total if total else 1.0}


def describe_vocabulary(vocabulary: "PartialVocabulary") -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return {
        "kept_rows": len(vocabulary),
        "full_rows": vocabulary.full_size,
        "kept_ratio": len(vocabulary) / vocabulary.full_size,
        "digest": vocabulary.digest,
    }
