"""Columns of a data set that hold texts, and their token ids."""

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from leanvocab.errors import DataError
from leanvocab.extras import require

# Pairs first: QNLI's question + sentence is no single sentence.
TEXT_GROUPS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
"""Usual names of one column with texts, or of two with pairs."""
USUAL_TEXTS = tuple(dict.fromkeys(name for names in TEXT_GROUPS for name in names))
"""Names of columns that hold texts in any file."""
CHATS = ("messages", "conversations")
_FOR_LANGUAGE_MODELS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
_STRINGS = ("string", "large_string", "string_view")


def find_text_columns(split: Any, wanted: tuple[str, ...] = ()) -> tuple[str, ...]:
    """One column with texts, or two with pairs: the wanted ones, or the first of the usual names that are there.

    Raises:
        DataError: there is no such column.
    """
    columns = split.column_names
    for_generating = next(filter(None, (spelled(names, columns) for names in _FOR_LANGUAGE_MODELS)), ())
    hint = f"; or learn {' + '.join(for_generating)} with a language model (task: causal-lm)" if for_generating else ""
    return choose_text_columns("text", wanted, TEXT_GROUPS, columns, hint)


def spelled(names: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of these names, as they are spelled or in other letter case; none where one of them is missing."""
    by_name = {column.casefold(): column for column in reversed(columns)} | {column: column for column in columns}
    return tuple(by_name[name] for name in names) if set(names) <= set(by_name) else ()


def choose_text_columns(
    what: str, wanted: tuple[str, ...], usual: tuple[tuple[str, ...], ...], columns: Sequence[str], hint: str = ""
) -> tuple[str, ...]:
    """The wanted columns, or the first of the usual groups that is there; raises DataError where there are none."""
    if missing := [name for name in wanted if name not in columns]:
        raise DataError(f"there is no {what} column {missing[0]!r}; the columns are {', '.join(columns)}")
    if wanted:
        return wanted
    for names in usual:
        if there := spelled(names, columns):
            return there
    raise DataError(
        f"found no {what} column: looked for {', '.join(' + '.join(names) for names in usual)}; the columns are "
        f"{', '.join(columns)}. Name it with {what}_column{'s' if what == 'text' else ''}{hint}"
    )


def check_texts(split_name: str, split: Any, text_columns: tuple[str, ...], optional: str | None = None) -> None:
    """Raises DataError where a text column is missing, holds no strings, or has gaps, which the optional one may have."""
    for name in text_columns:
        check_column(split_name, split, name, "text")
        kind = getattr(split.features[name], "dtype", split.features[name])
        if kind not in _STRINGS:
            raise DataError(f"text column {name!r} of split {split_name!r} holds {kind}; expected strings")
        if name != optional:
            check_no_gaps(split_name, name, [text is None for text in values_of(split, name)], "text")


def check_column(split_name: str, split: Any, column: str, what: str) -> None:
    """Raises DataError where a split lacks a column that another has."""
    if column not in split.column_names:
        raise DataError(
            f"split {split_name!r} has no {what} column {column!r}; its columns are {', '.join(split.column_names)}"
        )


def check_no_gaps(split_name: str, column: str, gaps: list[bool], what: str, hint: str = "") -> None:
    """Raises DataError where any row has a gap, saying how many have and which is the first."""
    if any(gaps):
        raise DataError(
            f"{sum(gaps):,} of {len(gaps):,} rows of split {split_name!r} have no {what} in column {column!r}, the "
            f"first is row {gaps.index(True)}{hint}. Leave those rows out"
        )


def in_memory(table: Any) -> Any:
    """A data set of an Arrow table. datasets would name it by a digest of all that the table holds; nothing is cached here."""
    return require("datasets", extra="finetune").Dataset(table, fingerprint=_new_name())


def _new_name() -> str:
    return uuid.uuid4().hex[:16]


def values_of(split: Any, column: str) -> list[Any]:
    """All values of a column as Python objects, whatever format the user set on the data set."""
    return list(split.with_format(None)[column][:])


def tokenize(
    split: Any, name: str, text_columns: tuple[str, ...], tokenizer: Any, max_length: int | None = None
) -> Any:
    """A new data set with the token ids of each row."""

    def to_ids(batch: dict[str, list[str]], numbers: list[int]) -> Any:
        texts = (batch[column] for column in text_columns)
        return tokenizer(*texts, truncation=max_length is not None, max_length=max_length)

    return map_in_memory(split, name, to_ids)


def map_in_memory(
    split: Any, name: str, to_rows: Callable[[dict[str, list[Any]], list[int]], Any], features: Any = None
) -> Any:
    """A new data set of the rows that are made of each batch and its rows' numbers: nothing is cached or written to the split."""
    return split.with_format(None).map(
        to_rows,
        batched=True,
        with_indices=True,
        remove_columns=split.column_names,
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
        # By default it is a digest of the pickled tokenizer, which takes seconds for a large vocabulary; nothing is cached.
        new_fingerprint=_new_name(),
        desc=f"tokenizing {name}",
    )
