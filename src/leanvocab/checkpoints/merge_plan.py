"""Plan of a merge, made and checked from headers alone: nothing is written before the plan stands. No torch."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.delta_format import (
    CONFIG,
    MODEL_CONFIG,
    DeltaTable,
    DeltaTensor,
    Description,
    is_delta,
    read_delta,
)
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
from leanvocab.files.presence import is_entry
from leanvocab.files.row_bytes import EXACT
from leanvocab.files.untrusted_files import parse_object, read_json
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_CODE_KEYS = ("auto_map", "custom_pipelines")  # names of code that a loader may be asked to run
_SAID_BY_THE_FILES = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Changes:
    """Tensors to be put into a base, and where they go; a partial checkpoint's description has no base and no digests."""

    tensors: Mapping[str, Located]
    description: Description

    @property
    def files(self) -> tuple[SafetensorsFile, ...]:
        return tuple({file.path: file for file, _ in self.tensors.values()}.values())

    @property
    def has_digests(self) -> bool:
        return bool(self.description.base_tensors)

    @cached_property
    def sources(self) -> dict[str, str]:
        """Name in the base → name of the tensor that replaces it, or its rows."""
        return {target: name for name, tensor in self.description.tensors.items() for target in tensor.replaces}

    @property
    def added(self) -> list[str]:
        """Names of the tensors that replace none of the base's."""
        return [name for name, tensor in self.description.tensors.items() if not tensor.replaces]

    def token_ids(self, name: str) -> NDArray[np.int64] | None:
        """The ids of the rows that a tensor has; None where it has all rows."""
        table = self.description.tables.get(name)
        return None if table is None else table.vocabulary.token_ids


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: `start` is its offset there. Without `token_ids` a delta's tensor replaces all of it."""

    name: str
    start: int
    base: Located | None
    delta: Located | None
    token_ids: NDArray[np.int64] | None

    @property
    def entry(self) -> TensorEntry:
        """The tensor that it has the form of: the base's, or a new one."""
        located = self.base or self.delta
        assert located is not None
        return located[1]


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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that come of it, by name."""
        return {tensor.name: tensor.entry.shape for file in self.files for tensor in file.tensors}

    @property
    def num_bytes(self) -> int:
        headers = sum(len(file.header) for file in self.files)
        return headers + sum(tensor.entry.num_bytes for file in self.files for tensor in file.tensors)


def read_changes(folder: Path, vocabulary: PartialVocabulary | str | os.PathLike[str] | None, base: Weights) -> Changes:
    """The changes in a delta's folder, or in a partial checkpoint's with the vocabulary of its rows; raises `CheckpointError`."""
    given = (
        vocabulary
        if vocabulary is None or isinstance(vocabulary, PartialVocabulary)
        else load_vocabulary(Path(vocabulary))
    )
    if is_delta(folder):
        return _read_delta(folder, given)
    if given is None:
        raise CheckpointError(
            f"{folder}: expected a delta (leanvocab.json), found none; for a partial checkpoint say which rows it holds: "
            "vocabulary=… (--vocabulary)"
        )
    return _read_partial_checkpoint(read_weights(folder), given, base)


def load_vocabulary(path: Path) -> PartialVocabulary:
    """The vocabulary in a file; raises `CheckpointError` where none is."""
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
    return Changes({name: (file, entry) for name, entry in file.tensors.items()}, description)


def _read_partial_checkpoint(partial: Weights, vocabulary: PartialVocabulary, base: Weights) -> Changes:
    own, num_rows = base.tensors, (len(vocabulary), vocabulary.full_size)
    tables = {}
    for name, (_, entry) in partial.tensors.items():
        full = own[name][1].shape if name in own else ()
        if entry.shape[:1] + full[:1] == num_rows and entry.shape[1:] == full[1:] and entry.shape != full:
            tables[name] = DeltaTable(vocabulary, rest_sha256="")
    if not tables:
        raise CheckpointError(
            f"{partial.folder}: expected a table of {len(vocabulary):,} rows whose full one in {base.folder} has "
            f"{vocabulary.full_size:,}, found none; is this the vocabulary of these rows?"
        )
    tensors = {name: DeltaTensor((name,) if name in own else (), sha256="") for name in partial.tensors}
    return Changes(partial.tensors, Description("", None, {}, tables, tensors))


def make_plan(base: Weights, changes: Changes, allow_rounding: bool = False) -> Plan:
    """The plan which bytes go where; raises `CheckpointError` where base and delta do not fit one another."""
    _check_base(base, changes)
    _check_fit(base, changes, allow_rounding)
    if not (changes.description.absent or changes.description.renamed or changes.added):
        return Plan(base, tuple(_same_file(file, changes) for file in base.files), base.index)
    files = _other_files(base, changes)
    return Plan(base, files, None if base.index is None else _index(base, files, changes))


def _check_base(base: Weights, changes: Changes) -> None:
    own = base.tensors
    for name, expected in changes.description.base_tensors.items():
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
        if changes.has_digests and name not in changes.description.base_tensors:
            raise CheckpointError(f"{file.path}: expected no tensor {name!r}: the delta was made from another base")


def _check_fit(base: Weights, changes: Changes, allow_rounding: bool) -> None:
    for name, (file, entry) in changes.tensors.items():
        where, table = f"{file.path}: tensor {name!r}", changes.description.tables.get(name)
        for target in changes.description.tensors[name].replaces:
            full = base.tensors[target][1]
            rows = entry.shape[:1] if table is None else (table.vocabulary.full_size,)
            if full.shape[:1] != rows or full.shape[1:] != entry.shape[1:]:
                raise CheckpointError(
                    f"{where}: expected the shape of {target!r} {list(full.shape)}, found {list(entry.shape)}"
                )
            if table is not None and (not entry.shape or entry.row_bytes * 8 % DTYPE_BITS[entry.dtype]):
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
    source = changes.sources.get(base[1].name, "")
    return TensorPlan(name, start, base, changes.tensors.get(source), changes.token_ids(source))


def _other_files(base: Weights, changes: Changes) -> tuple[FilePlan, ...]:
    """Files whose headers change: tensors leave, are renamed, or are new (at the end of the last file)."""
    absent, renamed = changes.description.absent, changes.description.renamed
    kept: list[tuple[SafetensorsFile, list[tuple[str, TensorEntry]]]] = []
    for file in base.files:
        entries = [entry for entry in _in_data_order(file) if entry.name not in absent]
        if entries:
            kept.append((file, [(renamed.get(entry.name, entry.name), entry) for entry in entries]))
    if not kept:
        raise CheckpointError(f"{base.folder}: the delta keeps none of its tensors")
    new = [(name, changes.tensors[name][1]) for name in changes.added]
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
        TensorPlan(name, starts[name], None, changes.tensors[name], None)
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
    order = dict.fromkeys(changes.description.renamed.get(name, name) for name in index["weight_map"])
    index["weight_map"] = {name: shards[name] for name in dict.fromkeys([*order, *shards]) if name in shards}
    return index_with_sizes(index, ((tensor.entry.num_bytes, tensor.entry.shape) for tensor in tensors))


def index_with_sizes(index: dict[str, Any], tensors: Iterable[tuple[int, tuple[int, ...]]]) -> bytes:
    """The file of an index, with the sizes that it has of all tensors made those of `tensors`: (bytes, shape) of each."""
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        sizes = list(tensors)
        numbers = {
            "total_size": sum(num_bytes for num_bytes, _ in sizes),
            "total_parameters": sum(math.prod(shape) for _, shape in sizes),
        }
        metadata |= {key: value for key, value in numbers.items() if key in metadata}
    return (json.dumps(index, indent=2) + "\n").encode()


def merged_config(base: Path, delta: Path) -> bytes | None:
    """The model's config, where it says something else than the base's; None where the base's stays."""
    if not is_entry(delta / MODEL_CONFIG):
        return None
    _, wanted = read_json(delta, MODEL_CONFIG)
    has_own = is_entry(base / CONFIG)
    own = read_json(base, CONFIG)[1] if has_own else {}
    code_of_base = list(_code_in(own))
    for key, value in _code_in(wanted):
        if (key, value) not in code_of_base:
            raise CheckpointError(
                f"{delta / MODEL_CONFIG}: expected no code of its own, found {key} {value!r:.80}, which the base does not have"
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
