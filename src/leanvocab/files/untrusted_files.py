"""Files that nobody vouches for: none leads out of its folder or is a pipe, and JSON is read as if it were hostile."""

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from leanvocab.errors import CheckpointError, shortened
from leanvocab.files.copying import read_exactly

MAX_JSON_BYTES = 100_000_000
_MAX_DEPTH = 16  # no honest file nests deeper; found before the parser recurses
_STRINGS_AND_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def resolve_in(folder: Path, name: str) -> Path:
    """The path where the file `name` of `folder` really lies; raises `CheckpointError` where that is outside the folder.

    A link may lead to another file of the folder, and in a hub cache to its `blobs`, which is where its files are.
    """
    parts = Path(name).parts
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts or name != "/".join(parts):
        raise CheckpointError(f"{folder}: expected the name of a file in this folder, found {shortened(name)}")
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


def read_json(folder: Path, name: str, *, infinity: bool = False) -> tuple[bytes, dict[str, Any]]:
    """(the file as it is, its content) of a JSON object; raises `CheckpointError`.

    `infinity` takes Infinity and NaN too, which are no JSON, and stand in configs that Python wrote.
    """
    with opened(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{folder / name}: expected at most {MAX_JSON_BYTES:,} bytes of JSON, found {size:,}")
        raw = read_exactly(descriptor, 0, size)
    return raw, parse_object(folder / name, raw, infinity=infinity)


def parse_object(path: Path, raw: bytes, *, infinity: bool = False) -> dict[str, Any]:
    """The JSON object that a file holds; raises `CheckpointError`."""
    try:
        value = parse_json(raw, infinity=infinity)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found something else: {shortened(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {shortened(value)}")
    return value


def parse_json(raw: bytes, *, infinity: bool = False) -> Any:
    """The value of JSON in UTF-8; raises `ValueError` (of which UnicodeDecodeError and JSONDecodeError are kinds)."""
    _check_depth(raw)
    constant = float if infinity else _refuse_constant
    return json.loads(raw.decode(), object_pairs_hook=_without_duplicates, parse_constant=constant)


def _check_depth(raw: bytes) -> None:
    depth = 0
    for mark in _STRINGS_AND_BRACKETS.finditer(raw):
        depth += _STEPS.get(raw[mark.start()], 0)
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DEPTH}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, part in pairs:
        if key in value:
            raise ValueError(f"{shortened(key)} occurs twice (duplicate key {shortened(key)})")
        value[key] = part
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def is_sizes(value: Any) -> bool:
    """True for a list of whole numbers from 0 to 2**63 - 1."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def is_text_map(value: Any) -> bool:
    """True for an object whose values are texts."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


class JsonReader:
    """Takes values of the expected kinds out of JSON; each raises `CheckpointError`, which says what was found instead."""

    def __init__(self, path: Path):
        self.path = path

    def of(self, owner: dict[str, Any], key: str, kind: type) -> Any:
        """A value of that kind."""
        value = owner.get(key)
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {key}: expected {kind.__name__}, found {value!r:.60}")
        return value

    def one_of(self, owner: dict[str, Any], key: str, allowed: tuple[str, ...]) -> str:
        """A text that is among those allowed."""
        value = owner.get(key)
        if value not in allowed:
            raise CheckpointError(
                f"{self.path}: {key}: expected one of {', '.join(allowed)}, found {value!r:.60}; a newer leanvocab may read it"
            )
        return str(value)

    def objects(self, owner: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, object) of each object in an object."""
        for name, value in self.of(owner, key, dict).items():
            if not isinstance(value, dict):
                raise CheckpointError(f"{self.path}: {key}: {name!r:.60}: expected an object, found {value!r:.60}")
            yield name, value

    def texts(self, owner: dict[str, Any], key: str) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(
            self.checked(owner, key, list, lambda texts: all(type(text) is str for text in texts), "a list of names")
        )

    def sizes(self, owner: dict[str, Any], key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0."""
        return tuple(self.checked(owner, key, list, is_sizes, "a list of sizes"))

    def digest(self, owner: dict[str, Any], key: str) -> str:
        """A sha256 in hex."""
        value = owner.get(key)
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            raise CheckpointError(f"{self.path}: {key}: expected 64 hexadecimal digits, found {value!r:.80}")
        return value

    def checked(
        self, owner: dict[str, Any], key: str, kind: type, is_right: Callable[[Any], bool], expected: str
    ) -> Any:
        """A value of that kind of which `is_right` is true."""
        value = self.of(owner, key, kind)
        if not is_right(value):
            raise CheckpointError(f"{self.path}: {key}: expected {expected}, found {value!r:.80}")
        return value
