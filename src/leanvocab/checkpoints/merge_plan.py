"""What a merge will write, made and checked from headers alone: nothing is written before the plan stands. No torch."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.delta_format import BaseTensor, is_delta, read_delta
from leanvocab.errors import CheckpointError
from leanvocab.files.headers import (
    DTYPE_BITS,
    SafetensorsFile,
    TensorEntry,
    Weights,
    make_header,
    parse_json,
    read_weights,
)
from leanvocab.files.row_bytes import EXACT
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_Located = tuple[SafetensorsFile, TensorEntry]


@dataclass(frozen=True)
class Partial:
    """What is to be put into a base: tensors of a delta, or of a partial checkpoint, and where they go."""

    folder: Path
    tensors: Mapping[str, _Located]
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

    @property
    def base_sha256(self) -> dict[str, str]:
        return {name: each.sha256 for name, each in self.base_tensors.items()}

    @property
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
    base_file: SafetensorsFile | None
    base: TensorEntry | None
    delta_file: SafetensorsFile | None
    delta: TensorEntry | None
    token_ids: NDArray[np.int64] | None

    @property
    def uses_base(self) -> bool:
        """Whether bytes of the base are in it."""
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

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """Everything that a merge writes, side files aside."""

    base: Weights
    files: tuple[FilePlan, ...]
    index: bytes | None

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


# --- what is to be put in ---------------------------------------------------------------------------------------------


def read_partial(folder: Path, vocabulary: PartialVocabulary | str | os.PathLike[str] | None, base: Weights) -> Partial:
    """A delta's folder, or a partial checkpoint's with the vocabulary of its rows; raises `CheckpointError`."""
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


def _read_delta(folder: Path, vocabulary: PartialVocabulary | None) -> Partial:
    said, file = read_delta(folder)
    for name, table in said.tables.items():
        if vocabulary is not None and vocabulary.digest != table.vocabulary.digest:
            raise CheckpointError(
                f"{folder}: table {name!r}: expected the vocabulary with digest {vocabulary.digest[:16]}…, found "
                f"{table.vocabulary.digest[:16]}…; the delta has its own, leave vocabulary= out"
            )
    return Partial(
        folder=folder,
        tensors={name: (file, entry) for name, entry in file.tensors.items()},
        token_ids={name: table.vocabulary.token_ids for name, table in said.tables.items()},
        full_sizes={name: table.vocabulary.full_size for name, table in said.tables.items()},
        replaces={name: tensor.replaces for name, tensor in said.tensors.items()},
        base_tensors=said.base_tensors,
        sha256={name: tensor.sha256 for name, tensor in said.tensors.items()},
        rest_sha256={name: table.rest_sha256 for name, table in said.tables.items()},
        absent=said.absent,
        renamed=said.renamed,
        restricted={name: table.vocabulary for name, table in said.tables.items() if said.output == "restricted"},
    )


def _read_partial_checkpoint(partial: Weights, vocabulary: PartialVocabulary, base: Weights) -> Partial:
    own, tables = base.tensors, {}
    for name, (_, entry) in partial.tensors.items():
        if name in own and _is_table(entry, own[name][1], vocabulary):
            tables[name] = vocabulary.token_ids
    if not tables:
        raise CheckpointError(
            f"{partial.folder}: expected a table of {len(vocabulary):,} rows whose full one in {base.folder} has "
            f"{vocabulary.full_size:,}, found none; is this the vocabulary of these rows?"
        )
    return Partial(
        folder=partial.folder,
        tensors=partial.tensors,
        token_ids=tables,
        full_sizes=dict.fromkeys(tables, vocabulary.full_size),
        replaces={name: (name,) if name in own else () for name in partial.tensors},
    )


def _is_table(partial: TensorEntry, full: TensorEntry, vocabulary: PartialVocabulary) -> bool:
    rows = partial.shape[:1] + full.shape[:1]
    return (
        rows == (len(vocabulary), vocabulary.full_size)
        and partial.shape != full.shape
        and partial.shape[1:] == full.shape[1:]
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_plan(base: Weights, partial: Partial, allow_rounding: bool = False) -> Plan:
    """Which bytes go where; raises `CheckpointError` where base and delta do not fit one another."""
    _check_base(base, partial)
    _check_fit(base, partial, allow_rounding)
    if not (partial.absent or partial.renamed or any(not targets for targets in partial.replaces.values())):
        return Plan(base, tuple(_same_file(file, partial) for file in base.files), base.index)
    files = _other_files(base, partial)
    return Plan(base, files, None if base.index is None else _index(base, files, partial))


def _check_base(base: Weights, partial: Partial) -> None:
    if not partial.has_digests:
        return
    found = base.tensors
    for name, expected in partial.base_tensors.items():
        if name not in found:
            raise CheckpointError(
                f"{base.folder}: expected the tensor {name!r}, found none: the delta was made from another base"
            )
        file, entry = found[name]
        if (entry.dtype, entry.shape) != (expected.dtype, expected.shape):
            raise CheckpointError(
                f"{file.path}: tensor {name!r}: expected {expected.dtype} {list(expected.shape)}, found {entry.dtype} "
                f"{list(entry.shape)}: the delta was made from another base"
            )
    for name, (file, _) in found.items():
        if name not in partial.base_tensors:
            raise CheckpointError(f"{file.path}: expected no tensor {name!r}: the delta was made from another base")


def _check_fit(base: Weights, partial: Partial, allow_rounding: bool) -> None:
    own = base.tensors
    for name, (file, entry) in partial.tensors.items():
        where = f"{file.path}: tensor {name!r}"
        for target in partial.replaces[name]:
            full = own[target][1]
            rows = (partial.full_sizes[name],) if name in partial.token_ids else entry.shape[:1]
            if full.shape[:1] != rows or full.shape[1:] != entry.shape[1:]:
                raise CheckpointError(
                    f"{where}: expected the shape of {target!r} {list(full.shape)}, found {list(entry.shape)}"
                )
            if name in partial.token_ids and (not entry.shape or entry.row_bytes * 8 % DTYPE_BITS[entry.dtype]):
                raise CheckpointError(f"{where}: expected rows of whole bytes, found {entry.dtype} {list(entry.shape)}")
            _check_dtype(where, entry.dtype, full.dtype, allow_rounding)


def _check_dtype(where: str, found: str, expected: str, allow_rounding: bool) -> None:
    if found == expected or expected in EXACT.get(found, ()):
        return
    if found in EXACT and expected in EXACT:
        if allow_rounding:
            return
        raise CheckpointError(
            f"{where}: expected {expected}, as in the base, found {found}, whose values would be rounded; "
            "allow_rounding=True (--allow-rounding) does that, save_full keeps them"
        )
    raise CheckpointError(f"{where}: expected {expected}, as in the base, found {found}")


def _in_data_order(file: SafetensorsFile) -> list[TensorEntry]:
    return sorted(file.tensors.values(), key=lambda entry: (entry.start, entry.end))


def _same_file(file: SafetensorsFile, partial: Partial) -> FilePlan:
    tensors = tuple(_tensor(entry.name, entry.start, file, entry, partial) for entry in _in_data_order(file))
    return FilePlan(file.path.name, file.raw, tensors)


def _tensor(
    name: str, start: int, file: SafetensorsFile | None, entry: TensorEntry | None, partial: Partial
) -> TensorPlan:
    source = partial.sources.get(entry.name) if entry is not None else name
    delta_file, delta = partial.tensors[source] if source is not None else (None, None)
    form = entry or delta
    assert form is not None
    token_ids = partial.token_ids.get(source) if source is not None else None
    return TensorPlan(name, form.dtype, form.shape, start, file, entry, delta_file, delta, token_ids)


def _other_files(base: Weights, partial: Partial) -> tuple[FilePlan, ...]:
    """Files whose headers change: tensors leave, are renamed, or are new (at the end of the last file)."""
    left: list[tuple[SafetensorsFile, list[tuple[str, TensorEntry | None]]]] = []
    for file in base.files:
        kept = [(partial.renamed.get(e.name, e.name), e) for e in _in_data_order(file) if e.name not in partial.absent]
        if kept:
            left.append((file, list(kept)))
    if not left:
        raise CheckpointError(f"{base.folder}: the delta keeps none of its tensors")
    left[-1][1].extend((name, None) for name, targets in partial.replaces.items() if not targets)
    return tuple(_other_file(file, tensors, partial) for file, tensors in left)


def _other_file(file: SafetensorsFile, tensors: list[tuple[str, TensorEntry | None]], partial: Partial) -> FilePlan:
    forms = [(name, entry, entry or partial.tensors[name][1]) for name, entry in tensors]
    forms.sort(key=lambda form: -DTYPE_BITS[form[2].dtype])  # so that each is aligned, as safetensors has it
    raw, starts = make_header(file.metadata, ((name, form.dtype, form.shape) for name, _, form in forms))
    planned = (_tensor(name, starts[name], file if entry else None, entry, partial) for name, entry, _ in forms)
    return FilePlan(file.path.name, raw, tuple(planned))


def _index(base: Weights, files: Iterable[FilePlan], partial: Partial) -> bytes:
    assert base.index is not None
    found = parse_json(base.folder, base.index)
    places = {tensor.name: file.name for file in files for tensor in file.tensors}
    order = [partial.renamed.get(name, name) for name in found["weight_map"]]
    names = [*dict.fromkeys(name for name in order if name in places), *(name for name in places if name not in order)]
    found["weight_map"] = {name: places[name] for name in names}
    sizes = [tensor for file in files for tensor in file.tensors]
    metadata = found.get("metadata")
    if isinstance(metadata, dict):
        numbers = {
            "total_size": sum(tensor.num_bytes for tensor in sizes),
            "total_parameters": sum(math.prod(tensor.shape) for tensor in sizes),
        }
        metadata |= {key: value for key, value in numbers.items() if key in metadata}
    return (json.dumps(found, indent=2) + "\n").encode()
