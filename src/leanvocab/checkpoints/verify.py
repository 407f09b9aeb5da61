"""Proof that a folder holds what a merge gives: all of it is read again, and nothing that was written is trusted. No torch."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.merge_plan import Changes, Plan, TensorPlan
from leanvocab.errors import CheckpointError
from leanvocab.files.copying import BLOCK_BYTES, read_exactly, sha256_of_range
from leanvocab.files.headers import TensorEntry, Weights, all_opened, read_weights
from leanvocab.files.row_bytes import convert, gaps, row_blocks

_Opened = dict[Path, int]


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
                is_as_planned = _is_as_planned if tensor.token_ids is None else _rows_are_as_planned
                if not is_as_planned(tensor, sources[written.path], sources):
                    return f"{planned.name}: tensor {tensor.name!r} is not the base's with the delta's rows"
    return None


def _is_as_planned(tensor: TensorPlan, written: int, sources: _Opened) -> bool:
    located = tensor.delta or tensor.base
    assert located is not None
    file, entry = located
    position = tensor.start
    for _, block in row_blocks(sources[file.path], entry):
        expected = convert(block, entry.dtype, tensor.dtype)
        if read_exactly(written, position, len(expected)) != expected:
            return False
        position += len(expected)
    return True


def _rows_are_as_planned(tensor: TensorPlan, written: int, sources: _Opened) -> bool:
    assert tensor.base is not None
    assert tensor.delta is not None
    assert tensor.token_ids is not None
    (file, base), (delta_file, delta), ids = tensor.base, tensor.delta, tensor.token_ids
    for first, block in row_blocks(sources[file.path], base):
        num_rows = len(block) // base.row_bytes
        expected = np.frombuffer(block, np.uint8).reshape(num_rows, base.row_bytes).copy()
        low, high = np.searchsorted(ids, [first, first + num_rows]).tolist()
        if low < high:
            start = delta.start + low * delta.row_bytes
            rows = read_exactly(sources[delta_file.path], start, (high - low) * delta.row_bytes)
            rows = convert(rows, delta.dtype, tensor.dtype)
            expected[ids[low:high] - first] = np.frombuffer(rows, np.uint8).reshape(-1, base.row_bytes)
        if read_exactly(written, tensor.start + first * base.row_bytes, len(block)) != expected.tobytes():
            return False
    return True


def is_merged_already(weights: Weights, changes: Changes) -> bool:
    """True where `weights` are what merging `changes` into their base gives, by the digests that a delta carries."""
    base_names = {changes.renamed.get(name, name): name for name in changes.base_tensors if name not in changes.absent}
    new = {name for name, targets in changes.replaces.items() if not targets}
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


def _holds_delta(name: str, delta_name: str, weights: Weights, changes: Changes, sources: _Opened) -> bool:
    (file, entry), (delta_file, delta) = weights.tensors[name], changes.tensors[delta_name]
    ids = changes.token_ids.get(delta_name)
    num_rows = (changes.full_sizes[delta_name],) if ids is not None else delta.shape[:1]
    if entry.shape[:1] != num_rows or entry.shape[1:] != delta.shape[1:]:
        return False
    for first, block in row_blocks(sources[delta_file.path], delta):
        rows = convert(block, delta.dtype, entry.dtype)
        if ids is None:
            written = read_exactly(sources[file.path], entry.start + first * entry.row_bytes, len(rows))
        else:
            written = _rows_at(sources[file.path], entry, ids[first : first + len(rows) // entry.row_bytes])
        if rows != written:
            return False
    return True


def _rows_at(source: int, entry: TensorEntry, token_ids: NDArray[np.int64]) -> bytes:
    starts = (entry.start + token_ids * entry.row_bytes).tolist()
    return b"".join(read_exactly(source, start, entry.row_bytes) for start in starts)


def _rest_is_the_base(
    name: str, delta_name: str | None, base_name: str | None, weights: Weights, changes: Changes, sources: _Opened
) -> bool:
    """True where all of a tensor that the delta does not have is the base's."""
    file, entry = weights.tensors[name]
    if base_name is None:
        return True
    expected = changes.base_tensors[base_name]
    if delta_name is None:
        sha256 = sha256_of_range(sources[file.path], entry.start, entry.end)
        return (entry.dtype, entry.shape, sha256) == (expected.dtype, expected.shape, expected.sha256)
    if delta_name not in changes.token_ids:
        return entry.dtype == expected.dtype
    rest = rest_sha256(sources[file.path], entry, changes.token_ids[delta_name])
    return rest == changes.rest_sha256[delta_name]


def rest_sha256(source: int, entry: TensorEntry, token_ids: NDArray[np.int64]) -> str:
    """sha256 over the rows of a table that are not in `token_ids`, in order."""
    digest, row_bytes = hashlib.sha256(), entry.row_bytes
    for first, num_rows in gaps(token_ids, entry.shape[0], (BLOCK_BYTES >> 2) // max(1, row_bytes)):
        digest.update(read_exactly(source, entry.start + first * row_bytes, num_rows * row_bytes))
    return digest.hexdigest()
