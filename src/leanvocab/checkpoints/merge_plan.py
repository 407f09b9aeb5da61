"""Plan of a merge, made and checked from headers alone: nothing is written before the plan stands. No torch."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.delta_format import BaseTensor, is_delta, read_delta
from leanvocab.errors import CheckpointError
from leanvocab.files.headers import (
    DTYPE_BITS,
    Located,
    SafetensorsFile,
    TensorEntry,
    Weights,
    make_header,
    read_weights,
)
from leanvocab.files.row_bytes import EXACT
from leanvocab.files.strict_json import parse_object
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


@dataclass(frozen=True)
class Changes:
    """Tensors to be put into a base, of a delta or of a partial checkpoint, and where they go."""

    folder: Path
    tensors: Mapping[str, Located]
    token_ids: Mapping[str, NDArray[np.int64]]  # of each table
    full_sizes: Mapping[str, int]
    replaces: Mapping[str, tuple[str, ...]]  # names in the base; none for a tensor that is new
    base_tensors: Mapping[str, BaseTensor] = field(default_factory=dict)  # empty where nothing says what the base was
    sha256: Mapping[str, str] = field(default_factory=dict)
    rest_sha256: Mapping[str, str] = field(default_factory=dict)  # of the base's other rows, of each table
    absent: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    restricted: Mapping[str, PartialVocabulary] = field(default_factory=dict)  # of tables whose softmax was restricted

    @property
    def files(self) -> tuple[SafetensorsFile, ...]:
        return tuple({file.path: file for file, _ in self.tensors.values()}.values())

    @property
    def has_digests(self) -> bool:
        return bool(self.base_tensors)

    @cached_property
    def sources(self) -> dict[str, str]:
        """Name in the base → name of the tensor that replaces it, or its rows."""
        return {target: name for name, targets in self.replaces.items() for target in targets}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: `start` is its offset there. Without `token_ids` a delta's tensor replaces all of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    base: Located | None
    delta: Located | None
    token_ids: NDArray[np.int64] | None

    @property
    def uses_base(self) -> bool:
        """True where bytes of the base are in it."""
        return self.base is not None and (self.delta is None or self.token_ids is not None)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class FilePlan:
    """One file of the output; `tensors` in the order in which they lie there."""

    name: str
    header: bytes
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a merge writes, side files aside."""

    base: Weights
    files: tuple[FilePlan, ...]
    index: bytes | None

    @property
    def num_bytes(self) -> int:
        headers = sum(len(file.header) for file in self.files)
        return headers + sum(tensor.num_bytes for file in self.files for tensor in file.tensors)


# --- what is to be put in ---------------------------------------------------------------------------------------------


def read_changes(folder: Path, vocabulary: PartialVocabulary | str | os.PathLike[str] | None, base: Weights) -> Changes:
    """The changes in a delta's folder, or in a partial checkpoint's with the vocabulary of its rows; raises `CheckpointError`."""
    given = vocabulary if vocabulary is None or isinstance(vocabulary, PartialVocabulary) else _load(Path(vocabulary))
    if is_delta(folder):
        return _read_delta(folder, given)
    if given is None:
        raise CheckpointError(
            f"{folder}: expected a delta (leanvocab.json), found none; for a partial checkpoint say which rows it holds: "
            "vocabulary=… (--vocabulary)"
        )
    return _read_partial_checkpoint(read_weights(folder), given, base)


def _load(path: Path) -> PartialVocabulary:
    try:
        return PartialVocabulary.load(path)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a vocabulary that `vocabulary.save` wrote, found none: {error!r:.120}"
        ) from error


def _read_delta(folder: Path, vocabulary: PartialVocabulary | None) -> Changes:
    description, file = read_delta(folder)
    for name, table in description.tables.items():
        if vocabulary is not None and vocabulary.digest != table.vocabulary.digest:
            raise CheckpointError(
                f"{folder}: table {name!r}: expected the vocabulary with digest {vocabulary.digest[:16]}…, found "
                f"{table.vocabulary.digest[:16]}…; the delta has its own, leave vocabulary= out"
            )
    return Changes(
        folder=folder,
        tensors={name: (file, entry) for name, entry in file.tensors.items()},
        token_ids={name: table.vocabulary.token_ids for name, table in description.tables.items()},
        full_sizes={name: table.vocabulary.full_size for name, table in description.tables.items()},
        replaces={name: tensor.replaces for name, tensor in description.tensors.items()},
        base_tensors=description.base_tensors,
        sha256={name: tensor.sha256 for name, tensor in description.tensors.items()},
        rest_sha256={name: table.rest_sha256 for name, table in description.tables.items()},
        absent=description.absent,
        renamed=description.renamed,
        restricted={
            name: table.vocabulary for name, table in description.tables.items() if description.output == "restricted"
        },
    )


def _read_partial_checkpoint(partial: Weights, vocabulary: PartialVocabulary, base: Weights) -> Changes:
    own, num_rows = base.tensors, (len(vocabulary), vocabulary.full_size)
    tables = {}
    for name, (_, entry) in partial.tensors.items():
        full = own[name][1].shape if name in own else ()
        if entry.shape[:1] + full[:1] == num_rows and entry.shape[1:] == full[1:] and entry.shape != full:
            tables[name] = vocabulary.token_ids
    if not tables:
        raise CheckpointError(
            f"{partial.folder}: expected a table of {len(vocabulary):,} rows whose full one in {base.folder} has "
            f"{vocabulary.full_size:,}, found none; is this the vocabulary of these rows?"
        )
    return Changes(
        folder=partial.folder,
        tensors=partial.tensors,
        token_ids=tables,
        full_sizes=dict.fromkeys(tables, vocabulary.full_size),
        replaces={name: (name,) if name in own else () for name in partial.tensors},
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_plan(base: Weights, changes: Changes, allow_rounding: bool = False) -> Plan:
    """The plan which bytes go where; raises `CheckpointError` where base and delta do not fit one another."""
    _check_base(base, changes)
    _check_fit(base, changes, allow_rounding)
    if not (changes.absent or changes.renamed or any(not targets for targets in changes.replaces.values())):
        return Plan(base, tuple(_same_file(file, changes) for file in base.files), base.index)
    files = _other_files(base, changes)
    return Plan(base, files, None if base.index is None else _index(base, files, changes))


def _check_base(base: Weights, changes: Changes) -> None:
    own = base.tensors
    for name, expected in changes.base_tensors.items():
        if name not in own:
            raise CheckpointError(
                f"{base.folder}: expected the tensor {name!r}, found none: the delta was made from another base"
            )
        file, entry = own[name]
        if (entry.dtype, entry.shape) != (expected.dtype, expected.shape):
            raise CheckpointError(
                f"{file.path}: tensor {name!r}: expected {expected.dtype} {list(expected.shape)}, found {entry.dtype} "
                f"{list(entry.shape)}: the delta was made from another base"
            )
    for name, (file, _) in own.items():
        if changes.has_digests and name not in changes.base_tensors:
            raise CheckpointError(f"{file.path}: expected no tensor {name!r}: the delta was made from another base")


def _check_fit(base: Weights, changes: Changes, allow_rounding: bool) -> None:
    own = base.tensors
    for name, (file, entry) in changes.tensors.items():
        where = f"{file.path}: tensor {name!r}"
        for target in changes.replaces[name]:
            full = own[target][1]
            rows = (changes.full_sizes[name],) if name in changes.token_ids else entry.shape[:1]
            if full.shape[:1] != rows or full.shape[1:] != entry.shape[1:]:
                raise CheckpointError(
                    f"{where}: expected the shape of {target!r} {list(full.shape)}, found {list(entry.shape)}"
                )
            if name in changes.token_ids and (not entry.shape or entry.row_bytes * 8 % DTYPE_BITS[entry.dtype]):
                raise CheckpointError(f"{where}: expected rows of whole bytes, found {entry.dtype} {list(entry.shape)}")
            _check_dtype(where, entry.dtype, full.dtype, allow_rounding)


def _check_dtype(where: str, found: str, expected: str, allow_rounding: bool) -> None:
    is_rounding = found in EXACT and expected in EXACT
    if found == expected or expected in EXACT.get(found, ()) or (is_rounding and allow_rounding):
        return
    if is_rounding:
        raise CheckpointError(
            f"{where}: expected {expected}, as in the base, found {found}, whose values would be rounded; "
            "allow_rounding=True (--allow-rounding) does that, save_full keeps them"
        )
    raise CheckpointError(f"{where}: expected {expected}, as in the base, found {found}")


def _in_data_order(file: SafetensorsFile) -> list[TensorEntry]:
    return sorted(file.tensors.values(), key=lambda entry: (entry.start, entry.end))


def _same_file(file: SafetensorsFile, changes: Changes) -> FilePlan:
    tensors = (_replaced(entry.name, entry.start, (file, entry), changes) for entry in _in_data_order(file))
    return FilePlan(file.path.name, file.raw, tuple(tensors))


def _replaced(name: str, start: int, base: Located, changes: Changes) -> TensorPlan:
    """The plan of a tensor of the base: `name` and `start` are those in the output."""
    entry, source = base[1], changes.sources.get(base[1].name, "")
    delta, token_ids = changes.tensors.get(source), changes.token_ids.get(source)
    return TensorPlan(name, entry.dtype, entry.shape, start, base, delta, token_ids)


def _other_files(base: Weights, changes: Changes) -> tuple[FilePlan, ...]:
    """Files whose headers change: tensors leave, are renamed, or are new (at the end of the last file)."""
    kept: list[tuple[SafetensorsFile, list[tuple[str, TensorEntry]]]] = []
    for file in base.files:
        entries = [entry for entry in _in_data_order(file) if entry.name not in changes.absent]
        if entries:
            kept.append((file, [(changes.renamed.get(entry.name, entry.name), entry) for entry in entries]))
    if not kept:
        raise CheckpointError(f"{base.folder}: the delta keeps none of its tensors")
    new = [(name, changes.tensors[name][1]) for name, targets in changes.replaces.items() if not targets]
    last = kept[-1][0]
    return tuple(_other_file(file, entries, new if file is last else [], changes) for file, entries in kept)


def _other_file(
    file: SafetensorsFile,
    kept: list[tuple[str, TensorEntry]],
    new: list[tuple[str, TensorEntry]],
    changes: Changes,
) -> FilePlan:
    """The plan of a file: `kept` are entries of the base by their names in the output, `new` those of the delta."""
    entries = sorted([*kept, *new], key=lambda named: -DTYPE_BITS[named[1].dtype])  # so that each is aligned, as ever
    raw, starts = make_header(file.metadata, ((name, entry.dtype, entry.shape) for name, entry in entries))
    added = {name for name, _ in new}
    tensors = (
        TensorPlan(name, entry.dtype, entry.shape, starts[name], None, changes.tensors[name], None)
        if name in added
        else _replaced(name, starts[name], (file, entry), changes)
        for name, entry in entries
    )
    return FilePlan(file.path.name, raw, tuple(tensors))


def _index(base: Weights, files: Iterable[FilePlan], changes: Changes) -> bytes:
    assert base.index is not None
    index = parse_object(base.folder, base.index)
    tensors = [tensor for file in files for tensor in file.tensors]
    shards = {tensor.name: file.name for file in files for tensor in file.tensors}
    order = dict.fromkeys(changes.renamed.get(name, name) for name in index["weight_map"])
    index["weight_map"] = {name: shards[name] for name in dict.fromkeys([*order, *shards]) if name in shards}
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        numbers = {
            "total_size": sum(tensor.num_bytes for tensor in tensors),
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        }
        metadata |= {key: value for key, value in numbers.items() if key in metadata}
    return (json.dumps(index, indent=2) + "\n").encode()
