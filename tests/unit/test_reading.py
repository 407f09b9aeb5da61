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


def test_a_split_of_any_name_is_counted(tmp_path):
    write(tmp_path / "test.jsonl", chats(3))
    assert list(count_data(str(tmp_path), DataOptions(task="causal-lm"), tokenizer())) == ["test"]
