"""One loader for every command: what a run trains on is what `count` counts."""

from functools import reduce
from operator import add

import pytest
from texts import CHAT_TEMPLATE, chats, language_tokenizer, pairs, rows, texts, write

from leanvocab import count_tokens
from leanvocab.cli.data_counts import DataOptions, count_data
from leanvocab.finetune.reading import read_examples
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.texts.data_files import load_splits


def tokenizer():
    made = language_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def same(counts, others):
    return counts.token_ids.tolist() == others.token_ids.tolist() and counts.counts.tolist() == others.counts.tolist()


@pytest.mark.parametrize(
    ("entries", "options"),
    [
        (chats(12), {"task": "causal-lm"}),
        ([{"talk": row["messages"]} for row in chats(12)], {"task": "causal-lm", "messages_column": "talk"}),
        (pairs(12), {"task": "causal-lm", "max_length": 7}),
        (pairs(12, names=("a", "b")), {"task": "seq2seq-lm", "prompt_column": "a", "completion_column": "b"}),
        (pairs(12), {"task": "seq2seq-lm", "max_target_length": 2}),
        (texts(12), {"task": "causal-lm", "packing": True, "max_length": 16}),
        (texts(12), {"task": "masked-lm"}),
        (rows(12), {"max_length": 5}),
    ],
)
def test_what_a_run_trains_on_is_what_is_counted(tmp_path, entries, options):
    file = write(tmp_path / "train.jsonl", entries)
    examples = read_examples(file, tokenizer(), FineTuneSettings(**options))
    counted = count_data(str(file), DataOptions(**options), tokenizer())
    assert same(reduce(add, counted.values()), count_tokens(examples.encoded, examples.task.token_columns))


def test_count_cuts_texts_where_a_run_does_by_default(tmp_path):
    """The tokenizer's 128 tokens: a run with the default of 512 counts these, and not what it never sees."""
    words = " ".join(["word1"] * 200 + ["word2"])
    counted = count_data(
        str(write(tmp_path / "train.jsonl", [{"text": words}])), DataOptions(task="causal-lm"), tokenizer()
    )
    assert counted["train"].num_tokens == 128


def test_what_was_understood_is_plain(tmp_path):
    file = write(tmp_path / "a.jsonl", rows(12, kind="str"))
    data = {"train": file, "validation": write(tmp_path / "b.jsonl", rows(4, kind="str"))}
    assert read_examples(data, tokenizer(), FineTuneSettings()).understood == {
        "task": "classification",
        "columns": {"text": ["text"], "label": ["label"]},
        "classes": ["bad", "good"],
        "left_out": {},
        "rows": {"train": 12, "validation": 4},
    }
    asked = write(tmp_path / "c.jsonl", pairs(5))
    assert read_examples(asked, tokenizer(), FineTuneSettings(task="causal-lm")).understood == {
        "task": "causal-lm",
        "columns": {"prompt": ["prompt"], "completion": ["completion"]},
        "rows": {"train": 5},
    }


def test_a_split_of_any_name_is_counted(tmp_path):
    write(tmp_path / "test.jsonl", chats(3))
    assert list(count_data(str(tmp_path), DataOptions(task="causal-lm"), tokenizer())) == ["test"]


@pytest.mark.parametrize(
    ("header", "knobs"),
    [
        ("text", {}),
        ("body", {"text_columns": ("body",)}),
        ("prompt,completion", {"task": "causal-lm"}),
        ("source,target", {"task": "seq2seq-lm"}),
        ("a,b", {"task": "causal-lm", "prompt_column": "a", "completion_column": "b"}),
    ],
)
def test_texts_of_digits_are_read_as_they_are_written(tmp_path, header, knobs):
    names = header.split(",")
    values = ["1.50", "2.50"] if len(names) == 1 else ["1.50,007", "2.50,8"]
    (tmp_path / "a.csv").write_text(f"{header},label\n" + "".join(f"{v},{at}\n" for at, v in enumerate(values)))
    seen = []

    class Tokenizer:
        unk_token_id, all_special_ids, eos_token_id, is_fast = None, [], None, True

        def __call__(self, *texts, text_target=None, **options):
            given = [*texts, *([text_target] if text_target else [])]
            seen.extend(text for column in given for text in column)
            ids = [[1, 2, 3] for _ in given[0]]
            return {"input_ids": ids, "special_tokens_mask": [[0, 0, 0] for _ in ids]}

    read_examples(tmp_path / "a.csv", Tokenizer(), FineTuneSettings(**knobs))
    assert sorted(seen) == sorted(word for value in values for word in value.split(","))


def test_what_was_made_strings_in_a_column_that_is_learned_is_said(tmp_path):
    """A number in a column of texts is learned as its digits; a chat is what its JSON says, and an unused column nobody reads."""
    entries = [{**row, "other": at if at % 2 else "x"} for at, row in enumerate(rows(12, kind="str"))]
    entries[3]["text"], entries[7]["text"], entries[8]["text"] = 150.5, {"a": 1}, "word7"
    read = read_examples(write(tmp_path / "a.jsonl", entries), tokenizer(), FineTuneSettings())
    said = "2 of 12 rows of split 'train' hold no string in column 'text'; it was made one, as JSON writes it, such as '150.5'."
    assert read.notes == (said,)
    calls = [{"role": "assistant", "content": "word1", "arguments": {"city": "word2"}}]
    talks = [*chats(11), {"messages": [*chats(1)[0]["messages"], *calls]}]
    assert (
        read_examples(write(tmp_path / "b.jsonl", talks), tokenizer(), FineTuneSettings(task="causal-lm")).notes == ()
    )
    shards = tmp_path / "shards"
    write(shards / "train-0.jsonl", entries)
    write(shards / "train-1.jsonl", entries)
    assert read_examples(shards, tokenizer(), FineTuneSettings()).notes == (said.replace("2 of 12", "4 of 24"),)


def test_what_was_made_strings_is_said_of_files_that_join_others(tmp_path):
    """The command's --validation joins a file to the splits of another."""
    mixed = rows(12, kind="str")
    mixed[3]["text"] = 150
    file = write(tmp_path / "a.jsonl", mixed)
    splits = load_splits(file)
    splits.update(validation=write(tmp_path / "b.jsonl", mixed[:4]))
    notes = read_examples(splits, tokenizer(), FineTuneSettings()).notes
    assert [note.partition(" hold")[0] for note in notes] == [
        "1 of 12 rows of split 'train'", "1 of 4 rows of split 'validation'"
    ]  # fmt: skip
