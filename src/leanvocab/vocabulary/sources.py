"""Data → pieces: what kind of data it is, which columns of it hold token ids, and its rows in pieces. No torch.

Everything that can be checked without reading rows is checked when a source is made; a piece is read when it is
counted. Nothing is written or cached, and the caller's data is only read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import DataError
from leanvocab.vocabulary.columns import (
    Kind,
    arrow_kind,
    check_kind,
    choose_id_columns,
    class_label_columns,
    is_arrow,
    is_datasets,
    is_tensor,
    value_kind,
)

_PIECE_IDS = 1 << 22  # about as many ids in a piece, the unit of work of a thread
_PIECE_IDS_COPIED = 1 << 19  # … where the rows of a piece must be copied together
_ROWS_FLATTENED = 1024  # rows flattened at once where Arrow must copy them
_IDS_GATHERED = 1 << 16  # plain Python numbers held before they are made an array
_ROWS_SORTED = 1 << 21  # selected rows sorted at once (16 MB)


@dataclass(frozen=True)
class Piece:
    """Some rows of one column, read when a thread gets to them.

    `load` gives them as an Arrow or numpy array; `row_number` tells the caller's row for one of the piece; `where` says
    in messages where the rows come from. `load_flat` is a faster way to all ids at once, or gives None.
    """

    load: Callable[[], Any]
    num_rows: int
    where: str
    row_number: Callable[[int], int]
    columns: tuple[str, ...] = ()
    load_flat: Callable[[], list[NDArray[Any]] | None] | None = None

    def ids(self) -> Iterator[NDArray[Any]]:
        """The integers in it, as 1-D arrays; nulls are left out."""
        ids = None if self.load_flat is None else self.load_flat()
        return flat(self.load()) if ids is None else iter(ids)


@dataclass(frozen=True)
class Source:
    """One column of a data set, or a stream of rows."""

    pieces: Iterable[Piece]
    num_rows: int | None = None
    num_ids: int | None = None
    """About how many; None for a stream."""
    columns: tuple[str, ...] = ()


def find_sources(data: Any, columns: list[str] | None, where: str) -> Iterator[Source]:
    """Tell what data is, and choose its columns; only a stream is not checked before it is read."""
    if isinstance(data, str | bytes):
        raise DataError(f"found text{where}, expected token ids: tokenize it first")
    if is_datasets(data, "Dataset"):
        yield from _dataset_sources(data, columns, where)
    elif is_datasets(data, "IterableDataset"):
        yield _iterable_dataset_source(data, columns, where)
    elif is_datasets(data, "Column") and is_datasets(getattr(data, "source", None), "Dataset"):
        yield from _dataset_sources(data.source, [data.column_name], where)
    elif is_arrow(data, "Table", "RecordBatch"):
        yield from _table_sources(data, columns, where)
    elif is_arrow(data, "ChunkedArray", "Array"):
        _refuse_columns(columns, data)
        yield _arrow_source(data, where)
    elif is_tensor(data) or (isinstance(data, np.ndarray) and data.dtype != object):
        _refuse_columns(columns, data)
        yield _array_source(data, where)
    elif isinstance(data, Mapping):
        yield from _mapping_sources(data, columns, where)
    elif hasattr(data, "__arrow_c_stream__"):  # pandas, polars
        import pyarrow as pa

        yield from _table_sources(pa.table(data), columns, where)
    elif isinstance(data, Iterable) or (hasattr(data, "__getitem__") and isinstance(data, Sized)):
        yield Source(_stream_pieces(data, columns, where), len(data) if isinstance(data, Sized) else None)
    else:
        raise DataError(
            f"cannot find token ids in {type(data).__name__}{where}: expected a data set, a table, an array, "
            "a mapping of columns or an iterable of sequences"
        )


def _refuse_columns(columns: list[str] | None, data: Any) -> None:
    if columns is not None:
        raise DataError(f"columns={columns!r} names columns, but {type(data).__name__} has none")


def _dataset_sources(dataset: Any, columns: list[str] | None, where: str) -> Iterator[Source]:
    # `data` is the Arrow table under every format, transform and selection; it is only read. `_indices` maps selected
    # rows to rows of that table; datasets has no public name for it, and reading rows through it is slow.
    kinds = {name: arrow_kind(dataset.data.column(name).type) for name in dataset.column_names}
    classes = class_label_columns(dataset.features)
    try:
        names = choose_id_columns(kinds, columns, where=where, class_labels=classes)
    except DataError as error:
        if dataset.format["type"] == "custom" and columns is None:
            raise DataError(f"{error} Its transform is not run; to count what it gives, pass iter(dataset).") from None
        raise
    for name in names:
        column = dataset.data.column(name)
        here = f" of column {name!r}{where}"
        if dataset._indices is None:
            yield _arrow_source(column, here, name)
        else:
            indices = dataset._indices.column(0)
            num_ids = _num_ids(column) * len(indices) // max(len(column), 1)
            yield Source(_selected_pieces(column, indices, here), len(indices), num_ids, (name,))


def _iterable_dataset_source(dataset: Any, columns: list[str] | None, where: str) -> Source:
    if dataset.features is not None:
        kinds = {field.name: arrow_kind(field.type) for field in dataset.features.arrow_schema}
        classes = class_label_columns(dataset.features)
        columns = choose_id_columns(kinds, columns, where=where, class_labels=classes)
        dataset = dataset.select_columns(columns)  # what is not counted is neither read nor decoded
    # Streams of Arrow tables come as such, fast. Others come row by row: making tables of them fails in datasets where
    # a row is empty, since each is given a type of its own.
    if getattr(getattr(dataset, "_ex_iterable", None), "iter_arrow", None):
        return Source(_batch_pieces(dataset.with_format("arrow").iter(batch_size=1000), columns, where))
    return Source(_stream_pieces(dataset.with_format(None), columns, where))


def _batch_pieces(tables: Iterable[Any], columns: list[str] | None, where: str) -> Iterator[Piece]:
    first_row = 0
    for table in tables:
        for source in _table_sources(table, columns, where, first_row):
            yield from (_renamed(piece, source.columns[0]) for piece in source.pieces)
        first_row += len(table)


def _table_sources(table: Any, columns: list[str] | None, where: str, first_row: int = 0) -> Iterator[Source]:
    kinds = {name: arrow_kind(table.schema.field(name).type) for name in table.schema.names}
    for name in choose_id_columns(kinds, columns, where=where):
        yield _arrow_source(table.column(name), f" of column {name!r}{where}", name, first_row)


def _arrow_source(column: Any, where: str, name: str | None = None, first_row: int = 0) -> Source:
    check_kind(arrow_kind(column.type), f"the data{where}")
    names = () if name is None else (name,)
    column = _as_chunked(column)
    return Source(_arrow_pieces(column, where, first_row), len(column), _num_ids(column), names)


def _as_chunked(column: Any) -> Any:
    import pyarrow as pa

    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def _arrow_pieces(column: Any, where: str, first_row: int) -> Iterator[Piece]:
    step = _num_rows_of(_PIECE_IDS, column)
    for start in range(0, len(column), step):
        rows = partial(column.slice, start, step)
        yield Piece(rows, min(step, len(column) - start), where, partial(int.__add__, first_row + start))


def _num_ids(column: Any) -> int:
    """About how many ids lie in an Arrow array: from its bytes, which are known without reading them."""
    try:
        return int(column.nbytes) // 4
    except TypeError:  # lists of the view kind, in older versions of pyarrow
        return int(column.get_total_buffer_size()) // 4


def _num_rows_of(num_ids: int, column: Any) -> int:
    """How many rows hold about so many ids."""
    return max(1, num_ids * len(column) // max(_num_ids(column), 1))


def _selected_pieces(column: Any, indices: Any, where: str) -> Iterator[Piece]:
    """The selected rows, in the order in which they are stored: counting does not mind, and the disk is read once."""
    step = _num_rows_of(_PIECE_IDS_COPIED, column)
    starts = np.arange(0, len(column) + step, step)
    for block in range(0, len(indices), _ROWS_SORTED):
        rows = _sorted(indices.slice(block, _ROWS_SORTED).to_numpy().astype(np.int64, copy=False), len(column))
        edges = np.searchsorted(rows, starts)
        for number in np.flatnonzero(np.diff(edges)):
            for first in range(edges[number], edges[number + 1], step):
                part = rows[first : min(first + step, edges[number + 1])]
                yield Piece(
                    partial(_take, column, part),
                    len(part),
                    where,
                    partial(_selected_row, indices, part),
                    load_flat=partial(_take_flat, column, part),
                )


def _sorted(rows: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    # Most selections take a row once: a flag for each row sorts them twenty times as fast.
    if num_rows <= 8 * len(rows):
        taken = np.zeros(num_rows, dtype=np.bool_)
        taken[rows] = True
        found = np.flatnonzero(taken)
        if len(found) == len(rows):
            return found
    return np.sort(rows)


def _take(column: Any, rows: NDArray[np.int64]) -> Any:
    """Sorted rows of a column, near each other, as an Arrow array."""
    import pyarrow as pa

    stretch = column.slice(rows[0], rows[-1] - rows[0] + 1)
    if len(stretch) == len(rows) and (np.diff(rows) == 1).all():
        return stretch
    if len(stretch) > 8 * len(rows):  # what lies between them is better not read
        return pa.chunked_array([stretch.slice(row, 1).chunk(0) for row in (rows - rows[0]).tolist()])
    return stretch.take(pa.array(rows - rows[0]))


def _take_flat(column: Any, rows: NDArray[np.int64]) -> list[NDArray[Any]] | None:
    """The ids in most rows of a stretch: a mask over them is two to four times as fast as taking row by row.

    None where the rows are few, all or repeated, or have nulls.
    """
    num_rows = int(rows[-1] - rows[0]) + 1
    if not len(rows) < num_rows < 4 * len(rows) or not (np.diff(rows) > 0).all():
        return None
    stretch = column.slice(rows[0], num_rows)
    if not _is_list_of_integers(column.type) or stretch.null_count or any(c.values.null_count for c in stretch.chunks):
        return None
    is_taken = np.zeros(num_rows, dtype=np.bool_)
    is_taken[rows - rows[0]] = True
    found = []
    for chunk in stretch.chunks:
        offsets = chunk.offsets.to_numpy()
        taken, is_taken = np.split(is_taken, [len(chunk)])
        ids = chunk.values.to_numpy()[offsets[0] : offsets[-1]]
        found.append(ids[np.repeat(taken, np.diff(offsets))])
    return found


def _selected_row(indices: Any, rows: NDArray[np.int64], row: int) -> int:
    # Only for a message: reads the whole mapping.
    return int(np.flatnonzero(indices.to_numpy() == rows[row])[0])


def _array_source(array: Any, where: str) -> Source:
    check_kind(value_kind(array), f"the data{where}")
    if is_tensor(array):
        if str(array.layout) != "torch.strided" or array.device.type == "meta":
            raise DataError(
                f"cannot count token ids in a {array.layout} tensor on {array.device}: expected a dense one"
            )
        array, num_ids = array.detach(), array.numel()
        load: Callable[[Any], Any] = lambda part: part.cpu().numpy()  # noqa: E731 (a piece at a time leaves the device)
    else:
        num_ids, load = array.size, lambda part: part
    if array.ndim == 0:
        array = array.reshape(1)
    return Source(_array_pieces(array, num_ids, load, where), len(array), int(num_ids))


def _array_pieces(array: Any, num_ids: int, load: Callable[[Any], Any], where: str) -> Iterator[Piece]:
    step = max(1, _PIECE_IDS * len(array) // max(num_ids, 1))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        yield Piece(partial(load, part), len(part), where, partial(int.__add__, start))


def _mapping_sources(data: Mapping[Any, Any], columns: list[str] | None, where: str) -> Iterator[Source]:
    if data and all(is_datasets(v, "Dataset", "IterableDataset") or is_arrow(v, "Table") for v in data.values()):
        for split, dataset in data.items():
            yield from find_sources(dataset, columns, f"{where} of split {split!r}")
        return
    for name in choose_id_columns(_kinds(data), columns, where=where):
        for source in find_sources(data[name], None, f" of column {name!r}{where}"):
            yield Source(source.pieces, source.num_rows, source.num_ids, (name,))


def _kinds(row: Mapping[Any, Any]) -> dict[str, Kind]:
    return {name: value_kind(value) for name, value in row.items() if isinstance(name, str)}


# ---------------------------------------------------------------------------------------------------- streams


def _stream_pieces(rows: Any, columns: list[str] | None, where: str) -> Iterator[Piece]:
    """Pieces of an iterable. Numbers, lists and small arrays are gathered; all else goes by itself."""
    gathered = _Gathered(where)
    chosen: dict[Any, list[str]] = {}
    for number, row in enumerate(_iterate(rows)):
        if isinstance(row, Mapping) and not is_datasets(row, "DatasetDict", "IterableDatasetDict"):
            signature = tuple((name, type(value)) for name, value in row.items())
            if signature not in chosen:
                chosen[signature] = choose_id_columns(_kinds(row), columns, where=f" of row {number}{where}")
            values: dict[str | None, Any] = {name: row[name] for name in chosen[signature]}
        else:
            values = {None: row}
        for name, value in values.items():
            if (array := _small_array(value)) is not None:
                gathered.add(name, number, array)
            elif _is_plain(value):
                gathered.add(name, number, value)
            else:
                here = f" of row {number}{where}" if name is None else f" of column {name!r} of row {number}{where}"
                for source in find_sources(value, columns if name is None else None, here):
                    yield from (_renamed(piece, name) for piece in source.pieces)
        if gathered.is_full:
            yield from gathered.pieces()
            gathered = _Gathered(where)
    yield from gathered.pieces()


def _iterate(rows: Any) -> Iterator[Any]:
    # A torch data set may have no __iter__, and no end that indexing would tell.
    return iter(rows) if isinstance(rows, Iterable) else (rows[number] for number in range(len(rows)))


def _small_array(value: Any) -> NDArray[Any] | None:
    """A numpy array of not many integers, also where a tensor holds them; None for all else."""
    if is_tensor(value) and value.device.type == "cpu" and str(value.layout) == "torch.strided":
        if value.is_floating_point() or value.is_complex() or value.numel() > _IDS_GATHERED:
            return None
        value = value.detach().numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size <= _IDS_GATHERED:
        return value
    return None


def _is_plain(value: Any) -> bool:
    while isinstance(value, list | tuple):
        value = next((item for item in value if item is not None), None)
    return value is None or isinstance(value, int | np.integer)


def _renamed(piece: Piece, column: str | None) -> Piece:
    return piece if column is None else replace(piece, columns=(column,))


class _Gathered:
    """Rows of plain Python numbers, and small arrays, held back until there are enough to be counted together.

    They are copied: the caller may use the same list or array for the next row.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._values: dict[tuple[str | None, Any], list[Any]] = {}
        self._numbers: dict[tuple[str | None, Any], list[int]] = {}
        self._size = 0

    def add(self, column: str | None, number: int, value: Any) -> None:
        if isinstance(value, np.ndarray):
            value = value.flatten()
        elif isinstance(value, list):
            value = value.copy()
        key = column, value.dtype if isinstance(value, np.ndarray) else None
        self._values.setdefault(key, []).append(value)
        self._numbers.setdefault(key, []).append(number)
        self._size += 1 + (len(value) if isinstance(value, list | tuple | np.ndarray) else 0)

    @property
    def is_full(self) -> bool:
        return self._size >= _IDS_GATHERED

    def pieces(self) -> Iterator[Piece]:
        for key, values in self._values.items():
            (column, dtype), numbers = key, self._numbers[key]
            where = self._where if column is None else f" of column {column!r}{self._where}"
            load = partial(_arrow_of_plain, values, numbers, where) if dtype is None else partial(list, values)
            load_flat = None if dtype is None else partial(_concatenated, values)
            columns = () if column is None else (column,)
            yield Piece(load, len(values), where, partial(_item, numbers), columns, load_flat)


def _concatenated(arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
    return [np.concatenate(arrays)]


def _item(numbers: list[int], row: int) -> int:
    return numbers[row]


def _arrow_of_plain(values: list[Any], numbers: list[int], where: str) -> Any:
    import pyarrow as pa

    rows = f"the data in row {numbers[0]}{f' to {numbers[-1]}' if len(numbers) > 1 else ''}{where}"
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise DataError(f"{rows} is not all integers (token ids): {error}") from None
    check_kind(arrow_kind(array.type), rows)
    return array


def flat(array: Any) -> Iterator[NDArray[Any]]:
    """The integers in an Arrow or numpy array, or in a list of arrays, as 1-D arrays; nulls alone take a copy."""
    if isinstance(array, np.ndarray):
        yield from _flat_numpy(array)
    elif isinstance(array, list):
        for part in array:
            yield from _flat_numpy(part)
    elif is_arrow(array, "ChunkedArray"):
        yield from _flat_chunks(array)
    else:
        yield from _flat_arrow(array)


def _flat_numpy(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    if array.ndim == 1:
        yield array
    elif array.flags.forc:
        yield array.ravel(order="K")
    elif array.size:
        rows = max(1, _PIECE_IDS_COPIED * len(array) // array.size)
        for start in range(0, len(array), rows):
            part = array[start : start + rows]
            if len(part) == 1 and part.size > _PIECE_IDS_COPIED:
                yield from _flat_numpy(part[0])
            else:
                yield part.reshape(-1)


def _flat_chunks(array: Any) -> Iterator[NDArray[Any]]:
    lies_flat = _is_list_of_integers(array.type) and array.null_count == 0
    for chunk in array.chunks:
        if lies_flat and (values := chunk.values).null_count == 0:
            # What `flatten` gives, in half its time: a data set may have a chunk for every few thousand ids.
            offsets = chunk.offsets
            yield values.to_numpy()[offsets[0].as_py() : offsets[-1].as_py()]
        else:
            yield from _flat_arrow(chunk)


def _is_list_of_integers(arrow_type: Any) -> bool:
    import pyarrow as pa

    return isinstance(arrow_type, pa.ListType | pa.LargeListType) and pa.types.is_integer(arrow_type.value_type)


def _flat_arrow(array: Any) -> Iterator[NDArray[Any]]:
    import pyarrow as pa

    lies_together = (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)
    while isinstance(array, pa.ExtensionArray) or (isinstance(array, lies_together) and array.null_count == 0):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.flatten()
    if pa.types.is_integer(array.type):
        if array.null_count == 0:
            yield array.to_numpy()
        else:
            for start in range(0, len(array), _PIECE_IDS_COPIED):
                yield array.slice(start, _PIECE_IDS_COPIED).drop_null().to_numpy()
    elif not pa.types.is_null(array.type):
        # Null rows may hide ids, and lists of the view kind lie in any order: `flatten` copies what is there.
        for start in range(0, len(array), _ROWS_FLATTENED):
            yield from _flat_arrow(array.slice(start, _ROWS_FLATTENED).flatten())
