"""Base folder + delta → full folder: streamed by bytes, with no model built and no torch.

A plan is made and checked first, from headers alone. What the delta does not touch is copied as bytes of the base's
files, kept rows are written over them, and the base's digests are checked while its bytes pass. The output appears
whole or not at all.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvocab.checkpoints.checkpoint import clear_leftovers, written_whole
from leanvocab.checkpoints.delta_format import CONFIG, MODEL_CONFIG, is_delta, write_training_note
from leanvocab.checkpoints.merge_plan import FilePlan, Partial, Plan, TensorPlan, make_plan, read_partial
from leanvocab.checkpoints.verify import first_difference, is_merged_already
from leanvocab.errors import CheckpointError
from leanvocab.files.copying import copy_range, sha256_of_range, sync_and_forget
from leanvocab.files.headers import INDEX, Weights, is_weights_file, opened, read_json, read_weights, resolve_in
from leanvocab.files.row_bytes import convert, first_nan_row, row_blocks, runs
from leanvocab.progress import ProgressBar
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_CODE_KEYS = ("auto_map", "custom_pipelines")  # names of code that a loader may be asked to run
_SAID_BY_THE_FILES = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass(frozen=True)
class MergeResult:
    """What a merge did. `already_there`: nothing, since the output was this merge's result."""

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

    Sharding, tensor order, metadata, dtypes and every side file are the base's; nothing is held in memory but a block.
    Running it twice changes nothing.

    Args:
        base: folder of the pretrained checkpoint (safetensors, one file or shards).
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
    """
    started = time.perf_counter()
    source, partial_folder = _folder(base, "base"), _folder(delta, "delta")
    target = _target(source, partial_folder, output, in_place)
    if target.parent.is_dir():
        clear_leftovers(target)
    weights = read_weights(source)
    rows = read_partial(partial_folder, vocabulary, weights)
    if in_place and rows.has_digests and is_merged_already(weights, rows):
        return _result(source, None, rows, weights.num_bytes, started, verified=True)
    plan = make_plan(weights, rows, allow_rounding)
    config = _config(source, partial_folder) if is_delta(partial_folder) else None
    if not (in_place or overwrite) and target.is_dir() and any(target.iterdir()):
        return _take_what_is_there(target, plan, rows, started)
    sides = _side_files(source)
    merge = _Merge(plan, rows, allow_nan, progress)
    try:
        with written_whole(target, keeps=_keeps(in_place), replace=in_place or overwrite) as (folder, _):
            merge.write(folder)
            if not in_place:
                _copy_side_files(source, folder, sides)
            if config is not None:
                (folder / CONFIG).write_bytes(config)
            if rows.restricted:
                write_training_note(folder, rows.restricted)
            if verify:
                _verify(folder, plan, rows)
    except FileExistsError:
        return _take_what_is_there(target, plan, rows, started)
    return _result(target, plan, rows, plan.num_bytes, started, verified=verify)


def _verify(folder: Path, plan: Plan, partial: Partial) -> None:
    """Re-reads what was written; raises `CheckpointError` where it is not what it should be, and then it never appears."""
    for file in plan.files:
        sync_and_forget(folder / file.name)
    try:
        found = first_difference(folder, plan, partial)
    except CheckpointError as error:
        found = str(error)
    if found is not None:
        raise CheckpointError(
            f"what was written is not what was to be written, and is discarded: {found}; check the disk"
        )


def _take_what_is_there(target: Path, plan: Plan, partial: Partial, started: float) -> MergeResult:
    """Another run has made the output already, or something else lies there, which is not ours to replace."""
    try:
        found = first_difference(target, plan, partial)
    except CheckpointError as error:
        found = str(error)
    if found is None:
        return _result(target, None, partial, plan.num_bytes, started, verified=True)
    raise CheckpointError(
        f"{target} is there already, and is not this merge's result ({found}); name another output, or replace it with "
        "overwrite=True (--overwrite)"
    )


def _result(
    target: Path, plan: Plan | None, partial: Partial, num_bytes: int, started: float, verified: bool
) -> MergeResult:
    tables = list(partial.token_ids.values())
    replaced = [name for name, targets in partial.replaces.items() if targets and name not in partial.token_ids]
    return MergeResult(
        output=target,
        num_bytes=num_bytes,
        num_rows=sum(len(token_ids) for token_ids in tables),
        num_replaced=len(replaced),
        num_added=sum(not targets for targets in partial.replaces.values()),
        left_out=() if plan is None else _left_out(plan),
        verified=verified,
        already_there=plan is None,
        seconds=time.perf_counter() - started,
    )


def _left_out(plan: Plan) -> tuple[str, ...]:
    written = {file.path.name for file in plan.base.files} | {INDEX}
    folder = plan.base.folder
    return tuple(sorted(each for each in os.listdir(folder) if is_weights_file(each) and each not in written))


def _folder(path: str | os.PathLike[str], role: str) -> Path:
    folder = Path(os.path.realpath(path))
    if not folder.exists() and folder.parent.is_dir():
        clear_leftovers(folder)  # a kill in the middle of a swap may have left it aside
    if not folder.is_dir():
        raise CheckpointError(
            f"{role}: expected a folder, found {'a file' if folder.exists() else 'nothing'} at {path}"
        )
    return folder


def _target(base: Path, partial: Path, output: str | os.PathLike[str] | None, in_place: bool) -> Path:
    if in_place:
        if output is not None and Path(os.path.realpath(output)) != base:
            raise CheckpointError(f"in_place=True replaces the base {base}; leave output={os.fspath(output)!r} out")
        if base.parent.name == "snapshots" and (base.parent.parent / "blobs").is_dir():
            raise CheckpointError(f"{base} lies in a hub cache, which others share: merge into another output instead")
        return base
    if output is None:
        raise CheckpointError("expected output=, a folder to make, or in_place=True")
    target = Path(os.path.realpath(output))
    for role, folder in (("base", base), ("delta", partial)):
        if target == folder or folder in target.parents or target in folder.parents:
            hint = "; to replace it give in_place=True (--in-place)" if target == base else ""
            raise CheckpointError(
                f"output {target} and the {role} {folder} lie in one another; name another output{hint}"
            )
    return target


def _keeps(in_place: bool) -> Callable[[str], bool]:
    return lambda name: in_place and not is_weights_file(name)


# --- writing ----------------------------------------------------------------------------------------------------------


class _Merge:
    """One merge that is being written: copies by bytes, digests in threads beside it."""

    def __init__(self, plan: Plan, partial: Partial, allow_nan: bool, progress: bool | None):
        self.plan, self.partial, self.allow_nan = plan, partial, allow_nan
        self.progress = ProgressBar("merging", plan.num_bytes, progress)
        self.sources: dict[Path, int] = {}
        self.digests: list[tuple[str, str, Future[str]]] = []

    def write(self, folder: Path) -> None:
        """Writes the weights; raises `CheckpointError` where the base or the delta is not what it should be."""
        with ExitStack() as stack:
            for file in (*self.plan.base.files, *self.partial.files):
                self.sources[file.path] = stack.enter_context(opened(file.path.parent, file.path.name))
            stack.callback(self.progress.close)
            executor = stack.enter_context(ThreadPoolExecutor(2, "leanvocab-digest"))
            try:
                self._check_delta(executor)
                for each in self.plan.files:
                    self._write_file(folder / each.name, each, executor)
                for where, expected, found in self.digests:
                    _check_digest(where, expected, found.result())
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
        if self.plan.index is not None:
            (folder / INDEX).write_bytes(self.plan.index)
            shutil.copymode(self.plan.base.folder / INDEX, folder / INDEX)

    def _check_delta(self, executor: ThreadPoolExecutor) -> None:
        for name, (file, entry) in self.partial.tensors.items():
            self._expect(executor, file.path, name, entry.start, entry.end, self.partial.sha256.get(name))

    def _expect(
        self, executor: ThreadPoolExecutor, path: Path, name: str, start: int, end: int, expected: str | None
    ) -> None:
        if expected is not None:
            found = executor.submit(sha256_of_range, self.sources[path], start, end)
            self.digests.append((f"{path}: tensor {name!r}", expected, found))

    def _write_file(self, path: Path, plan: FilePlan, executor: ThreadPoolExecutor) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            mode = next(
                os.fstat(self.sources[file.path]).st_mode
                for file in self.plan.base.files
                if file.path.name == plan.name
            )
            os.fchmod(descriptor, mode & 0o777)
            self._write_header(descriptor, plan.header)
            for tensor in plan.tensors:
                self._write_tensor(descriptor, tensor, executor)
            _sync_file(descriptor)
        finally:
            os.close(descriptor)

    def _write_header(self, descriptor: int, header: bytes) -> None:
        write_at(descriptor, header, 0)
        self.progress.add(len(header))

    def _write_tensor(self, descriptor: int, tensor: TensorPlan, executor: ThreadPoolExecutor) -> None:
        if tensor.uses_base:
            assert tensor.base_file is not None
            assert tensor.base is not None
            entry, path = tensor.base, tensor.base_file.path
            self._expect(executor, path, entry.name, entry.start, entry.end, self.partial.base_sha256.get(entry.name))
            copy_range(self.sources[path], entry.start, descriptor, tensor.start, entry.num_bytes, self.progress.add)
        if tensor.delta is not None and tensor.token_ids is not None:
            self._write_rows(descriptor, tensor)
        elif tensor.delta is not None:
            self._write_whole(descriptor, tensor)

    def _write_rows(self, descriptor: int, tensor: TensorPlan) -> None:
        assert tensor.base is not None
        assert tensor.token_ids is not None
        row_bytes = tensor.base.row_bytes
        for first, block in self._delta_blocks(tensor):
            ids = tensor.token_ids[first : first + len(block) // max(1, row_bytes)]
            for offset, token_id, count in runs(ids):
                rows = memoryview(block)[offset * row_bytes : (offset + count) * row_bytes]
                write_at(descriptor, rows, tensor.start + token_id * row_bytes)

    def _write_whole(self, descriptor: int, tensor: TensorPlan) -> None:
        position = tensor.start
        for _, block in self._delta_blocks(tensor):
            write_at(descriptor, block, position)
            position += len(block)
            self.progress.add(len(block))

    def _delta_blocks(self, tensor: TensorPlan) -> Iterator[tuple[int, bytes]]:
        """(first row, bytes of rows in the base's dtype); rows of a table are checked for NaN."""
        assert tensor.delta is not None
        assert tensor.delta_file is not None
        entry, path = tensor.delta, tensor.delta_file.path
        for first, block in row_blocks(self.sources[path], entry):
            if tensor.token_ids is not None and not self.allow_nan:
                row = first_nan_row(block, entry)
                if row is not None:
                    raise CheckpointError(
                        f"{path}: tensor {entry.name!r}: expected numbers, found NaN in the row of id "
                        f"{tensor.token_ids[first + row]}: the training diverged. allow_nan=True (--allow-nan) takes it"
                    )
            yield first, convert(block, entry.dtype, tensor.dtype)


def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Writes all of `data` at `position`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _sync_file(descriptor: int) -> None:
    os.fsync(descriptor)


def _check_digest(where: str, expected: str, found: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{where}: expected sha256 {expected[:16]}…, found {found[:16]}…: it is not the one that the "
            "delta was made from, or damaged"
        )


# --- side files -------------------------------------------------------------------------------------------------------


def _side_files(base: Path) -> list[Path]:
    """Everything in the base's folder that holds no weights, checked before anything is written."""
    found = []
    for directory, folders, files in os.walk(base):
        here = Path(directory).relative_to(base)
        folders.sort()
        for name in sorted([*files, *(each for each in folders if os.path.islink(os.path.join(directory, each)))]):
            relative = here / name
            if here == Path() and is_weights_file(name):
                continue
            real = resolve_in(base, str(relative))
            if not real.is_file() and not real.is_dir():
                raise CheckpointError(f"{base / relative}: expected a regular file or a folder, found something else")
            found.append(relative)
        found += [here / each for each in folders if not os.path.islink(os.path.join(directory, each))]
    return found


def _copy_side_files(base: Path, folder: Path, side_files: list[Path]) -> None:
    for relative in side_files:
        source, copy = base / relative, folder / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        real = Path(os.path.realpath(source))
        if source.is_symlink() and real.is_relative_to(base) and not is_weights_file(real.name):
            copy.symlink_to(os.path.relpath(real, Path(os.path.realpath(source.parent))))
        elif real.is_dir():
            copy.mkdir(exist_ok=True)
        else:
            shutil.copy2(real, copy)


def _config(base: Path, partial: Path) -> bytes | None:
    """The model's config, where it says something else than the base's; None where the base's stays."""
    if not os.path.lexists(partial / MODEL_CONFIG):
        return None
    _, wanted = read_json(partial, MODEL_CONFIG)
    has_own = os.path.lexists(base / CONFIG)
    own = read_json(base, CONFIG)[1] if has_own else {}
    for key, value in _code_in(wanted):
        if (key, value) not in list(_code_in(own)):
            raise CheckpointError(
                f"{partial / MODEL_CONFIG}: expected no code of its own, found {key} {value!r:.80}, which the base does not have"
            )
    if has_own and _without_notes(wanted) == _without_notes(own):
        return None
    wanted |= {key: own[key] for key in ("dtype", "torch_dtype") if key in own}  # the tensors' dtypes are the base's
    return (json.dumps(wanted, indent=2, sort_keys=True) + "\n").encode()


def _code_in(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key in _CODE_KEYS:
                yield key, part
            yield from _code_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from _code_in(part)


def _without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _SAID_BY_THE_FILES}


__all__ = ["MergeResult", "Weights", "merge_checkpoint"]
