"""Data → examples: the splits of a run, drawn and tokenized for its task, alike for every command that reads them."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from leanvocab.errors import DataError, SettingsError
from leanvocab.extras import require
from leanvocab.finetune.classification import find_label_task
from leanvocab.finetune.language_modeling import find_language_task
from leanvocab.finetune.settings import DataSettings, FineTuneSettings
from leanvocab.finetune.tasks import Task, find_eval_split
from leanvocab.texts.data_files import load_splits
from leanvocab.texts.fitting import check_known

datasets = require("datasets", extra="finetune")


@dataclass(frozen=True)
class Examples:
    """A task, its tokenized splits, and the seconds that tokenizing took.

    `understood` are plain values that a summary opens with: the task, its columns and classes, and the rows of each split;
    `notes` are what else a user should know.
    """

    task: Task
    encoded: Any
    notes: tuple[str, ...]
    seconds: float
    understood: dict[str, Any]

    @property
    def columns(self) -> set[str]:
        """The columns of the data that are learned as they are written; a chat is what its JSON says."""
        by_use = self.understood["columns"].items()
        return {name for what, names in by_use if what != "messages" for name in names}


def read_examples(data: Any, tokenizer: Any, settings: FineTuneSettings, config: Any = None) -> Examples:
    """Examples of whatever `load_splits` takes, as a run of these settings trains on them.

    `config` is the checkpoint's, whose classes may be those of the data.

    Raises:
        DataError: nothing can be learned from the data, or the tokenizer does not know them.
        ModelError: the tokenizer cannot write such data.
        SettingsError: the settings need a split that is not there.
    """
    loaded = load_splits(data, settings.config_name, settings.texts)
    splits = select_samples(loaded, settings, settings.seed)
    is_language = settings.is_language_model
    task: Task = find_language_task(splits, settings) if is_language else find_label_task(splits, settings, config)
    if settings.best and task.eval_split is None:
        raise SettingsError("best needs a validation split: name one (eval_split), or hold one out (validation_ratio)")
    start = time.perf_counter()
    encoded, notes = task.encode(splits, tokenizer, settings)
    seconds = time.perf_counter() - start
    check_known(task.train_split, encoded[task.train_split], tokenizer)
    understood = {**task.understood, "rows": {name: len(split) for name, split in splits.items()}}
    examples = Examples(task, encoded, notes, seconds, understood)
    return replace(examples, notes=(*notes, *loaded.said_of_strings(examples.columns)))


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


def _rows(split: Any, positions: np.ndarray[Any, Any]) -> Any:
    """Some rows of a split, in its order; in memory, where `select` would write beside a data set on disk."""
    if not 0 < len(positions) < len(split):
        raise DataError(f"cannot take {len(positions):,} of {len(split):,} rows: at least one belongs on each side")
    return split.select(np.sort(positions), keep_in_memory=True)
