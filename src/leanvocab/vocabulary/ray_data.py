"""The door to Ray Data: ids are counted where the blocks lie, and partial counts alone travel. Nothing here imports Ray."""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import DataError
from leanvocab.vocabulary.columns import choose_id_columns
from leanvocab.vocabulary.threads import count_in_threads

_ADDED_AT_ONCE = 16  # partial counts that a worker adds up, at 16 bytes for each id that occurs


def count_in_workers(
    dataset: Any, columns: list[str] | None, full_size: int | None, num_workers: int | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Counts [full_size, or the largest id + 1] of a Ray data set, and the columns counted; see `count_tokens`.

    Blocks are counted in Ray's workers, which also add partial counts up; a task whose worker dies is run again by Ray.

    Raises:
        DataError: as `count_tokens`; rows in its message are those of a block, which is all that a worker knows.
    """
    import pyarrow as pa

    # The columns are chosen once; where the schema is not Arrow's, each block has to say.
    schema = getattr(dataset.schema(), "base_schema", None)
    if isinstance(schema, pa.Schema):
        columns = choose_id_columns(schema, columns)
    if columns is not None:
        dataset = dataset.select_columns(columns)  # others are not even read, where files allow it
    work = partial(count_block, columns=columns, full_size=full_size)
    counted = dataset.map_batches(work, batch_format="pyarrow", batch_size=None, concurrency=num_workers)
    added = counted.map_batches(add_partial_counts, batch_format="pyarrow", batch_size=_ADDED_AT_ONCE)
    total, named = np.zeros(full_size or 0, np.int64), dict.fromkeys(columns or [])
    for row in added.iter_rows():
        if row["error"]:
            raise DataError(f"{row['error']} (rows as they are numbered in a block of the Ray data set)")
        total = _added(total, row)
        named |= dict.fromkeys(row["columns"])
    return total, list(named)


def count_block(block: Any, columns: list[str] | None, full_size: int | None) -> Any:
    """One row: the ids that occur in a block, which is an Arrow table, and how often."""
    if block.num_rows == 0:
        return _row([], [], [])
    try:
        counts, counted = count_in_threads(block, columns, full_size, num_workers=1, progress=False)
    except DataError as error:  # as data: Ray wraps what its workers raise
        return _row([], [], [], str(error))
    token_ids = np.flatnonzero(counts)
    return _row(token_ids, counts[token_ids], counted)


def add_partial_counts(blocks: Any) -> Any:
    """One row: the sum of such rows."""
    rows = blocks.to_pylist()
    total = np.zeros(0, np.int64)
    for row in rows:
        total = _added(total, row)
    error = next((row["error"] for row in rows if row["error"]), "")
    names = dict.fromkeys(name for row in rows for name in row["columns"])
    token_ids = np.flatnonzero(total)
    return _row(token_ids, total[token_ids], list(names), error)


def _added(total: NDArray[np.int64], row: dict[str, Any]) -> NDArray[np.int64]:
    token_ids, counts = np.asarray(row["token_ids"], np.int64), np.asarray(row["counts"], np.int64)
    if token_ids.size and token_ids[-1] >= len(total):
        total = np.concatenate([total, np.zeros(token_ids[-1] + 1 - len(total), np.int64)])
    total[token_ids] += counts
    return total


def _row(token_ids: Any, counts: Any, columns: list[str], error: str = "") -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.int64())
    schema = pa.schema({"token_ids": ids, "counts": ids, "columns": pa.list_(pa.string()), "error": pa.string()})
    return pa.table([[token_ids], [counts], [columns], [error]], schema=schema)
