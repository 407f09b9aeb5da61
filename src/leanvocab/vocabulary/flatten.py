"""Arrays of token ids, nested as they may be → flat arrays of ids, without a copy where they lie together. No torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.extras import is_instance

IDS_COPIED = 1 << 19  # about as many ids are copied at once where they do not lie together
ROWS_COPIED = 1024  # rows that Arrow copies at once


def flat_ids(array: Any) -> Iterator[NDArray[Any]]:
    """The integers in an Arrow or numpy array, or in a list of 1-D arrays of one type; nulls are left out."""
    if isinstance(array, list):
        yield np.concatenate(array)
    elif isinstance(array, np.ndarray):
        yield from _flat_numpy(array)
    else:
        lies_flat = is_list_of_integers(array.type)
        for chunk in array.chunks if is_instance(array, "pyarrow", "ChunkedArray") else [array]:
            if lies_flat and chunk.null_count == 0 and (ids := chunk.values).null_count == 0:
                # What `flatten` gives, in half its time: a data set may have a chunk for every few thousand ids.
                offsets = chunk.offsets
                yield ids.to_numpy()[offsets[0].as_py() : offsets[-1].as_py()]
            else:
                yield from _flat_arrow(chunk)


def is_list_of_integers(arrow_type: Any) -> bool:
    """True where values lie one after the other between offsets."""
    import pyarrow as pa

    return isinstance(arrow_type, pa.ListType | pa.LargeListType) and pa.types.is_integer(arrow_type.value_type)


def _flat_numpy(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    if array.ndim == 1:
        yield array
    elif array.flags.forc:
        yield array.ravel(order="K")
    elif array.size:
        num_rows = max(1, IDS_COPIED * len(array) // array.size)
        for start in range(0, len(array), num_rows):
            part = array[start : start + num_rows]
            if len(part) == 1 and part.size > IDS_COPIED:
                yield from _flat_numpy(part[0])
            else:
                yield part.reshape(-1)


def _flat_arrow(array: Any) -> Iterator[NDArray[Any]]:
    import pyarrow as pa

    lies_together = (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)
    while isinstance(array, pa.ExtensionArray) or (isinstance(array, lies_together) and array.null_count == 0):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.flatten()
    if pa.types.is_integer(array.type):
        if array.null_count == 0:
            yield array.to_numpy()
        else:
            for start in range(0, len(array), IDS_COPIED):
                yield array.slice(start, IDS_COPIED).drop_null().to_numpy()
    elif not pa.types.is_null(array.type):
        # Null rows may hide ids, and lists of the view kind lie in any order: `flatten` copies what is there.
        for start in range(0, len(array), ROWS_COPIED):
            yield from _flat_arrow(array.slice(start, ROWS_COPIED).flatten())
