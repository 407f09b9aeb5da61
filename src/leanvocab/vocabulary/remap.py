"""Data sets of token ids → data sets of partial ids: the paper's D' (Section 4). No torch.

Shrinking does not need it, since ids are remapped inside the lookup; it is for models shrunk with `ids="partial"`. Only
the columns of token ids are rewritten: with their own Arrow type, nulls and nesting, and with `-100` left as it is.
"""

from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from leanvocab.errors import DataError, MissingTokenError
from leanvocab.extras import is_instance, is_tensor
from leanvocab.vocabulary.columns import choose_columns_to_remap
from leanvocab.vocabulary.sources import holds_data_sets

Remap = Callable[[Any], Any]
"""Arrays, tensors or lists of token ids → the same of partial ids; -100 stays; a MissingTokenError for an unseen id."""


def remap_dataset(dataset: Any, columns: list[str] | None, remap: Remap) -> Any:
    """A data set of the same kind over partial ids; see `PartialVocabulary.remap_dataset`."""
    if is_instance(dataset, "datasets", "DatasetDict", "IterableDatasetDict"):
        return type(dataset)({split: remap_dataset(part, columns, remap) for split, part in dataset.items()})
    if is_instance(dataset, "datasets", "Dataset"):
        return _remap_arrow_dataset(dataset, columns, remap)
    if is_instance(dataset, "datasets", "IterableDataset"):
        if dataset.features is not None:
            columns = choose_columns_to_remap(dataset, columns)
        return dataset.map(partial(_remap_row, columns=columns, remap=remap), features=dataset.features)
    if is_instance(dataset, "pyarrow", "Table", "RecordBatch"):
        return _remap_table(dataset, None, columns=choose_columns_to_remap(dataset, columns), remap=remap)
    if isinstance(dataset, Mapping):
        return _remap_mapping(dataset, columns, remap)
    raise DataError(
        f"cannot remap {type(dataset).__name__}: expected a data set, a pyarrow table or a mapping of columns; "
        "arrays, tensors and lists go through to_partial(ids)"
    )


def _remap_arrow_dataset(dataset: Any, columns: list[str] | None, remap: Remap) -> Any:
    columns = choose_columns_to_remap(dataset, columns)
    # `map` works in bounded memory: data in memory stays there, data on disk goes to a cache file, as with every map.
    remapped = dataset.with_format("arrow").map(
        partial(_remap_table, columns=columns, remap=remap),
        with_indices=True,
        batched=True,
        features=dataset.features,
        desc="Remapping token ids",
    )
    shown = dataset.format
    return remapped.with_format(shown.pop("type"), **shown.pop("format_kwargs"), **shown)


def _remap_row(row: Mapping[str, Any], *, columns: list[str] | None, remap: Remap) -> dict[str, Any]:
    remapped = {name: _remap_value(row[name], name, remap) for name in choose_columns_to_remap(row, columns)}
    # Where the stream is formatted as tensors, datasets makes them again, and warns of having got tensors.
    return {name: value.numpy() if is_tensor(value) else value for name, value in remapped.items()}


def _remap_mapping(data: Mapping[Any, Any], columns: list[str] | None, remap: Remap) -> Any:
    if holds_data_sets(data):
        return {split: remap_dataset(part, columns, remap) for split, part in data.items()}
    remapped = dict(data) | {
        name: _remap_value(data[name], name, remap) for name in choose_columns_to_remap(data, columns)
    }
    # A batch keeps its class (transformers' BatchEncoding), which its data alone can make.
    return type(data)(remapped) if isinstance(data, UserDict) else remapped


def _remap_value(value: Any, column: str, remap: Remap) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple) and any(item is None for item in value):
        return [_remap_value(item, column, remap) for item in value]
    try:
        is_arrow = is_instance(value, "pyarrow", "Array", "ChunkedArray")
        return _remap_arrow(value, remap) if is_arrow else remap(value)
    except MissingTokenError as error:
        raise MissingTokenError(f"column {column!r}: {error}") from None


def _remap_table(arrow: Any, rows: Iterable[int] | None, *, columns: list[str], remap: Remap) -> Any:
    first_row = 0 if rows is None else next(iter(rows), 0)
    for name in columns:
        position = arrow.schema.get_field_index(name)
        try:
            remapped = _remap_arrow(arrow.column(position), remap)
        except MissingTokenError:
            _refuse_row(arrow.column(position), first_row, name, remap)
            raise
        arrow = arrow.set_column(position, arrow.schema.field(position), remapped)
    return arrow


def _refuse_row(column: Any, first_row: int, name: str, remap: Remap) -> None:
    """Raise for the first row with an unseen id, by its number."""
    for row in range(len(column)):
        try:
            _remap_arrow(column.slice(row, 1), remap)
        except MissingTokenError as error:
            raise MissingTokenError(f"row {first_row + row} of column {name!r}: {error}") from None


def _remap_arrow(array: Any, remap: Remap) -> Any:
    """An Arrow array of the same type, nulls and nesting over partial ids. What lies in null rows is left out."""
    import pyarrow as pa

    kind = array.type
    if isinstance(array, pa.ChunkedArray):
        return pa.chunked_array([_remap_arrow(chunk, remap) for chunk in array.chunks], type=kind)
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(kind, _remap_arrow(array.storage, remap))
    if pa.types.is_null(kind) or getattr(kind, "list_size", 1) == 0:
        return array  # holds no ids
    if pa.types.is_integer(kind):
        present = ~array.is_null().to_numpy(zero_copy_only=False)
        ids = np.zeros(len(array), dtype=kind.to_pandas_dtype())
        ids[present] = remap(array.drop_null().to_numpy())
        return pa.array(ids, type=kind, mask=None if present.all() else ~present)
    return _with_lists_of(array, _remap_arrow(array.flatten(), remap))


def _with_lists_of(array: Any, values: Any) -> Any:
    """Lists over `values`, which are those of `array` one after the other; of the same lengths, type and nulls."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, nulls = array.type, array.is_null() if array.null_count else None
    counted = array.sizes if hasattr(array, "sizes") else pc.fill_null(pc.list_value_length(array), 0)
    lengths = counted.to_numpy(zero_copy_only=False)
    if nulls is not None:  # a null row may have a size
        lengths = np.where(nulls.to_numpy(zero_copy_only=False), 0, lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if isinstance(array, pa.FixedSizeListArray):
        if nulls is not None:  # a null row takes its room too
            slots = np.repeat(offsets[:-1], kind.list_size).reshape(len(array), -1) + np.arange(kind.list_size)
            values = values.take(
                pa.array(slots.ravel(), mask=np.repeat(nulls.to_numpy(zero_copy_only=False), kind.list_size))
            )
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=nulls)
    width = pa.int64() if isinstance(array, pa.LargeListArray) or str(kind).startswith("large") else pa.int32()
    if isinstance(array, pa.ListArray | pa.LargeListArray):
        return type(array).from_arrays(pa.array(offsets, width), values, type=kind, mask=nulls)
    sizes = pa.array(np.diff(offsets), width)
    return type(array).from_arrays(pa.array(offsets[:-1], width), sizes, values, type=kind, mask=nulls)
