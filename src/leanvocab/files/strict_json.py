"""JSON read as if someone hostile had written it: no duplicate keys, no numbers that are none, no deep nesting."""

import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from leanvocab.errors import CheckpointError, shortened
from leanvocab.files.copying import read_exactly
from leanvocab.files.safe_opening import opened

MAX_JSON_BYTES = 100_000_000
_MAX_DEPTH = 16  # no honest file nests deeper; found before the parser recurses
_STRINGS_AND_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def read_json(folder: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """(the file as it is, its content) of a JSON object; raises `CheckpointError`."""
    with opened(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{folder / name}: expected at most {MAX_JSON_BYTES:,} bytes of JSON, found {size:,}")
        raw = read_exactly(descriptor, 0, size)
    return raw, parse_object(folder / name, raw)


def parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    """The JSON object that a file holds; raises `CheckpointError`."""
    try:
        value = parse(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found something else: {shortened(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {shortened(value)}")
    return value


def parse(raw: bytes) -> Any:
    """The value of JSON in UTF-8; raises `ValueError` (of which UnicodeDecodeError and JSONDecodeError are kinds)."""
    _check_depth(raw)
    return json.loads(raw.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)


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
