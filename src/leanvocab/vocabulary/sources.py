"""Sources of token ids: one for each column that is counted, whose rows come in pieces. No torch.

Everything that can be checked without reading rows is checked when a source is made; a piece is read when it is
counted. Nothing is written or cached, and the caller's data is only read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import DataError
from leanvocab.extras import is_instance, is_tensor
from leanvocab.vocabulary.columns import check_ids, choose_id_columns
from leanvocab.vocabulary.pieces import Piece, array_pieces, estimate_num_ids, selected_pieces

IDS_GATHERED = 1 << 16  # ids in short rows that are held until they are counted together


@dataclass(frozen=True)
class Source:
    """One column of a data set, or a stream of rows; about how many ids it has is known, but for a stream."""

    pieces: Iterable[Piece]
    num_rows: int | None = None
    num_ids: int | None = None
    column: str | None = None


def find_sources(data: Any, columns: list[str] | None, where: str = "") -> Iterator[Source]:
    """The sources in data of any kind, of its chosen columns; only a stream is not checked before it is read."""
    if isinstance(data, str | bytes):
        raise DataError(f"found text{where}, expected token ids: tokenize it first, or pass tokenizer=")
    if is_instance(data, "datasets", "Dataset"):
        yield from _dataset_sources(data, columns, where)
    elif is_instance(data, "datasets", "IterableDataset"):
        yield _iterable_dataset_source(data, columns, where)
    elif is_instance(data, "datasets", "Column") and is_instance(getattr(data, "source", None), "datasets", "Dataset"):
        yield from _dataset_sources(data.source, [data.column_name], where)
    elif _is_array(data):
        if columns is not None:
            raise DataError(f"columns={columns!r} names columns, but {type(data).__name__} has none")
        check_ids(data, f"the data{where}")
        yield _array_source(data, where)
    elif is_instance(data, "pyarrow", "Table", "RecordBatch"):
        for name in choose_id_columns(data, columns, where=where):
            yield _array_source(data.column(name), where, name)
    elif isinstance(data, Mapping):
        yield from _mapping_sources(data, columns, where)
    elif hasattr(data, "__arrow_c_stream__"):  # pandas, polars
        import pyarrow as pa

        yield from find_sources(pa.table(data), columns, where)
    elif isinstance(data, Iterable) or (hasattr(data, "__getitem__") and isinstance(data, Sized)):
        yield Source(_stream_pieces(data, columns, where), len(data) if isinstance(data, Sized) else None)
    else:
        raise DataError(
            f"cannot find token ids in {type(data).__name__}{where}: expected a data set, a table, an array, "
            "a mapping of columns or an iterable of sequences"
        )


def holds_data_sets(data: Mapping[Any, Any]) -> bool:
    """True where a mapping is one of splits, not of columns."""
    return bool(data) and all(
        is_instance(part, "datasets", "Dataset", "IterableDataset") or is_instance(part, "pyarrow", "Table")
        for part in data.values()
    )


def _mapping_sources(data: Mapping[Any, Any], columns: list[str] | None, where: str) -> Iterator[Source]:
    if holds_data_sets(data):
        for split, dataset in data.items():
            yield from find_sources(dataset, columns, f"{where} of split {split!r}")
        return
    for name in choose_id_columns(data, columns, where=where):
        if _is_array(data[name]):
            yield _array_source(data[name], where, name)
        else:
            for source in find_sources(data[name], None, _of_column(name, where)):
                yield replace(source, column=name)


def _of_column(name: str | None, where: str) -> str:
    return where if name is None else f" of column {name!r}{where}"


def _dataset_sources(dataset: Any, columns: list[str] | None, where: str) -> Iterator[Source]:
    try:
        columns_of_ids = choose_id_columns(dataset, columns, where=where)
    except DataError as error:
        if dataset.format["type"] == "custom" and columns is None:
            raise DataError(f"{error} Its transform is not run; to count what it gives, pass iter(dataset).") from None
        raise
    # `data` is the Arrow table under every format, transform and selection; it is only read. `_indices` maps selected
    # rows to rows of that table; datasets has no public name for it, and reading rows through it is slow.
    for name in columns_of_ids:
        column = dataset.data.column(name)
        if dataset._indices is None:
            yield _array_source(column, where, name)
        else:
            indices = dataset._indices.column(0)
            num_ids = estimate_num_ids(column) * len(indices) // max(len(column), 1)
            yield Source(selected_pieces(column, indices, _of_column(name, where), name), len(indices), num_ids, name)


def _iterable_dataset_source(dataset: Any, columns: list[str] | None, where: str) -> Source:
    if dataset.features is not None:
        columns = choose_id_columns(dataset, columns, where=where)
        dataset = dataset.select_columns(columns)  # what is not counted is neither read nor decoded
    # Streams of Arrow tables come as such, fast. Others come row by row: making tables of them fails in datasets where
    # a row is empty, since each is given a type of its own.
    if getattr(getattr(dataset, "_ex_iterable", None), "iter_arrow", None):
        return Source(_batch_pieces(dataset.with_format("arrow").iter(batch_size=1000), columns, where))
    return Source(_stream_pieces(dataset.with_format(None), columns, where))


def _batch_pieces(batches: Iterable[Any], columns: list[str] | None, where: str) -> Iterator[Piece]:
    first_row, schema, chosen = 0, None, list[str]()
    for batch in batches:
        if batch.schema != schema:
            schema, chosen = batch.schema, choose_id_columns(batch, columns, where=where)
        for name in chosen:
            yield from _array_source(batch.column(name), where, name, first_row).pieces
        first_row += len(batch)


def _is_array(data: Any) -> bool:
    """True for arrays of numbers or lists, numpy's, torch's and Arrow's: they have no columns, but a size."""
    if isinstance(data, np.ndarray):
        return bool(data.dtype != object)
    return is_tensor(data) or is_instance(data, "pyarrow", "ChunkedArray", "Array")


def _array_source(array: Any, where: str, column: str | None = None, first_row: int = 0) -> Source:
    where = _of_column(column, where)
    if is_tensor(array):
        if str(array.layout) != "torch.strided" or array.device.type == "meta":
            raise DataError(
                f"cannot count token ids in a {array.layout} tensor on {array.device}: expected a dense one"
            )
        array = array.detach()
    if getattr(array, "ndim", 1) == 0:
        array = array.reshape(1)
    return Source(array_pieces(array, where, column, first_row), len(array), estimate_num_ids(array), column)


def _stream_pieces(rows: Any, columns: list[str] | None, where: str) -> Iterator[Piece]:
    """Pieces of an iterable. Numbers, lists and small arrays are gathered; all else goes by itself."""
    gathered = _Gathered(where)
    chosen: dict[Any, list[str] | None] = {}  # by names and types: rows that look alike are looked at once
    # A torch data set may have no __iter__, and no end that indexing would tell.
    in_turn = rows if isinstance(rows, Iterable) else (rows[number] for number in range(len(rows)))
    for number, row in enumerate(in_turn):
        names = None
        if isinstance(row, Mapping):
            looks = tuple((name, type(value)) for name, value in row.items())
            if looks not in chosen:
                here = f" of row {number}{where}"
                chosen[looks] = None if holds_data_sets(row) else choose_id_columns(row, columns, where=here)
            names = chosen[looks]
        for name in [None] if names is None else names:
            value = row if name is None else row[name]
            if not gathered.add(name, number, value):
                here = _of_column(name, f" of row {number}{where}")
                for source in find_sources(value, columns if name is None else None, here):
                    yield from (piece if name is None else replace(piece, column=name) for piece in source.pieces)
        if gathered.size >= IDS_GATHERED:
            yield from gathered.take()
    yield from gathered.take()


class _Gathered:
    """Rows of plain Python numbers, and small arrays, held back until there are enough to be counted together.

    They are copied: the caller may use the same list or array for the next row.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        # column, and type of the arrays (None: plain Python) → values, and numbers of their rows
        self._rows: dict[tuple[str | None, Any], tuple[list[Any], list[int]]] = {}
        self.size = 0

    def add(self, column: str | None, number: int, value: Any) -> bool:
        """Hold a value, if it is of a kind that is gathered."""
        if _is_plain(value):
            value, dtype = value.copy() if isinstance(value, list) else value, None
            self.size += 1 + (len(value) if isinstance(value, list | tuple) else 0)
        elif (array := _small_array(value)) is not None:
            value, dtype = array.flatten(), array.dtype
            self.size += 1 + len(value)
        else:
            return False
        values, numbers = self._rows.setdefault((column, dtype), ([], []))
        values.append(value)
        numbers.append(number)
        return True

    def take(self) -> Iterator[Piece]:
        """Pieces of all that is held, which is let go."""
        rows, self._rows, self.size = self._rows, {}, 0
        for (column, dtype), (values, numbers) in rows.items():
            where = _of_column(column, self._where)
            load = partial(_arrow_of_plain, values, numbers, where) if dtype is None else partial(list, values)
            yield Piece(load, len(values), where, numbers.__getitem__, column)


def _is_plain(value: Any) -> bool:
    while isinstance(value, list | tuple):
        value = next((item for item in value if item is not None), None)
    return value is None or isinstance(value, int | np.integer)


def _small_array(value: Any) -> NDArray[Any] | None:
    """A numpy array of not many integers, also where a tensor holds them; None for all else."""
    if not isinstance(value, np.ndarray) and is_tensor(value):
        numbers = not (value.is_floating_point() or value.is_complex())
        if not numbers or value.device.type != "cpu" or str(value.layout) != "torch.strided":
            return None
        value = value.detach().numpy()  # not a copy
    is_small = isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size <= IDS_GATHERED
    return value if is_small else None


def _arrow_of_plain(values: list[Any], numbers: list[int], where: str) -> Any:
    import pyarrow as pa

    rows = f"the data in row {numbers[0]}{f' to {numbers[-1]}' if len(numbers) > 1 else ''}{where}"
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise DataError(f"{rows} is not all integers (token ids): {error}") from None
    check_ids(array, rows)
    return array
