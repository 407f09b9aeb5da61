"""The file of a trimming, `trimming.json`: what was trimmed to what, so that the same bytes can be made again. No torch.

{
"format": "leanvocab trimming",
"version": 1,
"base": {"name": …, "revision": …, "tensors": {name: dtype, shape, sha256}, "files": {name: sha256}},
"delta": null, or {"name": …, "files": {name: sha256}},
"tokenizer": "base", "none", or the name of another,
"vocabulary": {"full_size": …, "digest": …, "token_ids": "0-257 300 1002-1005"},
"rows": {"wanted": …, "for_model": …, "for_splits": …, "padding": …, "padding_id": …},
"options": {"pad_to_multiple_of": …, "allow_rounding": …},
"output": {"tensors": {those that were cut: sha256}, "files": {those that were written anew: sha256}},
"versions": {"leanvocab": …, …}
}

Names are as the user gave them. All of the base that is not named in "output" is in the result as it was.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.delta_format import MAX_FULL_SIZE, BaseTensor, read_base_tensors
from leanvocab.errors import CheckpointError, shortened
from leanvocab.files.row_bytes import runs
from leanvocab.files.untrusted_files import JsonReader, read_json
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

FORMAT, VERSION, RECIPE = "leanvocab trimming", 1, "trimming.json"
FROM_BASE, NONE = "base", "none"  # where a tokenizer came from, or whose name it has
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


@dataclass(frozen=True)
class Source:
    """A folder that was read: its name as the user gave it, and the digests of its files that hold no tensors."""

    name: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Rows:
    """Numbers of rows: those of the given vocabulary, those that the model and the tokenizer need beside them, and padding,
    which is copies of the row of `padding_id`."""

    wanted: int
    for_model: int
    for_splits: int
    padding: int
    padding_id: int


@dataclass(frozen=True)
class Options:
    """Options that decide the bytes of the result."""

    pad_to_multiple_of: int | None
    allow_rounding: bool


@dataclass(frozen=True)
class Recipe:
    """Content of `trimming.json`. `vocabulary` has all kept ids, those that were needed beside the given ones too."""

    base: Source
    revision: str | None
    base_tensors: Mapping[str, BaseTensor]
    delta: Source | None
    tokenizer: str
    vocabulary: PartialVocabulary
    rows: Rows
    options: Options
    cut: Mapping[str, str]  # tensor of the output → sha256
    written: Mapping[str, str]  # file of the output that is none of the base's → sha256
    versions: Mapping[str, str]

    def text(self) -> str:
        """The file: a line a part."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "base": {
                "name": self.base.name,
                "revision": self.revision,
                "tensors": {name: vars(tensor) for name, tensor in self.base_tensors.items()},
                "files": dict(self.base.files),
            },
            "delta": None if self.delta is None else {"name": self.delta.name, "files": dict(self.delta.files)},
            "tokenizer": self.tokenizer,
            "vocabulary": {
                "full_size": self.vocabulary.full_size,
                "digest": self.vocabulary.digest,
                "token_ids": ranges(self.vocabulary.token_ids),
            },
            "rows": asdict(self.rows),
            "options": asdict(self.options),
            "output": {"tensors": dict(self.cut), "files": dict(self.written)},
            "versions": dict(self.versions),
        }
        parts = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        return "{\n" + ",\n".join(parts) + "\n}\n"


def read_recipe(path: Path) -> Recipe:
    """Reads a `trimming.json` and checks it; raises `CheckpointError`."""
    _, content = read_json(path.parent, path.name)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r}, version {VERSION}, found {content.get('format')!r:.60}, "
            f"{content.get('version')!r:.60}; a newer leanvocab may read it"
        )
    reader = JsonReader(path)
    base, rows, options, output = (reader.of(content, key, dict) for key in ("base", "rows", "options", "output"))
    numbers = {name: reader.of(rows, name, int) for name in Rows.__annotations__}
    return Recipe(
        base=_source(reader, base),
        revision=base.get("revision") if isinstance(base.get("revision"), str) else None,
        base_tensors=read_base_tensors(reader, base),
        delta=None if content.get("delta") is None else _source(reader, reader.of(content, "delta", dict)),
        tokenizer=reader.of(content, "tokenizer", str),
        vocabulary=_vocabulary(reader, reader.of(content, "vocabulary", dict)),
        rows=Rows(**numbers),
        options=_options(reader, options),
        cut=_digests(reader, output, "tensors"),
        written=_digests(reader, output, "files"),
        versions={name: str(version) for name, version in reader.of(content, "versions", dict).items()},
    )


def _source(reader: JsonReader, value: dict[str, Any]) -> Source:
    return Source(reader.of(value, "name", str), _digests(reader, value, "files"))


def _digests(reader: JsonReader, owner: dict[str, Any], key: str) -> dict[str, str]:
    digests = reader.of(owner, key, dict)
    return {name: reader.digest(digests, name) for name in digests}


def _options(reader: JsonReader, value: dict[str, Any]) -> Options:
    multiple = value.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise CheckpointError(
            f"{reader.path}: pad_to_multiple_of: expected null, or a number from 1, found {multiple!r:.60}"
        )
    return Options(multiple, reader.of(value, "allow_rounding", bool))


def _vocabulary(reader: JsonReader, value: dict[str, Any]) -> PartialVocabulary:
    full_size, where = reader.of(value, "full_size", int), f"{reader.path}: vocabulary"
    if not 0 < full_size <= MAX_FULL_SIZE:
        raise CheckpointError(f"{where}: expected a full_size from 1 to {MAX_FULL_SIZE:,}, found {full_size}")
    vocabulary = PartialVocabulary(_token_ids(where, reader.of(value, "token_ids", str), full_size), full_size)
    if vocabulary.digest != reader.digest(value, "digest"):
        raise CheckpointError(
            f"{where}: the token ids have the digest {vocabulary.digest[:16]}…, expected {value['digest'][:16]}…: they were "
            "changed"
        )
    return vocabulary


def ranges(token_ids: NDArray[np.int64]) -> str:
    """Sorted ids as text, such as 0-257 300."""
    return " ".join(f"{first}-{first + count - 1}" if count > 1 else f"{first}" for _, first, count in runs(token_ids))


def _token_ids(where: str, text: str, full_size: int) -> NDArray[np.int64]:
    ids, least = [np.zeros(0, np.int64)], 0
    for part in text.split():
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
        if not least <= first <= last < full_size:
            raise CheckpointError(
                f"{where}: expected ids and ranges in order, each once, below {full_size:,}, such as 0-257 300, found "
                f"{shortened(part)}"
            )
        ids.append(np.arange(first, last + 1, dtype=np.int64))
        least = last + 1
    return np.concatenate(ids)


def check_same(recipe: Recipe, made: Recipe) -> None:
    """Raises `CheckpointError` where something was read, or came out, that is not what the recipe says."""
    expected_delta, found_delta = (({} if r.delta is None else r.delta.files) for r in (recipe, made))
    for what, expected, found in (
        ("the base is another one, or damaged: its tensor", recipe.base_tensors, made.base_tensors),
        ("the base is another one: its file", recipe.base.files, made.base.files),
        ("the delta is another one: its file", expected_delta, found_delta),
        ("other bytes than the recipe's came out, with other versions perhaps: tensor", recipe.cut, made.cut),
        ("other bytes than the recipe's came out, with other versions perhaps: file", recipe.written, made.written),
    ):
        for name in (*expected, *found):
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{what} {name!r}: expected {expected.get(name)}, found {found.get(name)} (recipe made with "
                    f"{recipe.versions}, here are {made.versions})"
                )


def name_of_tokenizer(tokenizer: Any) -> str:
    """What a recipe calls a tokenizer, as it was given."""
    if tokenizer is None:
        return FROM_BASE
    if tokenizer is False:
        return NONE
    return os.fspath(tokenizer) if isinstance(tokenizer, str | os.PathLike) else type(tokenizer).__name__
