"""Texts for language models: columns found and checked, token ids with the labels that are learned."""

import json

import datasets
import pytest
from texts import CHAT_TEMPLATE, SPECIAL, WORDS, chats, ids_of, language_tokenizer, pairs, texts
from transformers import AutoTokenizer

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import DataError, ModelError, SettingsError
from leanvocab.finetune.language_modeling import find_language_task
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.texts.chats import ChatWriter, as_messages

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
        ({"conversations": chats(1)[0]["messages"], "id": 1}, "messages", ("conversations",)),
        ({"Text": "a", "Id": "b"}, "text", ("Text",)),
        ({"TEXT": "a", "text": "b"}, "text", ("text",)),
        ({"Prompt": "a", "Completion": "b"}, "prompts", ("Prompt", "Completion")),
        ({"instruction": "a", "input": "b", "output": "c"}, "prompts", ("instruction", "input", "output")),
        ({"instruction": "a", "output": "c"}, "prompts", ("instruction", "output")),
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
        ([{"words": "a"}], {}, r"found nothing to learn from: looked for prompt \+ completion, source \+ target, "
         r"instruction \+ input \+ output, instruction \+ output, messages, conversations, text, sentence; the columns are "
         "words. Name them with prompt_column and completion_column, or text_columns"),
        ([{"text": "a"}], {"task": "seq2seq-lm"}, r"looked for prompt \+ completion, "
         r"source \+ target, instruction \+ input \+ output, instruction \+ output; the columns are text"),
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


def test_what_is_learned_where_several_columns_could_be_is_said():
    _, notes = encoded([{**pairs(1)[0], **chats(1)[0]}])
    assert notes == ("Of the columns, prompt + completion are learned, and not messages: name others to learn.",)
    assert encoded([{**pairs(1)[0], **texts(1)[0]}], text_columns=("text",))[1] == ()


def test_speakers_and_their_values_are_messages():
    chat = [
        {"from": "system", "value": "word3"},
        {"from": "human", "value": "word1"},
        {"from": "gpt", "value": "word2"},
    ]
    roles = [
        {"role": role, "content": turn["value"]}
        for role, turn in zip(("system", "user", "assistant"), chat, strict=True)
    ]
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    assert encoded([{"conversations": chat}], tokenizer) == encoded([{"messages": roles}], tokenizer)


def test_instructions_are_prompts_with_their_inputs_where_they_have_any():
    rows = [
        {"instruction": "word1", "input": "word2", "output": "word3"},
        {"instruction": "word1", "input": "", "output": "word3"},
        {"instruction": "word1", "input": None, "output": "word3"},
    ]
    plain = [{"prompt": prompt, "completion": "word3"} for prompt in ("word1\n\nword2\n\n", "word1\n\n", "word1\n\n")]
    made, notes = encoded(rows)
    assert made == encoded(plain)[0]
    assert notes == ("A prompt is instruction and input, with a blank line after each.",)
    assert encoded(rows, task="seq2seq-lm")[0] == encoded(plain, task="seq2seq-lm")[0]


@pytest.mark.parametrize("knobs", [{}, {"train_on_prompts": True}])
def test_a_chat_that_cannot_be_written_is_named_by_its_row(knobs):
    tokenizer = language_tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    table = chats(8)
    table[6] = {"messages": [{"role": "system", "content": "word1"}, *table[6]["messages"]]}
    with pytest.raises(
        DataError, match=r"^row 6 of split 'train': .*System role not supported; change that chat, leave"
    ):
        encoded(table, tokenizer, **knobs)
    tokenizer.chat_template = CHAT_TEMPLATE
    offers = [{**row, "tools": "[]"} for row in chats(3)] + [{**chats(1)[0], "tools": '{"name": "a"}'}]
    with pytest.raises(DataError, match=r"^row 3 of split 'train': column 'tools' holds .*; expected a list of tools"):
        encoded(offers, tokenizer, **knobs)


@pytest.mark.parametrize("value", ["hello", 3, {"role": "user", "content": "a"}])
def test_a_column_of_messages_that_are_no_lists_is_an_error(value):
    with pytest.raises(DataError, match=r"column 'messages' of split 'train' holds .*; expected lists of messages"):
        found([{"messages": value}])


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
        assert "".join(text for text, _ in ChatWriter(tokenizer).spans(row["messages"], 512)) == whole


def test_a_template_that_writes_beginnings_otherwise_is_an_error():
    tokenizer = language_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(
        DataError, match="chat template writes a beginning of a chat in another way than the chat itself"
    ):
        ChatWriter(tokenizer).spans([*chats(1)[0]["messages"], {"role": "user", "content": "word1"}], 512)


USER, REPLY, THINKING = (len(SPECIAL) + WORDS.index(word) for word in ("word298", "word299", "word297"))
# As Qwen3's: the last reply alone has its reasoning.
THINKING_TEMPLATE = (
    "{% for message in messages %}{{ '[CLS] ' + ('word298 ' if message['role'] == 'user' else 'word299 ') }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ 'word297 ' }}{% endif %}{{ message['content'] + ' [SEP] ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[CLS] word299 ' }}{% endif %}"
)
MARKING_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[CLS] word298 ' + message['content'] + ' [SEP] ' }}"
    "{% else %}{{ '[CLS] word299 ' }}{%- generation -%}{{ ('word297 ' if loop.last else '') + message['content'] + ' [SEP] ' }}"
    "{%- endgeneration -%}{% endif %}{% endfor %}"
)


def chat_of(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]


def learned(chat, template, **knobs):
    """The ids of a chat, those that are learned, and the notes."""
    tokenizer = language_tokenizer()
    tokenizer.chat_template = template
    (row,), notes = encoded([{"messages": chat}], tokenizer, **knobs)
    return row["input_ids"], [label for label in row["labels"] if label != P], notes


def test_the_last_reply_alone_is_learned_where_the_template_writes_earlier_ones_otherwise_and_that_is_said():
    w1, w2, w3, w4 = ids_of("word1 word2 word3 word4")
    ids, labels, notes = learned(chat_of("word1", "word2", "word3", "word4"), THINKING_TEMPLATE)
    assert ids == [CLS, USER, w1, SEP, CLS, REPLY, w2, SEP, CLS, USER, w3, SEP, CLS, REPLY, THINKING, w4, SEP]
    assert labels == [THINKING, w4, SEP]
    assert notes == (
        "1 of 1 rows of split 'train' are chats of which the last reply alone is learned: the tokenizer's chat template writes a "
        "chat in another way as it goes on, and marks no reply ({% generation %}).",
    )
    _, labels, notes = learned(chat_of("word1", "word4"), THINKING_TEMPLATE)
    assert (labels, notes) == ([THINKING, w4, SEP], ())


def test_what_follows_the_last_reply_is_left_out_where_that_alone_is_learned():
    ids, labels, notes = learned(chat_of("word1", "word2", "word3"), THINKING_TEMPLATE)
    w1, w2 = ids_of("word1 word2")
    assert (ids, labels, len(notes)) == ([CLS, USER, w1, SEP, CLS, REPLY, THINKING, w2, SEP], [THINKING, w2, SEP], 1)


def test_whole_chats_are_learned_whatever_their_template_does():
    chat = chat_of("word1", "word2", "word3", "word4")
    for template in (THINKING_TEMPLATE, "{{ messages | length }} " + CHAT_TEMPLATE):
        ids, labels, notes = learned(chat, template, train_on_prompts=True)
        assert (labels, notes) == (ids[1:], ())


def test_replies_that_a_template_marks_are_learned():
    chat = chat_of("word1", "word2", "word3", "word4")
    w1, w2, w3, w4 = ids_of("word1 word2 word3 word4")
    ids, labels, notes = learned(chat, MARKING_TEMPLATE)
    assert ids == [CLS, USER, w1, SEP, CLS, REPLY, w2, SEP, CLS, USER, w3, SEP, CLS, REPLY, THINKING, w4, SEP]
    assert (labels, notes) == ([w2, SEP, THINKING, w4, SEP], ())


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, "[UNK] " + CHAT_TEMPLATE], ids=["plain", "with a beginning of its own"]
)
def test_a_chat_may_begin_with_a_reply(template):
    w1, w2, w3 = ids_of("word1 word2 word3")
    ids, labels, notes = learned(chat_of("word1", "word2", "word3", first="assistant"), template)
    begin = [SPECIAL.index("[UNK]")] if template.startswith("[UNK]") else []
    assert ids == [*begin, CLS, REPLY, w1, SEP, CLS, USER, w2, SEP, CLS, REPLY, w3, SEP]
    assert (labels, notes) == ([w1, SEP, w3, SEP], ())


def test_a_first_reply_that_cannot_be_found_is_an_error_that_says_what_to_do():
    without_question = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
    with pytest.raises(DataError, match=r"replies cannot be found in it; mark them in the template \({% generation %}"):
        learned(chat_of("word1", "word2", first="assistant"), without_question)


def test_nulls_that_a_table_puts_into_calls_of_tools_are_not_written():
    template = CHAT_TEMPLATE.replace(
        "message['content'] +", "message['content'] + (message['arguments'] | tojson if message['arguments'] else '') +"
    )
    tokenizer = language_tokenizer()
    tokenizer.chat_template = template
    calls = [{"city": "Oslo", "days": [{"first": 1}, {"last": 2}]}, {"query": "x"}]
    table = datasets.Dataset.from_list(
        [{"messages": [*chat_of("w"), {"role": "assistant", "content": "", "arguments": call}]} for call in calls]
    )
    for chat, call in zip(table["messages"], calls, strict=True):
        (before, _), (reply, is_learned), *_ = ChatWriter(tokenizer).spans(as_messages(chat), 512)
        assert (json.loads(reply.removesuffix(" [SEP] ")), is_learned) == (call, True)
        assert before == "[CLS] word298 w [SEP] [CLS] word299 "


@pytest.mark.parametrize("as_column", [list, json.dumps])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKING_TEMPLATE])
@pytest.mark.parametrize("knobs", [{}, {"train_on_prompts": True}])
def test_a_template_is_told_the_tools_that_a_chat_is_offered(as_column, template, knobs):
    offering = "{% for tool in tools or [] %}{{ tool.name + ' ' + (tool.unit or 'word9') + ' ' }}{% endfor %}"
    tokenizer = language_tokenizer()
    tokenizer.chat_template = offering + template
    tools = [{"name": "word5"}, {"name": "word6", "unit": "word7"}]
    offers = [as_column(tools), as_column([]), None]
    made, notes = encoded(
        [{"messages": chat_of("word1", "word2"), "tools": offer} for offer in offers], tokenizer, **knobs
    )
    assert made[0]["input_ids"] == [*ids_of("word5 word9 word6 word7"), *made[1]["input_ids"]]
    assert (made[1], notes) == (made[2], ())


def test_tools_that_are_none_are_an_error():
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for wrong in ("weather", '{"name": "weather"}'):
        with pytest.raises(
            DataError, match=r"column 'tools' holds .*weather.*; expected a list of tools, or JSON of one"
        ):
            encoded([{"messages": chat_of("word1", "word2"), "tools": wrong}], tokenizer)


@pytest.mark.parametrize("as_column", [dict, json.dumps])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKING_TEMPLATE])
@pytest.mark.parametrize("knobs", [{}, {"train_on_prompts": True}])
def test_a_template_is_told_the_values_of_a_chat_and_those_of_the_settings(as_column, template, knobs):
    """As TRL reads the column of that name; what stands in a row goes before what was set for all."""
    tokenizer = language_tokenizer()
    tokenizer.chat_template = "{{ 'word5 ' if enable_thinking else 'word6 ' }}{{ (style or '') + ' ' }}" + template
    rows = [{"messages": chat_of("word1", "word2")}] * 2
    values = [as_column({"enable_thinking": True}), None]
    beside = [{**row, "chat_template_kwargs": value} for row, value in zip(rows, values, strict=True)]
    thinking = '{"enable_thinking": true, "style": "word7"}'
    (plain, _), _ = encoded(rows, tokenizer, **knobs)
    assert plain["input_ids"][:1] == ids_of("word6")
    own, notes = encoded(beside, tokenizer, **knobs)
    assert [row["input_ids"][:1] for row in own] == [ids_of("word5"), ids_of("word6")]
    assert (own[1], own[0]["input_ids"][1:], notes) == (plain, plain["input_ids"][1:], ())
    told, _ = encoded(beside, tokenizer, chat_template_kwargs=thinking.replace("true", "false"), **knobs)
    assert [row["input_ids"][:2] for row in told] == [ids_of("word5 word7"), ids_of("word6 word7")]


def test_values_that_a_template_does_not_use_are_said_and_refused_where_they_were_set():
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    row = {"messages": chat_of("word1", "word2")}
    _, notes = encoded(
        [{**row, "chat_template_kwargs": {"thinks": True}}, {**row, "chat_template_kwargs": None}], tokenizer
    )
    assert notes == (
        "1 of 2 rows of split 'train' have values in column 'chat_template_kwargs' that the tokenizer's chat template "
        "does not use.",
    )
    for wrong, message in (
        ('{"thinks": true}', "chat_template_kwargs sets 'thinks', which the tokenizer's chat template does not use"),
        ("thinks", "chat_template_kwargs holds 'thinks'; expected an object of names and values, or JSON of one"),
        ('{"tokenize": true}', "chat_template_kwargs sets 'tokenize', which is no value of a template"),
    ):
        with pytest.raises(SettingsError, match=message):
            encoded([row], tokenizer, chat_template_kwargs=wrong)
    with pytest.raises(
        DataError, match=r"^row 0 of split 'train': chat_template_kwargs sets 'tools', which is no value"
    ):
        encoded([{**row, "chat_template_kwargs": '{"tools": []}'}], tokenizer)
    with pytest.raises(SettingsError, match="are for the template of chats, and the data are text; leave them out"):
        encoded([{"text": "word1"}], tokenizer, chat_template_kwargs='{"a": 1}')


def test_chats_whose_replies_have_another_role_are_an_error_that_names_the_roles():
    chat = [{"role": "human", "content": "word1"}, {"role": "gpt", "content": "word2"}]
    with pytest.raises(
        DataError, match=r"role 'assistant', and column 'messages' has the roles gpt, human\. Rename the role"
    ):
        learned(chat, CHAT_TEMPLATE)
    assert learned(chat, CHAT_TEMPLATE, train_on_prompts=True)[1]


def test_a_chat_without_a_reply_has_nothing_to_learn():
    with pytest.raises(DataError, match="nothing is left to learn"):
        learned(chat_of("word1"), CHAT_TEMPLATE)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for message in messages %}{{ message.content + 1 }}{% endfor %}", "can only concatenate str"),
    ],
)
def test_a_chat_that_the_template_refuses_is_an_error_that_says_why(template, reason):
    with pytest.raises(
        DataError, match=rf"refuses a chat of the roles user, assistant that begins with .*word1.*: {reason}"
    ):
        learned(chat_of("word1", "word2"), template)


def test_a_beginning_that_the_template_refuses_is_not_needed():
    system = "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}" + CHAT_TEMPLATE
    chat = [{"role": "user", "content": "word1"}, *chat_of("word2", "word3")]
    w3 = ids_of("word3")[0]
    assert learned(chat, system)[1] == [w3, SEP]


def test_long_chats_are_written_no_more_often_than_there_are_tokens_to_learn(monkeypatch):
    tokenizer, calls = language_tokenizer(), []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *args, **kw: calls.append(args) or plain(*args, **kw))
    tokenizer.chat_template = CHAT_TEMPLATE
    spans = ChatWriter(tokenizer).spans(chat_of(*["word1"] * 400), 16)
    assert len(calls) <= 2 * 17 + 1
    assert sum(learns for _, learns in spans) == 17
    assert "".join(text for text, _ in spans) == plain(chat_of(*["word1"] * 400), tokenize=False)
    calls.clear()
    tokenizer.chat_template = MARKING_TEMPLATE
    assert sum(learns for _, learns in ChatWriter(tokenizer).spans(chat_of(*["word1"] * 400), 512)) == 200
    assert len(calls) == 1


@pytest.mark.shared_data
def test_chats_of_two_turns_are_learned_with_the_template_of_qwen3(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/qwen3")
    chat = chat_of("What is two?", "A number.", "And three?", "<think>\nEasy.\n</think>\n\nAnother.")
    spans = ChatWriter(tokenizer).spans(chat, 512, tally := {"by TRL": 0, "last reply": 0})
    assert "".join(text for text, _ in spans) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert [text for text, learns in spans if learns] == ["<think>\nEasy.\n</think>\n\nAnother.<|im_end|>\n"]
    assert tally == {"by TRL": 0, "last reply": 1}
    first = chat_of("Hello!", "Hi.", "Bye.", first="assistant")
    assert [text for text, learns in ChatWriter(tokenizer).spans(first, 512) if learns][-1].endswith("Bye.<|im_end|>\n")


def test_the_training_template_of_trl_marks_every_reply_of_a_chat():
    templates = pytest.importorskip("trl.chat_template_utils")
    tokenizer = language_tokenizer()
    tokenizer.chat_template = templates.qwen3_chat_template
    chat = chat_of("word1", "word2", "word3", "word4")
    spans = ChatWriter(tokenizer).spans(chat, 512, tally := {"by TRL": 0, "last reply": 0})
    replies = [text.split()[-1] for text, learns in spans if learns]
    assert (replies, tally) == (["word2<|im_end|>", "word4<|im_end|>"], {"by TRL": 1, "last reply": 0})
    (_, _, notes) = learned(chat, templates.qwen3_chat_template)
    assert notes == (
        "1 of 1 rows of split 'train' were written by TRL's training template, since the tokenizer's own does not say where "
        "their replies are.",
    )


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


def test_a_chat_in_json_is_what_it_says_nulls_and_absent_keys_alike():
    call = {"role": "assistant", "tool_calls": [{"arguments": {"unit": None}}, {"arguments": {}}]}
    chat = [{"role": "user", "content": "word5"}, {**call, "content": None}, call]
    assert as_messages(json.dumps(chat)) == chat


def test_chats_that_a_table_holds_as_json_are_chats():
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = chat_of("word1", "word2")
    assert encoded([{"messages": json.dumps(chat)}], tokenizer) == encoded([{"messages": chat}], tokenizer)
