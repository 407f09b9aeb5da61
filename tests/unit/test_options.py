"""Options as people type them, and errors in the words of the command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from runs import json_of, run

from leanvocab.cli.app import app
from leanvocab.cli.options import ALIASES, ARGUMENTS, in_options

FLAGS = {
    "text_columns": "--text-column",
    "full_vocabulary": "--full-vocabulary",
    "max_length": "--max-length",
    "output": "--output",
    "overwrite": "--overwrite",
    "resume": "--resume",
    "task": "--task",
    "in_place": "--in-place",
    "data": "--data",
}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Name it with text_columns", "Name it with --text-column"),
        ("their prompts fill max_length (8 tokens)", "their prompts fill --max-length (8 tokens)"),
        ("rows of output='frozen' lie; output is 'full'", "rows of --output frozen lie; output is 'full'"),
        ("set overwrite (or resume) if a run", "set --overwrite (or --resume) if a run"),
        ("replace it give in_place=True (--in-place)", "replace it give --in-place"),
        ("full_vocabulary=True has no meaning", "--full-vocabulary has no meaning"),
        ("a language model (task: causal-lm)", "a language model (--task causal-lm)"),
        ("what they are (task: classification or regression)", "what they are (--task classification or regression)"),
        ("they are classes (regression: task).", "they are classes (regression: --task)."),
        # No word of the message that only looks like a name of an option:
        ("the output directory out is not empty", "the output directory out is not empty"),
        ("no data in /tmp/max_length/data", "no data in /tmp/max_length/data"),
        ("column 'max_length_x' of my.max_length", "column 'max_length_x' of my.max_length"),
        ("task-specific output", "task-specific output"),
        ("column 'max_length' holds", "column 'max_length' holds"),
        ("/tmp/(task: it)", "/tmp/(task: it)"),
    ],
)
def test_errors_name_the_options_of_the_command(message: str, expected: str) -> None:
    assert in_options(message, FLAGS) == expected


def test_the_name_that_begins_an_error_about_a_setting_is_the_options() -> None:
    assert in_options("task must be one of", FLAGS, is_setting=True) == "--task must be one of"
    assert in_options("task must be one of", FLAGS) == "task must be one of"


@pytest.mark.parametrize(
    "words",
    [
        "finetune {base} {data} -o {out} --lr 0.01 --per-device-train-batch-size 4 --num-train-epochs 1 --use_cpu",
        "finetune --model {base} --dataset={data} --output_dir {out} --learning_rate=0.01 --batch-size 4 --epochs 1 --no-cuda",
        "finetune {base} --train_file {data} -o {out} --lr=0.01 --train_batch_size 4 --num_epochs 1 --cpu",
        "finetune --model_name_or_path {base} {data} -o {out} --lr=1e-2 --batch_size=4 --epochs=1 --cpu",
    ],
)
def test_the_names_that_other_trainers_have_are_understood(words: str, base: Path, data: Path, tmp_path: Path) -> None:
    run(*words.format(base=base, data=data, out=tmp_path / "out").split())
    settings = json.loads((tmp_path / "out/checkpoints/run.json").read_text())["settings"]
    assert (settings["learning_rate"], settings["batch_size"]) == (0.01, 4)


def test_every_alias_stands_for_an_option_that_there_is() -> None:
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {name for command in commands.values() for parameter in command.params for name in parameter.opts}
    assert set(ALIASES.values()) <= known
    assert not set(ALIASES) & known
    assert set(ARGUMENTS.values()) <= {p.name for c in commands.values() for p in c.params}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("finetune a b -o c --optimizer sgd", "there is no option --optimizer: finetune trains with AdamW"),
        ("finetune a b -o c --learning-rat 1", "No such option:? '?--learning-rat\\b.*--learning-rate"),
        ("merge a c --delta b", "give BASE DELTA OUTPUT in this order, without names"),
        ("finetune a b", "Missing option '--output-dir'"),
        ("finetune a b -o c --epochs many", "Invalid value for '--epochs'"),
        ("finetune", "Missing argument '(model|MODEL)'"),
    ],
)
def test_usage_errors_say_what_there_is(words: str, message: str) -> None:
    result = run(*words.split(), code=2)
    assert re.search(message, " ".join(result.stderr.replace("│", " ").split())), result.stderr
    assert re.search(message, json_of(*words.split(), code=2)["error"]["message"].replace("\n", " "))


def test_settings_that_contradict_each_other_are_named_as_options(base: Path, data: Path, tmp_path: Path) -> None:
    words = ("finetune", base, data, "-o", tmp_path / "out")
    said = run(*words, "--best", "f1", "--save-strategy", "no", code=2).stderr
    assert said.startswith(
        "error: --best needs a checkpoint at each validation: set --eval-strategy and --save-strategy"
    )
    (tmp_path / "other.csv").write_text("words,kind\na,b\n")
    assert "Name it with --text-column" in run("finetune", base, tmp_path / "other.csv", *words[3:], code=1).stderr
