"""Blocks of token ids: nothing lost, nothing learned that cannot be predicted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanvocab.choices import IGNORE_INDEX
from leanvocab.texts.packing import join_and_cut, lay_side_by_side, num_learned

SEQUENCES = st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=9), max_size=20)


@given(SEQUENCES, st.integers(2, 12))
def test_joined_texts_are_one_stream_cut_into_blocks(texts, length):
    blocks = list(join_and_cut(texts, length))
    stream = [token_id for text in texts for token_id in text]
    naive = [stream[start : start + length] for start in range(0, len(stream), length)]
    assert [block["input_ids"] for block in blocks] == [block for block in naive if len(block) > 1]
    for block in blocks:
        assert block["labels"] == [IGNORE_INDEX, *block["input_ids"][1:]]


def test_a_block_takes_no_more_of_a_text_than_it_holds():
    taken = []
    text = (taken.append(number) or number for number in range(1000))
    for number, block in enumerate(join_and_cut([text], 64), 1):
        assert block["input_ids"] == list(range(1000))[64 * (number - 1) : 64 * number]
        assert len(taken) == min(64 * number, 1000)


def examples(sequences):
    return [{"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]} for ids in sequences]


@given(SEQUENCES, st.integers(9, 20))
def test_examples_side_by_side_stay_whole_and_none_is_lost(sequences, length):
    found = []
    for block in lay_side_by_side(examples(sequences), length):
        assert len(block["input_ids"]) == len(block["labels"]) == len(block["position_ids"]) <= length
        starts = [at for at, position in enumerate(block["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(block["input_ids"])], strict=True):
            found.append(block["input_ids"][start:end])
            assert block["position_ids"][start:end] == list(range(end - start))
            assert block["labels"][start:end] == [IGNORE_INDEX, *block["input_ids"][start + 1 : end]]
    assert sorted(found) == sorted(sequences)


def test_examples_go_into_the_first_block_with_room():
    blocks = [block["input_ids"] for block in lay_side_by_side(examples([[1] * 6, [2] * 5, [3] * 3, [4] * 2]), 10)]
    assert blocks == [[1] * 6 + [3] * 3, [2] * 5 + [4] * 2]


def test_an_example_longer_than_a_block_is_alone_in_its_own():
    assert [len(block["input_ids"]) for block in lay_side_by_side(examples([[1] * 12, [2] * 3]), 10)] == [12, 3]


@pytest.mark.parametrize(("labels", "number"), [([IGNORE_INDEX, 5, 0], 2), ([IGNORE_INDEX], 0)])
def test_ignored_labels_are_not_learned(labels, number):
    assert num_learned({"labels": labels}) == number
