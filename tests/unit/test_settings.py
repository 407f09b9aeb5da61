"""The knobs of a fine-tuning: the paper's defaults, and errors for what cannot be."""

import csv

import pytest

from leanvocab.errors import SettingsError
from leanvocab.settings import FineTuneSettings


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


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"max_steps": -1}, "max_steps must be above 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"dropout": 1.0}, "dropout is a ratio below 1, got 1.0"),
        ({"eval_strategy": "often"}, "eval_strategy must be one of no, steps, epoch; got 'often'"),
        ({"task": "ranking"}, "task must be one of classification, regression; got 'ranking'"),
        ({"text_columns": ("a", "b", "c")}, r"one column, or two for pairs; got \['a', 'b', 'c'\]"),
        ({"best": "f1", "save_strategy": "no"}, "best needs a checkpoint at each validation"),
        ({"resume": True, "overwrite": True}, "choose one"),
    ],
)
def test_a_value_that_cannot_be_is_an_error_that_names_it(knobs, message):
    with pytest.raises(SettingsError, match=message):
        FineTuneSettings(**knobs)
