"""Base folder + delta → full folder: streamed by bytes, with no model built and no torch.

A plan is made and checked first, from headers alone. What the delta does not touch is copied as bytes of the base's
files, kept rows are written over them, and the base's digests are checked while its bytes pass. The output appears
whole or not at all.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from leanvocab.checkpoints.delta_format import CONFIG, is_delta, read_description, write_note_of
from leanvocab.checkpoints.merge_plan import Changes, Plan, TensorPlan, make_plan, merged_config, read_changes
from leanvocab.checkpoints.verify import first_difference, is_merged_already
from leanvocab.errors import CheckpointError
from leanvocab.files.atomic_folders import check_apart, clear_leftovers, written_whole
from leanvocab.files.copying import Digests, copy_range, new_file, sync, write_at
from leanvocab.files.headers import INDEX, Located, all_opened, is_weights_file, read_weights
from leanvocab.files.hub_cache import cached_folder
from leanvocab.files.presence import is_folder, is_there
from leanvocab.files.row_bytes import convert, first_nan_row, row_blocks, runs
from leanvocab.files.side_files import copy_side_files, find_side_files
from leanvocab.progress import ProgressBar
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


@dataclass(frozen=True)
class MergeResult:
    """Account of a merge. `already_there`: nothing was done, since the output was this merge's result."""

    output: Path
    num_bytes: int
    num_rows: int
    num_replaced: int  # tensors other than tables
    num_added: int
    left_out: tuple[str, ...]  # weights of the base in other formats, which do not hold what was trained
    verified: bool
    already_there: bool
    seconds: float


def merge_checkpoint(
    *,
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    verify: bool = False,
    in_place: bool = False,
    overwrite: bool = False,
    vocabulary: PartialVocabulary | str | os.PathLike[str] | None = None,
    allow_nan: bool = False,
    allow_rounding: bool = False,
    progress: bool | None = None,
) -> MergeResult:
    """Writes the full checkpoint of `base` with the rows and tensors of `delta`, and says what was done.

    Sharding, tensor order, metadata, dtypes and side files are the base's; a block is in memory. Twice changes nothing.

    Args:
        base: folder of the pretrained checkpoint (safetensors, one file or shards), or its name in the hub's cache.
        delta: folder of a delta (`save_delta`), or of a partial checkpoint together with `vocabulary`.
        output: folder to make; it appears whole or not at all. Must be free, or hold this merge's result.
        verify: re-read the output before it appears: kept rows equal the delta, all other bytes equal the base.
        in_place: the output takes the place of the base, once it is complete and synced.
        overwrite: replace what lies in `output`.
        vocabulary: the rows' vocabulary, or a file of it, where `delta` is no delta.
        allow_nan: take rows with NaN, which otherwise are refused.
        allow_rounding: take values that the base's dtype cannot hold (a model trained in fp32 from a bf16 base).
        progress: a bar with bytes; by default on a terminal, when it takes long.

    Raises:
        CheckpointError: something is not what it should be: which file, which tensor, what was expected and found.
        OSError: the output cannot be written. In both cases nothing has changed.

    Source: paper, Section 4: "we merge … into the original embedding matrix (stored on-disk)".
    """
    started = time.perf_counter()
    base_folder, delta_folder = base_and_delta(base, delta)
    target = _target(base_folder, delta_folder, output, in_place)
    clear_leftovers(target)
    weights = read_weights(base_folder)
    changes = read_changes(delta_folder, vocabulary, weights)
    if in_place and changes.has_digests and is_merged_already(weights, changes):
        return _result(target, None, changes, weights.num_bytes, started, verified=True)
    plan = make_plan(weights, changes, allow_rounding)
    config = merged_config(base_folder, delta_folder) if is_delta(delta_folder) else None
    replace = in_place or overwrite
    if not replace and is_folder(target) and any(target.iterdir()):
        return _take_what_is_there(target, plan, changes, started)
    merge = _Merge(plan, changes, in_place, allow_nan, ProgressBar("merging", plan.num_bytes, progress))
    try:
        with written_whole(target, keeps=lambda name: in_place and not is_weights_file(name), replace=replace) as (
            folder,
            _,
        ):
            merge.write(folder, config)
            if verify:
                _verify(folder, plan, changes)
    except FileExistsError:
        return _take_what_is_there(target, plan, changes, started)
    return _result(target, plan, changes, plan.num_bytes, started, verified=verify)


def _verify(folder: Path, plan: Plan, changes: Changes) -> None:
    """Re-reads what was written; raises `CheckpointError` where it is not what it should be, and then it never appears."""
    for file in plan.files:
        sync(folder / file.name, forget=True)
    difference = first_difference(folder, plan, changes)
    if difference is not None:
        raise CheckpointError(
            f"what was written is not what was to be written, and is discarded: {difference}; check the disk"
        )


def _take_what_is_there(target: Path, plan: Plan, changes: Changes, started: float) -> MergeResult:
    """Another run has made the output already, or something else lies there, which is not ours to replace."""
    difference = first_difference(target, plan, changes)
    if difference is None:
        return _result(target, None, changes, plan.num_bytes, started, verified=True)
    raise CheckpointError(
        f"{target} is there already, and is not this merge's result ({difference}); name another output, or replace it with "
        "overwrite=True (--overwrite)"
    )


def _result(
    target: Path, plan: Plan | None, changes: Changes, num_bytes: int, started: float, verified: bool
) -> MergeResult:
    tables, tensors, num_added = changes.description.tables, changes.description.tensors, len(changes.added)
    return MergeResult(
        output=target,
        num_bytes=num_bytes,
        num_rows=sum(len(table.vocabulary) for table in tables.values()),
        num_replaced=len(tensors) - num_added - len(tables),
        num_added=num_added,
        left_out=_left_out(plan) if plan is not None else (),
        verified=verified,
        already_there=plan is None,
        seconds=time.perf_counter() - started,
    )


def _left_out(plan: Plan) -> tuple[str, ...]:
    written = {file.path.name for file in plan.base.files} | {INDEX}
    names = os.listdir(plan.base.folder)
    return tuple(sorted(name for name in names if is_weights_file(name) and name not in written))


def folder_at(path: str | os.PathLike[str], role: str, revision: str | None = None) -> Path:
    """The folder at a path, or of a name in the hub's cache where it is a base's; raises `CheckpointError`."""
    folder = Path(os.path.realpath(path))
    if not is_there(folder):
        clear_leftovers(folder)  # a kill in the middle of a swap may have left it aside
    if role == "base" and not is_there(folder) and (cached := cached_folder(os.fspath(path), revision)) is not None:
        return Path(os.path.realpath(cached))
    if not is_folder(folder):
        raise CheckpointError(
            f"{role}: expected a folder, found {'a file' if is_there(folder) else 'nothing'} at {path}"
        )
    return folder


def base_and_delta(base_path: str | os.PathLike[str], delta_path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(base, delta); raises `CheckpointError` where each is what the other should be, or one is something else."""
    delta = folder_at(delta_path, "delta")
    base = folder_at(base_path, "base", read_description(delta).base_revision if is_delta(delta) else None)
    if is_delta(base):
        others = "and the delta is none: they are the wrong way round" if not is_delta(delta) else "too: merge it first"
        raise CheckpointError(f"the base {base} is a delta, {others}; expected the base first, then the delta")
    if not is_delta(delta) and is_there(delta / "adapter_config.json"):
        raise CheckpointError(
            f"{delta} is an adapter of peft, expected a delta: PeftModel.from_pretrained(base, adapter).merge_and_unload() gives "
            "the whole model"
        )
    return base, delta


def _target(base: Path, delta: Path, output: str | os.PathLike[str] | None, in_place: bool) -> Path:
    if in_place:
        if output is not None and Path(os.path.realpath(output)) != base:
            raise CheckpointError(f"in_place=True replaces the base {base}; leave output={os.fspath(output)!r} out")
        if base.parent.name == "snapshots" and is_folder(base.parent.parent / "blobs"):
            raise CheckpointError(f"{base} lies in a hub cache, which others share: merge into another output instead")
        return base
    if output is None:
        raise CheckpointError("expected output=, a folder to make, or in_place=True")
    target = Path(os.path.realpath(output))
    if target == base:
        raise CheckpointError(
            f"output {target} and the base lie in one another; to replace it give in_place=True (--in-place)"
        )
    check_apart(target, base=base, delta=delta)
    return target


class _Merge:
    """One merge that is being written: copies by bytes, digests in threads beside it."""

    def __init__(self, plan: Plan, changes: Changes, in_place: bool, allow_nan: bool, progress: ProgressBar):
        self.plan, self.changes, self.in_place = plan, changes, in_place
        self.allow_nan, self.progress = allow_nan, progress
        self.side_files = find_side_files(plan.base.folder)
        self.sources: dict[Path, int] = {}

    def write(self, folder: Path, config: bytes | None) -> None:
        """Writes everything; raises `CheckpointError` where the base or the delta is not what it should be."""
        self._write_weights(folder)
        if self.plan.index is not None:
            (folder / INDEX).write_bytes(self.plan.index)
            shutil.copymode(self.plan.base.folder / INDEX, folder / INDEX)
        if not self.in_place:
            copy_side_files(self.plan.base.folder, folder, self.side_files)
        if config is not None:
            (folder / CONFIG).write_bytes(config)
        write_note_of(folder, self.changes.description)

    def _write_weights(self, folder: Path) -> None:
        with ExitStack() as stack:
            self.sources = stack.enter_context(all_opened((*self.plan.base.files, *self.changes.files)))
            stack.callback(self.progress.close)
            self.digests = stack.enter_context(Digests())
            for name, located in self.changes.tensors.items():
                self._expect(located, self.changes.description.tensors[name].sha256)
            of_base = {file.path.name: self.sources[file.path] for file in self.plan.base.files}
            for file in self.plan.files:
                with new_file(folder / file.name, of_base[file.name]) as descriptor:
                    write_at(descriptor, file.header, 0)
                    self.progress.add(len(file.header))
                    for tensor in file.tensors:
                        self._write_tensor(descriptor, tensor)
            self.digests.check()

    def _expect(self, located: Located, sha256: str) -> None:
        if sha256:
            file, entry = located
            digest = self.digests.start(self.sources[file.path], entry.start, entry.end)
            self.digests.expect(f"{file.path}: tensor {entry.name!r}", sha256, digest)

    def _write_tensor(self, descriptor: int, tensor: TensorPlan) -> None:
        if tensor.delta is None or tensor.token_ids is not None:  # bytes of the base are in it
            assert tensor.base is not None
            file, entry = tensor.base
            if self.changes.has_digests:
                self._expect(tensor.base, self.changes.description.base_tensors[entry.name].sha256)
            source = self.sources[file.path]
            copy_range(source, entry.start, descriptor, tensor.start, entry.num_bytes, self.progress.add)
        if tensor.delta is not None and tensor.token_ids is not None:
            self._write_rows(descriptor, tensor, tensor.delta)
        elif tensor.delta is not None:
            position = tensor.start
            for _, block in self._delta_blocks(tensor, tensor.delta):
                write_at(descriptor, block, position)
                position += len(block)
                self.progress.add(len(block))

    def _write_rows(self, descriptor: int, tensor: TensorPlan, delta: Located) -> None:
        assert tensor.base is not None
        assert tensor.token_ids is not None
        row_bytes = tensor.base[1].row_bytes
        for first, block in self._delta_blocks(tensor, delta):
            ids = tensor.token_ids[first : first + len(block) // max(1, row_bytes)]
            for offset, token_id, count in runs(ids):
                rows = memoryview(block)[offset * row_bytes : (offset + count) * row_bytes]
                write_at(descriptor, rows, tensor.start + token_id * row_bytes)

    def _delta_blocks(self, tensor: TensorPlan, delta: Located) -> Iterator[tuple[int, bytes]]:
        """(first row, bytes of rows in the base's dtype); rows of a table are checked for NaN."""
        file, entry = delta
        for first, block in row_blocks(self.sources[file.path], entry):
            if tensor.token_ids is not None and not self.allow_nan:
                row = first_nan_row(block, entry)
                if row is not None:
                    raise CheckpointError(
                        f"{file.path}: tensor {entry.name!r}: expected numbers, found NaN in the row of id "
                        f"{tensor.token_ids[first + row]}: the training diverged. allow_nan=True (--allow-nan) takes it"
                    )
            yield first, convert(block, entry.dtype, tensor.entry.dtype)
