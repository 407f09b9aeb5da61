"""Files, folders and data sets → splits; nothing is written beside them."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from texts import files_in, rows, write, write_splits

from leanvocab.errors import DataError
from leanvocab.texts.data_files import load_splits


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_file_is_the_training_split(tmp_path, suffix):
    path = write(tmp_path / f"reviews{suffix}", rows(5))
    splits = load_splits(path)
    assert list(splits) == ["train"]
    assert splits["train"].to_list() == rows(5)
    assert files_in(tmp_path) == [f"reviews{suffix}"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_folders_files_are_splits_by_their_names(tmp_path, suffix):
    write_splits(tmp_path, suffix)
    (tmp_path / "README.md").write_text("not data")
    assert {name: len(split) for name, split in load_splits(tmp_path).items()} == {"train": 48, "validation": 24}


def test_names_of_the_hub_and_of_shards_are_understood(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation_matched-00000-of-00001", "dev"):
        write(tmp_path / f"mnli/{name}.parquet", rows(4))
    found = load_splits(tmp_path, "mnli")
    assert {name: len(split) for name, split in found.items()} == {
        "train": 8,
        "validation_matched": 4,
        "validation": 4,
    }


def test_a_configuration_may_be_a_prefix_of_the_files_names(tmp_path):
    write(tmp_path / "cola.train.parquet", rows(3))
    write(tmp_path / "sst2.train_partial.parquet", rows(4))
    assert len(load_splits(tmp_path, "sst2")["train"]) == 4
    with pytest.raises(DataError, match=r"several files claim the split 'train': cola.train.parquet, sst2"):
        load_splits(tmp_path)
    with pytest.raises(DataError, match="holds no file of the configuration 'qqp' with a split in its name"):
        load_splits(tmp_path, "qqp")


def test_a_saved_data_set_is_read_and_left_as_it_was(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows(5))).save_to_disk(tmp_path / "saved")
    before = files_in(tmp_path)
    assert load_splits(tmp_path / "saved")["train"].to_list() == rows(5)
    assert files_in(tmp_path) == before


def test_splits_may_be_given_as_files_and_data_sets_by_name(tmp_path):
    splits = load_splits({"train": datasets.Dataset.from_list(rows(4)), "test": write(tmp_path / "x.jsonl", rows(2))})
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "test": 2}
    assert list(load_splits(datasets.Dataset.from_list(rows(4)))) == ["train"]


def test_line_breaks_and_the_word_null_are_text(tmp_path):
    texts = [{"text": "first\nsecond", "label": 0}, {"text": "null", "label": 1}, {"text": "NA, or not", "label": 1}]
    assert load_splits(write(tmp_path / "t.csv", texts))["train"]["text"][:] == [row["text"] for row in texts]


def test_a_file_of_lines_is_a_column_of_text(tmp_path):
    (tmp_path / "corpus.txt").write_text("one two\n\nthree\u2028four\n")
    assert load_splits(tmp_path / "corpus.txt")["train"].to_list() == [{"text": "one two"}, {"text": "three\u2028four"}]


def test_class_names_in_a_parquet_file_are_kept(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_list(rows(3), features=features).to_parquet(tmp_path / "train.parquet")
    assert load_splits(tmp_path)["train"].features["label"].names == ["no", "yes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "", "cannot be read as .csv: it is empty"),
        ("data.csv", "text,label\n", "split 'train' is empty: expected at least one row"),
        ("data.csv", "text,label\na,1,2\n", r"cannot be read as .csv: CSV parse error: Expected 2 columns, got 3"),
        ("data.csv", "text,text,label\na,b,1\n", "data.csv has the column 'text' more than once; give its columns"),
        ("data.jsonl", "[1]", "cannot be read as .jsonl"),
        ("data.parquet", "no parquet", "cannot be read as .parquet"),
        (
            "data.xlsx",
            "",
            r"data.xlsx is of an unknown type; expected one of .csv, .tsv, .jsonl, .json, .parquet, .txt",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_splits(tmp_path / name)


def test_a_missing_file_an_empty_folder_and_an_unknown_name_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"nothing.csv does not exist"):
        load_splits(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="holds no file with a split in its name"):
        load_splits(tmp_path)
    with pytest.raises(DataError, match="'no/such-data' is neither a file nor a folder here, and the hub did not give"):
        load_splits("no/such-data", "cola")
    with pytest.raises(DataError, match="cannot take a Table as a data set; expected a file, a folder"):
        load_splits(pa.table({"text": ["a"]}))
    with pytest.raises(DataError, match="split 'train' is a IterableDataset"):
        load_splits({"train": datasets.Dataset.from_list(rows(2)).to_iterable_dataset()})


def shards(folder, tables):
    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(table, folder / f"train-{number:05d}-of-{len(tables):05d}.parquet")
    return folder


def test_nothing_is_done_for_each_shard_but_reading_it(tmp_path, monkeypatch):
    made = []
    plain = datasets.Dataset.__init__
    monkeypatch.setattr(
        datasets.Dataset, "__init__", lambda self, *args, **kw: made.append(1) or plain(self, *args, **kw)
    )
    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", lambda dataset: pytest.fail("a digest was made"))
    shards(tmp_path, [pa.table({"text": [f"word{number}"], "label": [number]}) for number in range(40)])
    train = load_splits(tmp_path)["train"]
    assert train["label"][:] == list(range(40))
    assert len(made) < 5


def test_shards_keep_the_classes_that_each_declares(tmp_path):
    def declared(*names):
        features = datasets.Features(label=datasets.ClassLabel(names=list(names)))
        return datasets.Dataset.from_dict({"label": [0, 1]}, features=features).data.table

    alike = load_splits(shards(tmp_path, [declared("bad", "good")] * 3))["train"]
    assert (alike["label"][:], alike.features["label"].names) == ([0, 1] * 3, ["bad", "good"])
    shards(tmp_path, [declared("bad", "good"), declared("bad", "good"), declared("good", "bad")])
    with pytest.raises(DataError, match="files of split 'train' hold other columns than one another: "):
        load_splits(tmp_path)


def test_a_column_that_some_shards_lack_is_empty_there(tmp_path):
    tables = [pa.table({"text": ["a"]}), pa.table({"text": ["b"], "label": [1]}), pa.table({"text": ["c"]})]
    train = load_splits(shards(tmp_path, tables))["train"]
    assert train.to_dict() == {"text": ["a", "b", "c"], "label": [None, 1, None]}


# --- nothing is changed in reading ------------------------------------------------------------------------------------


def as_read(path, content, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_splits(path, **options)["train"].to_dict()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["01", "02"], ["01", "02"]),
        (["007", "7"], ["007", "7"]),
        (["1", "-2"], [1, -2]),
        (["1", "+2"], [1.0, 2.0]),
        (["0", "10", ""], [0, 10, None]),
        (["0.50", "1e-3", "3"], [0.5, 1e-3, 3.0]),
        (["0.5", "00.5"], ["0.5", "00.5"]),
        (["1", "NA"], [1, None]),
        (["NA", ""], ["NA", ""]),
        (["yes", "1"], ["yes", "1"]),
        (["2024-01-01", "2024-01-02"], ["2024-01-01", "2024-01-02"]),
        (["true", "false"], ["true", "false"]),
        (["12345678901234567890", "1"], ["12345678901234567890", "1"]),
    ],
)
def test_a_column_of_csv_is_numbers_only_where_each_value_is_written_as_one(tmp_path, values, expected):
    rows = "".join(f"word{at},{value}\n" for at, value in enumerate(values))
    assert as_read(tmp_path / "a.csv", "words,label\n" + rows)["label"] == expected


@pytest.mark.parametrize("value", ["7", "1.50", '"007"', '"7"', "NA", "2024-01-01", "true"])
def test_a_column_of_texts_is_text_whatever_stands_in_it(tmp_path, value):
    meant = value.strip('"')
    assert as_read(tmp_path / "a.csv", f"text,label\n{value},1\n") == {"text": [meant], "label": [1]}
    assert as_read(tmp_path / "a.csv", f"body,label\n{value},1\n", texts=("body",))["body"] == [meant]


def test_shards_of_csv_are_read_as_one(tmp_path):
    (tmp_path / "train_0.csv").write_text("a,label\nx,1\n")
    (tmp_path / "train_1.csv").write_text("a,label\ny,01\n")
    assert load_splits(tmp_path)["train"]["label"][:] == ["1", "01"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_strings_of_json_that_look_like_times_are_strings(tmp_path, suffix):
    row = {"text": "2024-01-01", "tags": [{"at": "2024-01-01T10:00:00Z"}], "label": 1}
    assert as_read(tmp_path / f"a{suffix}", json.dumps(row) + "\n") == {name: [value] for name, value in row.items()}


# --- valid files are read ---------------------------------------------------------------------------------------------


def test_a_list_of_rows_is_read_as_rows_in_lines_are(tmp_path):
    table = rows(5)
    for name, content in (("a.json", json.dumps(table, indent=2)), ("b.jsonl", json.dumps(table))):
        assert as_read(tmp_path / name, content) == {key: [row[key] for row in table] for key in table[0]}


def test_a_row_of_json_may_be_long(tmp_path):
    table = [{"text": "a" * 100, "label": 0}, {"text": "b" * 17_000_000, "label": 1}]
    assert as_read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in table))["text"][1][-1] == "b"


def test_a_column_of_mixed_types_leaves_the_others_as_they_are(tmp_path):
    table = [{"text": "a", "extra": 1}, {"text": "b", "extra": "é"}, {"text": "c", "extra": {"d": [1]}}, {"text": "e"}]
    read = as_read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in table))
    assert read == {"text": ["a", "b", "c", "e"], "extra": ["1", "é", '{"d": [1]}', None]}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_csv_may_have_other_separators(tmp_path, separator, ending):
    content = ending.join([f"text{separator}label", f'"a, b; c\td"{separator}1', ""])
    assert as_read(tmp_path / "a.csv", content) == {"text": ["a, b; c\td"], "label": [1]}
    if separator == "\t":
        assert as_read(tmp_path / "a.tsv", content) == {"text": ["a, b; c\td"], "label": [1]}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".txt"])
def test_files_may_be_compressed(tmp_path, suffix):
    if suffix == ".txt":
        plain = tmp_path / "a.txt"
        plain.write_text("one\r\ntwo\n")
    else:
        plain = write(tmp_path / f"a{suffix}", rows(3))
    meant = load_splits(plain)["train"].to_dict()
    assert as_read(tmp_path / f"b{suffix}.gz", gzip.compress(plain.read_bytes())) == meant


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "data/test-00000-of-00001.csv"), (2, 1)),
        (("train/a.csv", "train/b.csv", "test/a.csv"), (2, 1)),
        (("data/train/0.csv", "data/train/1.csv", "data/test/0.csv"), (2, 1)),
        (("Train.csv", "TEST.csv"), (1, 1)),
        (("train_0.csv", "train_1.csv", "test_0.csv"), (2, 1)),
        (("training.csv", "testing.csv"), (1, 1)),
        (("part-0.csv", "part-1.csv", "part-10.csv"), (3,)),
        (("reviews.csv",), (1,)),
    ],
)
def test_folders_are_read_as_datasets_takes_them(tmp_path, names, splits):
    for name in names:
        write(tmp_path / name, rows(4))
    assert {name: len(split) for name, split in load_splits(tmp_path).items()} == {
        name: 4 * number for name, number in zip(("train", "test"), splits, strict=False)
    }


def test_shards_may_differ_in_the_width_of_their_types(tmp_path):
    tables = [
        pa.table({"text": pa.array(["a"], pa.string()), "label": pa.array([1], pa.int32())}),
        pa.table({"text": pa.array(["b"], pa.large_string()), "label": pa.array([2], pa.int64())}),
    ]
    assert load_splits(shards(tmp_path, tables))["train"].to_dict() == {"text": ["a", "b"], "label": [1, 2]}
    shards(tmp_path, [tables[0], pa.table({"text": ["b"], "label": ["x"]})])
    with pytest.raises(DataError, match="hold other columns than one another: "):
        load_splits(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,label\ncafé,1\n".encode("latin-1"),
            r"a.csv is not in UTF-8 \(byte 0xe9 in line 2\): save it as UTF-8",
        ),
        ("a.jsonl", '{"text": "café"}\n'.encode("latin-1"), "is not in UTF-8 .* iconv -f LATIN1 -t UTF-8 a.jsonl"),
        ("a.txt", "one\n\ncafé\n".encode("latin-1"), "byte 0xe9 in line 3"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "it begins as UTF-16 does.* iconv -f UTF-16"),
        ("a.jsonl", b"", "cannot be read as .jsonl: it is empty; expected a row in each line"),
        ("a.jsonl", b"[]", "cannot be read as|is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n5\n', "line 2 is a int; expected a row in each line"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "an object has a key twice: text, text"),
        ("a.csv.gz", b"text,label\n", "cannot be read as .csv: Not a gzipped file"),
    ],
)
def test_what_lies_beneath_is_said_with_the_way_out(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        as_read(tmp_path / name, content)
