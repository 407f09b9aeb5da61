"""Files, folders, data sets of the hub → splits, one Dataset each.

Files are read into memory as they are: nothing is written beside them, and no cache is made of them.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from leanvocab.errors import DataError, first_line
from leanvocab.extras import require
from leanvocab.files.presence import is_file, is_folder, is_there
from leanvocab.texts.formats import FORMATS, MadeStrings, format_of, made_strings, read_table, with_numbers
from leanvocab.texts.text_columns import USUAL_TEXTS, in_memory

if TYPE_CHECKING:
    import datasets
else:
    datasets = require("datasets", extra="finetune")

# What split a file holds stands in its name: train.csv, cola.train.parquet, test-00000-of-00001.parquet.
_SPLIT = re.compile(
    r"(?:^|[._-])(training|train|validation|valid|val|dev|eval|evaluation|testing|test)(?=$|[._-])(_matched|_mismatched)?"
)
_SPLITS = {"training": "train", "testing": "test"} | dict.fromkeys(
    ("valid", "val", "dev", "eval", "evaluation"), "validation"
)
_SHARD = re.compile(r"[._-]\d+(-of-\d+)?$")
_HUB_NAMES = {"glue": "nyu-mll/glue", "xnli": "facebook/xnli"}
_UNTYPED = (".csv", ".tsv")

Noted = dict[str, dict[str, MadeStrings]]
"""What was made strings, by split and column."""


class Splits(datasets.DatasetDict):  # type: ignore[misc]
    """The splits of a data set, and what was made strings in files: by split and column."""

    made_strings: Noted

    def said_of_strings(self, columns: Collection[str]) -> Iterator[str]:
        """What to say of columns in whose files other values stand than strings."""
        for split, of_columns in self.made_strings.items():
            for name, made in of_columns.items():
                if name in columns:
                    yield (
                        f"{made.num_values:,} of {len(self[split]):,} rows of split {split!r} hold no string in column {name!r}; "
                        f"it was made one, as JSON writes it, such as {made.first}."
                    )


def load_splits(source: Any, config_name: str | None = None, texts: Collection[str] = ()) -> Splits:
    """The splits of a data set, by name.

    Args:
        source: a file (the split train); a folder whose files have a split in their names, or that `save_to_disk`
            wrote; a name on the hub; a Dataset or a DatasetDict; or a mapping from split to file or Dataset.
        config_name: which configuration of the data set: a subfolder or a prefix of the file names in a folder (cola in
            cola.train.parquet), a configuration on the hub.
        texts: columns of CSV files that are text, whatever stands in them, as those of the usual names are.

    Raises:
        DataError: nothing is there, of an unknown type, cannot be read, or a split is empty.
    """
    noted = dict(source.made_strings) if isinstance(source, Splits) else {}
    splits = Splits(_splits(source, config_name, texts, noted))
    splits.made_strings = noted
    for name, split in splits.items():
        if not isinstance(split, datasets.Dataset):
            raise DataError(f"split {name!r} is a {type(split).__name__}; expected a datasets.Dataset")
        if len(split) == 0:
            raise DataError(f"split {name!r} is empty: expected at least one row")
    return splits


def _splits(source: Any, config_name: str | None, texts: Collection[str], noted: Noted) -> dict[str, Any]:
    if isinstance(source, Mapping):
        parts = {str(name): part for name, part in source.items()}
        return {
            name: _data_set([Path(part)], texts, noted, name) if isinstance(part, str | Path) else part
            for name, part in parts.items()
        }
    if isinstance(source, datasets.Dataset):
        return {"train": source}
    if not isinstance(source, str | Path):
        raise DataError(
            f"cannot take a {type(source).__name__} as a data set; expected a file, a folder, a name on the hub, "
            "a datasets.Dataset, a DatasetDict, or a mapping from split to one of them"
        )
    path = Path(source)
    if is_folder(path):
        return _from_folder(path, config_name, texts, noted)
    if is_file(path) or format_of(path):
        return {"train": _data_set([path], texts, noted)}
    return _from_hub(str(source), config_name)


def read_data_file(path: Path, texts: Collection[str] = ()) -> "datasets.Dataset":
    """One file as a Dataset in memory; columns of `texts`, and of the usual names, are read as text.

    Raises:
        DataError: the file is missing, of another type, or cannot be read.
    """
    return _data_set([path], texts, {})


def _data_set(files: list[Path], texts: Collection[str], noted: Noted, split: str = "train") -> "datasets.Dataset":
    """Files of one split as a Dataset. Their types may differ in width (string and large_string, int32 and int64)."""
    tables, noted[split] = [], {}
    for file in files:
        table, made = made_strings(read_table(file))
        tables.append(table)
        for name, of_file in made.items():
            earlier = noted[split].get(name, MadeStrings(0, of_file.first))
            noted[split][name] = MadeStrings(earlier.num_values + of_file.num_values, earlier.first)
    try:
        # Tables of one form are one data set: making a data set of each of thousands takes longer than reading them.
        alike = [pa.concat_tables(group) for _, group in groupby(_widened(tables), _form)]
        if format_of(files[0]) in _UNTYPED:
            alike = [with_numbers(table, {*texts, *USUAL_TEXTS}) for table in alike]
        return datasets.concatenate_datasets([in_memory(table) for table in alike])
    except (ValueError, pa.ArrowException) as error:
        raise DataError(
            f"the files of split {split!r} hold other columns than one another: {first_line(error)}"
        ) from error


def _widened(tables: list[pa.Table]) -> list[pa.Table]:
    """The tables, in which columns of one name are of one type: the narrowest that holds what stands in all of them."""
    schemas = list({table.schema.remove_metadata(): None for table in tables})
    if len(schemas) == 1:
        return tables
    common = pa.unify_schemas(schemas, promote_options="permissive")
    wide = []
    for table in tables:
        meant = pa.schema([common.field(name) for name in table.column_names], table.schema.metadata)
        wide.append(table if table.schema.equals(meant) else table.cast(meant))
    return wide


def _form(table: pa.Table) -> tuple[pa.Schema, Any]:
    """Columns and their types, and what datasets has noted of them (names of classes)."""
    return table.schema.remove_metadata(), datasets.Features.from_arrow_schema(table.schema)


def _from_folder(folder: Path, config_name: str | None, texts: Collection[str], noted: Noted) -> dict[str, Any]:
    if is_there(folder / "dataset_dict.json") or is_there(folder / "state.json"):
        saved = datasets.load_from_disk(folder)
        return {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    files = _files_of(folder, config_name)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        if split := _split_of(file, folder):
            by_split.setdefault(split, []).append(file)
    if not by_split and len({_unnumbered(file) for file in files}) == 1:
        by_split["train"] = files
    if not by_split:
        what = f"of the configuration {config_name!r} " if config_name else ""
        raise DataError(
            f"{folder} holds no file {what}with a split in its name; expected such as train.csv or "
            f"cola.train.parquet, got {_some(files) or 'no ' + ', '.join(FORMATS)}"
        )
    for split, parts in by_split.items():
        if len({_unnumbered(file) for file in parts}) > 1 and not (
            parts[0].parent != folder and _split_in(parts[0].parent.name)
        ):
            raise DataError(
                f"several files claim the split {split!r}: {_some(parts)}; name one configuration of them (config_name), "
                "or the files themselves"
            )
    return {split: _data_set(parts, texts, noted, split) for split, parts in by_split.items()}


def _files_of(folder: Path, config_name: str | None) -> list[Path]:
    """The data files of a folder; where it has none, those of its folders data, train, validation, …"""
    inside = config_name is not None and is_folder(folder / config_name)
    folder = folder / str(config_name) if inside else folder
    prefix = re.compile("" if config_name is None or inside else re.escape(config_name) + r"[._-]")
    files = [file for file in sorted(folder.iterdir()) if is_file(file) and format_of(file) and prefix.match(file.name)]
    if files:
        return files
    below = [
        inner
        for inner in sorted(folder.iterdir())
        if is_folder(inner) and (inner.name == "data" or _split_in(inner.name))
    ]
    return [file for inner in below for file in _files_of(inner, None)]


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file's name says, or else that of the folders around it."""
    around = file.relative_to(folder).parts[:-1]
    return next((split for name in (_unnumbered(file), *reversed(around)) if (split := _split_in(name))), None)


def _split_in(name: str) -> str | None:
    if (named := _SPLIT.search(name.lower())) is None:
        return None
    return _SPLITS.get(named[1], named[1]) + (named[2] or "")


def _unnumbered(file: Path) -> str:
    """A file's name without its number among shards, and without suffixes."""
    name = file.name.lower().removesuffix(".gz")
    return _SHARD.sub("", name.removesuffix(format_of(file)))


def _from_hub(name: str, config_name: str | None) -> dict[str, Any]:
    try:
        loaded = datasets.load_dataset(_HUB_NAMES.get(name, name), config_name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name!r} is neither a file nor a folder here, and the hub did not give a data set of that name"
            f"{f' and the configuration {config_name!r}' if config_name else ''}: {first_line(error)}"
        ) from error
    return dict(loaded)


def _some(files: list[Path], most: int = 5) -> str:
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(file.name for file in files[:most]) + more
