"""A delta on disk: the one file `leanvocab.json` that says so, and the files beside it. No torch.

| file | holds |
| --- | --- |
| leanvocab.json | what this is: vocabularies, base, tensors, digests (this module) |
| delta.safetensors | the trained rows, and the other tensors that are not the base's |
| model_config.json | the model's config, as an ordinary checkpoint has it |
| config.json | makes a plain `from_pretrained` fail with the command to run |
| optimizer.safetensors, optimizer.json | the optimizer's states, partial (checkpoints of a training run) |
| README.md | one line for a person |

A full checkpoint whose training had another objective has `leanvocab_training.json` beside its weights, which says so.
"""

import itertools
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanvocab.choices import OUTPUT_MODES
from leanvocab.errors import CheckpointError
from leanvocab.files.headers import SafetensorsFile, is_weights_file, read_header
from leanvocab.files.presence import is_file
from leanvocab.files.untrusted_files import JsonReader, is_sizes, is_text_map, read_json
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

FORMAT, VERSION = "leanvocab delta", 1
MAX_FULL_SIZE = 1 << 24  # rows; a vocabulary takes memory for each, so a file must not choose freely
DESCRIPTION, TENSORS, MODEL_CONFIG, CONFIG, README = (
    "leanvocab.json", "delta.safetensors", "model_config.json", "config.json", "README.md",
)  # fmt: skip
OPTIMIZER_TENSORS, OPTIMIZER = "optimizer.safetensors", "optimizer.json"
FILES = (DESCRIPTION, TENSORS, MODEL_CONFIG, CONFIG, README, OPTIMIZER_TENSORS, OPTIMIZER)
TRAINING_NOTE = "leanvocab_training.json"  # beside a full checkpoint


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base, as it must be."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class DeltaTensor:
    """One tensor of a delta: which of the base's it replaces (ties: several; none: it is new), and its digest."""

    replaces: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class DeltaTable:
    """Rows of one vocabulary matrix. `rest_sha256` is the digest of the base's rows that are not in the vocabulary."""

    vocabulary: PartialVocabulary
    rest_sha256: str


@dataclass(frozen=True)
class Description:
    """Content of `leanvocab.json`."""

    base_name: str
    base_revision: str | None
    base_tensors: Mapping[str, BaseTensor]
    tables: Mapping[str, DeltaTable]  # name in delta.safetensors → its vocabulary
    tensors: Mapping[str, DeltaTensor]  # name in delta.safetensors, the tables' too
    absent: tuple[str, ...] = ()  # tensors of the base that the model does not have (another head)
    renamed: Mapping[str, str] = field(default_factory=dict)  # name in the base → name that the model gives it
    output: str = "full"
    decay_unused_rows: bool = False

    def write(self, folder: Path) -> None:
        """Writes `leanvocab.json`: a line a part, so that a person can look at it and rows of ids stay short."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "base": {
                "name": self.base_name,
                "revision": self.base_revision,
                "tensors": {name: vars(tensor) for name, tensor in self.base_tensors.items()},
            },
            "tables": {
                name: {
                    "full_size": table.vocabulary.full_size,
                    "digest": table.vocabulary.digest,
                    "rest_sha256": table.rest_sha256,
                    "token_ids": table.vocabulary.token_ids.tolist(),
                }
                for name, table in self.tables.items()
            },
            "tensors": {name: vars(tensor) for name, tensor in self.tensors.items()},
            "absent": self.absent,
            "renamed": dict(self.renamed),
            "output": self.output,
            "decay_unused_rows": self.decay_unused_rows,
        }
        parts = (f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in content.items())
        (folder / DESCRIPTION).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def is_delta(folder: Path) -> bool:
    """True for a folder that says that it holds a delta."""
    return is_file(folder / DESCRIPTION)


def read_delta(folder: Path) -> tuple[Description, SafetensorsFile]:
    """(what a delta's folder says, its tensors), each checked against the other; raises `CheckpointError`."""
    description = read_description(folder)
    full = next((name for name in sorted(os.listdir(folder)) if is_weights_file(name)), None)
    if full is not None:  # a training run without deltas wrote where one with deltas did: which is newer, nothing says
        raise CheckpointError(
            f"{folder} holds a delta ({DESCRIPTION}) and weights of a full checkpoint ({full}), expected one of them: two "
            f"runs wrote there. Remove {full} to use the delta, or {DESCRIPTION} and {TENSORS} to use the full checkpoint"
        )
    file = read_header(folder, TENSORS)
    if set(file.tensors) != set(description.tensors):
        odd = sorted(set(file.tensors) ^ set(description.tensors))[0]
        holds, lacks = (TENSORS, DESCRIPTION) if odd in file.tensors else (DESCRIPTION, TENSORS)
        raise CheckpointError(f"{folder}: tensor {odd!r} is in {holds} and not in {lacks}, expected it in both")
    for name, table in description.tables.items():
        shape, expected = file.tensors[name].shape, len(table.vocabulary)
        if not shape or shape[0] != expected:
            raise CheckpointError(
                f"{folder / TENSORS}: {name!r}: expected {expected:,} rows, as many as ids, found shape {shape}"
            )
    return description, file


def read_description(folder: Path) -> Description:
    """Reads `leanvocab.json` and checks it; raises `CheckpointError`."""
    path = folder / DESCRIPTION
    _, found = read_json(folder, DESCRIPTION)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r}, version {VERSION}, found {found.get('format')!r:.60}, "
            f"{found.get('version')!r:.60}; a newer leanvocab may read it"
        )
    reader = JsonReader(path)
    base = reader.of(found, "base", dict)
    description = Description(
        base_name=reader.of(base, "name", str),
        base_revision=base.get("revision") if isinstance(base.get("revision"), str) else None,
        tables={name: _table(reader, name, value) for name, value in reader.objects(found, "tables")},
        tensors={
            name: DeltaTensor(reader.texts(value, "replaces"), reader.digest(value, "sha256"))
            for name, value in reader.objects(found, "tensors")
        },
        base_tensors=read_base_tensors(reader, base),
        absent=reader.texts(found, "absent"),
        renamed=reader.checked(found, "renamed", dict, is_text_map, "{name: name}"),
        output=reader.one_of(found, "output", OUTPUT_MODES),
        decay_unused_rows=reader.of(found, "decay_unused_rows", bool),
    )
    _check_names(path, description)
    return description


def read_base_tensors(reader: JsonReader, base: dict[str, Any]) -> dict[str, BaseTensor]:
    """What JSON says of the tensors of a base; raises `CheckpointError`."""
    return {
        name: BaseTensor(reader.of(value, "dtype", str), reader.sizes(value, "shape"), reader.digest(value, "sha256"))
        for name, value in reader.objects(base, "tensors")
    }


def _table(reader: JsonReader, name: str, value: dict[str, Any]) -> DeltaTable:
    full_size, ids = reader.of(value, "full_size", int), value.get("token_ids")
    where = f"{reader.path}: table {name!r:.100}"
    if not is_sizes(ids) or not ids:
        raise CheckpointError(f"{where}: expected token ids from 0, found {ids!r:.60}")
    if not 0 < full_size <= MAX_FULL_SIZE or max(ids) >= full_size:
        raise CheckpointError(f"{where}: expected token ids from 0 to {full_size - 1}, found {max(ids)}")
    for first, second in itertools.pairwise(ids):
        if second <= first:
            raise CheckpointError(f"{where}: expected sorted token ids, each once, found {second} after {first}")
    vocabulary = PartialVocabulary(ids, full_size)
    if vocabulary.digest != reader.digest(value, "digest"):
        raise CheckpointError(
            f"{where}: the token ids have the digest {vocabulary.digest[:16]}…, expected {value['digest'][:16]}…: "
            "they were changed"
        )
    return DeltaTable(vocabulary, reader.digest(value, "rest_sha256"))


def _check_names(path: Path, description: Description) -> None:
    replaced: set[str] = set()
    for name, tensor in description.tensors.items():
        for target in tensor.replaces:
            if target in replaced:
                raise CheckpointError(f"{path}: {target!r:.100} is replaced twice, the second time by {name!r:.100}")
            replaced.add(target)
    for name in (*replaced, *description.absent, *description.renamed):
        if name not in description.base_tensors:
            raise CheckpointError(
                f"{path}: {name!r:.100} is said to be a tensor of the base, and is not among its tensors"
            )
    for name, table in description.tables.items():
        if name not in description.tensors or not description.tensors[name].replaces:
            raise CheckpointError(f"{path}: table {name!r:.100} replaces rows of no tensor of the base")
        full_size = table.vocabulary.full_size
        for target in description.tensors[name].replaces:
            shape = description.base_tensors[target].shape
            if not shape or shape[0] != full_size:
                raise CheckpointError(
                    f"{path}: table {name!r:.100}: expected {full_size:,} rows in {target!r:.100}, found shape {shape}"
                )
    gone = set(description.absent)
    merged = Counter(description.renamed.get(name, name) for name in description.base_tensors if name not in gone)
    merged.update(name for name, tensor in description.tensors.items() if not tensor.replaces)
    twice = {name for name, count in merged.items() if count > 1}
    if twice or gone & replaced or "__metadata__" in merged:
        raise CheckpointError(
            f"{path}: the merged tensors would not have one name each: {sorted(twice | (gone & replaced))!r:.100}"
        )


# --- signs for people, and for a plain from_pretrained ----------------------------------------------------------------


def merge_command(base_name: str, delta: str = "DELTA") -> str:
    """The command that makes a checkpoint of a delta, to copy."""
    return shlex.join(["leanvocab", "merge", base_name, delta, "OUTPUT"])


def write_signs(folder: Path, base_name: str, output: str = "full") -> None:
    """`config.json` and `README.md`: what tells a person, and transformers, that this is no checkpoint.

    An unknown model type stops the Auto classes, and a name of a weights file that is none stops a model's own class; each
    error repeats the text that stands there.
    """
    sign = f"this is a leanvocab delta, not a checkpoint; to make one, run: {merge_command(base_name)}"
    config = {"model_type": sign, "transformers_weights": sign}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    line = (
        "A leanvocab delta: the trained rows and tensors alone, without the rest of the model. To make a checkpoint that loads "
        f"anywhere, run `{merge_command(base_name)}` with this folder as DELTA; `{DESCRIPTION}` says what it holds.\n"
    )
    objective = f'\nTrained with output="restricted": {RESTRICTED}.\n' if output == "restricted" else ""
    (folder / README).write_text(line + objective, encoding="utf-8")


# --- what a full checkpoint says of its training ----------------------------------------------------------------------

RESTRICTED = (
    "the softmax was over the rows of the partial vocabulary alone, which is another objective than the full model's"
)


def write_training_note(folder: Path, tables: Mapping[str, PartialVocabulary]) -> None:
    """Says beside a full checkpoint that it was trained with a restricted softmax: over which rows of which matrices.

    A file of its own, so that the folder loads anywhere, and its other files are byte for byte the merged model's.
    """
    note = {
        "format": "leanvocab training",
        "version": VERSION,
        "output": "restricted",
        "meaning": RESTRICTED,
        "tables": {
            name: {"num_rows": len(vocabulary), "full_size": vocabulary.full_size, "digest": vocabulary.digest}
            for name, vocabulary in tables.items()
        },
    }
    (folder / TRAINING_NOTE).unlink(missing_ok=True)  # a link that a base had there is not followed
    (folder / TRAINING_NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def write_note_of(folder: Path, description: Description) -> None:
    """The note of `write_training_note`, where the rows of a delta were trained among one another alone."""
    if description.tables and description.output == "restricted":
        write_training_note(folder, {name: table.vocabulary for name, table in description.tables.items()})


def read_training_note(folder: Path) -> dict[str, Any] | None:
    """The note that `write_training_note` left beside the checkpoint in a folder; None where there is none."""
    return read_json(folder, TRAINING_NOTE)[1] if is_file(folder / TRAINING_NOTE) else None
