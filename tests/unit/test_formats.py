"""Files as they are found: what stands in them is what is read, and what cannot be read is said with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from texts import rows, write

from leanvocab.errors import DataError
from leanvocab.texts.data_files import load_splits


def read(path: Path, *texts: str) -> list[dict[str, Any]]:
    return load_splits(path, None, texts)["train"].to_list()


def file(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["01", "02"], ["01", "02"]),
        (["007", "7"], ["007", "7"]),
        (["1", "2"], [1, 2]),
        (["1", ""], [1, None]),
        (["1.0", "0.0"], [1.0, 0.0]),
        (["1.50", "nan"], [1.5, None]),
        (["1", "2.5"], [1.0, 2.5]),
        (["1", "x"], ["1", "x"]),
        (["true", "false"], ["true", "false"]),
        (["2020-01-01", "2020-01-02"], ["2020-01-01", "2020-01-02"]),
        (["99999999999999999999", "1"], ["99999999999999999999", "1"]),
    ],
)
def test_a_column_of_a_csv_is_of_numbers_where_each_is_written_as_one(
    tmp_path: Path, written: list[str], expected: list[Any]
) -> None:
    path = file(tmp_path, "a.csv", "x,label\n" + "".join(f"a,{value}\n" for value in written))
    assert [row["label"] for row in read(path)] == expected


@pytest.mark.parametrize("name", ["text", "Text", "sentence1", "prompt", "words"])
def test_columns_of_texts_are_texts_whatever_they_look_like(tmp_path: Path, name: str) -> None:
    path = file(tmp_path, "a.csv", f'{name},label\n"012",1\n1.50,0\n')
    assert [row[name] for row in read(path, "words")] == ["012", "1.50"]
    path = file(tmp_path, "a.jsonl", f'{{"{name}": 5}}\n{{"{name}": "x"}}\n{{"{name}": 2.50}}\n')
    assert [row[name] for row in read(path, "words")] == ["5", "x", "2.5"]


CHATS = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"arguments": {"city": "Paris"}}]},
        ]
    },
    {"messages": [{"role": "user", "content": None, "name": "x"}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"a": 1}}, {"arguments": {"a": "b"}}]}]},
]


def test_absent_keys_stay_absent_and_nulls_stay_nulls(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in CHATS))
    assert [{"messages": json.loads(row["messages"])} for row in read(path)] == CHATS
    alike = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}] * 2}]
    assert read(file(tmp_path, "b.jsonl", "".join(json.dumps(row) + "\n" for row in alike))) == alike


def test_rows_are_as_long_as_they_are(tmp_path: Path) -> None:
    long = [{"text": "x" * 3_000_000, "label": 1}, {"text": "y" * 5_000_000, "label": 0}]
    for suffix in (".jsonl", ".json", ".csv"):
        assert read(write(tmp_path / f"long{suffix}", long)) == long


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", json.dumps(rows(3)), rows(3)),
        ("a.json", json.dumps(rows(3), indent=2), rows(3)),
        ("a.jsonl", json.dumps(rows(2)), rows(2)),
        (
            "a.jsonl",
            '{"text": "a", "x": 1}\n\n{"text": "b", "x": "y"}\n{"text": "c", "x": [1]}',
            [("1",), ("y",), ("[1]",)],
        ),
        ("a.jsonl", '{"text": "a", "x": 1}\n{"text": "b", "x": 2.5}\n{"text": "c"}', [(1.0,), (2.5,), (None,)]),
        ("a.tsv", "text\tlabel\na, b\t1\n", [{"text": "a, b", "label": 1}]),
        ("a.csv", "text;label\na, b;1\n", [{"text": "a, b", "label": 1}]),
        ("a.csv", "text\tlabel\na; b\t1\n", [{"text": "a; b", "label": 1}]),
        ("a.csv", '\ufefftext,label\r\n"a\r\nb",1\r\n', [{"text": "a\r\nb", "label": 1}]),
        ("a.csv", "text\nonly one column\n", [{"text": "only one column"}]),
        ("a.csv.gz", gzip.compress(b"text,label\na,1\n", mtime=0), [{"text": "a", "label": 1}]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0), [{"text": "a"}]),
        ("A.CSV", "text\na\n", [{"text": "a"}]),
        ("a.txt.gz", gzip.compress(b"one\n\ntwo\n", mtime=0), [{"text": "one"}, {"text": "two"}]),
    ],
)
def test_valid_files_are_read(tmp_path: Path, name: str, content: Any, expected: list[Any]) -> None:
    found = read(file(tmp_path, name, content))
    assert [(row["x"],) for row in found] == expected if isinstance(expected[0], tuple) else found == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,label\ncafé,1\n".encode("latin-1"),
            r"is not in UTF-8 \(byte 0xe9 in line 2\).*iconv -f LATIN1",
        ),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), r"is not in UTF-8 \(byte 0xe9 in line 1\)"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "is not in UTF-8.*iconv -f UTF-16"),
        ("a.txt", "é".encode("latin-1"), "^[^ ]*a.txt is not in UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"line 2 is no JSON \(Expecting value"),
        ("a.jsonl", '{"text": "a"}\n5\n', "line 2 is a int; expected a row in each line"),
        ("a.json", "null", "line 1 is a NoneType; expected a row"),
        ("a.json", "[1]", "row 0 is a int; expected an object"),
        ("a.json", "[{", "cannot be read as .json"),
        ("a.jsonl", "[" * 100_000, "cannot be read as .jsonl"),
        ("a.jsonl", "", "it is empty; expected a row in each line"),
        ("a.csv", "", "it is empty; expected a line with the names of columns"),
        ("a.csv.gz", b"no gzip", "cannot be read as .csv: Not a gzipped file"),
        ("a.parquet.gz", gzip.compress(b"no parquet", mtime=0), "cannot be read as .parquet"),
        ("a.xlsx.gz", b"", "is of an unknown type"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(file(tmp_path, name, content))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"],
            {"train": 2, "test": 2},
        ),
        (["train/a.csv", "train/b.csv", "validation/a.csv"], {"train": 4, "validation": 2}),
        (["Train.csv", "TEST.csv"], {"train": 2, "test": 2}),
        (["train_0.csv", "train_1.csv", "dev_0.csv"], {"train": 4, "validation": 2}),
        (["part-0.csv", "part-1.csv", "part-2.csv"], {"train": 6}),
        (["train.csv.gz", "validation.jsonl"], {"train": 2, "validation": 2}),
        (["only.csv"], {"train": 2}),
    ],
)
def test_folders_are_read_as_they_come(tmp_path: Path, files: list[str], expected: dict[str, int]) -> None:
    for name in files:
        path = write(tmp_path / "d" / name.removesuffix(".gz"), rows(2))
        if name.endswith(".gz"):
            (path.parent / (path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    assert {name: len(split) for name, split in load_splits(tmp_path / "d").items()} == expected


def test_files_whose_names_say_nothing_are_not_guessed(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        write(tmp_path / name, rows(2))
    with pytest.raises(DataError, match=r"holds no file with a split in its name.*got a.csv, b.csv"):
        load_splits(tmp_path)


def test_shards_of_like_types_are_one(tmp_path: Path) -> None:
    tables = [
        pa.table({"text": pa.array(["a"], pa.string()), "label": pa.array([1], pa.int32())}),
        pa.table({"text": pa.array(["b"], pa.large_string()), "label": pa.array([2], pa.int64())}),
    ]
    for number, table in enumerate(tables):
        pa.parquet.write_table(table, tmp_path / f"train-{number:05d}-of-00002.parquet")
    assert load_splits(tmp_path)["train"].to_list() == [{"text": "a", "label": 1}, {"text": "b", "label": 2}]


def test_columns_that_come_late_and_change_their_kind_are_whole(tmp_path: Path) -> None:
    many: list[dict[str, Any]] = [{"n": number} for number in range(10_001)]
    path = file(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in [*many, {"n": "x", "late": {"a": 1}}]))
    found = load_splits(path)["train"]
    assert isinstance(found.features["n"], datasets.Value)
    assert (found["n"][0], found["n"][-1]) == ("0", "x")
    assert (found["late"][0], found["late"][-1]) == (None, {"a": 1})
