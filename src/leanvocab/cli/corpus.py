"""Data on the command line, tokenized or as text → counts, and the vocabulary to keep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.errors import DataError, ModelError

if TYPE_CHECKING:
    from leanvocab.vocabulary.counts import TokenCounts
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

DATA_HELP = (
    "A CSV, JSON lines, Parquet or text file, a folder of them with splits in their names, or a name on the hub; "
    "tokenized, or as text with a tokenizer."
)
ConfigName = Annotated[str | None, typer.Option(help="Configuration of the data set, such as cola in glue.")]
TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text-column", help="Column with the text; twice for pairs. By default usual names."),
]
TokenColumns = Annotated[
    list[str] | None,
    typer.Option("--token-column", help="Column with token ids of tokenized data; several if given so."),
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens to which a text, or a pair, is cut. By default none is cut.")
]


def count_data(
    data: str,
    config_name: str | None,
    text_columns: Sequence[str] | None,
    token_columns: Sequence[str] | None,
    tokenizer: Any,
    max_length: int | None,
) -> "dict[str, TokenCounts]":
    """Counts of each split.

    Raises:
        DataError: there are neither token ids nor text with a tokenizer.
    """
    from leanvocab.finetune.loading import load_splits
    from leanvocab.finetune.text_columns import check_texts, find_text_columns, tokenize
    from leanvocab.vocabulary.counts import count_tokens

    splits = load_splits(data, config_name)
    columns = next(iter(splits.values())).column_names
    if token_columns or (not text_columns and "input_ids" in columns):
        return {name: count_tokens(split, list(token_columns or ()) or None) for name, split in splits.items()}
    if tokenizer is None:
        raise DataError(
            f"{data} holds no column input_ids but {', '.join(columns)}: name the columns of token ids "
            "(--token-column), or the tokenizer of its text (--tokenizer)"
        )
    texts = find_text_columns(next(iter(splits.values())), tuple(text_columns or ()))
    counts = {}
    for name, split in splits.items():
        check_texts(name, split, texts)
        counts[name] = count_tokens(tokenize(split, name, texts, tokenizer, max_length), "input_ids")
    return counts


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or a name on the hub.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"there is no tokenizer in {name!r}: {first}") from error


def config_beside(name: str) -> Any:
    """The model config that lies beside a tokenizer: it knows the rows of the embeddings. None where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def keep(
    counts: "dict[str, TokenCounts]",
    tokenizer: Any,
    config: Any,
    *,
    full_size: int | None = None,
    min_count: int = 1,
    always_keep: Sequence[int] = (),
) -> "PartialVocabulary":
    """The vocabulary of all splits: counted ids, and those that the tokenizer or the model can insert."""
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

    first, *others = counts.values()
    total = first
    for each in others:
        total = total + each
    return PartialVocabulary.from_counts(
        total, full_size=full_size, tokenizer=tokenizer, model=config, always_keep=always_keep, min_count=min_count
    )
