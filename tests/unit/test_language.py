"""Texts for language models: columns found and checked, token ids with the labels that are learned."""

import datasets
import pytest
from texts import CHAT_TEMPLATE, SPECIAL, WORDS, chats, ids_of, language_tokenizer, pairs, texts

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import DataError, ModelError
from leanvocab.finetune.language_modeling import chat_spans, find_language_task
from leanvocab.finetune.settings import FineTuneSettings

CLS, SEP = 2, 3
P = IGNORE_INDEX


def splits_of(train, **others):
    tables = {"train": train, **others}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(table) for name, table in tables.items()})


def encoded(train, tokenizer=None, **knobs):
    """Rows of the train split, and the notes."""
    settings, splits = FineTuneSettings(**{"task": "causal-lm"} | knobs), splits_of(train)
    task = find_language_task(splits, settings)
    made, notes = task.encode(splits, tokenizer or language_tokenizer(), settings)
    return made["train"].to_list(), notes


def found(train, validation=None, **knobs):
    splits = splits_of(train, **({"validation": validation} if validation else {}))
    return find_language_task(splits, FineTuneSettings(**{"task": "causal-lm"} | knobs))


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "source", "columns"),
    [
        ({"text": "a", "title": "b"}, "text", ("text",)),
        ({"prompt": "a", "completion": "b", "text": "c"}, "prompts", ("prompt", "completion")),
        ({"source": "a", "target": "b"}, "prompts", ("source", "target")),
        (chats(1)[0], "messages", ("messages",)),
    ],
)
def test_columns_are_found_by_the_usual_names(row, source, columns):
    task = found([row])
    assert (task.source, task.columns, task.train_split, task.eval_split) == (source, columns, "train", None)


@pytest.mark.parametrize(
    ("knobs", "source", "columns"),
    [
        ({"text_columns": ("c",)}, "text", ("c",)),
        ({"prompt_column": "c", "completion_column": "d"}, "prompts", ("c", "d")),
        ({"messages_column": "m"}, "messages", ("m",)),
        ({"prompt_column": "c", "completion_column": "d", "task": "seq2seq-lm"}, "prompts", ("c", "d")),
        ({"text_columns": ("d",), "task": "masked-lm"}, "text", ("d",)),
    ],
)
def test_columns_may_be_named(knobs, source, columns):
    row = {"text": "a", "prompt": "b", "completion": "b", "c": "c", "d": "d", "m": chats(1)[0]["messages"]}
    task = found([row], **knobs)
    assert (task.source, task.columns) == (source, columns)


@pytest.mark.parametrize(
    ("train", "knobs", "message"),
    [
        ([{"words": "a"}], {}, r"found nothing to learn from: looked for prompt \+ completion, source \+ target, messages, "
         "text, sentence; the columns are words. Name them with prompt_column and completion_column, or text_columns"),
        ([{"text": "a"}], {"task": "seq2seq-lm"}, r"looked for prompt \+ completion, source \+ target; the columns are text"),
        ([{"words": "a"}], {"task": "masked-lm"}, "found no text column: looked for text, sentence; the columns are words"),
        ([{"prompt": "a", "answer": "b"}], {}, "there is a column 'prompt' without 'completion'; the columns are prompt, "
         "answer. Name both with prompt_column and completion_column"),
        ([{"target": "a"}], {"task": "seq2seq-lm"}, "there is a column 'target' without 'source'"),
        (pairs(1), {"prompt_column": "question", "completion_column": "completion"},
         "there is no prompt column 'question'; the columns are prompt, completion"),
        (pairs(1), {"prompt_column": "prompt", "completion_column": "answer"}, "there is no completion column 'answer'"),
        (texts(1), {"text_columns": ("body",)}, "there is no text column 'body'; the columns are text"),
        (texts(1), {"messages_column": "chat"}, "there is no messages column 'chat'; the columns are text"),
        ([{"text": 1}], {}, "text column 'text' of split 'train' holds int64; expected strings"),
        ([{"prompt": "a", "completion": None}, *pairs(1)], {}, "1 of 2 rows of split 'train' have no text in column 'comp"),
        ([{"messages": []}, *chats(1)], {}, "1 of 2 rows of split 'train' have no messages in column 'messages'"),
        ([{"messages": ["hello"]}], {}, "row 0 of split 'train': column 'messages' holds something else than messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_an_error_that_says_where(train, knobs, message):
    with pytest.raises(DataError, match=message):
        found(train, **knobs)


def test_validation_is_checked_as_training_is():
    assert found(texts(2), texts(1)).eval_split == "validation"
    with pytest.raises(DataError, match="split 'validation' has no text column 'text'; its columns are words"):
        found(texts(2), [{"words": "a"}])
    with pytest.raises(DataError, match="split 'validation' has no messages column 'messages'; its columns are text"):
        found(chats(2), texts(1))


# --- causal language models -------------------------------------------------------------------------------------------


def test_a_text_is_learned_from_its_second_token_to_its_end():
    rows, notes = encoded([{"text": "word1 word2"}])
    assert rows == [{"input_ids": [CLS, *ids_of("word1 word2"), SEP], "labels": [P, *ids_of("word1 word2"), SEP]}]
    assert notes == ()


def test_a_text_without_a_tokenizers_end_has_none_and_that_is_said():
    rows, notes = encoded([{"text": "word1 word2"}], language_tokenizer(eos_token=None))
    assert rows[0]["input_ids"] == [CLS, *ids_of("word1 word2")]
    assert notes == ("The tokenizer has no end-of-sequence token: the texts are learned without an end.",)


def test_prompts_are_masked_and_have_the_ids_that_they_have_alone():
    row = {"prompt": "word1 word2", "completion": "word3"}
    prompt, completion = ids_of("word1 word2"), ids_of("word3")
    rows, _ = encoded([row])
    assert rows == [{"input_ids": [CLS, *prompt, *completion, SEP], "labels": [P, P, P, *completion, SEP]}]
    rows, _ = encoded([row], train_on_prompts=True)
    assert rows[0]["labels"] == [P, *prompt, *completion, SEP]


def test_an_end_that_stands_in_the_text_is_not_taken_for_the_tokenizers_own():
    rows, _ = encoded([{"text": "word1 [SEP]"}])
    assert rows[0]["input_ids"] == [CLS, *ids_of("word1"), SEP, SEP]


def test_long_texts_are_cut_and_what_has_nothing_left_to_learn_is_left_out_and_both_are_said():
    rows = [
        {"prompt": "word1 word2 word3 word4", "completion": "word5"},
        {"prompt": "word1", "completion": "word5 word6 word7"},
        {"prompt": "word1", "completion": "word5"},
    ]
    made, notes = encoded(rows, max_length=4)
    assert [row["input_ids"] for row in made] == [
        [CLS, *ids_of("word1 word5 word6")],
        [CLS, *ids_of("word1 word5"), SEP],
    ]
    assert notes == (
        "2 of 3 rows of split 'train' were cut to 4 tokens.",
        "1 of 3 rows of split 'train' were left out: nothing of them is left to learn within 4 tokens.",
    )
    with pytest.raises(
        DataError, match=r"nothing is left to learn of the 1 rows of split 'train': .* max_length \(4 tok"
    ):
        encoded(rows[:1], max_length=4)


def test_packed_texts_are_joined_with_ends_between_them_and_lose_nothing():
    table = [{"text": "word1 word2 word3"}, {"text": "word4"}, {"text": "word5 word6 word7 word8 word9"}]
    made, notes = encoded(table, max_length=6, packing=True)
    stream = [token_id for row in table for token_id in (CLS, *ids_of(row["text"]), SEP)]
    assert [token_id for row in made for token_id in row["input_ids"]] == stream
    assert [len(row["input_ids"]) for row in made] == [6, 6, 3]
    assert all(row["labels"] == [P, *row["input_ids"][1:]] for row in made)
    assert notes == ("Texts are joined and cut into blocks (packing): those in one block see one another.",)


def test_packed_prompts_stay_whole_with_positions_of_their_own():
    table = pairs(12)
    alone, _ = encoded(table)
    packed, notes = encoded(table, max_length=40, packing=True)
    assert notes == ()
    assert len(packed) < 8
    examples = []
    for block in packed:
        starts = [at for at, position in enumerate(block["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            examples.append({name: block[name][start:end] for name in ("input_ids", "labels")})
    assert sorted(examples, key=str) == sorted(alone, key=str)


def test_more_rows_than_a_batch_are_packed_across_batches():
    made, _ = encoded([{"text": "word1 word2"}] * 2500, max_length=16, packing=True)
    assert [len(row["input_ids"]) for row in made] == [16] * (2500 * 4 // 16)


# --- chats ------------------------------------------------------------------------------------------------------------


def test_replies_of_a_chat_are_learned_and_nothing_else():
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [
        {"role": "user", "content": "word1"},
        {"role": "assistant", "content": "word2 word3"},
        {"role": "user", "content": "word4"},
        {"role": "assistant", "content": "word5"},
    ]
    (row,), _ = encoded([{"messages": chat}], tokenizer)
    user, reply = (len(SPECIAL) + WORDS.index(word) for word in ("word298", "word299"))
    w1, w2, w3, w4, w5 = ids_of("word1 word2 word3 word4 word5")
    assert row["input_ids"] == [CLS, user, w1, SEP, CLS, reply, w2, w3, SEP, CLS, user, w4, SEP, CLS, reply, w5, SEP]
    assert row["labels"] == [P] * 6 + [w2, w3, SEP] + [P] * 6 + [w5, SEP]
    (row,), _ = encoded([{"messages": chat}], tokenizer, train_on_prompts=True)
    assert row["labels"] == [P, *row["input_ids"][1:]]


def test_a_chat_is_written_as_its_template_writes_it():
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for row in chats(5):
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert "".join(text for text, _ in chat_spans(row["messages"], tokenizer)) == whole


def test_a_template_that_writes_beginnings_otherwise_is_an_error():
    tokenizer = language_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(
        DataError, match="chat template writes a beginning of a chat in another way than the chat itself"
    ):
        chat_spans([*chats(1)[0]["messages"], {"role": "user", "content": "word1"}], tokenizer)


def test_messages_without_a_template_are_an_error():
    with pytest.raises(ModelError, match="the tokenizer has no chat template, which a column of messages needs"):
        encoded(chats(2))


# --- the other two ----------------------------------------------------------------------------------------------------


def test_targets_are_labels_and_each_side_has_its_length():
    row = {"source": "word1 word2 word3 word4", "target": "word5 word6 word7"}
    rows, _ = encoded([row], task="seq2seq-lm", max_length=5, max_target_length=4)
    assert rows == [
        {"input_ids": [CLS, *ids_of("word1 word2 word3"), SEP], "labels": [CLS, *ids_of("word5 word6"), SEP]}
    ]


def test_a_masked_model_reads_long_texts_in_pieces():
    rows, _ = encoded([{"text": "word1 word2 word3 word4 word5"}, {"text": "word6"}], task="masked-lm", max_length=4)
    assert [row["input_ids"] for row in rows] == [
        [CLS, *ids_of("word1 word2"), SEP],
        [CLS, *ids_of("word3 word4"), SEP],
        [CLS, *ids_of("word5"), SEP],
        [CLS, *ids_of("word6"), SEP],
    ]


def test_texts_without_a_word_to_mask_are_left_out():
    rows, notes = encoded([{"text": ""}, {"text": "word1"}], task="masked-lm")
    assert len(rows) == 1
    assert notes == ("1 of 2 rows of split 'train' were left out: nothing of them is left to learn within 512 tokens.",)


@pytest.mark.parametrize(
    ("task", "columns"), [("causal-lm", ("input_ids",)), ("seq2seq-lm", ("input_ids", "labels")), ("masked-lm", ("input_ids",))]
)  # fmt: skip
def test_columns_to_count_hold_every_id_that_is_looked_up_or_predicted(task, columns):
    assert found(texts(1) if task != "seq2seq-lm" else pairs(1), task=task).token_columns == columns


def test_the_callers_data_set_is_left_as_it_was(tmp_path):
    from texts import files_in

    splits_of(texts(12)).save_to_disk(tmp_path / "saved")
    loaded, before = datasets.load_from_disk(tmp_path / "saved"), files_in(tmp_path)
    settings = FineTuneSettings(task="causal-lm", packing=True)
    find_language_task(loaded, settings).encode(loaded, language_tokenizer(), settings)
    assert files_in(tmp_path) == before
    assert loaded["train"].column_names == ["text"]
