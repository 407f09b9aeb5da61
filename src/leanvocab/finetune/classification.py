"""Classification and regression: which columns are texts, which is the label, and what the labels mean."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from transformers import DataCollatorWithPadding

from leanvocab.errors import DataError
from leanvocab.extras import require
from leanvocab.finetune.scores import classification_scores, logits_of, regression_scores
from leanvocab.finetune.settings import DataSettings
from leanvocab.finetune.splits import find_eval_split
from leanvocab.finetune.text_columns import (
    check_column,
    check_no_gaps,
    check_texts,
    choose_text_columns,
    find_text_columns,
    tokenize,
    values_of,
)

if TYPE_CHECKING:
    import datasets
else:
    datasets = require("datasets", extra="finetune")

_LABEL_COLUMNS = (("label",), ("labels",))


@dataclass(frozen=True)
class LabelTask:
    """Columns, splits and labels of one fine-tuning. `label_names` in the order of class ids; empty for regression."""

    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    train_split: str
    eval_split: str | None
    _label_values: tuple[Any, ...] = ()

    token_columns: ClassVar[tuple[str, ...]] = ("input_ids",)  # the labels are classes
    has_new_head: ClassVar[bool] = True
    draws_words: ClassVar[bool] = False

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    def label_ids(self, values: Iterable[Any]) -> np.ndarray[Any, Any]:
        """Labels as the model takes them: int64 class ids, or float32 scores for regression."""
        if self.is_regression:
            return np.asarray(list(values), np.float32)
        ids = {value: position for position, value in enumerate(self._label_values)}
        return np.asarray([ids[value] for value in values], np.int64)

    def set_labels(self, config: Any) -> None:
        config.num_labels = self.num_labels
        if self.is_regression:
            config.problem_type = "regression"
        else:
            config.problem_type = "single_label_classification"
            config.id2label = dict(enumerate(self.label_names))
            config.label2id = {label: position for position, label in enumerate(self.label_names)}

    def check_network(self, network: Any, settings: DataSettings) -> None:
        """Any model with such a head will do."""

    def encode(self, splits: Any, tokenizer: Any, settings: DataSettings) -> tuple[Any, tuple[str, ...]]:
        """Token ids of every split, and `labels` of those to train and to validate on."""
        encoded = datasets.DatasetDict()
        for name, split in splits.items():
            encoded[name] = tokenize(split, name, self.text_columns, tokenizer, settings.max_length)
            if name in (self.train_split, self.eval_split):
                labels = self.label_ids(values_of(split, self.label_column))
                encoded[name] = encoded[name].add_column("labels", labels)
        return encoded, ()

    def batches(self, encoded: Any, network: Any, tokenizer: Any, *others: Any) -> tuple[Any, tuple[Any, ...]]:
        return DataCollatorWithPadding(tokenizer), ()

    def scoring(self) -> dict[str, Any]:
        scores = regression_scores if self.is_regression else classification_scores
        return {
            "compute_metrics": lambda evaluated: scores(evaluated.predictions, evaluated.label_ids),
            "preprocess_logits_for_metrics": lambda given, labels: logits_of(given),
        }


def find_label_task(splits: Any, settings: DataSettings) -> LabelTask:
    """Finds texts and labels, by name where the settings name them, and checks every row of them.

    Raises:
        DataError: a column is missing, holds something else, or has gaps; or there are fewer than two classes.
    """
    train, evaluation = settings.train_split, find_eval_split(splits, settings)
    text_columns = find_text_columns(splits[train], settings.text_columns)
    wanted = (settings.label_column,) if settings.label_column else ()
    (label_column,) = choose_text_columns("label", wanted, _LABEL_COLUMNS, splits[train].column_names)
    for name, split in splits.items():
        check_texts(name, split, text_columns)
    labels_of = {name: _labels(name, splits[name], label_column) for name in (train, evaluation) if name is not None}
    if _is_regression(splits[train].features[label_column], label_column, settings.task):
        for name, labels in labels_of.items():
            _check_numbers(name, label_column, labels)
        return LabelTask(text_columns, label_column, (), train, evaluation)
    for name, labels in labels_of.items():
        hint = " (-1 means a missing label; give classes other names)"
        check_no_gaps(name, label_column, [label == -1 for label in labels], "label", hint)
    values, names = _classes(splits[train].features[label_column], label_column, labels_of[train])
    for name, labels in labels_of.items():
        _check_classes(name, label_column, labels, values)
    return LabelTask(text_columns, label_column, names, train, evaluation, values)


def _labels(split_name: str, split: Any, label_column: str) -> list[Any]:
    """The labels of a split, none of them null, NaN or empty."""
    check_column(split_name, split, label_column, "label")
    labels = values_of(split, label_column)
    gaps = [label is None or label == "" or label != label for label in labels]  # NaN is not itself
    check_no_gaps(split_name, label_column, gaps, "label")
    return labels


def _is_regression(feature: Any, label_column: str, task: str | None) -> bool:
    if not isinstance(feature, datasets.Value | datasets.ClassLabel):
        raise DataError(f"label column {label_column!r} holds {feature}; expected one string, integer or float a row")
    is_number = feature.dtype.startswith(("float", "double", "decimal", "int", "uint"))
    if task == "regression" and (not is_number or isinstance(feature, datasets.ClassLabel)):
        raise DataError(f"regression needs numbers; label column {label_column!r} holds {feature}")
    return task == "regression" or (task is None and feature.dtype.startswith(("float", "double", "decimal")))


def _classes(feature: Any, label_column: str, labels: list[Any]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The values that stand for classes, in the order of the class ids, and their names."""
    if isinstance(feature, datasets.ClassLabel):
        return tuple(range(len(feature.names))), tuple(feature.names)
    values = tuple(sorted(set(labels)))
    if len(values) < 2:
        raise DataError(
            f"label column {label_column!r} holds {values[0]!r} in all {len(labels):,} rows to train on; expected at "
            "least two classes"
        )
    if isinstance(values[0], float) and any(value != int(value) for value in values):
        raise DataError(f"classes are strings or whole numbers; label column {label_column!r} holds {values[0]}")
    return values, tuple(str(int(value) if isinstance(value, float) else value) for value in values)


def _check_classes(split_name: str, label_column: str, labels: list[Any], values: tuple[Any, ...]) -> None:
    known = set(values)
    if unknown := [label for label in labels if label not in known]:
        raise DataError(
            f"label {unknown[0]!r} in column {label_column!r} of split {split_name!r} is none of the classes to train "
            f"on: {', '.join(map(repr, values))}"
        )


def _check_numbers(split_name: str, label_column: str, labels: list[Any]) -> None:
    if not np.isfinite(np.asarray(labels, np.float64)).all():
        raise DataError(f"label column {label_column!r} of split {split_name!r} holds an infinite number")
