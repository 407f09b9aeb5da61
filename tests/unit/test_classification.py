"""Columns and labels of labelled text: found, checked, and made what a model takes."""

import datasets
import numpy as np
import pytest
import transformers
from texts import files_in, rows, small_tokenizer

from leanvocab.errors import DataError
from leanvocab.finetune.classification import find_label_task
from leanvocab.finetune.reading import select_samples
from leanvocab.finetune.settings import FineTuneSettings


def splits_of(train, **others):
    tables = {"train": train, **others}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(table) for name, table in tables.items()})


def labelled(*labels):
    return [{"text": f"word{at}", "label": label} for at, label in enumerate(labels)]


def task_of(train, validation=None, **knobs):
    splits = splits_of(train, **({"validation": validation} if validation else {}))
    return find_label_task(splits, FineTuneSettings(**knobs))


@pytest.mark.parametrize(
    "columns",
    [
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("sentence",),
        ("text",),
    ],
)
def test_texts_are_found_by_the_usual_names(columns):
    table = [dict.fromkeys(columns, "word1") | {"idx": at, "label": at} for at in range(2)]
    assert task_of(table).text_columns == columns


def test_columns_may_be_named():
    table = [{"text": "a", "title": "b", "label": 0, "stars": at} for at in range(3)]
    task = task_of(table, text_columns=("title", "text"), label_column="stars")
    assert (task.text_columns, task.label_column, task.num_labels) == (("title", "text"), "stars", 3)


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([0, 1, 1], ("0", "1"), [0, 1, 1]),
        ([5, 1, 3], ("1", "3", "5"), [2, 0, 1]),
        (["good", "bad", "good"], ("bad", "good"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_strings_integers_and_booleans_are_classes(labels, names, ids):
    task = task_of(labelled(*labels))
    assert (task.is_regression, task.label_names) == (False, names)
    assert task.label_ids(labels).tolist() == ids
    assert task.label_ids(labels).dtype == np.int64


def test_floats_are_scores_unless_they_are_said_to_be_classes():
    task = task_of(labelled(0.5, -1.0, 3.0))
    assert (task.is_regression, task.num_labels) == (True, 1)
    assert task.label_ids([0.5, -1.0]).dtype == np.float32
    classes = task_of(labelled(2.0, 1.0, 2.0), task="classification")
    assert (classes.label_names, classes.label_ids([2.0, 1.0]).tolist()) == (("1", "2"), [1, 0])


@pytest.mark.parametrize("absent", [None, float("nan")])
def test_whole_floats_are_classes_and_rows_without_a_label_are_left_out_and_both_is_said(absent):
    """What pandas writes where a label is missing."""
    splits = splits_of(labelled(0.0, 1.0, absent, 1.0), validation=labelled(1.0, 0.0), test=labelled(absent))
    task = find_label_task(splits, FineTuneSettings())
    encoded, notes = task.encode(splits, small_tokenizer(), FineTuneSettings())
    assert (task.label_names, encoded["train"]["labels"][:], encoded["validation"]["labels"][:]) == (
        ("0", "1"),
        [0, 1, 1],
        [1, 0],
    )
    ids = [small_tokenizer()(f"word{at}")["input_ids"] for at in (0, 1, 3)]
    assert (encoded["train"]["input_ids"][:], len(encoded["test"])) == (ids, 1)
    assert notes == (
        "1 of 4 rows of split 'train' were left out: they have no label in column 'label'.",
        "The labels in column 'label' are whole numbers: they are classes (regression: task).",
    )
    assert task.understood == {
        "task": "classification",
        "columns": {"text": ["text"], "label": ["label"]},
        "classes": ["0", "1"],
        "left_out": {"train": 1},
    }
    assert task_of(labelled(0.0, 1.0, absent), task="regression").understood["task"] == "regression"
    assert task_of(labelled(0.0, 1.0), labelled(0.5)).is_regression


@pytest.mark.parametrize(
    "labels", [["a", "b", ""], ["a", None, "b"], [1, None, 0], [0.25, None, 1.0], [True, None, False]]
)
def test_rows_without_a_label_are_left_out_of_every_kind(labels):
    splits = splits_of(labelled(*labels))
    encoded, notes = find_label_task(splits, FineTuneSettings()).encode(splits, small_tokenizer(), FineTuneSettings())
    assert len(encoded["train"]) == 2
    assert "1 of 3 rows of split 'train' were left out" in notes[0]


def test_a_class_for_each_row_is_a_matter_of_the_task_where_it_is_said():
    assert task_of(labelled(*range(11)), task="classification").num_labels == 11
    assert task_of(labelled(*range(11)), task="regression").is_regression


@pytest.mark.parametrize("names", [("Text", "Label"), ("TEXT", "LABELS"), ("Sentence", "label")])
def test_columns_are_found_in_any_letter_case(names):
    text, label = names
    task = task_of([{text: "a", label: 0}, {text: "b", label: 1}])
    assert (task.text_columns, task.label_column) == ((text,), label)


@pytest.mark.parametrize(
    "names", [("messages",), ("conversations",), ("Prompt", "Completion"), ("instruction", "output")]
)
def test_what_is_for_language_models_is_said_to_be(names):
    with pytest.raises(
        DataError, match=r"found no text column: .*; or learn .* with a language model \(task: causal-lm\)"
    ):
        task_of([dict.fromkeys(names, "a")])


def test_integers_are_scores_where_it_is_said():
    assert task_of(labelled(-1, 4, 2), task="regression").is_regression


def test_class_names_of_the_data_set_keep_their_order():
    train = datasets.Dataset.from_list(labelled(1, 0))
    train = train.cast_column("label", datasets.ClassLabel(names=["worse", "better", "unseen"]))
    task = find_label_task({"train": train}, FineTuneSettings())
    assert task.label_names == ("worse", "better", "unseen")
    assert task.label_ids([1, 0]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("train", "knobs", "message"),
    [
        (
            [{"words": "a", "label": 0}],
            {},
            "found no text column: looked for sentence1 . sentence2, .*are words, label",
        ),
        (
            [{"text": "a", "stars": 0}],
            {},
            "found no label column: looked for label, labels; the columns are text, stars",
        ),
        (labelled(0, 1), {"text_columns": ("body",)}, "there is no text column 'body'; the columns are text, label"),
        (labelled(0, 1), {"label_column": "y"}, "there is no label column 'y'"),
        ([{"text": 1, "label": 0}], {}, "text column 'text' of split 'train' holds int64; expected strings"),
        ([{"text": "a", "label": 0}, {"text": None, "label": 1}], {}, "1 of 2 rows of split 'train' have no text"),
        (labelled(-1, -1), {}, "2 of 2 rows of split 'train' have no label in column 'label', the first is row 0"),
        (labelled(-1.0, None), {}, "1 of 1 rows of split 'train' have no label in column 'label'"),
        (labelled(0, -1, -1), {}, "2 of 3 rows of split 'train' have no label in column 'label', the first is row 1"),
        (labelled(None, None), {}, "2 of 2 rows of split 'train' have no label"),
        (labelled("", ""), {}, "2 of 2 rows of split 'train' have no label"),
        (labelled(float("nan")), {}, "1 of 1 rows of split 'train' have no label"),
        (labelled(*range(11)), {}, "holds another label in each of the 11 rows to train on .*label_column.*task"),
        (labelled(*map(str, range(11))), {}, "holds another label in each of the 11 rows to train on"),
        (labelled(*map(float, range(11))), {}, "holds another label in each of the 11 rows to train on"),
        (labelled(0.5, float("inf")), {}, "holds an infinite number"),
        (labelled(1, 1), {}, "holds 1 in all 2 rows to train on; expected at least two classes"),
        (labelled(0.5, 1.0), {"task": "classification"}, "classes are strings or whole numbers; .* holds 0.5"),
        (labelled("a", "b"), {"task": "regression"}, "regression needs numbers"),
        (labelled([0], [1]), {}, "expected one string, integer or float a row"),
        (labelled(0, 1), {"train_split": "training"}, "no split 'training' to train on .* the data set has train"),
        (labelled(0, 1), {"eval_split": "dev"}, "no split 'dev' to validate on .* the data set has train"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_says_where(train, knobs, message):
    settings = FineTuneSettings(**knobs)
    with pytest.raises(DataError, match=message):
        find_label_task(select_samples(splits_of(train), settings, settings.seed), settings)


def test_validation_is_checked_as_training_is():
    with pytest.raises(DataError, match="label 2 in column 'label' of split 'validation' is none of the classes"):
        task_of(labelled(0, 1), labelled(0, 2))
    with pytest.raises(DataError, match="1 of 2 rows of split 'validation' have no label"):
        task_of(labelled(0, 1), labelled(0, -1))
    with pytest.raises(DataError, match="split 'validation' has no text column 'text'; its columns are label"):
        task_of(labelled(0, 1), [{"label": 0}])


# --- the checkpoint's head --------------------------------------------------------------------------------------------


def checkpoint(*names, kind="BertForSequenceClassification", **fields):
    """A config with names of classes, in the order of their ids."""
    named = {"id2label": dict(enumerate(names))} if names else {}
    return transformers.BertConfig(architectures=[kind], **named | fields)


def classes_of(config, labels, declared=None, validation=None, declared_there=None):
    """The task of a data set with these labels, for a checkpoint, and the encoded labels of both splits."""
    splits = splits_of(labelled(*labels), **({"validation": labelled(*validation)} if validation else {}))
    for name, names in (("train", declared), ("validation", declared_there)):
        if names:
            splits[name] = splits[name].cast_column("label", datasets.ClassLabel(names=list(names)))
    task = find_label_task(splits, FineTuneSettings(), config)
    encoded, notes = task.encode(splits, small_tokenizer(), FineTuneSettings())
    return task, [encoded[name]["labels"][:] for name in splits], notes


NLI = ("contradiction", "neutral", "entailment")


@pytest.mark.parametrize(
    ("names", "labels", "declared", "ids"),
    [
        (("pos", "neg"), ["neg", "pos"], None, [1, 0]),
        (NLI, ["entailment", "neutral", "contradiction"], None, [2, 1, 0]),
        (NLI, [0, 1, 2], ("entailment", "neutral", "contradiction"), [2, 1, 0]),
        (("1", "0"), [0, 1], None, [1, 0]),
        (("True", "False"), [True, False], None, [0, 1]),
        (tuple(map(str, range(12))), list(map(str, range(12))), None, list(range(12))),
    ],
)
def test_classes_of_the_checkpoints_names_keep_its_order(names, labels, declared, ids):
    config = checkpoint(*names)
    task, (encoded,), notes = classes_of(config, labels, declared)
    assert (task.label_names, encoded, notes, task.replaces_head) == (names, ids, (), False)
    task.set_labels(config)
    assert (config.id2label, config.num_labels) == (dict(enumerate(names)), len(names))
    assert config.label2id == {name: number for number, name in enumerate(names)}


def test_some_of_the_checkpoints_classes_leave_its_head_whole():
    task, (encoded,), notes = classes_of(checkpoint(*NLI), ["entailment", "neutral"])
    assert (task.label_names, encoded, task.replaces_head) == (NLI, [2, 1], False)
    assert notes == ("The checkpoint's classes stay as they are. 'entailment', 'neutral' are some of them.",)


def test_classes_that_are_spelled_otherwise_are_the_checkpoints_and_that_is_said():
    task, (encoded,), notes = classes_of(checkpoint("POSITIVE", "NEGATIVE"), ["negative", "Positive"])
    assert (task.label_names, encoded, task.replaces_head) == (("POSITIVE", "NEGATIVE"), [1, 0], False)
    assert notes == (
        "The checkpoint's classes 'POSITIVE', 'NEGATIVE' keep their names and order, which the data spell otherwise.",
    )
    apart, (encoded,), _ = classes_of(checkpoint("A", "a"), ["a", "A"])
    assert (apart.label_names, encoded) == (("A", "a"), [1, 0])


@pytest.mark.parametrize(
    ("labels", "declared"), [([1, 0], None), (["1", "0"], None), ([1, 0], ("0", "1")), ([1, 1], ("0", "1"))]
)
def test_numbers_without_names_are_ids_of_the_checkpoints_classes_and_that_is_said(labels, declared):
    task, (encoded,), notes = classes_of(checkpoint("pos", "neg"), labels, declared)
    assert (task.label_names, encoded, task.replaces_head) == (("pos", "neg"), [int(label) for label in labels], False)
    assert notes == (
        "The checkpoint's classes 'pos', 'neg' keep their names and order: the data's labels are taken for their ids.",
    )


STARS = ("1 star", *(f"{number} stars" for number in range(2, 6)))


@pytest.mark.parametrize(
    ("names", "labels", "ids", "way"),
    [
        (STARS, [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], "are the numbers in these names"),
        (STARS, ["4", "1"], [3, 0], "are the numbers in these names"),  # no fifth star: not ids from 0
        (STARS, [0, 4], [0, 4], "are taken for their ids"),
        (("grade 2", "grade 1"), [1, 2], [1, 0], "are the numbers in these names"),
        (("2 of 5", "1 of 5"), [0, 1], [0, 1], "are taken for their ids"),
    ],
)
def test_numbers_that_stand_in_the_names_of_classes_are_these_classes(names, labels, ids, way):
    task, (encoded,), (note,) = classes_of(checkpoint(*names), labels)
    assert (task.label_names, encoded, task.replaces_head) == (names, ids, False)
    assert way in note


class CountedName(str):
    comparisons = 0

    def __eq__(self, other):
        CountedName.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__

    def __str__(self):
        return self

    def casefold(self):
        return CountedName(str.casefold(self))


@pytest.mark.parametrize("spell", [str, str.upper])
def test_a_head_of_many_classes_is_not_searched_for_each(spell):
    names = tuple(CountedName(f"class {number}") for number in range(400))
    config = checkpoint(*names)
    config.id2label = dict(enumerate(names))
    before = CountedName.comparisons
    task, (encoded,), _ = classes_of(config, [spell(name) for name in names])
    assert (encoded, task.label_names) == (list(range(400)), names)
    assert CountedName.comparisons - before < 50 * len(names)


@pytest.mark.parametrize(
    ("names", "labels", "replaces", "note"),
    [
        (
            ("pos", "neg"),
            ["ham", "spam"],
            True,
            "The checkpoint's head is for 'pos', 'neg', and not for 'ham', 'spam'; it starts",
        ),
        (("pos", "neg"), [1, 2], True, "is for 'pos', 'neg', and not for '1', '2'; it starts anew."),
        (
            NLI,
            ["neutral", "other"],
            False,
            "for 'contradiction', 'neutral', 'entailment', and not for 'neutral', 'other'",
        ),
        ((), ["a", "b", "c"], False, "head is for 2 classes without names, and not for 'a', 'b', 'c'; it starts anew."),
        (("LABEL_0",), [0, 1], False, "The checkpoint's head is for one number, and not for '0', '1'; it starts anew."),
    ],
)
def test_a_head_for_other_classes_starts_anew_and_that_is_said(names, labels, replaces, note):
    task, (encoded,), (said,) = classes_of(checkpoint(*names), labels)
    assert task.label_names == tuple(map(str, labels))
    assert (encoded, task.replaces_head) == (list(range(len(labels))), replaces)
    assert note in said


@pytest.mark.parametrize("names", [("O", "B-PER"), ()])
def test_a_head_of_another_kind_starts_anew_and_that_is_said(names):
    task, _, notes = classes_of(checkpoint(*names, kind="BertForTokenClassification"), [0, 1])
    assert task.replaces_head
    assert notes == ("The checkpoint's head is for another task (BertForTokenClassification); it starts anew.",)


def test_a_head_without_names_stays_and_which_class_is_which_is_said():
    task, (encoded,), notes = classes_of(checkpoint(), ["good", "bad"])
    assert (task.label_names, encoded, task.replaces_head) == (("bad", "good"), [1, 0], False)
    assert notes == (
        "The checkpoint's head has no names of its classes: it stays, with 'bad' its class 0, 'good' its class 1.",
    )
    assert classes_of(checkpoint(), [0, 1])[0].label_names == ("0", "1")
    unnamed, (encoded,), notes = classes_of(checkpoint(num_labels=11), [f"LABEL_{number}" for number in range(11)])
    assert (unnamed.label_names[10], encoded, notes) == ("LABEL_10", list(range(11)), ())


def test_a_checkpoint_without_a_head_takes_the_classes_as_they_are():
    for config in (checkpoint(kind="BertModel"), checkpoint("x", "y", kind="BertForMaskedLM"), None):
        task, (encoded,), notes = classes_of(config, ["pos", "neg"])
        assert (task.label_names, encoded, notes, task.replaces_head) == (("neg", "pos"), [1, 0], (), False)


@pytest.mark.parametrize(
    ("config", "replaces", "note"),
    [
        (checkpoint("LABEL_0", problem_type="regression"), False, ()),
        (checkpoint(kind="BertModel"), False, ()),
        (checkpoint(*NLI), False, ("The checkpoint's head is for 'contradiction', 'neutral', 'entailment'; it starts anew, for "
                                   "one number.",)),
        (checkpoint("LABEL_0", kind="BertForMultipleChoice"), True,
         ("The checkpoint's head is for another task (BertForMultipleChoice); it starts anew, for one number.",)),
    ],
)  # fmt: skip
def test_a_head_for_numbers_stays_where_numbers_are_learned(config, replaces, note):
    task, (encoded,), notes = classes_of(config, [0.5, 1.5])
    assert (encoded, task.replaces_head, notes) == ([0.5, 1.5], replaces, note)


@pytest.mark.parametrize("config", [None, checkpoint("b", "a", "c")])
def test_each_split_may_number_its_classes_otherwise(config):
    task, (train, validation), _ = classes_of(config, [0, 1], ("a", "b"), [0, 1], ("b", "a"))
    ids = {name: number for number, name in enumerate(task.label_names)}
    assert (train, validation) == ([ids["a"], ids["b"]], [ids["b"], ids["a"]])
    task, (train, validation), _ = classes_of(config, ["a", "b"], None, [0, 1], ("b", "a"))
    ids = {name: number for number, name in enumerate(task.label_names)}
    assert (train, validation) == ([ids["a"], ids["b"]], [ids["b"], ids["a"]])


def test_validation_may_hold_a_class_of_the_checkpoints_that_training_does_not():
    _, (_, validation), _ = classes_of(checkpoint(*NLI), ["entailment", "neutral"], None, ["contradiction"])
    assert validation == [0]
    with pytest.raises(
        DataError, match=r"label 'other' .* of split 'validation' is none of the classes to train on: 'ent"
    ):
        classes_of(checkpoint(*NLI), ["entailment", "neutral"], None, ["other"])
    with pytest.raises(DataError, match="label 'b' in column 'label' of split 'validation' is none of the classes"):
        classes_of(None, ["0", "1"], None, [1, 0], ("a", "b"))


def test_a_test_split_needs_no_labels_and_is_tokenized_too():
    splits = splits_of(labelled(0, 1), test=labelled(-1, -1))
    task = find_label_task(splits, FineTuneSettings())
    encoded = task.encode(splits, small_tokenizer(), FineTuneSettings())[0]
    assert set(encoded["train"].column_names) - set(encoded["test"].column_names) == {"labels"}
    assert len(encoded["test"]["input_ids"][:]) == 2
    assert encoded["train"]["labels"][:] == [0, 1]


def test_encoding_is_what_the_tokenizer_gives_one_by_one():
    table, tokenizer = rows(9, pairs=True), small_tokenizer()
    splits = splits_of(table)
    settings = FineTuneSettings(max_length=8)
    encoded = find_label_task(splits, settings).encode(splits, tokenizer, settings)[0]["train"]
    for row, ids in zip(table, encoded["input_ids"], strict=True):
        assert ids == tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=8)["input_ids"]


def test_the_callers_data_set_is_left_as_it_was(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows(12))).save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved").with_format("numpy", columns=["label"])
    before, settings = files_in(tmp_path), FineTuneSettings(validation_ratio=0.25, max_train_samples=5)
    splits = select_samples(loaded, settings, settings.seed)
    find_label_task(splits, settings).encode(splits, small_tokenizer(), settings)
    assert files_in(tmp_path) == before
    assert (list(loaded), len(loaded["train"]), loaded["train"].format["type"]) == (["train"], 12, "numpy")


def test_samples_are_drawn_by_the_seed():
    splits = splits_of(rows(40), validation=rows(20, seed=1))
    settings = FineTuneSettings(max_train_samples=10, max_eval_samples=5)
    drawn = [select_samples(splits, settings, settings.seed) for _ in range(2)]
    assert {name: len(split) for name, split in drawn[0].items()} == {"train": 10, "validation": 5}
    assert drawn[0]["train"].to_list() == drawn[1]["train"].to_list()
    other = select_samples(splits, FineTuneSettings(max_train_samples=10), seed=7)
    assert other["train"].to_list() != drawn[0]["train"].to_list()


def test_validation_is_held_out_only_where_there_is_none():
    settings = FineTuneSettings(validation_ratio=0.25)
    assert {name: len(split) for name, split in select_samples(splits_of(rows(40)), settings, 42).items()} == {
        "train": 30,
        "validation": 10,
    }
    kept = select_samples(splits_of(rows(40), validation=rows(4)), settings, 42)
    assert {name: len(split) for name, split in kept.items()} == {"train": 40, "validation": 4}
