"""Proof that a folder holds what a merge gives: all of it is read again, and nothing that was written is trusted. No torch."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.merge_plan import Changes, Plan, TensorPlan
from leanvocab.errors import CheckpointError
from leanvocab.files.copying import BLOCK_BYTES, read_exactly, sha256_of_range
from leanvocab.files.headers import Located, TensorEntry, Weights, all_opened, read_weights
from leanvocab.files.row_bytes import convert, gaps, row_blocks

Opened = dict[Path, int]  # path of a file → its descriptor


def first_difference(folder: Path, plan: Plan, changes: Changes) -> str | None:
    """The first thing in `folder` that is not as planned, byte by byte or since it cannot be read; None where all is."""
    try:
        return _first_difference(read_weights(folder), plan, changes)
    except CheckpointError as error:
        return str(error)


def _first_difference(weights: Weights, plan: Plan, changes: Changes) -> str | None:
    files = {file.path.name: file for file in weights.files}
    if set(files) != {file.name for file in plan.files} or weights.index != plan.index:
        return f"expected the files {', '.join(sorted(file.name for file in plan.files))}, as the plan has them"
    with all_opened((*plan.base.files, *changes.files, *weights.files)) as sources:
        for planned in plan.files:
            written = files[planned.name]
            if written.raw != planned.header:
                return f"{planned.name}: another header than planned"
            for tensor in planned.tensors:
                if not _is_as_planned(tensor, sources[written.path], sources):
                    return f"{planned.name}: tensor {tensor.name!r} is not the base's with the delta's rows"
    return None


def _is_as_planned(tensor: TensorPlan, written: int, sources: Opened) -> bool:
    position = tensor.start
    for expected in planned_blocks(tensor, sources):
        if read_exactly(written, position, len(expected)) != expected:
            return False
        position += len(expected)
    return True


def planned_blocks(tensor: TensorPlan, sources: Opened) -> Iterator[bytes]:
    """All bytes of a tensor as a plan has it, in blocks of whole rows."""
    entry = tensor.entry
    num_rows, row_bytes = (entry.shape[0], entry.row_bytes) if entry.shape else (1, entry.num_bytes)
    step = max(1, (BLOCK_BYTES >> 1) // max(1, row_bytes))
    for first in range(0, num_rows if row_bytes else 0, step):
        yield planned_rows(tensor, sources, first, min(step, num_rows - first))


def planned_rows(tensor: TensorPlan, sources: Opened, first: int, num_rows: int) -> bytes:
    """Rows of a tensor as a plan has it: the base's with the delta's over them, or the delta's, in the base's dtype."""
    if tensor.token_ids is None or tensor.delta is None:
        located = tensor.delta or tensor.base
        assert located is not None
        return convert(_rows(located, sources, first, num_rows), located[1].dtype, tensor.entry.dtype)
    assert tensor.base is not None
    block = _rows(tensor.base, sources, first, num_rows)
    low, high = np.searchsorted(tensor.token_ids, [first, first + num_rows]).tolist()
    if low == high:
        return block
    own = convert(_rows(tensor.delta, sources, low, high - low), tensor.delta[1].dtype, tensor.entry.dtype)
    rows = np.frombuffer(block, np.uint8).reshape(num_rows, -1).copy()
    rows[tensor.token_ids[low:high] - first] = np.frombuffer(own, np.uint8).reshape(high - low, -1)
    return rows.tobytes()


def _rows(located: Located, sources: Opened, first: int, num_rows: int) -> bytes:
    file, entry = located
    row_bytes = entry.row_bytes if entry.shape else entry.num_bytes
    return read_exactly(sources[file.path], entry.start + first * row_bytes, num_rows * row_bytes)


def is_merged_already(weights: Weights, changes: Changes) -> bool:
    """True where `weights` are what merging `changes` into their base gives, by the digests that a delta carries."""
    delta, new = changes.description, set(changes.added)
    base_names = {delta.renamed.get(name, name): name for name in delta.base_tensors if name not in delta.absent}
    if set(weights.tensors) != set(base_names) | new:
        return False
    replaced_by = {name: changes.sources.get(base) for name, base in base_names.items()} | {name: name for name in new}
    with all_opened((*weights.files, *changes.files)) as sources:
        return all(  # the delta's tensors first: cheap, and enough to see that a base has not been merged
            _holds_delta(name, delta_name, weights, changes, sources)
            for name, delta_name in replaced_by.items()
            if delta_name is not None
        ) and all(
            _rest_is_the_base(name, delta_name, base_names.get(name), weights, changes, sources)
            for name, delta_name in replaced_by.items()
        )


def _holds_delta(name: str, delta_name: str, weights: Weights, changes: Changes, sources: Opened) -> bool:
    (file, entry), (delta_file, delta) = weights.tensors[name], changes.tensors[delta_name]
    ids, table = changes.token_ids(delta_name), changes.description.tables.get(delta_name)
    num_rows = delta.shape[:1] if table is None else (table.vocabulary.full_size,)
    if entry.shape[:1] != num_rows or entry.shape[1:] != delta.shape[1:]:
        return False
    for first, block in row_blocks(sources[delta_file.path], delta):
        rows = convert(block, delta.dtype, entry.dtype)
        if ids is None:
            written = read_exactly(sources[file.path], entry.start + first * entry.row_bytes, len(rows))
        else:
            starts = entry.start + ids[first : first + len(rows) // entry.row_bytes] * entry.row_bytes
            row_by_row = (read_exactly(sources[file.path], start, entry.row_bytes) for start in starts.tolist())
            written = b"".join(row_by_row)
        if rows != written:
            return False
    return True


def _rest_is_the_base(
    name: str, delta_name: str | None, base_name: str | None, weights: Weights, changes: Changes, sources: Opened
) -> bool:
    """True where all of a tensor that the delta does not have is the base's."""
    file, entry = weights.tensors[name]
    if base_name is None:
        return True
    expected = changes.description.base_tensors[base_name]
    if delta_name is None:
        sha256 = sha256_of_range(sources[file.path], entry.start, entry.end)
        return (entry.dtype, entry.shape, sha256) == (expected.dtype, expected.shape, expected.sha256)
    table = changes.description.tables.get(delta_name)
    if table is None:
        return entry.dtype == expected.dtype
    return rest_sha256(sources[file.path], entry, table.vocabulary.token_ids) == table.rest_sha256


def rest_sha256(source: int, entry: TensorEntry, token_ids: NDArray[np.int64]) -> str:
    """sha256 over the rows of a table that are not in `token_ids`, in order."""
    digest, row_bytes = hashlib.sha256(), entry.row_bytes
    for first, num_rows in gaps(token_ids, entry.shape[0], (BLOCK_BYTES >> 2) // max(1, row_bytes)):
        digest.update(read_exactly(source, entry.start + first * row_bytes, num_rows * row_bytes))
    return digest.hexdigest()
