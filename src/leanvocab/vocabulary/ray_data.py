"""The door to Ray Data: ids are counted where the blocks lie, and partial counts alone travel. Nothing here imports Ray."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import DataError
from leanvocab.vocabulary.sources import find_sources

_ADDED_AT_ONCE = 16  # partial counts that a worker adds up, at 16 bytes for each id that occurs


def is_ray_dataset(data: Any) -> bool:
    """Whether data is a `ray.data.Dataset`."""
    return any(kind.__name__ == "Dataset" and kind.__module__.startswith("ray.data") for kind in type(data).__mro__)


def count_in_workers(
    dataset: Any, columns: list[str] | None, full_size: int | None, num_workers: int | None, count: Callable[..., Any]
) -> tuple[NDArray[np.int64], list[str]]:
    """Counts [full_size, or the largest id + 1] of a Ray data set, and the columns counted; `count` is `count_tokens`.

    Blocks are counted in Ray's workers, which also add partial counts up; a task whose worker dies is run again by Ray.

    Raises:
        DataError: as `count_tokens`; rows in its message are those of a block, which is all that a worker knows.
    """
    columns = _columns(dataset, columns)
    if columns is not None:
        dataset = dataset.select_columns(columns)  # others are not even read, where files allow it
    work = partial(_count_block, columns=columns, full_size=full_size, count=count)
    counted = dataset.map_batches(work, batch_format="pyarrow", batch_size=None, concurrency=num_workers)
    added = counted.map_batches(_add_partial_counts, batch_format="pyarrow", batch_size=_ADDED_AT_ONCE)
    total, named = np.zeros(full_size or 0, np.int64), dict.fromkeys(columns or [])
    for row in added.iter_rows():
        if row["error"]:
            raise DataError(f"{row['error']} (rows as they are numbered in a block of the Ray data set)")
        total = _added(total, np.asarray(row["token_ids"], np.int64), np.asarray(row["counts"], np.int64))
        named |= dict.fromkeys(row["columns"])
    return total, list(named)


def _columns(dataset: Any, columns: list[str] | None) -> list[str] | None:
    """The columns to count, chosen once from the schema; None where it is no Arrow schema, and each block has to say."""
    import pyarrow as pa

    schema = getattr(dataset.schema(), "base_schema", None)
    if not isinstance(schema, pa.Schema):
        return columns
    return [name for source in find_sources(schema.empty_table(), columns, "") for name in source.columns]


def _count_block(table: Any, columns: list[str] | None, full_size: int | None, count: Callable[..., Any]) -> Any:
    """One row: which ids occur in a block, and how often."""
    if table.num_rows == 0:
        return _row([], [], [])
    try:
        found = count(table, columns, full_size=full_size, num_workers=1, progress=False)
    except DataError as error:  # as data: Ray wraps what its workers raise
        return _row([], [], [], str(error))
    return _row(found.token_ids, found.counts[found.token_ids], list(found.columns))


def _add_partial_counts(table: Any) -> Any:
    rows = table.to_pylist() if table.num_rows else []
    total = np.zeros(0, np.int64)
    for row in rows:
        total = _added(total, np.asarray(row["token_ids"], np.int64), np.asarray(row["counts"], np.int64))
    error = next((row["error"] for row in rows if row["error"]), "")
    names = dict.fromkeys(name for row in rows for name in row["columns"])
    token_ids = np.flatnonzero(total)
    return _row(token_ids, total[token_ids], list(names), error)


def _added(total: NDArray[np.int64], token_ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    if token_ids.size and token_ids[-1] >= len(total):
        total = np.concatenate([total, np.zeros(token_ids[-1] + 1 - len(total), np.int64)])
    total[token_ids] += counts
    return total


def _row(token_ids: Any, counts: Any, columns: list[str], error: str = "") -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.int64())
    schema = pa.schema({"token_ids": ids, "counts": ids, "columns": pa.list_(pa.string()), "error": pa.string()})
    return pa.table([[token_ids], [counts], [columns], [error]], schema=schema)
