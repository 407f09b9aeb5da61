"""Rows of tensors as bytes: blocks of a file, runs of ids that follow on one another, NaN, and dtypes. numpy, no torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.files.copying import BLOCK_BYTES, read_exactly
from leanvocab.files.headers import TensorEntry

# Floating dtypes as integers: (integer type, mask of all but the sign, largest value that is no NaN).
_FLOATS: dict[str, tuple[Any, int, int]] = {
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F, 0x7E),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
}
# From → the dtypes that hold each of its values.
EXACT = {"BF16": {"F32", "F64"}, "F16": {"F32", "F64"}, "F32": {"F64"}, "F64": set()}


def row_blocks(source: int, entry: TensorEntry, num_bytes: int = BLOCK_BYTES >> 1) -> Iterator[tuple[int, bytes]]:
    """(first row, bytes) of blocks of whole rows of a tensor; raises `CheckpointError` where the file ends too early."""
    rows, row_bytes = (entry.shape[0], entry.row_bytes) if entry.shape else (1, entry.num_bytes)
    step = max(1, num_bytes // max(1, row_bytes))
    for first in range(0, rows if row_bytes else 0, step):
        yield first, read_exactly(source, entry.start + first * row_bytes, min(step, rows - first) * row_bytes)


def runs(token_ids: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(position, first id, count) of each run of ids that follow on one another."""
    if len(token_ids) == 0:
        return
    starts = [0, *(np.flatnonzero(np.diff(token_ids) != 1) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(token_ids)], strict=True):
        yield start, int(token_ids[start]), end - start


def gaps(token_ids: NDArray[np.int64], full_size: int, most: int | None = None) -> Iterator[tuple[int, int]]:
    """(first id, count) of each stretch of ids that are not in `token_ids`, cut where it has more than `most`."""
    first, step = 0, max(1, full_size if most is None else most)
    for _, end, count in (*runs(token_ids), (0, full_size, 0)):
        for start in range(first, end, step):
            yield start, min(step, end - start)
        first = end + count


def first_nan_row(block: bytes, entry: TensorEntry) -> int | None:
    """The first row of a block that holds a NaN."""
    if entry.dtype not in _FLOATS or not block:
        return None
    integer, mask, limit = _FLOATS[entry.dtype]
    bits = np.frombuffer(block, integer).reshape(-1, entry.row_bytes // np.dtype(integer).itemsize)
    rows = np.flatnonzero(((bits & integer(mask)) > integer(limit)).any(axis=1))
    return int(rows[0]) if rows.size else None


def convert(block: bytes, dtype: str, wanted: str) -> bytes:
    """Values of one floating dtype as another; rounded to the nearest, ties to even, where the other is narrower."""
    return block if dtype == wanted else _narrowed(_widened(block, dtype), wanted).tobytes()


def _widened(block: bytes, dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        return (np.frombuffer(block, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(block, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def _narrowed(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):  # too large a number is infinite, as torch has it
        if dtype != "BF16":
            return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
        bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FC0), rounded).astype(np.uint16)
