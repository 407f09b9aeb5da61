"""Tokenized data sets on disk, as `datasets` writes them: ids by Zipf's law, in equal or ragged rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROW_LENGTH = 128
_ROWS_A_CHUNK = 1000
_BLOCK = 1 << 22  # ids drawn, or rows written, at once
_STEPS = 1 << 22  # ranks are drawn from a table of so many equal steps of the cumulated distribution


def draw_ids(num_tokens: int, vocabulary_size: int) -> Iterator[NDArray[np.int32]]:
    """Token ids by Zipf's law, in blocks; frequent ids lie anywhere in the vocabulary.

    A look into a table instead of a binary search for each id: a billion ids take seconds, not minutes.
    """
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, vocabulary_size + 1)
    steps = (np.arange(_STEPS) + 0.5) / _STEPS
    ranks = np.searchsorted(np.cumsum(share / share.sum()), steps).clip(max=vocabulary_size - 1)
    table = rng.permutation(vocabulary_size)[ranks].astype(np.int32)
    for start in range(0, num_tokens, _BLOCK):
        yield table[rng.integers(0, _STEPS, min(_BLOCK, num_tokens - start), dtype=np.int32)]


def write_ids(path: Path, num_tokens: int, vocabulary_size: int, dtype: str = "int32") -> None:
    """The flat ids as an .npy file."""
    out = np.lib.format.open_memmap(path, "w+", dtype, (num_tokens,))
    start = 0
    for block in draw_ids(num_tokens, vocabulary_size):
        out[start : start + len(block)] = block
        start += len(block)
    out.flush()


def row_offsets(num_tokens: int, rows: str) -> NDArray[np.int64]:
    """Starts and ends of rows: all of one length, or of 1 to 255 ids; the last may be shorter."""
    num_rows = -(-num_tokens // ROW_LENGTH)
    if rows == "equal":
        return np.append(np.arange(num_rows, dtype=np.int64) * ROW_LENGTH, num_tokens)
    lengths = np.random.default_rng(1).integers(1, 2 * ROW_LENGTH, 2 * num_rows + 8)
    ends = np.cumsum(lengths)
    return np.concatenate(([0], ends[: np.searchsorted(ends, num_tokens)], [num_tokens]))


def write_rows(folder: Path, ids: Path, rows: str, dtype: str = "int32") -> None:
    """A data set of the flat ids, with a chunk for every thousand rows; rows of equal length are cut to whole rows."""
    import datasets
    import pyarrow as pa

    flat = np.load(ids, mmap_mode="r")
    num_tokens = len(flat) // ROW_LENGTH * ROW_LENGTH if rows == "equal" else len(flat)
    offsets = row_offsets(num_tokens, rows)
    folder.mkdir(parents=True)
    schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(np.dtype(dtype)))})
    schema = datasets.Features.from_arrow_schema(schema).arrow_schema
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, len(offsets) - 1, _ROWS_A_CHUNK):
            part = offsets[start : start + _ROWS_A_CHUNK + 1]
            values = pa.array(np.asarray(flat[part[0] : part[-1]], dtype=dtype))
            lists = pa.ListArray.from_arrays(pa.array(part - part[0], pa.int32()), values)
            stream.write_batch(pa.record_batch([lists], schema=schema))


def load_rows(folder: Path, in_memory: bool = False) -> Any:
    """The data set that `write_rows` wrote, mapped as `load_from_disk` maps it."""
    import datasets

    return datasets.Dataset.from_file(str(folder / "data.arrow"), in_memory=in_memory)
