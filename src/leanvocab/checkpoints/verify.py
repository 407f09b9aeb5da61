"""Whether a folder holds what a merge gives: proved by reading all of it again, not by trusting what was written. No torch."""

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from leanvocab.checkpoints.merge_plan import Partial, Plan, TensorPlan
from leanvocab.files.copying import BLOCK_BYTES, sha256_of_range
from leanvocab.files.headers import TensorEntry, Weights, opened, read_weights
from leanvocab.files.row_bytes import convert, gaps, read_exactly, row_blocks


def first_difference(folder: Path, plan: Plan, partial: Partial) -> str | None:
    """The first thing in `folder` that is not as planned, compared byte by byte with base and delta; None where all is.

    Raises `CheckpointError` where the folder cannot be read.
    """
    found = read_weights(folder)
    if {file.path.name for file in found.files} != {file.name for file in plan.files} or found.index != plan.index:
        return f"expected the files {', '.join(sorted(file.name for file in plan.files))}, as the plan has them"
    files = {file.path.name: file for file in found.files}
    with ExitStack() as stack:
        sources = {}
        for file in (*plan.base.files, *partial.files, *found.files):
            sources[file.path] = stack.enter_context(opened(file.path.parent, file.path.name))
        for planned in plan.files:
            written = files[planned.name]
            if written.raw != planned.header:
                return f"{planned.name}: another header than planned"
            for tensor in planned.tensors:
                if not _is_as_planned(tensor, sources[written.path], sources):
                    return f"{planned.name}: tensor {tensor.name!r} is not the base's with the delta's rows"
    return None


def _is_as_planned(tensor: TensorPlan, written: int, sources: dict[Path, int]) -> bool:
    if tensor.token_ids is not None:
        return _rows_are_as_planned(tensor, written, sources)
    file, entry = (tensor.delta_file, tensor.delta) if tensor.delta is not None else (tensor.base_file, tensor.base)
    assert file is not None
    assert entry is not None
    position = tensor.start
    for _, block in row_blocks(sources[file.path], entry):
        expected = convert(block, entry.dtype, tensor.dtype)
        if read_exactly(written, position, len(expected)) != expected:
            return False
        position += len(expected)
    return True


def _rows_are_as_planned(tensor: TensorPlan, written: int, sources: dict[Path, int]) -> bool:
    assert tensor.base is not None
    assert tensor.base_file is not None
    assert tensor.token_ids is not None
    assert tensor.delta is not None
    assert tensor.delta_file is not None
    row_bytes, delta_bytes, ids = tensor.base.row_bytes, tensor.delta.row_bytes, tensor.token_ids
    for first, block in row_blocks(sources[tensor.base_file.path], tensor.base):
        num_rows = len(block) // row_bytes
        expected = np.frombuffer(block, np.uint8).reshape(num_rows, row_bytes).copy()
        low, high = np.searchsorted(ids, [first, first + num_rows]).tolist()
        if low < high:
            offset = tensor.delta.start + low * delta_bytes
            rows = read_exactly(sources[tensor.delta_file.path], offset, (high - low) * delta_bytes)
            rows = convert(rows, tensor.delta.dtype, tensor.dtype)
            expected[ids[low:high] - first] = np.frombuffer(rows, np.uint8).reshape(-1, row_bytes)
        if read_exactly(written, tensor.start + first * row_bytes, len(block)) != expected.tobytes():
            return False
    return True


def is_merged_already(weights: Weights, partial: Partial) -> bool:
    """Whether `weights` are what merging `partial` into its base gives, by the digests that the delta carries."""
    gone, tensors = set(partial.absent), weights.tensors
    expected = {partial.renamed.get(name, name): name for name in partial.base_tensors if name not in gone}
    new = {name for name, targets in partial.replaces.items() if not targets}
    if set(tensors) != set(expected) | new:
        return False
    with ExitStack() as stack:
        sources = {}
        for file in (*weights.files, *partial.files):
            sources[file.path] = stack.enter_context(opened(file.path.parent, file.path.name))
        replaced = {
            name: partial.sources.get(expected.get(name, "")) or (name if name in new else None) for name in tensors
        }
        in_delta = [(name, source) for name, source in replaced.items() if source is not None]
        for name, source in in_delta:  # cheap, and enough to see that a base has not been merged
            if not _holds_delta(name, source, weights, partial, sources):
                return False
        for name, place in replaced.items():
            if not _rest_is_the_base(name, place, expected.get(name), weights, partial, sources):
                return False
    return True


def _holds_delta(name: str, source: str, weights: Weights, partial: Partial, sources: dict[Path, int]) -> bool:
    (file, entry), (delta_file, delta) = weights.tensors[name], partial.tensors[source]
    ids = partial.token_ids.get(source)
    rows = partial.full_sizes[source] if ids is not None else (delta.shape[0] if delta.shape else 0)
    if (entry.shape[0] if entry.shape else 0) != rows or entry.shape[1:] != delta.shape[1:]:
        return False
    for first, block in row_blocks(sources[delta_file.path], delta):
        num_rows = len(block) // delta.row_bytes if delta.shape else 1
        places = range(first, first + num_rows) if ids is None else ids[first : first + num_rows].tolist()
        if convert(block, delta.dtype, entry.dtype) != _rows_at(sources[file.path], entry, places):
            return False
    return True


def _rows_at(source: int, entry: TensorEntry, places: "range | list[int]") -> bytes:
    if not entry.shape:
        return read_exactly(source, entry.start, entry.num_bytes)
    if isinstance(places, range):
        return read_exactly(source, entry.start + places.start * entry.row_bytes, len(places) * entry.row_bytes)
    return b"".join(os.pread(source, entry.row_bytes, entry.start + place * entry.row_bytes) for place in places)


def _rest_is_the_base(
    name: str, source: str | None, base_name: str | None, weights: Weights, partial: Partial, sources: dict[Path, int]
) -> bool:
    file, entry = weights.tensors[name]
    if source is None:
        assert base_name is not None
        expected = partial.base_tensors[base_name]
        found = sha256_of_range(sources[file.path], entry.start, entry.end)
        return (entry.dtype, entry.shape, found) == (expected.dtype, expected.shape, expected.sha256)
    if source not in partial.token_ids:
        return base_name is None or entry.dtype == partial.base_tensors[base_name].dtype
    return rest_sha256(sources[file.path], entry, partial.token_ids[source]) == partial.rest_sha256[source]


def rest_sha256(source: int, entry: TensorEntry, token_ids: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> str:
    """sha256 over the rows of a table that are not in `token_ids`, in order."""
    digest, row_bytes = hashlib.sha256(), entry.row_bytes
    step = max(1, (BLOCK_BYTES >> 2) // max(1, row_bytes))
    for first, count in gaps(token_ids, entry.shape[0]):
        for start in range(first, first + count, step):
            num_rows = min(step, first + count - start)
            digest.update(read_exactly(source, entry.start + start * row_bytes, num_rows * row_bytes))
    return digest.hexdigest()
