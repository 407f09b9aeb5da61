"""Files, folders, data sets of the hub → splits, one Dataset each.

Files are read into memory as they are: nothing is written beside them, and no cache is made of them.
"""

import re
from collections.abc import Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from leanvocab.errors import DataError, first_line
from leanvocab.extras import require
from leanvocab.texts.text_columns import in_memory

if TYPE_CHECKING:
    import datasets
else:
    datasets = require("datasets", extra="finetune")

# What split a file holds stands in its name: train.csv, cola.train.parquet, test-00000-of-00001.parquet.
_SPLIT = re.compile(r"(?:^|[._-])(train|validation|valid|val|dev|test)(?=$|[._-])(_matched|_mismatched)?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_HUB_NAMES = {"glue": "nyu-mll/glue", "xnli": "facebook/xnli"}


def load_splits(source: Any, config_name: str | None = None) -> "datasets.DatasetDict":
    """The splits of a data set, by name.

    Args:
        source: a file (the split train); a folder whose files have a split in their names, or that `save_to_disk`
            wrote; a name on the hub; a Dataset or a DatasetDict; or a mapping from split to file or Dataset.
        config_name: which configuration of the data set: a subfolder or a prefix of the file names in a folder (cola in
            cola.train.parquet), a configuration on the hub.

    Raises:
        DataError: nothing is there, of an unknown type, cannot be read, or a split is empty.
    """
    splits = datasets.DatasetDict(_splits(source, config_name))
    for name, split in splits.items():
        if not isinstance(split, datasets.Dataset):
            raise DataError(f"split {name!r} is a {type(split).__name__}; expected a datasets.Dataset")
        if len(split) == 0:
            raise DataError(f"split {name!r} is empty: expected at least one row")
    return splits


def _splits(source: Any, config_name: str | None) -> dict[str, Any]:
    if isinstance(source, Mapping):
        parts = {str(name): part for name, part in source.items()}
        return {name: read_data_file(Path(p)) if isinstance(p, str | Path) else p for name, p in parts.items()}
    if isinstance(source, datasets.Dataset):
        return {"train": source}
    if not isinstance(source, str | Path):
        raise DataError(
            f"cannot take a {type(source).__name__} as a data set; expected a file, a folder, a name on the hub, "
            "a datasets.Dataset, a DatasetDict, or a mapping from split to one of them"
        )
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, config_name)
    if path.is_file() or path.suffix.lower() in _READERS:
        return {"train": read_data_file(path)}
    return _from_hub(str(source), config_name)


def read_data_file(path: Path) -> "datasets.Dataset":
    """One CSV, JSON lines or Parquet file, or lines of text, as a Dataset in memory.

    Raises:
        DataError: the file is missing, of another type, or cannot be read.
    """
    return in_memory(_read_table(path))


def _read_table(path: Path) -> pa.Table:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of an unknown type; expected one of {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        table = reader(path)
    except (pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix}: {first_line(error)}") from error
    if twice := next((name for name in table.column_names if table.column_names.count(name) > 1), None):
        raise DataError(f"{path} has the column {twice!r} more than once; give its columns names of their own")
    return table


def _read_lines(path: Path) -> pa.Table:
    return pa.table({"text": [line for line in path.read_text("utf-8").split("\n") if line.strip()]})


_READERS = {
    # A text may hold line breaks, and the word null or NA is a text.
    ".csv": partial(pyarrow.csv.read_csv, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)),
    ".jsonl": pyarrow.json.read_json,
    ".json": pyarrow.json.read_json,
    ".parquet": pyarrow.parquet.read_table,
    ".txt": _read_lines,
}


def _from_folder(folder: Path, config_name: str | None) -> dict[str, Any]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = datasets.load_from_disk(folder)
        return {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    files = _files_of(folder, config_name)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        if named := _SPLIT.search(_SHARD.sub("", file.stem)):
            split = "validation" if named[1] in ("valid", "val", "dev") else named[1]
            by_split.setdefault(split + (named[2] or ""), []).append(file)
    if not by_split and len(files) == 1:
        by_split["train"] = files
    if not by_split:
        what = f"of the configuration {config_name!r} " if config_name else ""
        raise DataError(
            f"{folder} holds no file {what}with a split in its name; expected such as train.csv or "
            f"cola.train.parquet, got {_some(files) or 'no ' + ', '.join(_READERS)}"
        )
    return {split: _concatenated(split, parts) for split, parts in by_split.items()}


def _files_of(folder: Path, config_name: str | None) -> list[Path]:
    inside = config_name is not None and (folder / config_name).is_dir()
    files = sorted((folder / str(config_name) if inside else folder).iterdir())
    prefix = re.compile("" if config_name is None or inside else re.escape(config_name) + r"[._-]")
    return [file for file in files if file.suffix.lower() in _READERS and prefix.match(file.name)]


def _concatenated(split: str, files: list[Path]) -> "datasets.Dataset":
    if len(files) > 1 and not all(_SHARD.search(file.stem) for file in files):
        raise DataError(
            f"several files claim the split {split!r}: {_some(files)}; name one configuration of them (config_name), or "
            "the files themselves"
        )
    # Tables of one form are one data set: making a data set of each of thousands takes longer than reading them.
    alike = groupby((_read_table(file) for file in files), _form)
    parts = [in_memory(pa.concat_tables(tables)) for _, tables in alike]
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(
            f"the files of split {split!r} hold other columns than one another: {first_line(error)}"
        ) from error


def _form(table: pa.Table) -> tuple[pa.Schema, Any]:
    """Columns and their types, and what datasets has noted of them (names of classes)."""
    return table.schema.remove_metadata(), datasets.Features.from_arrow_schema(table.schema)


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


# --- samples of them ---------------------------------------------------------------------------------------------------
