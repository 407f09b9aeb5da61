"""The knobs of a fine-tuning: the paper's defaults, and errors for what cannot be."""

import csv
from dataclasses import fields

import pytest

from leanvocab.errors import SettingsError
from leanvocab.finetune.settings import GROUPS, FineTuneSettings


@pytest.mark.shared_data
def test_the_defaults_are_those_of_the_papers_table_8(shared):
    with (shared / "paper/tables/table8_hyperparameters.csv").open() as lines:
        table = {row["hyperparameter"]: row["glue"] for row in csv.DictReader(lines)}
    settings = FineTuneSettings()
    assert settings.adam_epsilon == float(table["adam_epsilon"])
    assert settings.adam_beta1 == float(table["adam_beta1"])
    assert settings.adam_beta2 == float(table["adam_beta2"])
    assert settings.batch_size == int(table["batch_size"])
    assert settings.dropout == float(table["dropout_attention"]) == float(table["dropout_hidden"])
    assert settings.scheduler == table["learning_rate_schedule"]
    assert settings.max_length == int(table["sequence_length"])
    assert settings.epochs == int(table["training_epochs"])
    assert table["learning_rate_peak"] == "2e-5 (7.5e-6 for XLM models)"


def test_the_peak_learning_rate_depends_on_the_model_family():
    settings = FineTuneSettings()
    assert {settings.learning_rate_for(name) for name in ("bert", "roberta", "deberta-v2", "xlnet")} == {2e-5}
    assert {settings.learning_rate_for(name) for name in ("xlm-roberta", "xlm", "xlm-roberta-xl")} == {7.5e-6}
    assert FineTuneSettings(learning_rate=1e-3).learning_rate_for("xlm-roberta") == 1e-3


def test_language_models_have_defaults_of_their_own():
    causal, seq2seq, masked = (FineTuneSettings(task=task) for task in ("causal-lm", "seq2seq-lm", "masked-lm"))
    assert [(each.max_length, each.batch_size, each.dropout) for each in (causal, seq2seq, masked)] == [
        (512, 8, -1.0)
    ] * 3
    assert [each.learning_rate_for("llama") for each in (causal, seq2seq, masked)] == [2e-5, 5e-5, 5e-5]
    assert [seq2seq.learning_rate_for(name) for name in ("t5", "mt5", "bart", "mbart")] == [1e-4, 1e-4, 5e-5, 5e-5]
    assert masked.learning_rate_for("xlm-roberta") == 5e-5
    named = FineTuneSettings(task="causal-lm", max_length=64, batch_size=2, dropout=0.0)
    assert (named.max_length, named.batch_size, named.dropout) == (64, 2, 0.0)
    assert [each.is_language_model for each in (causal, FineTuneSettings(), FineTuneSettings(task="regression"))] == [
        True, False, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"max_steps": -1}, "max_steps must be above 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"dropout": 1.0}, "dropout is a ratio below 1, got 1.0"),
        ({"eval_strategy": "often"}, "eval_strategy must be one of no, steps, epoch; got 'often'"),
        (
            {"task": "ranking"},
            "task must be one of classification, regression, causal-lm, .*, masked-lm; got 'ranking'",
        ),
        ({"text_columns": ("a", "b", "c")}, r"one column, or two for pairs; got \['a', 'b', 'c'\]"),
        ({"best": "f1", "save_strategy": "no"}, "best needs a checkpoint at each validation"),
        ({"resume": True, "overwrite": True}, "choose one"),
        ({"output": "frozen"}, "output is for causal-lm and seq2seq-lm and masked-lm; the task is classification"),
        ({"output": "frozen", "task": "regression"}, "output is for .*; the task is regression"),
        ({"frozen_rows": "host"}, "frozen_rows is for causal-lm .*; the task is classification"),
        (
            {"prompt_column": "a", "completion_column": "b"},
            "prompt_column is for causal-lm and seq2seq-lm; the task is cl",
        ),
        ({"packing": True, "task": "masked-lm"}, "packing is for causal-lm; the task is masked-lm"),
        ({"train_on_prompts": True, "task": "seq2seq-lm"}, "train_on_prompts is for causal-lm; the task is seq2seq-lm"),
        ({"masked_ratio": 0.3, "task": "causal-lm"}, "masked_ratio is for masked-lm; the task is causal-lm"),
        ({"max_target_length": 5}, "max_target_length is for seq2seq-lm; the task is classification"),
        (
            {"label_column": "y", "task": "causal-lm"},
            "label_column is for classification and regression; the task is cau",
        ),
        ({"text_columns": ("a",), "task": "seq2seq-lm"}, "text_columns is for .*; the task is seq2seq-lm"),
        ({"messages_column": "m", "task": "seq2seq-lm"}, "messages_column is for causal-lm; the task is seq2seq-lm"),
        (
            {"text_columns": ("a", "b"), "task": "causal-lm"},
            r"reads one text column, got \['a', 'b'\]; texts in two parts are",
        ),
        ({"prompt_column": "a", "task": "causal-lm"}, "prompt_column was given without completion_column; name both"),
        (
            {"completion_column": "a", "task": "seq2seq-lm"},
            "completion_column was given without prompt_column; name both",
        ),
        (
            {"text_columns": ("a",), "messages_column": "m", "task": "causal-lm"},
            "text_columns and messages_column were given",
        ),
        ({"masked_ratio": 1.0, "task": "masked-lm"}, "masked_ratio is a ratio below 1, got 1.0"),
        ({"masked_ratio": 0.0, "task": "masked-lm"}, "masked_ratio must be above 0, got 0.0"),
        ({"output": "tied", "task": "causal-lm"}, "output must be one of full, frozen, restricted; got 'tied'"),
        ({"frozen_rows": "disk", "task": "causal-lm"}, "frozen_rows must be one of device, host; got 'disk'"),
        (
            {"output": "full", "full_vocabulary": True, "task": "causal-lm"},
            "output='full' has no meaning; leave one of them",
        ),
        (
            {"frozen_rows": "host", "full_vocabulary": True, "task": "causal-lm"},
            "frozen_rows='host' has no meaning; leave",
        ),
        (
            {"frozen_rows": "host", "output": "restricted", "task": "causal-lm"},
            "frozen_rows says where the rows of .* lie",
        ),
        ({"filter_eps": "auto"}, "filter_eps is for causal-lm .*; the task is classification"),
        (
            {"filter_eps": "high", "task": "causal-lm"},
            "filter_eps must be auto or a number between 0 and 1; got 'high'",
        ),
        ({"filter_eps": "1.5", "task": "causal-lm"}, "filter_eps must be auto or a number between 0 and 1; got '1.5'"),
        ({"filter_eps": "nan", "task": "causal-lm"}, "filter_eps must be auto or a number between 0 and 1; got 'nan'"),
        (
            {"filter_eps": "auto", "full_vocabulary": True, "task": "causal-lm"},
            "filter_eps='auto' has no meaning; leave",
        ),
        (
            {"filter_eps": "auto", "output": "full", "task": "causal-lm"},
            "filter_eps leaves out rows of output='frozen'; output is 'full'",
        ),
        (
            {"filter_eps": "auto", "frozen_rows": "host", "task": "causal-lm"},
            "filter_eps and frozen_rows='host' exclude each other",
        ),
    ],
)
def test_a_value_that_cannot_be_is_an_error_that_names_it(knobs, message):
    with pytest.raises(SettingsError, match=message):
        FineTuneSettings(**knobs)


@pytest.mark.parametrize(("given", "threshold"), [(None, None), ("auto", "auto"), ("1e-4", 1e-4), (1e-4, 1e-4)])
def test_a_threshold_is_auto_or_a_number(given, threshold):
    assert FineTuneSettings(task="causal-lm", filter_eps=given).filter_threshold == threshold


def test_every_knob_stands_in_one_group_in_the_order_of_the_help():
    grouped = [field.name for group in GROUPS.values() for field in fields(group)]
    assert grouped == [field.name for field in fields(FineTuneSettings)]
    assert len(set(grouped)) == len(grouped)


def test_knobs_that_a_trainer_takes_are_arguments_of_it():
    from transformers import TrainingArguments

    taken = FineTuneSettings(epochs=2, cpu=True).trainer_arguments()
    assert set(taken) <= {field.name for field in fields(TrainingArguments)}
    assert (taken["num_train_epochs"], taken["use_cpu"], taken["weight_decay"]) == (2, True, 0.0)


def test_columns_may_be_given_as_a_list():
    assert FineTuneSettings(text_columns=["a", "b"]) == FineTuneSettings(text_columns=("a", "b"))


@pytest.mark.parametrize(
    "knobs",
    [{"adam_beta1": 1.0}, {"adam_beta2": 1.0}, {"learning_rate": float("nan")}, {"warmup": float("inf")}],
)
def test_numbers_that_no_optimizer_takes_are_refused_at_once(knobs):
    with pytest.raises(SettingsError, match=r"is a ratio below 1|must be a finite number"):
        FineTuneSettings(**knobs)
