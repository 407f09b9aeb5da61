"""Files of weights with the kept rows alone: planned from headers, and streamed. No torch.

The plan of a merge says what each tensor holds, a delta's rows over the base's; here those dimensions that are the
vocabulary's are cut to the kept ids. Nothing is held in memory but a block.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.merge_plan import Changes, FilePlan, Plan, TensorPlan, index_with_sizes
from leanvocab.checkpoints.verify import Opened, planned_blocks, planned_rows
from leanvocab.errors import CheckpointError
from leanvocab.files.copying import BLOCK_BYTES, Digests, copy_range, new_file, write_at
from leanvocab.files.headers import DTYPE_BITS, INDEX, Located, all_opened, make_header, widened
from leanvocab.files.untrusted_files import parse_object
from leanvocab.progress import ProgressBar
from leanvocab.trimming.id_fields import NewIds

_LINE_BYTES = 64
Dims = Mapping[str, tuple[int, ...]]  # tensor → which of its dimensions are the vocabulary


@dataclass(frozen=True)
class KeptRows:
    """Ids whose rows stay, in their order; rows of padding after them are copies of the row of `padding_id`."""

    new_ids: NewIds
    padding_id: int = 0

    def of(self, size: int) -> NDArray[np.int64]:
        """The rows to take of a dimension of so many."""
        kept = self.new_ids.vocabulary.token_ids
        kept = kept[: np.searchsorted(kept, size)]
        return np.concatenate([kept, np.full(self.new_ids.size(size) - len(kept), self.padding_id, np.int64)])


@dataclass(frozen=True)
class TrimmedTensor:
    """One tensor of the output: all of `source`, but of the dimensions `dims` what `kept` says. `start` is its offset there."""

    source: TensorPlan
    start: int
    dims: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.source.entry.dtype] // 8


@dataclass(frozen=True)
class TrimmedFile:
    """One file of the output; `tensors` in the order in which they lie there."""

    name: str
    header: bytes
    tensors: tuple[TrimmedTensor, ...]


@dataclass(frozen=True)
class TrimmedPlan:
    """Everything that is written of the weights."""

    merged: Plan
    changes: Changes
    kept: KeptRows
    files: tuple[TrimmedFile, ...]
    index: bytes | None

    @property
    def num_bytes(self) -> int:
        headers = sum(len(file.header) for file in self.files)
        return headers + sum(tensor.num_bytes for file in self.files for tensor in file.tensors)


def make_trimmed_plan(merged: Plan, changes: Changes, dims: Dims, kept: KeptRows) -> TrimmedPlan:
    """The plan of what a merge would give with the kept rows alone; raises `CheckpointError` where `dims` do not fit it."""
    tensors = {tensor.name: tensor for file in merged.files for tensor in file.tensors}
    for name, of_vocabulary in dims.items():
        _check_dims(merged.base.folder, name, tensors.get(name), of_vocabulary, kept)
    metadata = {file.path.name: file.metadata for file in merged.base.files}
    files = tuple(_trimmed_file(file, metadata[file.name], dims, kept) for file in merged.files)
    if merged.index is None:
        return TrimmedPlan(merged, changes, kept, files, None)
    sizes = ((tensor.num_bytes, tensor.shape) for file in files for tensor in file.tensors)
    index = index_with_sizes(parse_object(merged.base.folder / INDEX, merged.index), sizes)
    return TrimmedPlan(merged, changes, kept, files, index)


def _check_dims(folder: Path, name: str, tensor: TensorPlan | None, dims: tuple[int, ...], kept: KeptRows) -> None:
    if tensor is None:
        raise CheckpointError(f"{folder}: expected the tensor {name!r}, which holds rows of the vocabulary, found none")
    entry, where, most = tensor.entry, f"{folder}: tensor {name!r}", kept.new_ids.vocabulary.full_size
    for dim in dims:
        if not 0 <= dim < len(entry.shape) or entry.shape[dim] > most:
            raise CheckpointError(
                f"{where}: expected dimension {dim} of at most {most:,}, the vocabulary's rows, found "
                f"{entry.dtype} {list(entry.shape)}"
            )
    if dims and DTYPE_BITS[entry.dtype] % 8:
        raise CheckpointError(
            f"{where}: expected values of whole bytes, found {entry.dtype}, packed; trim before quantizing"
        )


def _trimmed_file(file: FilePlan, metadata: Mapping[str, str] | None, dims: Dims, kept: KeptRows) -> TrimmedFile:
    """The plan of a file, in the base's order; one of which nothing is cut has the base's header, byte for byte."""
    tensors = [
        TrimmedTensor(tensor, tensor.start, own := tuple(sorted(dims.get(tensor.name, ()))), _shape(tensor, own, kept))
        for tensor in file.tensors
    ]
    if not any(tensor.dims for tensor in tensors):
        return TrimmedFile(file.name, file.header, tuple(tensors))
    tensors.sort(key=lambda tensor: -DTYPE_BITS[tensor.source.entry.dtype])  # so that each stays aligned
    forms = ((tensor.source.name, tensor.source.entry.dtype, tensor.shape) for tensor in tensors)
    header, starts = make_header(metadata, forms)
    further = _further(tensors, starts)
    moved = (replace(tensor, start=starts[tensor.source.name] + further) for tensor in tensors)
    return TrimmedFile(file.name, widened(header, further), tuple(moved))


def _further(tensors: Sequence[TrimmedTensor], starts: Mapping[str, int]) -> int:
    """Bytes by which the data have to lie further behind, so that most of what is not cut lies on a line of the processor's
    cache where it did: what is mapped from there is multiplied to the same bits (docs/decisions/aligned-weights.md)."""
    by_distance: Counter[int] = Counter()
    for tensor in tensors:
        if not tensor.dims:
            by_distance[(tensor.source.start - starts[tensor.source.name]) % _LINE_BYTES] += tensor.num_bytes
    further = by_distance.most_common(1)[0][0] if by_distance else 0
    are_aligned = all(
        (starts[tensor.source.name] + further) * 8 % DTYPE_BITS[tensor.source.entry.dtype] == 0 for tensor in tensors
    )
    return further if are_aligned else 0


def _shape(tensor: TensorPlan, dims: tuple[int, ...], kept: KeptRows) -> tuple[int, ...]:
    return tuple(kept.new_ids.size(size) if dim in dims else size for dim, size in enumerate(tensor.entry.shape))


@dataclass(frozen=True)
class WrittenWeights:
    """sha256 of every tensor of the base, and of those of the output that were cut."""

    base: Mapping[str, str]
    cut: Mapping[str, str]


def write_trimmed(folder: Path, plan: TrimmedPlan, progress: ProgressBar) -> WrittenWeights:
    """Writes the weights of a plan into `folder`; what is read is digested, and compared with what a delta says of it.

    Raises `CheckpointError` where it is something else, `OSError` where it cannot be written.
    """
    base, changes = plan.merged.base, plan.changes
    said, expected = changes.description.tensors, changes.description.base_tensors
    cut: dict[str, str] = {}
    with all_opened((*base.files, *changes.files)) as sources, Digests() as digests:

        def digest(located: Located, expected: str) -> Future[str]:
            file, entry = located
            made = digests.start(sources[file.path], entry.start, entry.end)
            if expected:
                digests.expect(f"{file.path}: tensor {entry.name!r}", expected, made)
            return made

        for name, located in changes.tensors.items():
            digest(located, said[name].sha256)
        of_base: dict[str, Future[str]] = {}

        def digest_of_base(located: Located) -> None:
            name = located[1].name
            of_base[name] = digest(located, expected[name].sha256 if changes.has_digests else "")

        modes = {file.path.name: sources[file.path] for file in base.files}
        for file in plan.files:
            with new_file(folder / file.name, modes[file.name]) as target:
                write_at(target, file.header, 0)
                progress.add(len(file.header))
                for tensor in file.tensors:
                    if tensor.source.base is not None:
                        digest_of_base(tensor.source.base)
                    _write_tensor(target, tensor, plan.kept, sources, cut, progress)
        for name in base.tensors.keys() - of_base.keys():  # that a delta leaves out
            digest_of_base(base.tensors[name])
        if plan.index is not None:
            (folder / INDEX).write_bytes(plan.index)
        digests.check()
        return WrittenWeights({name: made.result() for name, made in of_base.items()}, cut)


def _write_tensor(
    target: int, tensor: TrimmedTensor, kept: KeptRows, sources: Opened, cut: dict[str, str], progress: ProgressBar
) -> None:
    source, position = tensor.source, tensor.start
    if not tensor.dims and source.base is not None and source.delta is None:
        file, entry = source.base
        copy_range(sources[file.path], entry.start, target, position, entry.num_bytes, progress.add)
        return
    digest = hashlib.sha256()
    for block in kept_blocks(tensor, kept, sources) if tensor.dims else planned_blocks(source, sources):
        write_at(target, block, position)
        if tensor.dims:
            digest.update(block)
        position += len(block)
        progress.add(len(block))
    if tensor.dims:
        cut[source.name] = digest.hexdigest()


def kept_blocks(tensor: TrimmedTensor, kept: KeptRows, sources: Opened) -> Iterator[bytes]:
    """The bytes of a tensor of which dimensions are cut. Those before the first such one make it several tables, in a row."""
    entry = tensor.source.entry
    first, others = tensor.dims[0], tensor.dims[1:]
    size, inner = entry.shape[first], entry.shape[first + 1 :]
    num_tables, table = math.prod(entry.shape[:first]), _as_table(tensor.source, first)
    ids, value_bytes = kept.of(size), DTYPE_BITS[entry.dtype] // 8
    ids_of_others = [(dim - first, kept.of(entry.shape[dim])) for dim in others]
    spans = list(_spans(ids, max(1, (BLOCK_BYTES >> 1) // max(1, table.entry.row_bytes))))
    for number in range(num_tables):
        for low, high in spans:
            wanted = ids[low:high]
            start, end = int(wanted.min()), int(wanted.max()) + 1
            rows = np.frombuffer(planned_rows(table, sources, number * size + start, end - start), np.uint8)
            values = rows.reshape(end - start, *inner, value_bytes)[wanted - start]
            for axis, its_ids in ids_of_others:
                values = values.take(its_ids, axis=axis)
            yield values.tobytes()


def _as_table(tensor: TensorPlan, dim: int) -> TensorPlan:
    """The tensor with all dimensions before and with `dim` as one; rows of a delta are those of the first dimension already."""
    if dim == 0:
        return tensor

    def joined(located: Located | None) -> Located | None:
        if located is None:
            return None
        file, entry = located
        return file, replace(entry, shape=(math.prod(entry.shape[: dim + 1]), *entry.shape[dim + 1 :]))

    return replace(tensor, base=joined(tensor.base), delta=joined(tensor.delta))


def _spans(ids: NDArray[np.int64], step: int) -> Iterator[tuple[int, int]]:
    """(first, end) of positions whose ids lie in one stretch of `step`."""
    if len(ids):
        starts = [0, *(np.flatnonzero(np.diff(ids // step)) + 1).tolist()]
        yield from zip(starts, [*starts[1:], len(ids)], strict=True)
