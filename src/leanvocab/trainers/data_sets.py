"""Data sets of a trainer → counts of the token ids that it will give its model; no trainer of a name is known here.

Columns of token ids are counted as they stand. Everything else is read as the trainer reads it, row by row and through its own
collator, so that prompts, templates, transforms and truncation are those of training.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from leanvocab.errors import DataError
from leanvocab.extras import is_instance
from leanvocab.texts.counting import count_tokens as count_texts
from leanvocab.vocabulary.columns import choose_id_columns, has_token_columns, kinds_of_columns
from leanvocab.vocabulary.counts import TokenCounts, count_tokens

_ROWS_AT_ONCE = 64  # rows with images are large
_NOTHING = TokenCounts(np.zeros(0, np.int64))


@dataclass(frozen=True)
class DataSet:
    """One data set of a trainer, with what makes batches of its rows; `name` is that of messages."""

    name: str
    rows: Any
    collate: Callable[[list[Any]], Any] | None
    trains: bool = True


@dataclass(frozen=True)
class Counted:
    """The counts of data sets, and why some of the ids that come in training are not among them."""

    counts: TokenCounts
    uncounted: tuple[str, ...] = ()


def data_sets(name: str, data: Any, collate: Callable[[list[Any]], Any] | None, *, trains: bool) -> Iterator[DataSet]:
    """The data sets in what a trainer holds under a name: none, one, or one for each key of a mapping."""
    if isinstance(data, Mapping):
        for key, part in data.items():
            yield from data_sets(f"{name}[{key!r}]", part, collate, trains=trains)
    elif is_instance(data, "torch.utils.data", "ConcatDataset"):
        for number, part in enumerate(data.datasets):
            yield from data_sets(f"{name}.datasets[{number}]", part, collate, trains=trains)
    elif data is not None:
        yield DataSet(name, data, collate, trains)


def count_data_sets(parts: Iterable[DataSet], model: Any, tokenizer: Any) -> Counted:
    """Counts of all ids that can be counted, and the reasons why others of training cannot; random states are left alone.

    Raises:
        DataError: a collator cannot read its rows.
    """
    counts, uncounted = _NOTHING, list[str]()
    with _random_states_kept():
        for part in parts:
            its = _count(part, model, tokenizer)
            counts += its.counts
            if part.trains:
                uncounted += its.uncounted
                uncounted += (
                    [f"the collator of {part.name} draws words at random"] if _draws_words(part.collate) else []
                )
    return Counted(counts, tuple(uncounted))


def _draws_words(collate: Any) -> bool:
    """True for collators of masked language models, which put any token in the place of some."""
    return bool(getattr(collate, "mlm", False)) and getattr(collate, "random_replace_prob", 1) > 0


def _count(part: DataSet, model: Any, tokenizer: Any) -> Counted:
    rows = part.rows
    is_dataset = is_instance(rows, "datasets", "Dataset")
    if is_instance(rows, "datasets", "IterableDataset") or not hasattr(rows, "__len__"):
        return Counted(_NOTHING, (f"{part.name} is a stream",))
    if len(rows) == 0:
        return Counted(_NOTHING)
    if is_dataset and rows.format["type"] != "custom" and _id_columns(rows):
        return Counted(count_tokens(rows))
    first = next(_row_lists(rows))
    if isinstance(first[0], Mapping) and _id_columns(first[0]):
        return Counted(count_tokens(_ids_in(chain.from_iterable(_row_lists(rows)))))
    batches = chain.from_iterable(_read(batch, model) for batch in _batches(part))
    if (one := next(batches, None)) is not None:
        return Counted(count_tokens(chain([one], batches)))
    prompts = _NOTHING
    if is_dataset and tokenizer is not None:
        with suppress(DataError):  # no column of a usual name
            prompts = count_texts(rows, tokenizer=tokenizer)
    return Counted(prompts, (f"{part.name} gives no token ids before it trains",))


def _id_columns(data: Any) -> list[str]:
    """Columns of token ids, where inputs of a model are among them: labels alone may be anything."""
    return choose_id_columns(data) if has_token_columns(kinds_of_columns(data)) else []


def _ids_in(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    return ({name: row[name] for name in _id_columns(row)} for row in rows)


def _row_lists(rows: Any) -> Iterator[list[Any]]:
    """The rows as a DataLoader fetches them, some at a time; a transform of the data set is run."""
    fetch = getattr(rows, "__getitems__", None)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        numbers = list(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
        yield fetch(numbers) if fetch else [rows[number] for number in numbers]


def _batches(part: DataSet) -> Iterator[Any]:
    first = 0
    for rows in _row_lists(part.rows):
        try:
            yield rows if part.collate is None else part.collate(rows)
        except Exception as error:
            raise DataError(
                f"cannot count {part.name}: its collator ({type(part.collate).__name__}) raised {type(error).__name__} on rows "
                f"{first} to {first + len(rows) - 1}: {error}. Give the vocabulary (vocabulary=), or let rows come as their ids "
                'do (on_missing="extend")'
            ) from error
        first += len(rows)


def _read(batch: Any, model: Any) -> Iterator[dict[str, Any]]:
    """The columns of token ids of a batch, or of what the model makes of its texts (a CrossEncoder does so in its loss)."""
    if not isinstance(batch, Mapping):
        return
    if columns := _id_columns(batch):
        yield {name: batch[name] for name in columns}
    elif callable(getattr(model, "preprocess", None)):
        for texts in _pairs_and_texts(batch):
            asked = {name: batch.get(name) for name in ("prompt", "task")}
            yield from _ids_in([model.preprocess(texts, **asked)])


def _pairs_and_texts(batch: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Pairs of the first column's texts with each other column's; and all texts alone, since a loss pairs them anew.

    A text alone is cut later than in any pair.
    """
    columns = [values for name, values in batch.items() if name not in ("label", "dataset_name") and _are_texts(values)]
    for column in columns[1:]:
        yield [(text, other) for text, others in zip(columns[0], column, strict=True) for other in _flat(others)]
    for column in columns:
        yield [text for texts in column for text in _flat(texts)]


def _flat(texts: Any) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(text, str) for texts in values for text in _flat(texts))


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Training draws the numbers that it would have drawn."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(of_python)
    np.random.set_state(of_numpy)
