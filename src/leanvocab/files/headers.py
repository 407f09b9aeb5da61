"""Headers of safetensors files and shard indices, read as if someone hostile had written them. No torch, no pickle.

Every size, offset and name is checked before anything is done with it: a file that passes has tensors that cover its
data without holes or overlaps, and lies where its folder says. Nothing is ever written here.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from leanvocab.errors import CheckpointError, shortened
from leanvocab.files.copying import read_exactly
from leanvocab.files.presence import is_entry, is_there
from leanvocab.files.untrusted_files import is_sizes, is_text_map, opened, parse_object, read_json

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
_MAX_DIMENSIONS = 16


def is_weights_file(name: str) -> bool:
    """True for the name of a file that holds weights of a full checkpoint, or says which files do."""
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

    def opened(self) -> AbstractContextManager[int]:
        """A descriptor of the file, for reading; raises `CheckpointError`."""
        return opened(self.path.parent, self.path.name)


@contextmanager
def all_opened(files: Iterable[SafetensorsFile]) -> Iterator[dict[Path, int]]:
    """Path → descriptor of each file, for reading; raises `CheckpointError`."""
    with ExitStack() as stack:
        yield {file.path: stack.enter_context(file.opened()) for file in files}


Located = tuple[SafetensorsFile, TensorEntry]  # a tensor and the file that holds it


@dataclass(frozen=True)
class Weights:
    """The weights of a folder: one file, or shards with their index as it lies there."""

    folder: Path
    files: tuple[SafetensorsFile, ...]
    index: bytes | None

    @cached_property
    def tensors(self) -> dict[str, Located]:
        """Name → (file, tensor), in the order of the files."""
        return {name: (file, entry) for file in self.files for name, entry in file.tensors.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, in the order of the files."""
        return {name: entry.shape for name, (_, entry) in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def read_weights(folder: Path) -> Weights:
    """The weights in `folder`, as `from_pretrained` would choose them: the single file first, then the index.

    Raises `CheckpointError`.
    """
    if is_entry(folder / SINGLE):
        return Weights(folder, (read_header(folder, SINGLE),), None)
    if not is_entry(folder / INDEX):
        names = (name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if is_there(folder / name))
        hints = (f"; {name} is a pickle, which is never loaded: save the model as safetensors first" for name in names)
        raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{next(hints, '')}")
    raw, index = read_json(folder, INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{folder / INDEX}: expected a weight_map {{tensor: file}}, found {shortened(weight_map)}"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {shortened(tensor)}: expected a .safetensors file, found {shortened(name)}"
            )
    files = tuple(read_header(folder, name) for name in dict.fromkeys(weight_map.values()))
    _check_index(folder / INDEX, weight_map, files)
    return Weights(folder, files, raw)


def _check_index(path: Path, weight_map: Mapping[str, str], files: tuple[SafetensorsFile, ...]) -> None:
    holders: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor in holders:
                both = f"{holders[tensor]} and {file.path.name}"
                raise CheckpointError(f"{path}: {shortened(tensor)} lies in two shards, {both}")
            holders[tensor] = file.path.name
    for tensor, name in weight_map.items():
        if holders.get(tensor) != name:
            where = f"in {holders[tensor]}" if tensor in holders else "in no shard"
            raise CheckpointError(f"{path}: expected {shortened(tensor)} in {name}, found it {where}")


def read_header(folder: Path, name: str) -> SafetensorsFile:
    """The header of the safetensors file `name` in `folder`, checked; raises `CheckpointError`."""
    path = folder / name
    with opened(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(read_exactly(descriptor, 0, min(size, _LENGTH_BYTES)), "little")
        limit = min(size - _LENGTH_BYTES, MAX_HEADER_BYTES)
        if size < _LENGTH_BYTES or length > limit:
            raise CheckpointError(
                f"{path}: its header would have {length:,} bytes, expected at most {max(limit, 0):,} (the file has "
                f"{size:,}); it is truncated, or no safetensors file"
            )
        raw = read_exactly(descriptor, 0, _LENGTH_BYTES + length)
    header = parse_object(path, raw[_LENGTH_BYTES:])
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not is_text_map(metadata):
        raise CheckpointError(f"{path}: expected __metadata__ {{text: text}}, found {shortened(metadata)}")
    tensors = {name: _entry(path, name, value, len(raw), size) for name, value in header.items()}
    _check_coverage(path, tensors, len(raw), size)
    return SafetensorsFile(path, raw, metadata, tensors, size)


def _entry(path: Path, name: str, value: Any, data: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {shortened(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {shortened(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: expected a dtype such as F32, found {shortened(dtype)}")
    if not is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: expected a shape of sizes from 0, found {shortened(shape)}")
    if not is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data:
        raise CheckpointError(
            f"{where}: expected data_offsets [start, end] within the {size - data:,} bytes of data, found {shortened(offsets)}"
        )
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if num_bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where}: expected {-(-num_bits // 8):,} bytes ({dtype} {shortened(shape)}), found {offsets[1] - offsets[0]:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _check_coverage(path: Path, tensors: Mapping[str, TensorEntry], data: int, size: int) -> None:
    position, before = data, "the header"
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {shortened(entry.name)} {kind} {before}: expected it at byte {position:,}, found {entry.start:,}"
            )
        position, before = entry.end, shortened(entry.name)
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


def widened(header: bytes, num_bytes: int) -> bytes:
    """A header with so many spaces more at its end, so that the data lie so much further behind."""
    length = int.from_bytes(header[:_LENGTH_BYTES], "little") + num_bytes
    return length.to_bytes(_LENGTH_BYTES, "little") + header[_LENGTH_BYTES:] + b" " * num_bytes
