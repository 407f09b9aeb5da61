"""Deltas of two checkpoints on disk, of whatever run: compared and written by blocks, with no model built.

A matrix of which some rows differ is carried as those rows; what else differs, whole; what is the base's, not at all. A merge
then gives the tuned checkpoint's tensors back, bit for bit.
"""

import filecmp
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.base_checkpoint import Base, find_base
from leanvocab.checkpoints.delta_format import (
    CONFIG,
    MODEL_CONFIG,
    README,
    TENSORS,
    DeltaTable,
    DeltaTensor,
    Description,
    is_delta,
    read_training_note,
    write_signs,
)
from leanvocab.errors import CheckpointError
from leanvocab.files.atomic_folders import check_apart, written_whole
from leanvocab.files.copying import copy_range, sha256_of_range, write_at
from leanvocab.files.headers import DTYPE_BITS, Located, Weights, all_opened, make_header, read_header, read_weights
from leanvocab.files.hub_cache import cached_folder
from leanvocab.files.presence import is_file, is_folder, is_there
from leanvocab.files.row_bytes import row_blocks, runs
from leanvocab.files.side_files import find_side_files
from leanvocab.files.untrusted_files import read_json
from leanvocab.progress import ProgressBar
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_ADAPTER = "adapter_model.safetensors"
# A vocabulary matrix is carried as rows where they are at most half of it. 1 << 24: the most that a description may speak of.
_MOST_ROWS, _LARGEST_RATIO = 1 << 24, 0.5


class MadeDelta(NamedTuple):
    """The folder of a delta, and the files beside the tuned weights that it does not carry though they are not the base's."""

    output: Path
    left_out: tuple[str, ...]


class _Part(NamedTuple):
    """A tensor to carry: the one of the tuned checkpoint, the base's name for it, and its rows (None: all of it)."""

    located: Located
    replaces: str | None
    token_ids: NDArray[np.int64] | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.located[1].shape
        return shape if self.token_ids is None else (len(self.token_ids), *shape[1:])


def make_delta(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool | None = None,
) -> MadeDelta:
    """Writes what a checkpoint has that its base has not as a delta, whole or not at all.

    Args:
        tuned: folder of a full checkpoint (safetensors), or a hub name that is in the cache; trained by whatever program.
        base: the checkpoint that it was trained from.
        output: folder to make.
        overwrite: replace what lies in `output`.
        progress: bars with bytes; by default on a terminal, when it takes long.

    Raises:
        CheckpointError: one of them is no checkpoint, they have no tensor in common or other dtypes, or nothing differs.
        OSError: the output cannot be written. In each case nothing has changed.

    Source: docs/decisions/deltas.md.
    """
    source, weights = find_base(None, base), _read_tuned(tuned)
    target = Path(os.path.realpath(output))
    check_apart(target, base=source.folder, model=weights.folder)
    if is_there(target) and not overwrite and (not is_folder(target) or any(target.iterdir())):
        raise CheckpointError(
            f"{target} is there already; name another output, or replace it: overwrite=True (--overwrite)"
        )
    in_base = _names_in_base(weights, source.weights)
    parts = _differing(weights, source.weights, in_base, progress)
    if not parts and set(in_base.values()) == set(source.weights.tensors):
        raise CheckpointError(f"{weights.folder} holds the same tensors as {source.folder}: there is nothing to carry")
    with written_whole(target, keeps=lambda _: False) as (folder, _):
        _write(folder, parts, weights, source, in_base, progress)
    return MadeDelta(target, _files_left_out(weights.folder, source.folder))


def _read_tuned(tuned: str | os.PathLike[str]) -> Weights:
    there = Path(tuned) if is_folder(tuned) else cached_folder(os.fspath(tuned))
    if there is None:
        raise CheckpointError(
            f"the fine-tuned checkpoint {os.fspath(tuned)!r} is no folder here and not in the hub's cache"
        )
    folder = Path(os.path.realpath(there))
    if is_delta(folder):
        raise CheckpointError(f"{folder} is a delta already")
    if is_there(folder / _ADAPTER):
        raise CheckpointError(
            f"{folder} is an adapter, which is small by itself; for a delta put it into its model first (merge_and_unload)"
        )
    return read_weights(folder)


def _names_in_base(tuned: Weights, base: Weights) -> dict[str, str]:
    """The tuned checkpoint's name → the base's, which may lack the prefix that a head puts before it, or have it.

    Raises `CheckpointError` where none is found, or a tensor has another dtype.
    """
    longer = {name.partition(".")[2]: name for name in base.tensors}
    taken: set[str] = set()
    names: dict[str, str] = {}
    for name, (_, entry) in sorted(tuned.tensors.items(), key=lambda named: named[0] not in base.tensors):
        for candidate in (name, name.partition(".")[2], longer.get(name, "")):
            if candidate not in taken and candidate in base.tensors and base.tensors[candidate][1].shape == entry.shape:
                taken.add(candidate)
                names[name] = candidate
                break
    if not names:
        raise CheckpointError(f"{tuned.folder} has no tensor of {base.folder}: it does not come from it")
    for name, target in sorted(names.items()):
        found, expected = tuned.tensors[name][1].dtype, base.tensors[target][1].dtype
        if found != expected:
            raise CheckpointError(
                f"{tuned.folder}: {name!r}: expected {expected}, as in the base, found {found}; a delta would carry all of the "
                "model: save one of them in the dtype of the other first (from_pretrained(…, dtype=…).save_pretrained(…))"
            )
    return names


def _differing(tuned: Weights, base: Weights, in_base: Mapping[str, str], progress: bool | None) -> dict[str, _Part]:
    bar, sizes = ProgressBar("comparing", tuned.num_bytes, progress), _vocabulary_sizes(tuned.folder)
    parts = {}
    with all_opened((*tuned.files, *base.files)) as sources:
        for name, located in tuned.tensors.items():
            entry = located[1]
            if (target := in_base.get(name)) is None:
                parts[name] = _Part(located, None, None)
            elif len(rows := _differing_rows(located, base.tensors[target], sources)):
                as_rows = _is_carried_as_rows(entry.shape, len(rows), sizes)
                parts[name] = _Part(located, target, rows if as_rows else None)
            bar.add(entry.num_bytes)
    bar.close()
    return parts


def _is_carried_as_rows(shape: tuple[int, ...], num_rows: int, sizes: set[int]) -> bool:
    if len(shape) < 2 or shape[0] > _MOST_ROWS or (sizes and shape[0] not in sizes):
        return False
    return num_rows <= shape[0] * _LARGEST_RATIO


def _vocabulary_sizes(folder: Path) -> set[int]:
    """Sizes of vocabularies that a config speaks of, in its parts too; none where there is no config."""
    parts = [read_json(folder, CONFIG)[1]] if is_file(folder / CONFIG) else []
    for part in parts:  # which grows
        parts += [value for value in part.values() if isinstance(value, dict)]
    sizes = (
        named for part in parts for named in part.items() if "vocab_size" in named[0] and named[0] != "type_vocab_size"
    )
    return {value for _, value in sizes if isinstance(value, int)}


def _differing_rows(first: Located, second: Located, sources: Mapping[Path, int]) -> NDArray[np.int64]:
    """Rows of two tensors of one form that differ in any bit; of a tensor whose rows are no whole bytes, all or none."""
    blocks = [row_blocks(sources[file.path], entry) for file, entry in (first, second)]
    row_bytes, found = first[1].row_bytes, [np.empty(0, np.int64)]
    whole_bytes = row_bytes * 8 % DTYPE_BITS[first[1].dtype] == 0
    for (start, block), (_, other) in zip(*blocks, strict=True):
        if block == other:
            continue
        if not first[1].shape or not whole_bytes:
            return np.arange(first[1].shape[0] if first[1].shape else 1)
        rows, others = (np.frombuffer(part, np.uint8).reshape(-1, row_bytes) for part in (block, other))
        found.append(np.flatnonzero((rows != others).any(axis=1)) + start)
    return np.concatenate(found)


def _write(
    folder: Path,
    parts: Mapping[str, _Part],
    tuned: Weights,
    base: Base,
    in_base: Mapping[str, str],
    progress: bool | None,
) -> None:
    _write_tensors(folder / TENSORS, parts, tuned)
    file = read_header(folder, TENSORS)
    with file.opened() as written:
        digests = {name: sha256_of_range(written, entry.start, entry.end) for name, entry in file.tensors.items()}
    note = read_training_note(tuned.folder)
    mode = "full" if note is None else "restricted"
    Description(
        base_name=base.name,
        base_revision=base.revision,
        base_tensors=base.tensors(progress),
        tables=_tables(parts, base),
        tensors={
            name: DeltaTensor(() if part.replaces is None else (part.replaces,), digests[name])
            for name, part in parts.items()
        },
        absent=tuple(name for name in base.weights.tensors if name not in set(in_base.values())),
        renamed={target: name for name, target in in_base.items() if target != name},
        output=mode,
    ).write(folder)
    if is_file(tuned.folder / CONFIG):
        (folder / MODEL_CONFIG).write_bytes(read_json(tuned.folder, CONFIG)[0])
    write_signs(folder, base.name, mode)


def _tables(parts: Mapping[str, _Part], base: Base) -> dict[str, DeltaTable]:
    tables = {}
    for name, part in parts.items():
        if part.token_ids is not None and part.replaces is not None:
            vocabulary = PartialVocabulary(part.token_ids, part.located[1].shape[0])
            tables[name] = DeltaTable(vocabulary, base.rest_sha256(vocabulary, [part.replaces]))
    return tables


def _write_tensors(path: Path, parts: Mapping[str, _Part], tuned: Weights) -> None:
    ordered = sorted(parts.items(), key=lambda named: -DTYPE_BITS[named[1].located[1].dtype])  # so that each is aligned
    header, starts = make_header(
        {"format": "pt"}, ((name, part.located[1].dtype, part.shape) for name, part in ordered)
    )
    with all_opened(tuned.files) as sources, path.open("xb") as file:
        write_at(file.fileno(), header, 0)
        for name, ((source, entry), _, token_ids) in ordered:
            stretches = [(0, 0, entry.num_bytes)]
            if token_ids is not None:
                size = entry.row_bytes
                stretches = [(at * size, first * size, count * size) for at, first, count in runs(token_ids)]
            for at, first, num_bytes in stretches:
                copy_range(sources[source.path], entry.start + first, file.fileno(), starts[name] + at, num_bytes)


def _files_left_out(tuned: Path, base: Path) -> tuple[str, ...]:
    """Files beside the weights of the one that are not the same in the other; the config is carried."""
    names = (str(path) for path in find_side_files(tuned) if is_file(tuned / path))
    wanted = [name for name in names if name not in (CONFIG, README)]
    _, differing, missing = filecmp.cmpfiles(tuned, base, wanted, shallow=False)
    return tuple(name for name in wanted if name in {*differing, *missing})
