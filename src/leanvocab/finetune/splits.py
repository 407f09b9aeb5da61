"""Files, folders, data sets of the hub → the splits to train and to validate on, one Dataset each.

Files are read into memory as they are: nothing is written beside them, and no cache is made of them.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from leanvocab.errors import DataError, first_line
from leanvocab.extras import require
from leanvocab.finetune.settings import DataSettings

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
        return {
            str(name): read_data_file(Path(part)) if isinstance(part, str | Path) else part
            for name, part in source.items()
        }
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
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of an unknown type; expected one of {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        arrow = reader(path)
    except (pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix}: {first_line(error)}") from error
    return datasets.Dataset(arrow)


def _read_csv(path: Path) -> pa.Table:
    # A text may hold line breaks, and the word null or NA is a text.
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(path, parse_options=parse)


def _read_lines(path: Path) -> pa.Table:
    return pa.table({"text": [line for line in path.read_text("utf-8").split("\n") if line.strip()]})


_READERS = {
    ".csv": _read_csv,
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
        if found := _SPLIT.search(_SHARD.sub("", file.stem)):
            name = {"valid": "validation", "val": "validation", "dev": "validation"}.get(found[1], found[1])
            by_split.setdefault(name + (found[2] or ""), []).append(file)
    if not by_split and len(files) == 1:
        by_split["train"] = files
    if not by_split:
        what = f"of the configuration {config_name!r} " if config_name else ""
        raise DataError(
            f"{folder} holds no file {what}with a split in its name; expected such as train.csv or "
            f"cola.train.parquet, got {_some(file.name for file in files) or 'no ' + ', '.join(_READERS)}"
        )
    return {split: _concatenated(split, parts) for split, parts in by_split.items()}


def _files_of(folder: Path, config_name: str | None) -> list[Path]:
    inside = config_name is not None and (folder / config_name).is_dir()
    files = sorted((folder / str(config_name) if inside else folder).iterdir())
    files = [file for file in files if file.suffix.lower() in _READERS]
    if config_name is None or inside:
        return files
    return [file for file in files if re.match(re.escape(config_name) + r"[._-]", file.name)]


def _concatenated(split: str, files: list[Path]) -> "datasets.Dataset":
    if len(files) > 1 and not all(_SHARD.search(file.stem) for file in files):
        raise DataError(
            f"several files claim the split {split!r}: {_some(file.name for file in files)}; "
            "name one configuration of them (config_name), or the files themselves"
        )
    return datasets.concatenate_datasets([read_data_file(file) for file in files])


def _from_hub(name: str, config_name: str | None) -> dict[str, Any]:
    try:
        loaded = datasets.load_dataset(_HUB_NAMES.get(name, name), config_name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name!r} is neither a file nor a folder here, and the hub did not give a data set of that name"
            f"{f' and the configuration {config_name!r}' if config_name else ''}: {first_line(error)}"
        ) from error
    return dict(loaded)


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- samples of them ---------------------------------------------------------------------------------------------------


def select_samples(splits: Any, settings: DataSettings, seed: int) -> Any:
    """The splits that the settings ask for: validation held out, and samples limited, both drawn by the seed.

    Raises:
        DataError: there is no split of that name.
    """
    splits, train = datasets.DatasetDict(splits), settings.train_split
    if train not in splits:
        raise DataError(f"there is no split {train!r} to train on (train_split); the data set has {', '.join(splits)}")
    if settings.validation_ratio and find_eval_split(splits, settings) is None:
        held_out = round(len(splits[train]) * settings.validation_ratio)
        order = np.random.default_rng(seed).permutation(len(splits[train]))
        splits["validation"] = _rows(splits[train], order[:held_out])
        splits[train] = _rows(splits[train], order[held_out:])
    limits = {train: settings.max_train_samples, find_eval_split(splits, settings): settings.max_eval_samples}
    for name, most in limits.items():
        if name is not None and most is not None and most < len(splits[name]):
            chosen = np.random.default_rng(seed).choice(len(splits[name]), most, replace=False)
            splits[name] = _rows(splits[name], chosen)
    return splits


def find_eval_split(splits: Any, settings: DataSettings) -> str | None:
    """The split to validate on: the one that is named, or the first whose name begins with validation; else None.

    Raises:
        DataError: there is no split of the name that was given.
    """
    if settings.eval_split is None:
        return next((name for name in sorted(splits) if name.startswith("validation")), None)
    if settings.eval_split not in splits:
        raise DataError(
            f"there is no split {settings.eval_split!r} to validate on (eval_split); the data set has "
            f"{', '.join(splits)}"
        )
    return settings.eval_split


def _rows(split: Any, positions: np.ndarray[Any, Any]) -> Any:
    """Some rows of a split, in its order; in memory, where `select` would write beside a data set on disk."""
    if not 0 < len(positions) < len(split):
        raise DataError(f"cannot take {len(positions):,} of {len(split):,} rows: at least one belongs on each side")
    return split.select(np.sort(positions), keep_in_memory=True)
