"""Files, folders and data sets → splits; nothing is written beside them."""

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
        ("data.csv", "", "cannot be read as .csv: Empty CSV file"),
        ("data.csv", "text,label\n", "split 'train' is empty: expected at least one row"),
        ("data.csv", "text,label\na,1,2\n", r"cannot be read as .csv: CSV parse error: Expected 2 columns, got 3"),
        ("data.csv", "text,text,label\na,b,1\n", "data.csv has the column 'text' more than once; give its columns"),
        ("data.jsonl", '[{"text": "a"}]', "cannot be read as .jsonl"),
        ("data.parquet", "no parquet", "cannot be read as .parquet"),
        ("data.xlsx", "", r"data.xlsx is of an unknown type; expected one of .csv, .jsonl, .json, .parquet, .txt"),
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
