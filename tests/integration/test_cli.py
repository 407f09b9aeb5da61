"""The commands: what they print, what they write, how they fail."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
from disk import tiny_folders
from models import FULL_SIZE
from runs import json_of, run, text_of
from texts import SPECIAL, WORDS, files_in, pairs, rows, save_language_model, save_pretrained, write, write_splits
from transformers import AutoModelForSequenceClassification
from typer.main import get_command

from leanvocab import PartialVocabulary, __version__, count_tokens
from leanvocab.cli.app import app
from leanvocab.errors import LeanVocabWarning
from leanvocab.finetune.settings import FineTuneSettings

pytestmark = pytest.mark.usefixtures("loud_libraries_afterwards")

QUICK = ["--epochs", "1", "--batch-size", "8", "--learning-rate", "1e-2", "--cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_pretrained(tmp_path_factory.mktemp("pretrained") / "base"))


@pytest.fixture
def data(tmp_path):
    return str(write_splits(tmp_path / "data"))


# --- the front -------------------------------------------------------------------------------------------------------


def test_the_front_lists_the_commands_and_the_version():
    assert run("--version").stdout == f"leanvocab {__version__}\n"
    shown = run("--help").stdout
    assert all(name in shown for name in ("count", "estimate", "finetune", "info", "--version", "--debug"))


def test_every_knob_is_an_option_with_the_same_default():
    command = get_command(app).commands["finetune"]
    options = {parameter.name: parameter for parameter in command.params}
    assert set(options) == {field.name for field in fields(FineTuneSettings)} | {
        "model", "data", "output_dir", "validation", "test", "quiet", "as_json",
    }  # fmt: skip
    for field in fields(FineTuneSettings):
        default = options[field.name].default
        assert (tuple(default) if isinstance(field.default, tuple) else default) == field.default, field.name
        assert options[field.name].help


def test_python_m_leanvocab_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "leanvocab", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"leanvocab {__version__}\n"


# --- count -----------------------------------------------------------------------------------------------------------


def used_words(data_rows):
    return {word for row in data_rows for word in row["text"].split()}


def test_text_is_counted_with_a_tokenizer_and_the_vocabulary_is_written(base, data, tmp_path):
    counted = json_of("count", data, "--tokenizer", base, "-o", tmp_path / "v.json")
    words = used_words(rows(48, seed=0) + rows(24, seed=1))
    assert set(counted["splits"]) == {"train", "validation"}
    assert counted["splits"]["train"]["num_tokens"] == sum(len(row["text"].split()) + 2 for row in rows(48, seed=0))
    assert counted["splits"]["train"]["used_rows"] == len(used_words(rows(48, seed=0))) + 2
    assert counted["tokenized"] == "distinct pieces"
    cut = json_of("count", data, "--tokenizer", base, "--max-length", 5)
    assert cut["tokenized"] == "whole texts, since they are cut to max_length"
    assert counted["vocabulary"]["full_rows"] == FULL_SIZE  # the model's rows, not the tokenizer's tokens
    vocabulary = PartialVocabulary.load(tmp_path / "v.json")
    assert set(vocabulary) == {len(SPECIAL) + WORDS.index(word) for word in words} | set(range(len(SPECIAL)))
    assert counted["vocabulary"]["digest"] == vocabulary.digest
    assert f"{len(vocabulary)} of {FULL_SIZE} rows" in text_of("count", data, "--tokenizer", base)


def test_token_ids_are_counted_without_a_tokenizer(tmp_path):
    ids = [{"input_ids": [5, 5, 9], "labels": [9, -100, 2]}, {"input_ids": [7], "labels": [3]}]
    file = write(tmp_path / "ids.parquet", ids)
    counted = json_of("count", file, "--token-column", "input_ids")
    covered = {"99": 3, "99.9": 3, "99.99": 3, "100": 3}
    splits = {"train": {"num_tokens": 4, "used_rows": 3}}
    assert counted == {"data": str(file), "splits": splits, "rows_to_cover": covered}
    both = json_of("count", file, "--token-column", "input_ids", "--token-column", "labels", "--full-size", 10)
    assert both["vocabulary"]["kept_rows"] == len(count_tokens([[5, 5, 9], [9, 2], [7], [3]]).token_ids) == 5
    json_of("count", file, "--token-column", "input_ids", "--full-size", 10, "--min-count", 2, "--always-keep", 1,
            "-o", tmp_path / "v.json")  # fmt: skip
    assert list(PartialVocabulary.load(tmp_path / "v.json")) == [1, 5]


def test_count_says_how_many_rows_cover_the_tokens_and_chooses_by_that(base, tmp_path):
    ids = [{"input_ids": [20] * 900 + [21] * 95 + [22] * 4 + [23]}]
    file = write(tmp_path / "ids.parquet", ids)
    counted = json_of("count", file, "--full-size", 40)
    assert counted["rows_to_cover"] == {"99": 2, "99.9": 3, "99.99": 4, "100": 4}
    assert "99.9 % 3" in " ".join(text_of("count", file, "--full-size", 40).split())
    chosen = ("count", file, "--full-size", 40, "--coverage", 99.9, "-o", tmp_path / "v.json")
    chosen_json = json_of(*chosen)
    assert list(PartialVocabulary.load(tmp_path / "v.json")) == [20, 21, 22]
    assert chosen_json["vocabulary"]["missing_tokens"] == 1
    assert chosen_json["vocabulary"]["kept_tokens_ratio"] == 0.999
    assert "to_train" not in chosen_json  # training on these data with it would be an error
    assert "1 of the counted tokens are not kept: a vocabulary for trimming" in text_of(*chosen, "--overwrite")
    assert json_of("count", file, "--full-size", 40)["vocabulary"]["missing_tokens"] == 0


def test_whole_scripts_are_kept_and_what_cannot_be_chosen_is_an_error_before_counting(base, data, tmp_path):
    counted = json_of("count", data, "--tokenizer", base, "--keep-script", "Latin", "--keep-script", "common")
    assert counted["vocabulary"]["kept_rows"] == len(SPECIAL) + len(WORDS)
    for words, told in {
        ("--keep-script", "Klingon"): "no script of Unicode 'Klingon'",
        (
            "--coverage",
            "0.999",
        ): "expected coverage in percent of the tokens, above 1 and up to 100 (99.9, say), got 0.999",
    }.items():
        assert told in run("count", "no/such.csv", "--tokenizer", base, *words, code=1).stderr
    error = run("count", "no/such.csv", "--keep-script", "Latin", code=1).stderr
    assert "--keep-script needs the tokenizer, which says what a token is: give --tokenizer" in error


def test_count_writes_one_file_and_does_not_write_over_it_unasked(base, data, tmp_path):
    (tmp_path / "out").mkdir()
    words = ("count", data, "--tokenizer", base, "-o", tmp_path / "out/v.json")
    run(*words)
    assert files_in(tmp_path / "out") == ["v.json"]
    before = (tmp_path / "out/v.json").read_bytes()
    assert "v.json is there already; give --overwrite, or name another" in run(*words, code=1).stderr
    run(*words, "--overwrite")
    assert (files_in(tmp_path / "out"), (tmp_path / "out/v.json").read_bytes()) == (["v.json"], before)


def test_validation_and_test_files_are_counted_as_a_run_reads_them(base, tmp_path):
    files = [write(tmp_path / f"{name}.csv", rows(24, seed=seed)) for seed, name in enumerate(("a", "b", "c"))]
    beside = ("--validation", files[1], "--test", files[2])
    counted = json_of("count", files[0], *beside, "--tokenizer", base)
    alone = [json_of("count", file, "--tokenizer", base)["splits"]["train"] for file in files]
    assert counted["splits"] == dict(zip(("train", "validation", "test"), alone, strict=True))
    estimated = json_of("estimate", base, "--data", files[0], *beside)
    ran = json_of("finetune", base, files[0], *beside, *QUICK, "-o", tmp_path / "out")
    kept = counted["vocabulary"]["kept_rows"]
    assert estimated["tables"][0]["partial_rows"] == ran["vocabulary"]["kept_rows"] == kept
    error = run("estimate", base, "--rows", 5, *beside, code=2).stderr
    assert "--validation and --test are files beside those of --data" in error


def test_what_was_made_strings_is_said_by_every_command_that_reads_beside_other_files_too(tmp_path, base):
    mixed = rows(12, kind="str")
    mixed[3]["text"] = 150
    train, more = (str(write(tmp_path / f"{name}.jsonl", mixed)) for name in ("train", "more"))
    said = "1 of 12 rows of split 'train' hold no string in column 'text'"
    for words in (["count", train, "--tokenizer", base], ["estimate", base, "--data", train]):
        for files in ([], ["--validation", more]):
            assert said in run(*words, *files).stderr
    trained = run("finetune", base, train, "--validation", more, "-o", tmp_path / "out", *QUICK)
    assert said in " ".join(trained.output.split())


def test_text_without_a_tokenizer_is_an_error_that_says_what_to_give(data):
    error = run("count", data, code=1).stderr
    assert "holds no column input_ids but text, label: name the columns of token ids (--token-column), or the" in error


def test_count_writes_a_report_and_names_it(base, data, tmp_path):
    words = ("count", data, "--tokenizer", base, "--report", tmp_path / "use.html")
    counted = json_of(*words)
    assert counted["report"] == str(tmp_path / "use.html")
    page = (tmp_path / "use.html").read_text(encoding="utf-8")
    for number in (counted["vocabulary"]["kept_rows"], *counted["rows_to_cover"].values(), FULL_SIZE):
        assert f'<data value="{number}">' in page
    for words_of_page in ("Memory of training", "rows that train lacks", "<bdi>word1", "Scripts"):
        assert words_of_page in page
    assert files_in(tmp_path) == ["data/train.csv", "data/validation.csv", "use.html"]
    assert "use.html is there already; give --overwrite, or name another" in run(*words, code=1).stderr
    assert f"written to {tmp_path / 'use.html'}" in run(*words, "--overwrite").stdout
    assert (tmp_path / "use.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--report", "use.pdf"), 2, "expected a name that ends in .html, got 'use.pdf'"),
        (("--report", "no/such/use.html"), 1, "there is no folder no/such"),
        (("--report", "use.html"), 2, "a report tells used rows from all of them: give --tokenizer, or --full-size"),
    ],
)
def test_a_report_that_cannot_be_written_is_an_error_before_counting(tmp_path, monkeypatch, words, code, told):
    monkeypatch.chdir(tmp_path)
    assert told in run("count", "no/such.csv", *words, code=code).stderr


def test_a_report_says_why_the_memory_is_not_told(base, data, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", tmp_path / "tokenizer")
    run("count", data, "--tokenizer", tmp_path / "tokenizer", "--report", tmp_path / "use.html")
    assert "no config of a model lies beside the tokenizer" in (tmp_path / "use.html").read_text(encoding="utf-8")


# --- estimate --------------------------------------------------------------------------------------------------------


def test_an_estimate_is_of_a_vocabulary_of_data_or_of_rows(base, data, tmp_path):
    run("count", data, "--tokenizer", base, "-o", tmp_path / "v.json")
    by_vocabulary = json_of("estimate", base, "--vocabulary", tmp_path / "v.json")
    by_data = json_of("estimate", base, "--data", data)
    kept = len(PartialVocabulary.load(tmp_path / "v.json"))
    by_rows = json_of("estimate", base, "--rows", kept)
    assert by_vocabulary == by_data == by_rows
    assert by_rows["tables"][0]["partial_rows"] == kept
    assert by_rows["full"]["num_parameters"] - by_rows["partial"]["num_parameters"] == (FULL_SIZE - kept) * 16
    assert f"{kept} of {FULL_SIZE} rows" in text_of("estimate", base, "--rows", kept)
    assert json_of("estimate", base, "--rows", 50, "--optimizer", "sgd")["full"]["optimizer_bytes"] == 0


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # peft 0.21 reads a name that transformers 5.23 has deprecated
)
@pytest.mark.parametrize("words", [(), ("--lora", "--lora-rank", "4")], ids=["all weights", "LoRA"])
def test_an_estimate_and_a_run_with_the_same_options_say_the_same_bytes(base, data, tmp_path, words):
    if words:
        pytest.importorskip("peft")
    half = tmp_path / "half"  # which finetune loads in fp32
    shutil.copytree(base, half)
    AutoModelForSequenceClassification.from_pretrained(base, dtype="bfloat16").save_pretrained(half)
    options = ("--cpu", "--max-length", "16", "--batch-size", "8", *words)
    ran = json_of("finetune", half, data, "-o", tmp_path / "out", "--epochs", "1", *options)
    estimated = json_of("estimate", half, "--rows", ran["vocabulary"]["kept_rows"], *options)
    for vocabulary in ("full", "partial"):
        names = ("num_parameters", "weights_bytes", "gradients_bytes", "optimizer_bytes", "total_bytes")
        assert {name: ran["memory"][vocabulary][name] for name in names} == {
            name: estimated[vocabulary][name] for name in names
        }
    for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert estimated["partial"][name] == ran[name]
    assert 0 < ran["memory"]["partial"]["peak_bytes"] <= estimated["partial"]["peak_bytes"]  # its rows are no longer
    assert ran["peak"]["peak_rss_bytes"] > 0
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["peak"] == ran["peak"]


def test_a_step_is_counted_where_it_is_asked_for_and_the_answer_says_so(base):
    told = "Activations are not among these figures: --activations counts a step"
    of_headers = json_of("estimate", base, "--rows", 50)
    assert of_headers == json_of("estimate", base, "--rows", 50, "--auto-class", "AutoModelForSequenceClassification")
    assert of_headers["step"] is None
    assert told in text_of("estimate", base, "--rows", 50)
    for words in (("--activations",), ("--batch-size", 2), ("--max-length", 16), ("--gradient-checkpointing",)):
        counted = json_of("estimate", base, "--rows", 50, *words)
        assert counted["partial"].pop("peak_bytes") > counted["partial"]["weights_bytes"]
        assert counted["partial"] == {name: its for name, its in of_headers["partial"].items() if name != "peak_bytes"}
    assert told not in text_of("estimate", base, "--rows", 50, "--activations")


def test_an_estimate_needs_exactly_one_of_them(base):
    assert "one of --vocabulary, --data and --rows" in run("estimate", base, code=2).stderr
    assert "one of --vocabulary, --data and --rows" in run("estimate", base, "--rows", 5, "--data", "x", code=2).stderr


# --- finetune --------------------------------------------------------------------------------------------------------


def test_finetune_leaves_the_same_model_with_and_without_the_full_vocabulary(base, data, tmp_path):
    words = ("finetune", base, data, *QUICK)
    full = json_of(*words, "-o", tmp_path / "full", "--full-vocabulary")
    partial = json_of(*words, "-o", tmp_path / "partial")
    assert full["losses"] == partial["losses"]
    assert full["scores"] == partial["scores"]
    assert partial["num_parameters"] < full["num_parameters"]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("full", "partial"))
    assert first == second
    assert json.loads((tmp_path / "partial/finetune.json").read_text()) == partial


def test_finetune_writes_a_report_where_it_is_told_to(base, data, tmp_path):
    """None by default: it holds words of the data, and a model's folder is what people share."""
    out = tmp_path / "out"
    words = ("finetune", base, data, *QUICK, "--save-strategy", "no", "--logging-steps", "2", "-o", out)
    ran = json_of(*words, "--report", out / "report.html")
    assert ran["report"] == str(out / "report.html")
    page = (out / "report.html").read_text(encoding="utf-8")
    numbers = [loss for _, loss in ran["losses"]] + [
        *ran["scores"].values(),
        ran["num_steps"],
        ran["peak"]["peak_rss_bytes"],
    ]
    numbers += [ran["memory"]["partial"]["total_bytes"], ran["vocabulary"]["kept_rows"]]
    for number in numbers:
        assert f'<data value="{number}">' in page, number
    assert "out is not empty" in run(*words, "--report", out / "report.html", code=1).stderr
    again = text_of(*words, "--overwrite", "--full-vocabulary", "--report", out / "report.html")
    assert f"report: {out / 'report.html'}" in again
    assert "Memory of training" not in (out / "report.html").read_text(encoding="utf-8")


def test_a_run_that_goes_on_writes_its_report_again(base, data, tmp_path):
    report = tmp_path / "run.html"
    words = ("finetune", base, data, "--batch-size", 8, "--cpu", "-o", tmp_path / "out", "--report", report)
    steps = [json_of(*words, "--epochs", 1)["num_steps"], json_of(*words, "--epochs", 2, "--resume")["num_steps"]]
    assert steps == [6, 12]
    page = report.read_text(encoding="utf-8")
    assert all(f'<td><data value="{step}">{step}</data></td>' in page for step in steps)  # a validation of each


def test_a_run_does_not_begin_whose_report_cannot_be_written(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").write_text("")
    words = ("finetune", base, data, *QUICK, "-o", "out", "--report")
    assert "mine.html is there already; set --overwrite, or name another" in run(*words, "mine.html", code=1).stderr
    assert (
        "expected a name that ends in .html, got 'out/model.safetensors'"
        in run(*words, "out/model.safetensors", code=2).stderr
    )
    assert "there is no folder no" in run(*words, "no/report.html", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_the_summary_shows_vocabulary_savings_times_and_scores(base, data, tmp_path):
    shown = text_of("finetune", base, data, *QUICK, "-o", tmp_path / "out")
    kept = len(PartialVocabulary.load(tmp_path / "out/partial_vocabulary.json"))
    assert f"vocabulary used {kept} of {FULL_SIZE} rows ({kept / FULL_SIZE:.1%})" in shown
    for words in ("parameters saved", "memory saved", "counting", "shrinking", "training", "steps 6", "validation f1"):
        assert words in shown


def test_a_second_run_is_refused_or_writes_over_the_first(base, data, tmp_path):
    words = ("finetune", base, data, *QUICK, "--save-strategy", "no", "-o", tmp_path / "out")
    run(*words)
    files = files_in(tmp_path / "out")
    assert files == sorted(
        ["config.json", "finetune.json", "model.safetensors", "partial_vocabulary.json", "tokenizer.json",
         "tokenizer_config.json"]
    )  # fmt: skip
    assert "out is not empty; name another, or set --overwrite" in run(*words, code=1).stderr
    run(*words, "--overwrite")
    assert files_in(tmp_path / "out") == files


def test_files_of_splits_and_columns_may_be_named(base, tmp_path):
    def renamed(**options):
        return [{"first": r["sentence1"], "second": r["sentence2"], "kind": r["label"]} for r in rows(**options)]

    train = write(tmp_path / "a.jsonl", renamed(num_rows=24, kind="str", pairs=True))
    validation = write(tmp_path / "b.csv", renamed(num_rows=8, kind="str", pairs=True))
    test = write(tmp_path / "c.parquet", [{"first": WORDS[0], "second": WORDS[299], "kind": None}])
    result = json_of("finetune", base, train, "--validation", validation, "--test", test, *QUICK, "-o", tmp_path / "out",
                     "--text-column", "first", "--text-column", "second", "--label-column", "kind")  # fmt: skip
    assert result["task"] == {
        "text_columns": ["first", "second"],
        "label_column": "kind",
        "label_names": ["bad", "good"],
        "train_split": "train",
        "eval_split": "validation",
        "left_out": {},
    }
    assert len(SPECIAL) + 299 in PartialVocabulary.load(tmp_path / "out/partial_vocabulary.json")


def test_finetune_trains_language_models_and_says_what_became_of_the_output_layer(tmp_path):
    base = save_language_model(tmp_path / "base", "gpt2", tied=True)
    train = write(tmp_path / "a.jsonl", pairs(18, names=("question", "answer")))
    validation = write(tmp_path / "b.csv", pairs(6, seed=1, names=("question", "answer")))
    words = ("finetune", base, train, "--validation", validation, "--task", "causal-lm", "--prompt-column", "question",
             "--completion-column", "answer", "--max-length", "32", *QUICK)  # fmt: skip
    shown = text_of(*words, "-o", tmp_path / "frozen")
    assert "output layer frozen: unused rows stay in the softmax" in shown
    assert "validation perplexity" in shown
    with pytest.warns(LeanVocabWarning, match="objective"):
        shown = text_of(*words, "--output", "restricted", "-o", tmp_path / "restricted")
    assert "output layer restricted: ANOTHER OBJECTIVE" in shown
    assert "compare with no other mode's" in shown
    written = json.loads((tmp_path / "frozen/finetune.json").read_text())
    assert written["output"] == "frozen"
    assert written["task"] == {
        "kind": "causal-lm",
        "source": "prompts",
        "columns": ["question", "answer"],
        "train_split": "train",
        "eval_split": "validation",
    }


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_says_what_a_checkpoint_is_and_which_rows_were_trained(base, data, tmp_path):
    run("finetune", base, data, *QUICK, "-o", tmp_path / "out")
    described = json_of("info", tmp_path / "out", "--base", base)
    vocabulary = PartialVocabulary.load(tmp_path / "out/partial_vocabulary.json")
    assert described["model_class"] == "BertForSequenceClassification"
    assert described["full_size"] == FULL_SIZE
    assert set(described["trained"]["token_ids"]) <= set(vocabulary)
    assert described["trained"]["num_rows"] == len(described["trained"]["token_ids"]) > 50
    assert described["trained"]["first_tokens"][:2] == ["[CLS]", "[SEP]"]
    shown = text_of("info", tmp_path / "out", "--base", base)
    assert "BertForSequenceClassification (bert)" in shown
    assert "[CLS] [SEP]" in shown  # brackets are no markup
    assert "trained" not in json_of("info", base)


def test_info_says_what_a_vocabulary_file_is(base, data, tmp_path):
    run("count", data, "--tokenizer", base, "-o", tmp_path / "v.json")
    vocabulary = PartialVocabulary.load(tmp_path / "v.json")
    described = json_of("info", tmp_path / "v.json", "--tokenizer", base)
    assert (described["kept_rows"], described["digest"]) == (len(vocabulary), vocabulary.digest)
    assert described["first_tokens"][:3] == ["[PAD]", "[UNK]", "[CLS]"]
    assert f"{len(vocabulary)} of {FULL_SIZE}" in text_of("info", tmp_path / "v.json")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("finetune", "BASE", "nothing.csv", "-o", "out"), 1, "nothing.csv does not exist"),
        (("finetune", "no/such", "DATA", "-o", "out"), 1, "'no/such' is no folder here"),
        (("finetune", "BASE", "DATA", "-o", "out", "--batch-size", "0"), 2, "--batch-size must be above 0, got 0"),
        (
            ("finetune", "BASE", "DATA", "-o", "out", "--output", "frozen"),
            2,
            "--output is for causal-lm and seq2seq-lm and",
        ),
        (
            ("finetune", "BASE", "DATA", "-o", "out", "--task", "causal-lm", "--prompt-column", "text"),
            2,
            "--prompt-column was given without --completion-column",
        ),
        (("count", "DATA", "--tokenizer", "no/such"), 1, "there is no tokenizer in 'no/such'"),
        (("count", "DATA", "--tokenizer", "BASE", "-o", "no/folder/v.json"), 1, "there is no folder no/folder"),
        (("estimate", "no/such", "--rows", "5"), 1, "'no/such' is no folder with a model here"),
        (("info", "no/such"), 1, "'no/such' is no folder here, and the hub gave no model of that name"),
        (("info", "VOCABULARY"), 1, "broken.json: "),
    ],
)
def test_an_error_is_one_clean_message_and_json_for_machines(base, data, tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    words = [{"BASE": base, "DATA": data, "VOCABULARY": "broken.json"}.get(word, word) for word in words]
    before = files_in(tmp_path)
    result = run(*words, code=code)
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    assert message in lines[-1]
    assert "Traceback" not in result.output
    assert result.stdout == ""
    error = json_of(*words, code=code)["error"]
    assert message in error["message"]
    assert error["type"].endswith("Error")
    assert files_in(tmp_path) == before


def test_an_unknown_option_is_a_usage_error(base, data):
    assert run("finetune", base, data, "--no-such-option", code=2).stdout == ""


def test_debug_shows_where_an_error_comes_from(tmp_path):
    command = [sys.executable, "-m", "leanvocab", "--debug", "info", str(tmp_path / "nothing")]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
    assert "CheckpointError" in shown.stderr


def test_a_missing_extra_is_an_error_with_the_pip_line(base, data):
    script = (
        "import sys; sys.modules['datasets'] = None; sys.argv[0] = 'leanvocab'\nfrom leanvocab.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "finetune", base, data, "-o", "never"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert shown.stderr.splitlines()[-1] == (
        "error: this needs datasets, which is not installed: pip install 'leanvocab[finetune]'"
    )


def test_info_knows_adapters_files_of_weights_and_data(base, data, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/model", "r": 8, "target_modules": ["q", "v"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(base + "/model.safetensors", adapter / "adapter_model.safetensors")
    described = json_of("info", adapter)
    assert (described["kind"], described["base"], described["rank"]) == ("adapter", "some/model", 8)
    assert described["num_bytes"] == json_of("info", adapter / "adapter_model.safetensors")["num_bytes"] > 0
    assert "q, v" in text_of("info", adapter)
    (tmp_path / "some.csv").write_text("text,label\na,1\nb,0\n")
    assert json_of("info", tmp_path / "some.csv")["columns"][0] == "text (string)"
    assert json_of("info", data)["kind"] == "data"
    for path, words in {
        base + "/config.json": "is the config of a model: give its folder",
        base + "/tokenizer.json": "is a tokenizer: give its folder",
    }.items():
        assert words in run("info", path, code=1).stderr
    (tmp_path / "old.bin").write_bytes(b"")
    assert "is a pickle" in run("info", tmp_path / "old.bin", code=1).stderr
    assert "leave it out" in run("info", tmp_path / "some.csv", "--base", base, code=2).stderr


def test_merge_says_when_its_folders_are_the_wrong_way_round(base, tmp_path):
    tiny_folders(tmp_path)
    single, delta, out = tmp_path / "single", tmp_path / "delta", tmp_path / "out"
    assert "they are the wrong way round" in run("merge", delta, single, out, code=1).stderr
    assert "is a delta, too: merge it first" in run("merge", delta, delta, out, code=1).stderr
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert "merge_and_unload" in run("merge", single, tmp_path / "adapter", out, code=1).stderr


def test_count_draws_what_it_counted(base, data, tmp_path):
    pytest.importorskip("matplotlib")
    assert json_of("count", data, "--tokenizer", base, "--plot", tmp_path / "use.svg")["plot"] == str(
        tmp_path / "use.svg"
    )
    assert "<svg" in (tmp_path / "use.svg").read_text()
    assert "give --overwrite" in run("count", data, "--tokenizer", base, "--plot", tmp_path / "use.svg", code=1).stderr
