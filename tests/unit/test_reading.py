"""One loader for every command: what a run trains on is what `count` counts."""

from functools import reduce
from operator import add

import pytest
from texts import CHAT_TEMPLATE, chats, language_tokenizer, pairs, rows, texts, write

from leanvocab import count_tokens
from leanvocab.cli.data_counts import DataOptions, count_data
from leanvocab.finetune.reading import read_examples
from leanvocab.finetune.settings import FineTuneSettings


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
