"""A newcomer's jobs with nothing but what the command prints: every line to copy is one that works."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from runs import json_of, run
from texts import CHAT_TEMPLATE, chats, language_tokenizer, rows, save_language_model, save_pretrained, write

from leanvocab.cli.app import app
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

# peft asks transformers by a name that is going; for a person the command hides it (below).
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
QUICK = ("--epochs", "1", "--batch-size", "8", "--learning-rate", "1e-2", "--cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a language model, a CSV of the columns text and label, and chats."""
    monkeypatch.chdir(tmp_path)
    save_pretrained(tmp_path / "MODEL")
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    save_language_model(tmp_path / "LM", "llama", tokenizer, tied=True)
    write(tmp_path / "DATA.csv", rows(48, kind="str"))
    write(tmp_path / "CHATS.jsonl", chats(24))
    return tmp_path


def line_of(shown: str, begins: str) -> str:
    """What follows these words on their line."""
    (line,) = (line.removeprefix(begins).strip() for line in shown.splitlines() if line.startswith(begins))
    return line


def load(line: str) -> Any:
    """What the line that uses a result gives."""
    return eval(line, {"transformers": transformers})


def test_the_help_has_a_line_for_each_job_and_each_is_one_that_runs(here: Path) -> None:
    lines = re.findall(
        r"^ *leanvocab ((?:estimate|finetune|delta|merge|count) .*)$", run("--help").stdout, re.MULTILINE
    )
    assert [line.split()[0] for line in lines] == [
        "estimate",
        "finetune",
        "finetune",
        "delta",
        "merge",
        "count",
        "finetune",
    ]
    for line in lines:
        words = shlex.split(line.replace("MODEL CHATS", "LM CHATS"))
        again = ("--overwrite",) if "v.json" in words and words[0] == "finetune" else ()
        run(*words, *(QUICK if words[0] == "finetune" else ()), *again)
    assert {"out", "adapter", "small", "whole", "v.json"} <= {path.name for path in here.iterdir()}


def test_a_classifier_is_interrupted_goes_on_and_is_used_by_the_lines_that_are_printed(here: Path) -> None:
    program = f"""
import os, sys, transformers
from leanvocab.cli.app import app
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
step = transformers.Trainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 3:
        os.kill(os.getpid(), {int(signal.SIGINT)})
    return step(self, *args, **kwargs)
transformers.Trainer.training_step = training_step
sys.argv = ["leanvocab", *sys.argv[1:]]
app()
"""
    words = ["finetune", "MODEL", "DATA.csv", "--validation-ratio", "0.2", *QUICK, "-o", "out"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    shown = run(*shlex.split(done.stderr.strip().splitlines()[-1])[1:]).stdout
    (answer,) = load(line_of(shown, "to use it: "))("word151 word160")
    assert answer["label"] in ("bad", "good")


@pytest.mark.parametrize(
    ("task", "options", "class_name"),
    [("causal-lm", ("--lora",), "TextGenerationPipeline"), ("causal-lm", (), "TextGenerationPipeline")],
)
def test_a_language_model_is_used_by_the_line_that_is_printed(
    here: Path, task: str, options: tuple[str, ...], class_name: str
) -> None:
    if "--lora" in options:
        pytest.importorskip("peft")
    shown = run("finetune", "LM", "CHATS.jsonl", "--task", task, *QUICK, *options, "-o", "out").stdout
    pipeline = load(line_of(shown, "to use it: "))
    assert type(pipeline).__name__ == class_name
    assert pipeline("word151 word160", max_new_tokens=2, do_sample=False)[0]["generated_text"]


def test_a_delta_is_merged_elsewhere_and_loaded_by_the_lines_that_are_printed(here: Path) -> None:
    run("finetune", "MODEL", "DATA.csv", *QUICK, "-o", "out")
    first = line_of(run("delta", "out", "MODEL", "small").stdout, "to merge: ")
    saved = run("finetune", "MODEL", "DATA.csv", *QUICK, "-o", "saved", "--save", "delta").stdout
    second = line_of(saved, "to make the full model: ")
    for number, line in enumerate((first, second)):
        shown = run(*shlex.split(line.replace("OUTPUT", f"whole{number}"))[1:]).stdout
        assert load(line_of(shown, "to use it: ")).config.id2label == {0: "bad", 1: "good"}
        assert (here / f"whole{number}/model.safetensors").read_bytes() == (here / "out/model.safetensors").read_bytes()


def test_a_model_that_is_a_name_on_the_hub_is_the_base_of_the_merge_that_is_printed(here: Path) -> None:
    """As most models are named: the name lies in the hub's cache, and the printed line merges with that."""
    snapshot = here / "cache/models--someone--small/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    (here / "MODEL").rename(snapshot)
    (here / "cache/models--someone--small/refs").mkdir()
    (here / "cache/models--someone--small/refs/main").write_text("abc")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(here / "cache")}

    def leanvocab(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "leanvocab", *words], capture_output=True, text=True, env=offline)
        assert done.returncode == 0, done.stderr
        return done.stdout

    leanvocab("finetune", "someone/small", "DATA.csv", *QUICK, "-o", "whole")
    line = line_of(leanvocab("delta", "whole", "someone/small", "small"), "to merge: ")
    assert line.startswith("leanvocab merge someone/small ")
    leanvocab(*shlex.split(line.replace("OUTPUT", "merged"))[1:])
    assert (here / "merged/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()


def test_what_a_delta_does_not_carry_is_said_in_one_line_whatever_a_run_left(here: Path) -> None:
    run("finetune", "MODEL", "DATA.csv", *QUICK, "-o", "out")
    (line,) = (line for line in run("delta", "out", "MODEL", "small").stdout.splitlines() if "not carried" in line)
    assert re.search(r"finetune\.json.*, checkpoints/ \(\d+ files\); a merge takes the base's$", line)
    assert "trainer_state" not in line
    assert any("trainer_state" in name for name in json_of("delta", "out", "MODEL", "small", "--overwrite")["left_out"])


@pytest.mark.parametrize(
    "words",
    [
        ("DATA.csv", "--tokenizer", "MODEL"),
        ("DATA.csv", "--tokenizer", "MODEL", "--text-column", "text", "--max-length", "16"),
        (
            "CHATS.jsonl",
            "--tokenizer",
            "LM",
            "--task",
            "causal-lm",
            "--messages-column",
            "messages",
            "--max-length",
            "9",
        ),
    ],
)
def test_counts_become_a_vocabulary_and_a_run_with_it(here: Path, words: tuple[str, ...]) -> None:
    shown = run("count", *words, "--output", "v.json").stdout
    line = line_of(shown, "to train with it: ")
    run(*shlex.split(line.replace("OUTPUT", "out"))[1:], *QUICK)
    assert PartialVocabulary.load(here / "out/partial_vocabulary.json") == PartialVocabulary.load(here / "v.json")


def test_counts_are_of_the_files_of_other_splits_too(here: Path) -> None:
    write(here / "more.csv", [{"text": "word7 word8", "label": "good"}])
    shown = run("count", "DATA.csv", "--tokenizer", "MODEL", "--validation", "more.csv", "-o", "v.json").stdout
    line = line_of(shown, "to train with it: ")
    assert "--validation more.csv" in line
    run(*shlex.split(line.replace("OUTPUT", "out"))[1:], *QUICK)
    assert PartialVocabulary.load(here / "out/partial_vocabulary.json") == PartialVocabulary.load(here / "v.json")
    run("count", "DATA.csv", "--tokenizer", "MODEL", "-o", "fewer.json")
    words = ("finetune", "MODEL", "DATA.csv", "--validation", "more.csv", "--vocabulary", "fewer.json", "-o", "other")
    assert "lacks 2 of" in run(*words, *QUICK, code=1).stderr


def test_counts_of_token_ids_leave_a_vocabulary_for_a_run_whose_model_is_still_to_be_named(here: Path) -> None:
    write(here / "ids.parquet", [{"input_ids": [5, 6, 7]}])
    shown = run("count", "ids.parquet", "--full-size", 305, "-o", "v.json").stdout
    assert line_of(shown, "to train with it: ").startswith("leanvocab finetune MODEL ids.parquet --vocabulary v.json")


# --- what is said on the way ------------------------------------------------------------------------------------------


def test_a_short_run_says_its_loss_before_each_validation_and_each_score_once(here: Path) -> None:
    result = run("finetune", "MODEL", "DATA.csv", "--validation-ratio", "0.2", *QUICK[2:], "--epochs", "2", "-o", "out")
    said = [line for line in result.stderr.splitlines() if line.startswith("step")]
    assert [re.sub(r"[0-9.]+(e-\d+)?", "_", line.partition(",")[0]) for line in said] == [
        "step _ of _: loss _", "step _ of _: validation loss _"
    ] * 2  # fmt: skip
    assert re.search(r"training loss, logged\D+\d\.\d{4} … \d\.\d{4}", result.stdout)
    without = run("finetune", "MODEL", "DATA.csv", *QUICK, "-o", "other").stdout
    assert re.search(r"training loss, logged\D+\d\.\d{4} ", without)
    assert "none (some is held out by --validation-ratio)" in " ".join(without.split())


def test_bf16_needs_no_accelerator_and_no_word_about_it(here: Path) -> None:
    """transformers refuses it on a machine without one unless it is told that there is none."""
    options = [word for word in QUICK if word != "--cpu"]
    assert "to use it" in run("finetune", "MODEL", "DATA.csv", "--bf16", *options, "-o", "out").stdout


def test_a_quiet_run_says_nothing_on_the_way(here: Path) -> None:
    words = ("finetune", "MODEL", "DATA.csv", *QUICK, "--logging-steps", "1", "-o", "out")
    result = run(*words, "--quiet")
    assert result.stderr == ""
    assert "to use it" in result.stdout
    assert json_of(*words, "--overwrite", "--quiet")["losses"]


def test_notes_of_the_summary_name_options(here: Path) -> None:
    numbers = [{"text": row["text"], "label": float(row["label"])} for row in rows(48)]
    write(here / "numbers.csv", numbers)
    shown = run("finetune", "MODEL", "numbers.csv", *QUICK, "-o", "out").stdout
    assert "they are classes (regression: --task)." in shown


def test_a_name_that_is_no_path_is_looked_for_on_the_hub_and_that_is_said(here: Path) -> None:
    """The client's own words for each attempt are not: an error says at the end what came of them."""
    done = subprocess.run(
        [sys.executable, "-m", "leanvocab", "info", "lora"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    first, *others = done.stderr.strip().splitlines()
    assert first == "lora is no file or folder here: asking the hub …"
    assert [line.partition(":")[0] for line in others] == ["error"]


def test_other_packages_warn_nobody_and_leanvocabs_own_warnings_are_one_line(here: Path) -> None:
    """peft and transformers speak of each other's deprecations; of what was trained to another objective leanvocab warns."""
    for options in (("--lora",), ("--output", "restricted"), ("--gradient-checkpointing",)):
        words = ["finetune", "LM", "CHATS.jsonl", "--task", "causal-lm", *QUICK, *options, "-o", "_".join(options)]
        done = subprocess.run(
            [sys.executable, "-W", "always", "-m", "leanvocab", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        others = [line for line in done.stderr.splitlines() if not re.match(r"leanvocab |step |warning: ", line)]
        assert others == []
        assert ("warning: " in done.stderr) == ("restricted" in options)


def test_every_command_is_in_the_front(here: Path) -> None:
    shown = run("--help").stdout
    assert all(f"leanvocab {command.name} " in shown for command in app.registered_commands if command.name != "info")
