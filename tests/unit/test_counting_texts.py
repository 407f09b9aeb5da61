"""Texts are data: counts of texts with a tokenizer are those of tokenizing everything first."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
from texts import CHAT_TEMPLATE, language_tokenizer, small_tokenizer, write, write_splits

import leanvocab as lv
from leanvocab.errors import DataError

TEXTS = ["word1 word2 word3", "", "word4 word5  word1 word6", "word1 word2 word3"]
SECONDS = ["word7", "word8 word1", "word4", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


def counted(*of_rows: Any) -> dict[int, int]:
    return dict(Counter(token_id for rows in of_rows for row in rows for token_id in row))


def as_dict(counts: lv.TokenCounts) -> dict[int, int]:
    return {int(token_id): int(counts.counts[token_id]) for token_id in counts.token_ids}


KINDS: dict[str, Callable[[], Any]] = {
    "a list": lambda: TEXTS,
    "an iterator": lambda: iter(TEXTS),
    "lists of texts": lambda: [TEXTS[:3], TEXTS[3:]],
    "rows": lambda: [{"text": text, "label": 1} for text in TEXTS],
    "an iterator of rows": lambda: ({"text": text} for text in TEXTS),
    "rows with nulls": lambda: [{"text": text} for text in [*TEXTS, None]],
    "columns": lambda: {"text": TEXTS, "label": [1, 2, 3, 4]},
    "a column of lists": lambda: {"text": [TEXTS[:1], TEXTS[1:]]},
    "a table": lambda: pa.table({"text": TEXTS, "label": [1, 2, 3, 4]}),
    "a record batch": lambda: pa.RecordBatch.from_pydict({"text": TEXTS}),
    "a table with a dictionary": lambda: pa.table({"text": pa.array(TEXTS).dictionary_encode()}),
    "views of strings": lambda: pa.table({"text": pa.array(TEXTS, pa.string_view())}),
    "views of strings with nulls": lambda: pa.table({"text": pa.array([*TEXTS, None], pa.string_view())}),
    "an Arrow array": lambda: pa.array(TEXTS),
    "a chunked array": lambda: pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    "a numpy array": lambda: np.array(TEXTS),
    "a numpy array of objects": lambda: np.array(TEXTS, dtype=object),
    "a data frame": lambda: pandas.DataFrame({"text": TEXTS}),
    "a data set": lambda: datasets.Dataset.from_dict({"text": TEXTS}),
    "a data set with a transform": lambda: datasets.Dataset.from_dict({"text": TEXTS}).with_transform(lambda rows: {}),
    "a selection": lambda: datasets.Dataset.from_dict({"text": ["no", *TEXTS]}).select([4, 3, 1, 2]),
    "a column of a data set": lambda: datasets.Dataset.from_dict({"text": TEXTS})["text"],
    "splits": lambda: datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": TEXTS[:2]}), test=datasets.Dataset.from_dict({"text": TEXTS[2:]})
    ),
    "a stream": lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    "a stream of rows": lambda: datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_any_kind_of_data_count_as_tokenizing_them_does(tokenizer: Any, kind: str) -> None:
    expected = counted(tokenizer(TEXTS)["input_ids"])
    assert as_dict(lv.count_tokens(KINDS[kind](), tokenizer=tokenizer)) == expected


def test_one_string_is_a_text(tokenizer: Any) -> None:
    assert as_dict(lv.count_tokens("word1 word2", tokenizer=tokenizer)) == counted(
        [tokenizer("word1 word2")["input_ids"]]
    )


def test_files_are_read_as_the_command_reads_them(tokenizer: Any, tmp_path: Path) -> None:
    folder = write_splits(tmp_path / "data")
    with warnings.catch_warnings(
        action="ignore", category=ResourceWarning
    ):  # datasets 3.6 leaves the file open, with pandas 3
        splits = datasets.load_dataset(
            "csv", data_files={"train": str(folder / "train.csv")}, cache_dir=tmp_path / "cache"
        )
    assert lv.count_tokens(folder / "train.csv", tokenizer=tokenizer) == lv.count_tokens(splits, tokenizer=tokenizer)
    tokens = write(tmp_path / "tokens.jsonl", [{"input_ids": [5, 6, 6]}])
    assert as_dict(lv.count_tokens(tokens)) == {5: 1, 6: 2}


def test_pairs_count_with_the_special_tokens_of_pairs(tokenizer: Any) -> None:
    expected = counted(tokenizer(TEXTS, SECONDS)["input_ids"])
    columns = {"premise": TEXTS, "hypothesis": SECONDS}
    assert as_dict(lv.count_tokens(columns, tokenizer=tokenizer)) == expected
    assert as_dict(lv.count_tokens(list(zip(TEXTS, SECONDS, strict=True)), tokenizer=tokenizer)) == expected
    named = {"query": TEXTS, "answer": SECONDS}
    assert as_dict(lv.count_tokens(named, [("query", "answer")], tokenizer=tokenizer)) == expected


def test_named_columns_count_each_by_itself(tokenizer: Any) -> None:
    expected = counted(tokenizer(TEXTS)["input_ids"], tokenizer(SECONDS)["input_ids"])
    counts = lv.count_tokens({"query": TEXTS, "answer": SECONDS}, ["query", "answer"], tokenizer=tokenizer)
    assert as_dict(counts) == expected
    assert counts.columns == ("query", "answer")


def test_token_columns_count_as_they_are_with_a_tokenizer_too(tokenizer: Any) -> None:
    rows = datasets.Dataset.from_dict({"text": ["word1 word2"], "input_ids": [[5, 6]], "labels": [[6, -100]]})
    assert as_dict(lv.count_tokens(rows, tokenizer=tokenizer)) == {5: 1, 6: 2}
    assert as_dict(lv.count_tokens(iter([[5, 6], [6]]), tokenizer=tokenizer)) == {5: 1, 6: 2}
    assert as_dict(lv.count_tokens(np.array([5, 6, 6]), tokenizer=tokenizer)) == {5: 1, 6: 2}
    assert as_dict(lv.count_tokens(rows, "text", tokenizer=tokenizer)) == counted(
        tokenizer(["word1 word2"])["input_ids"]
    )


def test_labels_beside_texts_are_no_token_ids(tokenizer: Any) -> None:
    rows = {"text": ["word1 word2"], "labels": [[0, 1, 1]]}
    assert as_dict(lv.count_tokens(rows, tokenizer=tokenizer)) == counted(tokenizer(["word1 word2"])["input_ids"])


@pytest.mark.parametrize("pairs", [False, True])
def test_texts_are_cut_on_request_alone(tokenizer: Any, pairs: bool) -> None:
    texts = (["word1 word2 word3 word4 word5 word6"] * 3, ["word7 word8 word9"] * 3)[: 1 + pairs]
    data = list(zip(*texts, strict=True)) if pairs else texts[0]
    cut = tokenizer(*texts, truncation=True, max_length=5)["input_ids"]
    assert as_dict(lv.count_tokens(data, tokenizer=tokenizer, max_length=5)) == counted(cut)
    backend = tokenizer.backend_tokenizer
    if not pairs:
        assert as_dict(lv.count_tokens(data, tokenizer=backend, max_length=5)) == counted(cut)
    assert as_dict(lv.count_tokens(data, tokenizer=tokenizer)) == counted(tokenizer(*texts)["input_ids"])


def test_cutting_and_padding_that_a_tokenizer_has_set_does_not_count_and_stays(tokenizer: Any) -> None:
    expected = counted(tokenizer(TEXTS)["input_ids"])
    backend = small_tokenizer().backend_tokenizer
    backend.enable_truncation(3, stride=1, direction="left")
    backend.enable_padding(length=50, pad_id=1, pad_token="x", direction="left")
    before = backend.to_str()
    assert as_dict(lv.count_tokens(TEXTS, tokenizer=backend)) == expected
    assert backend.to_str() == before


def test_a_tokenizer_in_python_is_called_text_by_text() -> None:
    class Slow:
        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1, *map(len, text.split())] for text in texts]}

    assert as_dict(lv.count_tokens(TEXTS, tokenizer=Slow())) == {1: 4, 5: 10}


def test_names_of_special_tokens_in_a_text_count_as_calling_the_tokenizer_does() -> None:
    texts = ["word1 [SEP] word2"]
    for tokenizer in (small_tokenizer(), small_tokenizer(split_special_tokens=True)):  # type: ignore[arg-type]
        counts = as_dict(lv.count_tokens(texts, tokenizer=tokenizer))
        assert counts == counted(tokenizer(texts)["input_ids"])
        assert (counts[3] == 2) is not tokenizer.split_special_tokens


def test_a_processor_stands_for_its_tokenizer(tokenizer: Any) -> None:
    class Processor:
        def __init__(self) -> None:
            self.tokenizer = tokenizer

    assert lv.count_tokens(TEXTS, tokenizer=Processor()) == lv.count_tokens(TEXTS, tokenizer=tokenizer)


CHAT = [{"role": "user", "content": "word1 word2"}, {"role": "assistant", "content": "word3"}]


@pytest.fixture(scope="module")
def writes_chats() -> Any:
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": CHAT}],
        [{"messages": str(CHAT).replace("'", '"')}],
        [{"conversations": [{"from": "human", "value": "word1 word2"}, {"from": "gpt", "value": "word3"}]}],
        [CHAT],
        [{"chosen": CHAT}],
    ],
)
def test_chats_count_as_the_template_writes_them(writes_chats: Any, rows: Any) -> None:
    tokenizer = writes_chats
    expected = counted([tokenizer.apply_chat_template(CHAT)["input_ids"]])
    assert as_dict(lv.count_tokens(rows, tokenizer=tokenizer)) == expected
    if isinstance(rows[0], dict):
        assert as_dict(lv.count_tokens(datasets.Dataset.from_list(rows), tokenizer=tokenizer)) == expected


def test_prompts_count_alone_and_with_what_follows(writes_chats: Any) -> None:
    tokenizer = writes_chats
    rows = [{"prompt": "word1 word2", "chosen": " word3", "rejected": " word4", "label": True}]
    expected = counted(tokenizer(["word1 word2", "word1 word2 word3", "word1 word2 word4"])["input_ids"])
    assert as_dict(lv.count_tokens(rows, tokenizer=tokenizer)) == expected
    rows = [{"prompt": CHAT[:1], "completion": CHAT[1:]}]
    written = [
        tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"],
        tokenizer.apply_chat_template(CHAT)["input_ids"],
    ]
    assert as_dict(lv.count_tokens(rows, tokenizer=tokenizer)) == counted(written)


REFUSED = [
    (["text"], {"max_length": 5, "tokenizer": None}, r"max_length=5 cuts texts: expected 1 or more, and a tokenizer"),
    (["text"], {"max_length": 0}, r"max_length=0 cuts texts: expected 1 or more"),
    (["text"], {"num_workers": 2}, r"num_workers=2 is of token ids, and this data is text: expected None\. A tokenizer takes all "
     r"cores, or as many threads as RAYON_NUM_THREADS in the environment says"),
    (["text"], {"full_size": 0}, r"expected full_size of 1 or more, or None, got 0"),
    (["word1 word2"], {"full_size": 2}, r"the tokenizer gave id \d+: expected ids below full_size=2"),
    (["text"], {"columns": "a"}, r"columns=\['a'\] names columns, but the data has none"),
    ({"a": ["text"]}, {}, r"found no column of texts: looked for messages, .*text; the data has 'a' \(a list of str\)\. Name"),
    ({"a": ["text"]}, {"columns": "b"}, r"found no column 'b': the data has 'a'"),
    ({"text": [1.5]}, {}, r"expected texts of column 'text'"),
    ({"a": ["text", None], "b": ["a", "b"]}, {"columns": [("a", "b")]}, r"columns 'a' and 'b' are no pairs: rows 0 to 1 "),
    ({"messages": [CHAT]}, {}, r"found chats of column 'messages', and the tokenizer has no chat template"),
    ({"text": ["a", "b"], "b": ["a"]}, {}, r"expected columns of as many rows, got {'text': 2, 'b': 1}"),
    ([{"text": "a"}, {"body": "b"}], {}, r"row 1 has no column 'text', as rows before it have: it has 'body'"),
    (3, {}, r"cannot find texts in int: expected a string, a path"),
    (["text"], {"tokenizer": 3}, r"expected a tokenizer of transformers or of tokenizers, got int"),
    (["a \ud800 b"], {}, r"expected texts"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "options", "message"), REFUSED)
def test_what_cannot_be_counted_is_said(tokenizer: Any, data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        lv.count_tokens(data, **{"tokenizer": tokenizer, **options})


def test_an_iterator_is_read_as_it_goes(tokenizer: Any) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for text in TEXTS:
            read += 1
            yield text

    counts = lv.count_tokens(texts(), tokenizer=tokenizer)
    assert read == len(TEXTS)
    assert counts == lv.count_tokens(TEXTS, tokenizer=tokenizer)
