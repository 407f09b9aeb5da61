"""Headers of safetensors files and shard indices, read as if someone hostile had written them. No torch, no pickle.

Every size, offset and name is checked before anything is done with it: a file that passes has tensors that cover its
data without holes or overlaps, and lies where its folder says. Nothing is ever written here.
"""

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from leanvocab.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files that hold weights, whole or in shards, and their indices: what a newly saved model makes stale.
SAVED_WEIGHTS = re.compile(r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?")
_OTHER_WEIGHTS = re.compile(r"tf_model.*\.h5|flax_model.*\.msgpack|model\.ckpt\..*")
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_LENGTH_BYTES = 8  # a file starts with the length of its JSON header, little endian
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_JSON_BYTES = 100_000_000
_MAX_DEPTH = 16  # no honest file nests deeper; found before the parser recurses
_MAX_DIMENSIONS = 16


def is_weights_file(name: str) -> bool:
    """Whether a file of that name holds weights of a full checkpoint, or says which files do."""
    return bool(SAVED_WEIGHTS.fullmatch(name) or _OTHER_WEIGHTS.fullmatch(name))


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` are offsets in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (one entry of the first dimension)."""
        return self.num_bytes // self.shape[0] if self.shape and self.shape[0] else 0


@dataclass(frozen=True)
class SafetensorsFile:
    """One safetensors file: its header as it lies there (`raw`, length included), and its tensors in the header's order."""

    path: Path
    raw: bytes
    metadata: Mapping[str, str] | None
    tensors: Mapping[str, TensorEntry]
    num_bytes: int


@dataclass(frozen=True)
class Weights:
    """The weights of a folder: one file, or shards with their index as it lies there."""

    folder: Path
    files: tuple[SafetensorsFile, ...]
    index: bytes | None

    @property
    def tensors(self) -> dict[str, tuple[SafetensorsFile, TensorEntry]]:
        """Name → (file, tensor), in the order of the files."""
        return {name: (file, entry) for file in self.files for name, entry in file.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def read_weights(folder: Path) -> Weights:
    """The weights in `folder`, as `from_pretrained` would choose them: the single file first, then the index.

    Raises `CheckpointError`.
    """
    if os.path.lexists(folder / SINGLE):
        return Weights(folder, (read_header(folder, SINGLE),), None)
    if not os.path.lexists(folder / INDEX):
        pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).exists()]
        also = (
            f"; {pickled[0]} is a pickle, which is never loaded: save the model as safetensors first" if pickled else ""
        )
        raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{also}")
    raw, index = read_json(folder, INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: expected a weight_map {{tensor: file}}, found {_short(weight_map)}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {_short(tensor)}: expected a .safetensors file, found {_short(name)}"
            )
    files = tuple(read_header(folder, name) for name in dict.fromkeys(weight_map.values()))
    _check_index(folder / INDEX, weight_map, files)
    return Weights(folder, files, raw)


def _check_index(path: Path, weight_map: Mapping[str, str], files: tuple[SafetensorsFile, ...]) -> None:
    holders: dict[str, Path] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor in holders:
                raise CheckpointError(
                    f"{path}: {_short(tensor)} lies in two shards, {holders[tensor].name} and {file.path.name}"
                )
            holders[tensor] = file.path
    for tensor, name in weight_map.items():
        found = holders.get(tensor)
        if found is None or found.name != name:
            where = "in no shard" if found is None else f"in {found.name}"
            raise CheckpointError(f"{path}: expected {_short(tensor)} in {name}, found it {where}")


def read_header(folder: Path, name: str) -> SafetensorsFile:
    """The header of the safetensors file `name` in `folder`, checked; raises `CheckpointError`."""
    path = folder / name
    with opened(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
        limit = min(size - _LENGTH_BYTES, MAX_HEADER_BYTES)
        if size < _LENGTH_BYTES or length > limit:
            raise CheckpointError(
                f"{path}: its header would have {length:,} bytes, expected at most {max(limit, 0):,} (the file has "
                f"{size:,}); it is truncated, or no safetensors file"
            )
        raw = os.pread(descriptor, _LENGTH_BYTES + length, 0)
    if len(raw) != _LENGTH_BYTES + length:
        raise CheckpointError(
            f"{path}: expected a header of {length:,} bytes, found {len(raw) - _LENGTH_BYTES:,}: truncated"
        )
    header = parse_json(path, raw[_LENGTH_BYTES:])
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise CheckpointError(f"{path}: expected __metadata__ {{text: text}}, found {_short(metadata)}")
    tensors = {name: _entry(path, name, value, len(raw), size) for name, value in header.items()}
    _check_coverage(path, tensors, len(raw), size)
    return SafetensorsFile(path, raw, metadata, tensors, size)


def _entry(path: Path, name: str, value: Any, data: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {_short(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {_short(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: expected a dtype such as F32, found {_short(dtype)}")
    if not is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: expected a shape of sizes from 0, found {_short(shape)}")
    if not is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data:
        raise CheckpointError(
            f"{where}: expected data_offsets [start, end] within the {size - data:,} bytes of data, found {_short(offsets)}"
        )
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if num_bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where}: expected {-(-num_bits // 8):,} bytes ({dtype} {_short(shape)}), found {offsets[1] - offsets[0]:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _check_coverage(path: Path, tensors: Mapping[str, TensorEntry], data: int, size: int) -> None:
    position, before = data, "the header"
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {_short(entry.name)} {kind} {before}: expected it at byte {position:,}, found {entry.start:,}"
            )
        position, before = entry.end, _short(entry.name)
    if position != size:
        raise CheckpointError(
            f"{path}: expected {position:,} bytes, found {size:,}: what follows {before} is no tensor"
        )


def make_header(
    metadata: Mapping[str, str] | None, forms: Iterable[tuple[str, str, tuple[int, ...]]]
) -> tuple[bytes, dict[str, int]]:
    """(a header with its length, offset in the file of each tensor) for tensors (name, dtype, shape) that lie in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in forms:
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    raw = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return raw, {name: len(raw) + header[name]["data_offsets"][0] for name in header if name != "__metadata__"}


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(folder: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """(the file as it is, what it says) of a JSON object; raises `CheckpointError`."""
    with opened(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{folder / name}: expected at most {MAX_JSON_BYTES:,} bytes of JSON, found {size:,}")
        raw = b""
        while block := os.pread(descriptor, MAX_JSON_BYTES, len(raw)):
            raw += block
    return raw, parse_json(folder / name, raw)


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, numbers that are none, or deep nesting; raises `CheckpointError`."""

    def refuse(found: str) -> NoReturn:
        raise _NotPlainError(f"{found} is no number")

    try:
        _check_depth(raw)
        value = json.loads(raw.decode(), object_pairs_hook=_without_duplicates, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: expected JSON, found something else: {_short(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {_short(value)}")
    return value


class _NotPlainError(ValueError):
    """JSON that a parser takes and that nobody who means well writes."""


def _check_depth(raw: bytes) -> None:
    depth, quoted = 0, False
    if raw.count(b"[") + raw.count(b"{") <= _MAX_DEPTH:
        return
    for part in _json_marks(raw):
        if part == '"':
            quoted = not quoted
        elif not quoted:
            depth += 1 if part in "[{" else -1
            if depth > _MAX_DEPTH:
                raise _NotPlainError(f"nested deeper than {_MAX_DEPTH}")


def _json_marks(raw: bytes) -> Iterator[str]:
    import re

    for found in re.finditer(rb'\\.|["\[\]{}]', raw, re.DOTALL):
        if found[0][0] != 0x5C:
            yield found[0].decode()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotPlainError(f"duplicate key {_short(twice)}")
    return value


def is_sizes(value: Any) -> bool:
    """Whether a value is a list of whole numbers from 0 to 2**63 - 1."""
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 63 for each in value)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


# --- files ------------------------------------------------------------------------------------------------------------


def resolve_in(folder: Path, name: str) -> Path:
    """Where the file `name` of `folder` really lies; raises `CheckpointError` where that is outside the folder.

    A link may lead to another file of the folder, and in a hub cache to its `blobs`, which is where its files are.
    """
    parts = Path(name).parts
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts or name != "/".join(parts):
        raise CheckpointError(f"{folder}: expected the name of a file in this folder, found {_short(name)}")
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(root / name))
    in_hub_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not in_hub_cache:
        raise CheckpointError(
            f"{folder / name}: a link that leads out of the folder, to {real}; put the file itself there"
        )
    return real


@contextlib.contextmanager
def opened(folder: Path, name: str) -> Iterator[int]:
    """A descriptor of the regular file `name` of `folder`, for reading; raises `CheckpointError`."""
    real = resolve_in(folder, name)
    try:
        # Without waiting, since a pipe in the place of a file would wait for ever; what `real` names is no link by now.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be opened ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{folder / name}: expected a regular file, found something else")
        yield descriptor
    finally:
        os.close(descriptor)
