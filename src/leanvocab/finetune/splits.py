"""The splits that a run trains and validates on."""

from typing import Any

import numpy as np

from leanvocab.errors import DataError
from leanvocab.extras import require
from leanvocab.finetune.settings import DataSettings

datasets = require("datasets", extra="finetune")


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
