"""Pieces of a column: some of its rows, of a size that a thread reads at once, where and when it gets to them. No torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.extras import is_tensor
from leanvocab.vocabulary.flatten import flat_ids, is_list_of_integers

PIECE_IDS = 1 << 22  # about as many ids in a piece, the unit of work of a thread
PIECE_IDS_TAKEN = 1 << 19  # … where its rows must be taken from between others
ROWS_SORTED = 1 << 21  # selected rows sorted at once (16 MB)


@dataclass(frozen=True)
class Piece:
    """Some rows of one column, read when a thread gets to them.

    `load` gives them as an Arrow or numpy array, or a list of flat ones; `row_number` tells the caller's row for one of
    the piece; `where` says in messages where the rows come from. `load_flat` is a faster way to all ids at once, or
    gives None.
    """

    load: Callable[[], Any]
    num_rows: int
    where: str
    row_number: Callable[[int], int]
    column: str | None = None
    load_flat: Callable[[], list[NDArray[Any]] | None] | None = None

    def ids(self) -> Iterator[NDArray[Any]]:
        """The integers in it, as 1-D arrays; nulls are left out."""
        ids = None if self.load_flat is None else self.load_flat()
        return flat_ids(self.load()) if ids is None else iter(ids)


def array_pieces(array: Any, where: str, column: str | None, first_row: int) -> Iterator[Piece]:
    """The rows of an array, numbered from `first_row`."""
    step = _num_rows_with(PIECE_IDS, array)
    for start in range(0, len(array), step):
        num_rows = min(step, len(array) - start)
        load, row_number = partial(_load_rows, array, start, num_rows), partial(int.__add__, first_row + start)
        yield Piece(load, num_rows, where, row_number, column)


def _load_rows(array: Any, start: int, num_rows: int) -> Any:
    rows = array[start : start + num_rows]
    return rows.cpu().numpy() if is_tensor(rows) else rows  # a piece at a time leaves the device


def estimate_num_ids(array: Any) -> int:
    """The number of ids in an array; of an Arrow array about, by its bytes, which are known without reading them."""
    if isinstance(array, np.ndarray):
        return array.size
    if is_tensor(array):
        return int(array.numel())
    try:
        return int(array.nbytes) // 4
    except TypeError:  # lists of the view kind, in older versions of pyarrow
        return int(array.get_total_buffer_size()) // 4


def _num_rows_with(num_ids: int, array: Any) -> int:
    """The number of rows that hold about so many ids."""
    return max(1, num_ids * len(array) // max(estimate_num_ids(array), 1))


def selected_pieces(column: Any, indices: Any, where: str, name: str) -> Iterator[Piece]:
    """The selected rows, in the order in which they are stored: counting does not mind, and the disk is read once."""
    step = _num_rows_with(PIECE_IDS_TAKEN, column)
    starts = np.arange(0, len(column) + step, step)
    for block in range(0, len(indices), ROWS_SORTED):
        rows = _sorted(indices.slice(block, ROWS_SORTED).to_numpy().astype(np.int64, copy=False), len(column))
        edges = np.searchsorted(rows, starts)
        for number in np.flatnonzero(np.diff(edges)):
            for first in range(edges[number], edges[number + 1], step):
                part = rows[first : min(first + step, edges[number + 1])]
                load, load_flat = partial(_take, column, part), partial(_take_flat, column, part)
                yield Piece(load, len(part), where, partial(_selected_row, indices, part), name, load_flat)


def _sorted(rows: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    # Most selections take a row once: a flag for each row sorts them twenty times as fast.
    if num_rows <= 8 * len(rows):
        is_taken = np.zeros(num_rows, dtype=np.bool_)
        is_taken[rows] = True
        taken = np.flatnonzero(is_taken)
        if len(taken) == len(rows):
            return taken
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
    if not is_list_of_integers(column.type) or stretch.null_count or any(c.values.null_count for c in stretch.chunks):
        return None
    is_taken = np.zeros(num_rows, dtype=np.bool_)
    is_taken[rows - rows[0]] = True
    ids_taken = []
    for chunk in stretch.chunks:
        offsets = chunk.offsets.to_numpy()
        is_taken_here, is_taken = np.split(is_taken, [len(chunk)])
        ids = chunk.values.to_numpy()[offsets[0] : offsets[-1]]
        ids_taken.append(ids[np.repeat(is_taken_here, np.diff(offsets))])
    return ids_taken


def _selected_row(indices: Any, rows: NDArray[np.int64], row: int) -> int:
    # Only for a message: reads the whole mapping.
    return int(np.flatnonzero(indices.to_numpy() == rows[row])[0])
