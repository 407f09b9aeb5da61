"""Counts become figures of use: what is counted by hand, and how it is shown."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

import leanvocab as lv
from leanvocab.errors import VocabularyError
from leanvocab.reports.vocabulary_use import vocabulary_use


def shown(renderable):
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return " ".join(console.file.getvalue().split())


def test_use_is_counted_by_hand():
    use = vocabulary_use(lv.count_tokens([[5, 5, 5, 5, 5, 5], [2, 2, 2], [7]], full_size=10))
    assert (use.num_tokens, use.used_rows, use.once_rows, use.full_rows) == (10, 3, 1, 10)
    assert use.used_ratio == 0.3
    assert use.coverage_rows == {0.5: 1, 0.9: 2, 0.99: 3}
    assert use.most_frequent == (("id 5", 6), ("id 2", 3), ("id 7", 1))


def test_use_names_tokens_where_a_tokenizer_is_known():
    class Tokenizer:
        def convert_ids_to_tokens(self, token_id):
            return f"[word{token_id}]"

    use = vocabulary_use(lv.count_tokens([[5, 5, 2]], full_size=10), tokenizer=Tokenizer())
    assert use.most_frequent == (("[word5]", 2), ("[word2]", 1))
    assert "most frequent: [word5]" in shown(use)  # brackets are no markup


def test_use_becomes_json_and_a_table():
    use = vocabulary_use(lv.TokenCounts(np.repeat([9, 0], [120, 380]), 500))
    read = json.loads(json.dumps(use.to_dict()))
    assert read["used_rows"] == 120
    assert read["used_ratio"] == 0.24
    assert read["coverage_rows"]["0.5"] == use.coverage_rows[0.5]
    text = shown(use)
    assert "rows used │ 120 │ 24.0 %" in text
    assert f"rows that cover 90% of the tokens │ {use.coverage_rows[0.9]}" in text


def test_nothing_counted_is_shown_as_nothing():
    counts = lv.TokenCounts(np.zeros(10, np.int64), 10)
    use = vocabulary_use(counts)
    assert (use.num_tokens, use.used_rows, use.coverage_rows) == (0, 0, {0.5: 0, 0.9: 0, 0.99: 0})
    assert "rows used │ 0 │ 0.0 %" in shown(use)


def test_use_without_a_full_size_is_an_error():
    counts = lv.TokenCounts(np.array([3, 0, 2]))
    with pytest.raises(VocabularyError, match="full size of the vocabulary is unknown: give full_size="):
        vocabulary_use(counts)
    assert vocabulary_use(counts, full_size=4).used_ratio == 0.5
    with pytest.raises(VocabularyError, match="token id 2 was counted, the full size is 2"):
        vocabulary_use(counts, full_size=2)
