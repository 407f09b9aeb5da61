"""Classification and regression: which columns are texts, which is the label, and what the labels mean."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding

from leanvocab.errors import DataError
from leanvocab.extras import require
from leanvocab.finetune.scores import classification_scores, logits_of, regression_scores
from leanvocab.finetune.settings import CLASSIFICATION, REGRESSION, DataSettings
from leanvocab.finetune.tasks import Task, find_eval_split
from leanvocab.texts.text_columns import (
    check_column,
    check_no_gaps,
    check_texts,
    choose_text_columns,
    find_text_columns,
    tokenize,
    values_of,
)

datasets = require("datasets", extra="finetune")

_LABEL_COLUMNS = (("label",), ("labels",))
_FEW_ROWS = 10  # so few may well have a class each


@dataclass(frozen=True)
class LabelTask(Task):
    """Columns, splits and labels of one fine-tuning. `label_names` in the order of class ids; empty for regression."""

    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    train_split: str
    eval_split: str | None
    left_out: Mapping[str, int] = field(default_factory=dict)  # rows without a label, by split
    _ids: Mapping[str, int] = field(default_factory=dict)  # class ids by the names that the data have
    _declared: tuple[str, ...] = ()  # names of the training split's own class ids
    _replaces_head: bool = False
    _notes: tuple[str, ...] = ()

    has_new_head = True

    @property
    def replaces_head(self) -> bool:
        return self._replaces_head

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def understood(self) -> dict[str, Any]:
        columns = {"text": list(self.text_columns), "label": [self.label_column]}
        task = REGRESSION if self.is_regression else CLASSIFICATION
        return {"task": task, "columns": columns, "classes": list(self.label_names), "left_out": dict(self.left_out)}

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    def label_ids(self, values: Iterable[Any], declared: tuple[str, ...] | None = None) -> np.ndarray[Any, Any]:
        """Labels as the model takes them: int64 class ids, or float32 scores for regression.

        `declared` are the names of the values, where these are class ids; None: those of the training split.
        """
        if self.is_regression:
            return np.asarray(list(values), np.float32)
        names = self._declared if declared is None else declared
        return np.asarray([self._ids[_name(value, names)] for value in values], np.int64)

    def set_labels(self, config: Any) -> None:
        config.num_labels = self.num_labels
        if self.is_regression:
            config.problem_type = "regression"
        else:
            config.problem_type = "single_label_classification"
            config.id2label = dict(enumerate(self.label_names))
            config.label2id = {label: position for position, label in enumerate(self.label_names)}

    def encode(self, splits: Any, tokenizer: Any, settings: DataSettings) -> tuple[Any, tuple[str, ...]]:
        """Token ids of every split, and `labels` of those to train and to validate on."""
        encoded = datasets.DatasetDict()
        for name, split in splits.items():
            if name in self.left_out:
                has_label = np.flatnonzero(~np.asarray(_gaps(values_of(split, self.label_column))))
                split = split.select(has_label, keep_in_memory=True)
            encoded[name] = tokenize(split, name, self.text_columns, tokenizer, settings.max_length)
            if name in (self.train_split, self.eval_split):
                declared = _declared(split.features[self.label_column])
                labels = self.label_ids(values_of(split, self.label_column), declared)
                encoded[name] = encoded[name].add_column("labels", labels)
        return encoded, self._notes

    def batches(self, encoded: Any, network: Any, tokenizer: Any, *others: Any) -> tuple[Any, tuple[Any, ...]]:
        return DataCollatorWithPadding(tokenizer), ()

    def scoring(self) -> dict[str, Any]:
        scores = regression_scores if self.is_regression else classification_scores
        return {
            "compute_metrics": lambda evaluated: scores(evaluated.predictions, evaluated.label_ids),
            "preprocess_logits_for_metrics": lambda given, labels: logits_of(given),
        }


def find_label_task(splits: Any, settings: DataSettings, config: Any = None) -> LabelTask:
    """Finds texts and labels, by name where the settings name them, and checks every row of them.

    `config` is the checkpoint's: where its classes are those of the data, their order stays, and so does its head.

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
    gaps = {name: len(splits[name]) - len(labels) for name, labels in labels_of.items()}
    left_out = {name: number for name, number in gaps.items() if number}
    head, notes = Head.of(config), _notes_of(left_out, splits, label_column)
    task = LabelTask(text_columns, label_column, (), train, evaluation, left_out)
    features = {name: splits[name].features[label_column] for name in labels_of}
    if _is_regression(features[train], label_column, settings.task, labels_of):
        for name, labels in labels_of.items():
            if not np.isfinite(np.asarray(labels, np.float64)).all():
                raise DataError(f"label column {label_column!r} of split {name!r} holds an infinite number")
        fate = head.for_numbers()
    else:
        if settings.task is None and _is_float(features[train]):
            notes += (f"The labels in column {label_column!r} are whole numbers: they are classes (regression: task).",)
        used = _used_names(labels_of, features, label_column)
        classes = _classes(features[train], label_column, labels_of[train])
        fate = _fate_of(classes, head, used, label_column)
        if settings.task is None and not _declared(features[train]) and not fate.is_known:
            _check_classes_recur(classes, label_column, len(labels_of[train]))
        task = replace(task, label_names=fate.names, _ids=fate.ids, _declared=_declared(features[train]))
    return replace(task, _replaces_head=fate.is_replaced, _notes=(*notes, *fate.notes))


def _fate_of(classes: tuple[str, ...], head: "Head", used: dict[str, dict[str, Any]], label_column: str) -> "Fate":
    """The fate of the head; raises DataError where a split holds a class that is not among those to train on."""
    fate = head.for_classes(classes, set().union(*used.values()))
    for name, shown in used.items():
        if unknown := [label for class_name, label in shown.items() if class_name not in fate.ids]:
            raise DataError(
                f"label {unknown[0]!r} in column {label_column!r} of split {name!r} is none of the classes to train "
                f"on: {', '.join(map(repr, classes))}"
            )
    return fate


def _labels(split_name: str, split: Any, label_column: str) -> list[Any]:
    """The labels of a split that are not null, NaN or empty; raises DataError where there are none."""
    check_column(split_name, split, label_column, "label")
    values = values_of(split, label_column)
    gaps = _gaps(values)
    labels = [value for value, is_gap in zip(values, gaps, strict=True) if not is_gap]
    if not labels:
        check_no_gaps(split_name, label_column, gaps, "label")
    return labels


def _gaps(labels: list[Any]) -> list[bool]:
    return [label is None or label == "" or label != label for label in labels]  # NaN is not itself


def _notes_of(left_out: Mapping[str, int], splits: Any, label_column: str) -> tuple[str, ...]:
    return tuple(
        f"{number:,} of {len(splits[name]):,} rows of split {name!r} were left out: they have no label in column "
        f"{label_column!r}."
        for name, number in left_out.items()
    )


def _is_float(feature: Any) -> bool:
    return str(feature.dtype).startswith(("float", "double", "decimal"))


def _check_classes_recur(classes: tuple[str, ...], label_column: str, num_rows: int) -> None:
    """Raises DataError where no class has two rows: then it is an identifier, a text or a number that was taken for a label."""
    if len(classes) == num_rows > _FEW_ROWS:
        shown = ", ".join(map(repr, classes[:3]))
        raise DataError(
            f"label column {label_column!r} holds another label in each of the {num_rows:,} rows to train on ({shown}, …): "
            "name the column of the labels (label_column), or say what they are (task: classification or regression)"
        )


def _is_regression(feature: Any, label_column: str, task: str | None, labels_of: dict[str, list[Any]]) -> bool:
    if not isinstance(feature, datasets.Value | datasets.ClassLabel):
        raise DataError(f"label column {label_column!r} holds {feature}; expected one string, integer or float a row")
    is_number = feature.dtype.startswith(("float", "double", "decimal", "int", "uint"))
    if task == "regression" and (not is_number or isinstance(feature, datasets.ClassLabel)):
        raise DataError(f"regression needs numbers; label column {label_column!r} holds {feature}")
    if task is not None or not _is_float(feature):
        return task == REGRESSION
    return any(label != label // 1 for labels in labels_of.values() for label in labels)


def _used_names(
    labels_of: dict[str, list[Any]], features: dict[str, Any], label_column: str
) -> dict[str, dict[str, Any]]:
    """The names of the classes that each split holds, and how a message shows them."""
    used = {}
    for name, labels in labels_of.items():
        hint = " (-1 means a missing label; give classes other names)"
        check_no_gaps(name, label_column, [label == -1 for label in labels], "label", hint)
        declared = _declared(features[name])
        named = {_name(value, declared): value for value in dict.fromkeys(labels)}
        used[name] = {each: each for each in named} if declared else named
    return used


def _classes(feature: Any, label_column: str, labels: list[Any]) -> tuple[str, ...]:
    """The names of the classes to train on, in the order that the data give them."""
    if names := _declared(feature):
        return names
    values = tuple(sorted(set(labels)))
    if len(values) < 2:
        raise DataError(
            f"label column {label_column!r} holds {values[0]!r} in all {len(labels):,} rows to train on; expected at "
            "least two classes"
        )
    if isinstance(values[0], float) and any(value != int(value) for value in values):
        raise DataError(f"classes are strings or whole numbers; label column {label_column!r} holds {values[0]}")
    return tuple(_name(value) for value in values)


def _declared(feature: Any) -> tuple[str, ...]:
    """The names of classes that a data set declares; none where values are names themselves."""
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _name(value: Any, declared: tuple[str, ...] = ()) -> str:
    return (
        declared[value] if declared else str(int(value) if isinstance(value, float) and value == int(value) else value)
    )


# --- the checkpoint's head --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fate:
    """Classes in the order of their ids, the ids by the names that the data have, and what becomes of a checkpoint's head."""

    names: tuple[str, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    is_replaced: bool = False
    notes: tuple[str, ...] = ()
    is_known: bool = False  # the classes are the checkpoint's own


@dataclass(frozen=True)
class Head:
    """The head of a checkpoint, as its config tells of it.

    `names` are those of its classes by id, none where they are transformers' own (LABEL_0, …); `kind` is the class of model
    that it was trained in, None where the checkpoint has no head of classes.
    """

    names: tuple[str, ...] = ()
    size: int = 0
    kind: str | None = None

    @classmethod
    def of(cls, config: Any) -> "Head":
        """The head that a config speaks of, if any."""
        id2label = getattr(config, "id2label", None) or {}
        size = len(id2label)
        names = tuple(str(id2label.get(number)) for number in range(size))
        is_named = set(id2label) == set(range(size)) and len(set(names)) == size and names != _unnamed(size)
        heads = (name for name in getattr(config, "architectures", None) or () if name.endswith(_KINDS))
        return cls(names if is_named else (), size, next(heads, None))

    def for_numbers(self) -> Fate:
        """The fate of the head where numbers are learned."""
        if self.kind is None or (self._is_of_sequences and self.size == 1):
            return Fate()
        return Fate(is_replaced=self.size == 1, notes=(f"{self._described()}; it starts anew, for one number.",))

    def for_classes(self, classes: tuple[str, ...], used: set[str]) -> Fate:
        """The fate of the head where `classes` are learned, in this order but for the head's; `used` occur in the data."""
        own = dict(zip(classes, range(len(classes)), strict=True))
        if self.kind is not None and not self._is_of_sequences:
            return Fate(classes, own, self.size == len(classes), (f"{self._described()}; it starts anew.",))
        names, ids, way = self._matched({*classes, *used})
        if ids:
            rest = f" {_listed(classes)} are some of them." if len({ids[name] for name in classes}) < len(names) else ""
            said = (f"{way}{rest}",) if self.kind and (rest or way != _SAME) else ()
            return Fate(names, ids, is_known=True, notes=said)
        if self.kind is None:
            return Fate(classes, own)
        if self.names or self.size != len(classes):
            notes = (f"{self._described()}, and not for {_listed(classes)}; it starts anew.",)
            return Fate(classes, own, self.size == len(classes), notes)
        shown = ", ".join(f"{name!r} its class {number}" for number, name in enumerate(classes[:_MOST_SHOWN]))
        return Fate(
            classes, own, notes=(f"The checkpoint's head has no names of its classes: it stays, with {shown}.",)
        )

    @property
    def _is_of_sequences(self) -> bool:
        return self.kind is not None and self.kind.endswith(_OF_SEQUENCES)

    def _matched(self, wanted: set[str]) -> tuple[tuple[str, ...], dict[str, int], str]:
        """The head's names, ids of the data's names among them, and how these were found; no ids where they are others."""
        if not self.names and self.kind is None:
            return (), {}, ""
        names = self.names or _unnamed(self.size)
        numbers = tuple(map(str, range(self.size)))
        spelled = tuple(name.casefold() for name in names)
        shown = f"The checkpoint's classes {_listed(names)} keep their names and order"
        if wanted <= set(names):
            return names, _positions(names), _SAME
        if len(set(spelled)) == self.size and {name.casefold() for name in wanted} <= set(spelled):
            by_spelling = _positions(spelled)
            ids = {name: by_spelling[name.casefold()] for name in wanted}
            return names, ids, f"{shown}, which the data spell otherwise."
        by_number = _positions(_numbers_in(names)) if self.names else {}  # "1 star", "2 stars"
        if wanted <= set(by_number):
            return names, by_number, f"{shown}: the data's labels are the numbers in these names."
        if wanted <= set(numbers):  # class ids
            way = f"{shown}: the data's labels are taken for their ids." if self.names else _SAME
            return self.names or numbers, {name: int(name) for name in numbers}, way
        return (), {}, ""

    def _described(self) -> str:
        if not self._is_of_sequences:
            return f"The checkpoint's head is for another task ({self.kind})"
        if self.size == 1:
            return "The checkpoint's head is for one number"
        return f"The checkpoint's head is for {_listed(self.names) if self.names else f'{self.size} classes without names'}"


_OF_SEQUENCES = "ForSequenceClassification"
_KINDS = (
    _OF_SEQUENCES,
    "ForTokenClassification",
    "ForMultipleChoice",
    "ForImageClassification",
    "ForAudioClassification",
)
_SAME = "The checkpoint's classes stay as they are."
_MOST_SHOWN = 8


def _unnamed(size: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(size))


def _positions(names: tuple[str, ...]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


def _numbers_in(names: tuple[str, ...]) -> tuple[str, ...]:
    """The number that stands in each name; none where a name has no one number of its own."""
    numbers = [re.findall(r"\d+", name) for name in names]
    alone = tuple(str(int(found[0])) for found in numbers if len(found) == 1)
    return alone if len(set(alone)) == len(names) else ()


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(map(repr, names[:_MOST_SHOWN])) + more
