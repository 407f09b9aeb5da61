"""`leanvocab trim`: what it prints, what it writes, how it fails."""

import json

import pytest
from disk import content
from models import FULL_SIZE
from runs import json_of, run, text_of
from texts import save_pretrained, write, write_splits
from transformers import AutoModel, AutoTokenizer

import leanvocab as lv

pytestmark = pytest.mark.usefixtures("loud_libraries_afterwards")


@pytest.fixture
def base(tmp_path):
    return save_pretrained(tmp_path / "base")


@pytest.fixture
def vocabulary(tmp_path):
    lv.PartialVocabulary([7, 8, 9], FULL_SIZE).save(tmp_path / "v.json")
    return tmp_path / "v.json"


def test_what_was_counted_is_trimmed_to_proved_and_made_again(base, tmp_path):
    data = write_splits(tmp_path / "data")
    counted = json_of("count", data, "--tokenizer", base, "-o", tmp_path / "v.json")
    trimmed = json_of("trim", base, "--vocabulary", tmp_path / "v.json", "-o", tmp_path / "out", "--verify", data)
    assert trimmed["rows_after"] == counted["vocabulary"]["kept_rows"]
    assert (trimmed["rows_before"], trimmed["already_there"], trimmed["proof"]["holds"]) == (FULL_SIZE, False, True)
    assert trimmed["proof"]["total"]["covered_texts"] == trimmed["proof"]["total"]["texts"] == 72
    assert AutoModel.from_pretrained(tmp_path / "out").config.vocab_size == trimmed["rows_after"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == trimmed["rows_after"]
    recipe = tmp_path / "out" / "trimming.json"
    assert trimmed["to_make_again"] == f"leanvocab trim --recipe {recipe} --output OUTPUT"
    run("trim", "--recipe", recipe, "--output", tmp_path / "again")
    run("trim", "--recipe", recipe, "--base", base, "--output", tmp_path / "third")
    assert content(tmp_path / "out") == content(tmp_path / "again") == content(tmp_path / "third")


def test_the_summary_says_what_was_kept_and_why_and_how_to_go_on(base, vocabulary, tmp_path):
    said = text_of("trim", base, "--vocabulary", vocabulary, "-o", tmp_path / "out", "--pad-to-multiple-of", 16)
    assert "16 of 500 (3.2%)" in said
    assert "8 of padding at the end" in said
    assert "beside those given, which the model inserts or computes with" in said
    assert f'to use it: transformers.BertModel.from_pretrained("{tmp_path / "out"}")' in said
    assert f"to make it again: leanvocab trim --recipe {tmp_path / 'out' / 'trimming.json'} --output OUTPUT" in said
    again = text_of("trim", base, "--vocabulary", vocabulary, "-o", tmp_path / "out", "--pad-to-multiple-of", 16)
    assert "is this trimming's result already; nothing was written" in again


def test_a_delta_is_the_second_argument(base, vocabulary, tmp_path):
    model = AutoModel.from_pretrained(base)
    lv.shrink_(model, lv.PartialVocabulary.load(vocabulary))
    lv.save_delta(model, tmp_path / "delta", base=base)
    run("trim", base, tmp_path / "delta", "--vocabulary", vocabulary, "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "trimming.json").read_text())["delta"]["name"] == str(tmp_path / "delta")


def test_several_files_of_texts_may_prove_it(base, vocabulary, tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", [{"text": f"word2 {name}"}]) for name in ("word3", "word4")]
    words = ("trim", base, "--vocabulary", vocabulary, "-o", tmp_path / "out")
    proof = json_of(*words, "--verify", files[0], "--verify", files[1])["proof"]
    assert [part["covered_texts"] for part in proof["splits"].values()] == [1, 1]
    assert "The proof holds." in text_of(*words, "--overwrite", "--verify", files[0])


def test_a_proof_goes_by_language_where_a_column_says_it(base, vocabulary, tmp_path):
    rows = [
        {"said": "word2 word3", "language": "a"},
        {"said": "word2", "language": "b"},
        {"said": "word4", "language": "a"},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    words = ("trim", base, "--vocabulary", vocabulary, "-o", tmp_path / "out", "--verify", file)
    proof = json_of(*words, "--text-column", "said", "--language-column", "language")["proof"]
    assert {name: part["covered_texts"] for name, part in proof["splits"].items()} == {"a": 2, "b": 1}
    shown = run(*words, "--overwrite", "--text-column", "said", "--language-column", "tongue", code=1).stderr
    assert "has no column 'tongue' that says the language: its columns are said, language" in shown
    assert (
        "found no column 'text' of 'train': the data has 'said'"
        in run(*words, "--overwrite", "--text-column", "text", code=1).stderr
    )


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["BASE", "--vocabulary", "V", "--language-column", "l", "-o", "OUT"], 2, "give --verify, the texts that have it, with"),
        (["BASE", "--vocabulary", "V", "--text-column", "t", "-o", "OUT"], 2, "give --verify, the texts that have it, with"),
        (["BASE", "-o", "OUT"], 2, "give --vocabulary, the rows to keep, or --recipe, to make the same again: one of the two"),
        (["BASE", "--vocabulary", "V", "--recipe", "R", "-o", "OUT"], 2, "one of the two"),
        (["--vocabulary", "V", "-o", "OUT"], 2, "give BASE, the checkpoint to trim: a folder, or a name in the hub's cache"),
        (["--recipe", "R", "--pad-to-multiple-of", "8", "-o", "OUT"], 2, "the recipe says this: leave --pad-to-multiple-of out"),
        (["BASE", "--vocabulary", "V", "--tokenizer", "BASE", "--no-tokenizer", "-o", "OUT"], 2, "not both"),
        (["BASE", "--vocabulary", "NOTHING", "-o", "OUT"], 1, "expected a vocabulary that `vocabulary.save` wrote, found none"),
        (["BASE", "--vocabulary", "V", "--tokenizer", "NOTHING", "-o", "OUT"], 1, "expected a folder, found nothing at"),
        (["NOTHING", "--vocabulary", "V", "-o", "OUT"], 1, "base: expected a folder, found nothing at"),
        (["--recipe", "NOTHING", "-o", "OUT"], 1, "cannot be opened (No such file or directory)"),
        (["BASE", "--vocabulary", "V", "-o", "BASE"], 1, "(no trimming.json lies there); name another output, or"),
    ],
)  # fmt: skip
def test_what_is_given_wrongly_is_refused_in_one_line(base, vocabulary, tmp_path, words, code, error):
    paths = {
        "BASE": base,
        "V": vocabulary,
        "R": tmp_path / "r.json",
        "NOTHING": tmp_path / "no",
        "OUT": tmp_path / "out",
    }
    shown = run("trim", *(paths.get(word, word) for word in words), code=code).stderr
    assert error in shown
    assert shown.count("\n") <= 2
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_said_in_a_line(base, vocabulary, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("leanvocab.trimming.export.write_trimmed", full)
    shown = run("trim", base, "--vocabulary", vocabulary, "-o", tmp_path / "out", code=1).stderr
    assert "nothing was written: [Errno 28] No space left on device" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "v.json"]
