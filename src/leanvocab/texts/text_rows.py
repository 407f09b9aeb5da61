"""Data of any kind → rows with texts, some at a time, by columns. No torch, no transformers; nothing is written or cached."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any

import numpy as np

from leanvocab.errors import DataError
from leanvocab.extras import is_instance
from leanvocab.vocabulary.columns import Kind, has_token_columns, kind_of_value, kinds_of_columns
from leanvocab.vocabulary.sources import holds_data_sets

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Rows:
    """Some rows: the values of each column, lists or Arrow arrays; without columns, `columns` has the one name None."""

    columns: Mapping[str | None, Any]
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Part:
    """One data set, or an iterable whose first row was looked at; `where` goes into messages."""

    data: Any
    where: str
    kinds: Mapping[str, Kind] | None
    leaf: str = "other"

    @property
    def holds_token_ids(self) -> bool:
        """True where columns hold token ids, or the rows without columns integers."""
        return self.leaf == "integer" if self.kinds is None else has_token_columns(self.kinds)

    @property
    def num_rows(self) -> int | None:
        """The number of rows, where it is known before they are read."""
        if isinstance(self.data, Mapping):
            return max(map(len, self.data.values()), default=0)
        return len(self.data) if isinstance(self.data, Sized) else None

    def rows(self) -> Iterator[Rows]:
        """All rows."""
        first = 0
        for columns in _batches(self.data):
            num_rows = len(next(iter(columns.values()), ()))
            yield Rows(columns, first, num_rows)
            first += num_rows


def find_parts(data: Any, where: str = "") -> Iterator[Part]:
    """The data sets in data: one for each split, or the one.

    Raises:
        DataError: it is of a kind that has no rows.
    """
    if isinstance(data, Mapping) and holds_data_sets(data):
        for split, part in data.items():
            yield from find_parts(part, f"{where} of split {split!r}")
        return
    data = _as_rows(data, where)
    if _has_known_columns(data):
        yield Part(data, where, kinds_of_columns(data))
    elif _is_array(data):
        yield Part(data, where, None, kind_of_value(data).leaf)
    else:
        is_iterator = not isinstance(data, Sized) and iter(data) is data
        rows = iter(data)
        first = list(islice(rows, 1))
        data = chain(first, rows) if is_iterator else data
        kinds = kinds_of_columns(first[0]) if first and isinstance(first[0], Mapping) else None
        yield Part(data, where, kinds, kind_of_value(first[0]).leaf if first else "empty")


def _has_known_columns(data: Any) -> bool:
    if is_instance(data, "datasets", "IterableDataset"):
        return data.features is not None
    return (
        isinstance(data, Mapping) or is_instance(data, "datasets", "Dataset") or is_instance(data, "pyarrow", "Table")
    )


def _as_rows(data: Any, where: str) -> Any:
    """The data as one of the kinds that are read: a data set, an Arrow table or array, a mapping or an iterable."""
    import pyarrow as pa

    if isinstance(data, str) or (isinstance(data, Mapping) and any(isinstance(value, str) for value in data.values())):
        return [data]  # one row
    if isinstance(data, Mapping):
        columns = {name: values for name, values in data.items() if isinstance(values, Sized)}
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"expected columns of as many rows{where}, got {lengths}")
        return columns
    if is_instance(data, "pyarrow", "RecordBatch"):
        return pa.Table.from_batches([data])
    if is_instance(data, "ray.data", "Dataset"):
        batches = data.iter_batches(batch_size=_ROWS_AT_ONCE, batch_format="pyarrow")
        return chain.from_iterable(batch.to_pylist() for batch in batches)
    known = is_instance(data, "datasets", "Dataset", "IterableDataset") or _is_array(data)
    if known or is_instance(data, "pyarrow", "Table"):
        return data
    if hasattr(data, "__arrow_c_stream__"):  # pandas, polars
        return pa.table(data)
    if all(hasattr(data, name) for name in ("__getitem__", "__len__")) and not hasattr(data, "__iter__"):
        return map(data.__getitem__, range(len(data)))  # a torch data set may have no __iter__
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        raise DataError(
            f"cannot find texts in {type(data).__name__}{where}: expected a string, a path, a data set, a table, a mapping of "
            "columns or an iterable of texts or rows"
        )
    return data


def _is_array(data: Any) -> bool:
    return isinstance(data, np.ndarray) or is_instance(data, "pyarrow", "Array", "ChunkedArray")


def _batches(data: Any) -> Iterator[Mapping[str | None, Any]]:
    """Columns of some rows at a time. Selections of a data set hold; its format and transform are looked through."""
    if is_instance(data, "datasets", "Dataset"):
        for table in data.with_format("arrow").iter(_ROWS_AT_ONCE):
            yield {name: table.column(name) for name in table.column_names}
    elif is_instance(data, "datasets", "IterableDataset"):
        yield from _gathered(data.with_format(None))
    elif is_instance(data, "pyarrow", "Table"):
        for start in range(0, len(data), _ROWS_AT_ONCE):
            part = data.slice(start, _ROWS_AT_ONCE)
            yield {name: part.column(name) for name in part.column_names}
    elif isinstance(data, Mapping):
        for start in range(0, max(map(len, data.values()), default=0), _ROWS_AT_ONCE):
            yield {name: values[start : start + _ROWS_AT_ONCE] for name, values in data.items()}
    elif _is_array(data):
        for start in range(0, len(data), _ROWS_AT_ONCE):
            part = data[start : start + _ROWS_AT_ONCE]
            yield {None: part.tolist() if isinstance(part, np.ndarray) else part}
    else:
        yield from _gathered(data)


def _gathered(rows: Iterable[Any]) -> Iterator[Mapping[str | None, Any]]:
    """Rows that follow on one another and have the same columns, gathered."""

    def names_of(row: Any) -> tuple[str, ...] | None:
        return tuple(row) if isinstance(row, Mapping) else None

    for names, alike in groupby(rows, names_of):
        while some := list(islice(alike, _ROWS_AT_ONCE)):
            yield {None: some} if names is None else {name: [row[name] for row in some] for name in names}
