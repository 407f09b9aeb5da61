"""Counting: every kind of data against a naive count, the columns that are chosen, and the words of every error."""

import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from leanvocab import TokenCounts, count_tokens
from leanvocab.errors import DataError
from leanvocab.progress import ProgressBar
from leanvocab.vocabulary.columns import choose_id_columns
from leanvocab.vocabulary.counting_threads import choose_num_threads, count_pieces
from leanvocab.vocabulary.pieces import Piece
from leanvocab.vocabulary.sources import find_sources
from versions import ListFeature

ROWS = [[5, 3, 3], [], [9], [3, 0, 12, 5, 5], [7, 7]]
LABELS = [[-100, 3, 3], [], [9], [-100, -100, -100, 5, 11], [7, 7]]


def naive(rows: Any) -> dict[int, int]:
    """The specification: occurrences of each id in nested lists; -100 and None are none."""
    found: Counter[int] = Counter()

    def visit(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                visit(item)
        elif value is not None and value != -100:
            found[value] += 1

    visit(rows)
    return dict(found)


def counted(data: Any, columns: Any = None, **options: Any) -> dict[int, int]:
    counts = count_tokens(data, columns, **options).counts
    return {int(token_id): int(counts[token_id]) for token_id in np.flatnonzero(counts)}


@pytest.fixture
def dataset() -> datasets.Dataset:
    features = datasets.Features(
        input_ids=ListFeature(datasets.Value("int32")), text=datasets.Value("string"), label=datasets.Value("int64")
    )
    rows = {"input_ids": ROWS, "text": list("abcde"), "label": [0, 1, 0, 1, 1]}
    return datasets.Dataset.from_dict(rows, features=features)


# ------------------------------------------------------------------------------------------ kinds of data


def arrow_kinds() -> Iterator[Any]:
    lists = [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_view(pa.int16()), pa.large_list_view(pa.uint32())]
    for kind in lists:
        yield pytest.param(pa.array(ROWS, type=kind), id=str(kind))
    yield pytest.param(pa.array(ROWS, type=lists[0]).slice(1, 3), id="sliced")
    yield pytest.param(pa.chunked_array([ROWS[:2], [], ROWS[2:]], type=lists[0]), id="chunked")
    yield pytest.param(pa.chunked_array([], type=lists[0]), id="no chunks")
    yield pytest.param(pa.array([[1, None], None, [None], [2, 1]]), id="nulls at both levels")
    yield pytest.param(pa.array([[[1, 2], None], [], None, [[3], []]]), id="nested")
    yield pytest.param(pa.array([1, 2, 2, None]), id="flat")
    yield pytest.param(pa.array([[], None]), id="lists of nothing")
    yield pytest.param(pa.nulls(3), id="nothing")
    yield pytest.param(pa.array([[1, 2], [2, 3]], type=pa.list_(pa.uint8(), 2)), id="fixed size")
    yield pytest.param(
        pa.array([[1, 2], [2, 3], [4, 5]], type=pa.list_(pa.int64(), 2)).slice(1), id="fixed size, sliced"
    )


@pytest.mark.parametrize("array", list(arrow_kinds()))
def test_arrow_arrays_of_any_list_kind_are_counted(array: Any) -> None:
    assert counted(array) == naive(array.to_pylist())


def test_ids_hidden_in_null_rows_are_not_counted() -> None:
    hidden = pa.array([7, 7, 1, 2, 9, 9])
    fixed = pa.FixedSizeListArray.from_arrays(hidden, 2, mask=pa.array([True, False, True]))
    ragged = pa.ListArray.from_arrays(pa.array([0, 2, 4, 6]), hidden, mask=pa.array([True, False, True]))
    assert fixed.values.to_pylist()[:2] == [7, 7]  # they are really there
    for array in (fixed, ragged):
        assert counted(array) == {1: 1, 2: 1}


def test_tables_batches_and_extension_arrays_are_counted() -> None:
    table = pa.table({"input_ids": ROWS, "text": list("abcde")})
    assert counted(table) == counted(table.to_batches()[0]) == naive(ROWS)
    square = [[[1, 2], [3, 4]]]
    images = datasets.Dataset.from_dict(
        {"input_ids": square}, features=datasets.Features(input_ids=datasets.Array2D((2, 2), "int64"))
    )
    assert isinstance(images.data.column("input_ids").type, pa.BaseExtensionType)
    assert counted(images) == naive(square)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"])
def test_numpy_arrays_of_any_integer_type_and_shape_are_counted(dtype: str) -> None:
    cube = np.arange(24).reshape(2, 3, 4).astype(dtype)
    zero_dimensional = cube[:1, :1, :1].reshape(())
    for array in (cube, cube.T, cube[:, ::2], zero_dimensional, cube[:0], np.asfortranarray(cube), cube[1, 1, ::-1]):
        assert counted(array) == naive(array.tolist())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_torch_tensors_are_counted(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    for array in (tensor, tensor.T, tensor[:, ::3], tensor[0, 0], tensor[:0]):
        assert counted(array) == naive(array.tolist())


def torch_dataset(rows: list[dict[str, Any]]) -> Any:
    class ByNumber:  # like torch.utils.data.Dataset: no __iter__
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, number: int) -> dict[str, Any]:
            return rows[number % len(rows)]  # indexing alone would never end

    return ByNumber()


ITERABLES: dict[str, Callable[[], Any]] = {
    "a list of lists": lambda: ROWS,
    "a flat list": lambda: [3, np.int64(5), 3],
    "a generator": lambda: (row for row in ROWS),
    "numpy rows": lambda: [np.array(row) for row in ROWS],
    "an object array of lists": lambda: np.array(ROWS, dtype=object),
    "torch rows": lambda: [torch.tensor(row) for row in ROWS],
    "nested tuples": lambda: ((tuple(row), None) for row in ROWS),
    "arrow rows": lambda: iter([pa.array(row, type=pa.int64()) for row in ROWS]),
    "rows as dicts": lambda: [{"input_ids": row, "label": 1} for row in ROWS],
    "rows as dicts of tensors": lambda: [{"input_ids": torch.tensor(row)} for row in ROWS],
    "batches of lists": lambda: [{"input_ids": ROWS[:3]}, {"input_ids": ROWS[3:]}],
    "a torch data set": lambda: torch_dataset([{"input_ids": row} for row in ROWS]),
    "tables": lambda: [pa.table({"input_ids": ROWS[:1]}), pa.record_batch({"input_ids": ROWS[1:]})],
    "a mapping": lambda: {"input_ids": ROWS, "text": list("abcde")},
    "a user's mapping": lambda: UserDict(input_ids=ROWS),
    "a list of splits": lambda: [{"a": pa.table({"input_ids": ROWS[:1]})}, {"b": pa.table({"input_ids": ROWS[1:]})}],
    "a mapping of splits": lambda: {"a": pa.table({"input_ids": ROWS[:1]}), "b": pa.table({"input_ids": ROWS[1:]})},
}


@pytest.mark.parametrize("kind", ITERABLES)
def test_iterables_and_mappings_are_counted(kind: str) -> None:
    expected = [3, 5, 3] if kind == "a flat list" else ROWS
    assert counted(ITERABLES[kind]()) == naive(expected)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_a_vocabulary_that_turns_out_large_while_counting_is_counted_right(dtype: str) -> None:
    ids = np.arange(1_500_000, dtype=dtype)  # larger than any block, and growing from block to block
    assert (count_tokens(np.concatenate([ids, ids[:7]])).counts == 1 + (ids < 7)).all()


def test_a_row_that_is_used_again_for_the_next_counts_each_time() -> None:
    def rows(row: Any) -> Iterator[Any]:
        for token_id in (1, 2, 3):
            row[0] = token_id
            yield row

    for row in ([0], np.zeros(1, int), torch.zeros(1, dtype=torch.int64)):
        assert counted(rows(row)) == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize(("dtype", "length"), [("int64", 300_000), ("int32", 300_000), ("int64", 5_000)])
def test_a_stream_of_arrays_is_not_held_in_memory(dtype: str, length: int) -> None:
    made: list[weakref.ref[Any]] = []

    def arrays() -> Iterator[Any]:
        for _ in range(200):
            array = np.ones(length, dtype=dtype)
            made.append(weakref.ref(array))
            yield array
            assert sum(ref() is not None for ref in made) * length < 2_000_000

    assert count_tokens(arrays()).num_tokens == 200 * length


def test_rows_of_different_types_are_counted_together() -> None:
    rows = [np.array([2**40], np.uint64), np.array([1], np.int8), [2], torch.tensor([[3, 3]])]
    assert counted([rows[1], rows[2], rows[3]]) == {1: 1, 2: 1, 3: 2}
    with pytest.raises(DataError, match=f"found id {2**40} in row 0:"):
        count_tokens(rows)


def test_long_streams_are_counted_in_parts() -> None:
    rows = [[number % 97] * (number % 5) for number in range(60_000)]
    assert counted(row for row in rows) == naive(rows)


def test_a_label_that_appears_only_in_later_rows_is_counted() -> None:
    rows = [{"input_ids": [1], "labels": None}, {"input_ids": [2], "labels": [3]}]
    assert counted(iter(rows)) == {1: 1, 2: 1, 3: 1}


def test_a_frame_that_speaks_arrow_is_counted() -> None:
    class Frame:
        def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
            return pa.table({"input_ids": ROWS}).__arrow_c_stream__(requested_schema)

    assert counted(Frame()) == naive(ROWS)


@pytest.mark.parametrize(
    "empty", [[], np.zeros((0, 4), int), torch.tensor([]), pa.table({"input_ids": pa.array([], pa.list_(pa.int8()))})]
)
def test_empty_data_counts_zero_tokens(empty: Any) -> None:
    assert count_tokens(empty).num_tokens == 0
    assert count_tokens(empty, full_size=5).counts.tolist() == [0] * 5


# ------------------------------------------------------------------------------------------ data sets


def test_selected_rows_alone_are_counted(dataset: datasets.Dataset) -> None:
    many = datasets.concatenate_datasets([dataset] * 40)  # 40 chunks
    selections = {
        "shuffled": many.shuffle(seed=0),
        "split": many.train_test_split(0.4, seed=1)["train"],
        "some": many.select([3, 199, 0]),
        "twice": many.select([0, 0, 3, 3, 3]),
        "none": many.select([]),
        "sharded": many.shard(3, 1),
        "selected twice": many.shuffle(seed=2).select(range(7)),
    }
    for name, selection in selections.items():
        assert counted(selection) == naive(list(selection["input_ids"])), name


def test_selections_larger_than_a_block_are_counted(dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanvocab.vocabulary.pieces.ROWS_SORTED", 7)
    monkeypatch.setattr("leanvocab.vocabulary.pieces.PIECE_IDS_TAKEN", 5)
    monkeypatch.setattr("leanvocab.vocabulary.pieces.IDS_COPIED", 5)
    many = datasets.concatenate_datasets([dataset] * 6)
    for selection in (many.shuffle(seed=0), many.select([29, 29, 0, 4, 5, 6])):
        assert counted(selection) == naive(list(selection["input_ids"]))


def test_ids_hidden_in_null_rows_are_not_selected_either() -> None:
    hidden = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 6, 8]), pa.array([1, 1, 7, 7, 2, 2, 3, 3]), mask=pa.array([False, True, False, False])
    )
    dataset = datasets.Dataset(pa.table({"input_ids": hidden}))
    assert counted(dataset.select([0, 1, 3])) == {1: 2, 3: 2}


@pytest.mark.parametrize("form", ["torch", "numpy", "arrow", "pandas"])
def test_a_format_is_looked_through(dataset: datasets.Dataset, form: str) -> None:
    assert counted(dataset.with_format(form)) == counted(dataset.with_format(form, columns=["label"])) == naive(ROWS)


def test_a_transform_is_looked_through_and_never_run(dataset: datasets.Dataset) -> None:
    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("it was run")

    assert counted(dataset.with_transform(transform)) == naive(ROWS)
    text = dataset.remove_columns("input_ids").with_transform(transform)
    with pytest.raises(DataError, match=r"Its transform is not run; to count what it gives, pass iter\(dataset\)"):
        count_tokens(text)


def test_what_a_transform_gives_is_counted_from_an_iterator(dataset: datasets.Dataset) -> None:
    tokenized = dataset.with_transform(lambda batch: {"input_ids": [[label] * 2 for label in batch["label"]]})
    assert counted(iter(tokenized)) == {0: 4, 1: 6}


def test_all_splits_are_counted(dataset: datasets.Dataset) -> None:
    splits = dataset.train_test_split(0.4, seed=0)
    assert counted(splits) == counted(dict(splits)) == naive(ROWS)


def test_one_column_of_a_data_set_is_counted(dataset: datasets.Dataset) -> None:
    assert counted(dataset["input_ids"]) == naive(ROWS)
    assert counted(dataset["label"]) == {0: 2, 1: 3}


def test_streams_are_counted(dataset: datasets.Dataset) -> None:
    stream = dataset.to_iterable_dataset(num_shards=2)
    doubled = stream.map(lambda row: {"input_ids": row["input_ids"] * 2})
    assert counted(stream) == counted(stream.shuffle(seed=0)) == counted(stream.with_format("torch")) == naive(ROWS)
    assert counted(doubled) == counted(doubled.with_format("numpy")) == naive(ROWS + ROWS)
    assert counted(stream.filter(lambda row: row["label"] == 1)) == naive([ROWS[1], ROWS[3], ROWS[4]])
    assert counted(
        datasets.IterableDataset.from_generator(lambda: iter([{"input_ids": row} for row in ROWS]))
    ) == naive(ROWS)
    assert counted(datasets.IterableDatasetDict(a=stream, b=stream), "label") == {0: 4, 1: 6}


def test_a_stream_starts_afresh_after_counting(dataset: datasets.Dataset) -> None:
    stream = dataset.to_iterable_dataset()
    before = stream.state_dict()
    count_tokens(stream)
    assert stream.state_dict() == before
    assert [row["input_ids"] for row in stream] == ROWS


def test_counting_leaves_the_data_set_and_its_folder_as_they_were(dataset: datasets.Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path / "data")
    loaded = datasets.load_from_disk(tmp_path / "data").with_format("torch", columns=["input_ids"])
    loaded = loaded.shuffle(seed=0, keep_in_memory=True)
    state = (loaded._fingerprint, loaded.format, loaded.features, loaded.cache_files, loaded.data.table)
    files = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}
    assert counted(loaded) == naive(ROWS)
    assert state == (loaded._fingerprint, loaded.format, loaded.features, loaded.cache_files, loaded.data.table)
    assert files == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}


# ------------------------------------------------------------------------------------------ columns


def chosen(data: Any) -> tuple[str, ...]:
    return count_tokens(data).columns


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"input_ids": ROWS, "attention_mask": ROWS, "token_type_ids": ROWS, "text": list("abcde")}, ["input_ids"]),
        ({"labels": LABELS, "input_ids": ROWS, "decoder_input_ids": ROWS},
         ["labels", "input_ids", "decoder_input_ids"]),
        ({"input_ids": ROWS, "labels": [0, 1, 2, 3, 4]}, ["input_ids"]),
        ({"input_ids": ROWS, "labels": [[0.5]] * 5}, ["input_ids"]),
        ({"chosen_input_ids": ROWS, "rejected_input_ids": ROWS, "chosen_labels": LABELS, "margin": [1] * 5},
         ["chosen_input_ids", "rejected_input_ids", "chosen_labels"]),
        ({"prompt_ids": ROWS, "completion_ids": ROWS, "completion_mask": ROWS}, ["prompt_ids", "completion_ids"]),
        ({"prompt_ids": list("abcde"), "input_ids": ROWS}, ["input_ids"]),  # names of prompts
        ({"input_ids": [[row, row] for row in ROWS], "labels": ROWS}, ["input_ids"]),  # multiple choice
        ({"input_ids": [1, 2, 2, 3, 4]}, ["input_ids"]),
        ({"labels": LABELS, "pixel_values": [[0.1]] * 5}, ["labels"]),  # image captions
    ],
)  # fmt: skip
def test_columns_are_chosen_by_name_and_kind(columns: dict[str, Any], expected: list[str]) -> None:
    table = pa.table(columns)
    for data in (table, datasets.Dataset(table), table.to_pylist(), datasets.Dataset(table).to_iterable_dataset()):
        assert sorted(chosen(data)) == sorted(expected)
        assert counted(data) == naive([columns[name] for name in expected])


def test_class_labels_of_token_classification_are_no_token_ids() -> None:
    tags = ListFeature(datasets.ClassLabel(names=["O", "PER"]))
    features = datasets.Features(input_ids=ListFeature(datasets.Value("int32")), labels=tags)
    tagged = datasets.Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[0, 1]]}, features=features)
    assert chosen(tagged) == chosen(tagged.to_iterable_dataset()) == ("input_ids",)
    assert counted(tagged, ["labels"]) == {0: 1, 1: 1}  # unless they are asked for


def test_a_batch_of_class_labels_is_not_counted_with_its_sequences() -> None:
    batch = {"input_ids": np.array([[5, 6], [7, 8]]), "labels": np.array([1, 0])}
    assert chosen(batch) == ("input_ids",)
    assert chosen([{name: torch.from_numpy(array) for name, array in batch.items()}]) == ("input_ids",)
    assert chosen(batch | {"labels": batch["input_ids"]}) == ("input_ids", "labels")


def test_the_columns_of_a_data_set_are_looked_at_once(
    dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []

    def choose(data: Any, *args: Any, **options: Any) -> list[str]:
        looks.append(data)
        return choose_id_columns(data, *args, **options)

    monkeypatch.setattr("leanvocab.vocabulary.sources.choose_id_columns", choose)
    columns = {"input_ids": ROWS, "labels": LABELS, "attention_mask": ROWS}
    table = pa.table(columns)
    rows = [{name: values[number] for name, values in columns.items()} for number in range(5)]
    for data in (table, datasets.Dataset(table), datasets.Dataset(table).select([1, 0]), columns, rows, iter(rows)):
        looks.clear()
        count_tokens(data)
        assert len(looks) == 1, type(data)
    looks.clear()
    count_tokens(dataset.train_test_split(0.4, seed=0))
    assert len(looks) == 2


def test_named_columns_are_counted_once_each(dataset: datasets.Dataset) -> None:
    assert counted(dataset, "label") == counted(dataset, ("label", "label")) == {0: 2, 1: 3}
    assert count_tokens(dataset, ["label", "input_ids"]).columns == ("label", "input_ids")


# ------------------------------------------------------------------------------------------ ids


def test_minus_100_and_nulls_are_ignored() -> None:
    assert counted(pa.array([[-100, 4, None], None])) == counted([[-100, 4]]) == counted(np.array([-100, 4])) == {4: 1}
    assert counted(np.array([[-100] * 50] * 50 + [[2] * 50])) == {2: 50}


BAD_IDS: list[tuple[Any, dict[str, Any], str]] = [
    ([[1], [2, -5]], {}, r"found id -5 in row 1: token ids are 0 or more \(-100 alone is ignored\)"),
    (pa.table({"input_ids": [[1], [2], [3, 9]]}), {"full_size": 9},
     r"found id 9 in row 2 of column 'input_ids': expected ids below full_size=9. Was the data tokenized for another"),
    (np.array([[0, 1], [-1, 1]]), {}, r"found id -1 in row 1:"),
    (torch.tensor([[0, 1], [1, 77]]), {"full_size": 77}, r"found id 77 in row 1:"),
    ({"a": pa.table({"labels": [[1]]}), "b": pa.table({"labels": [[1], [-7]]})}, {},
     r"found id -7 in row 1 of column 'labels' of split 'b'"),
    ([{"input_ids": [1]}, {"input_ids": [2]}, {"input_ids": [-3]}], {}, r"found id -3 in row 2 of column 'input_ids'"),
    (pa.array([[[1], [2, -9]], [[-8]]]), {}, r"found id -9 in row 0:"),
    ([[1], [2**40]], {},
     r"found id 1099511627776 in row 1: no vocabulary is known to be so large, so .* pass full_size="),
    (np.array([2**64 - 100], np.uint64), {}, r"found id 18446744073709551516 in row 0:"),
    (np.array([2**31 - 1], np.int32), {}, r"found id 2147483647 in row 0:"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "options", "message"), BAD_IDS)
def test_a_wrong_id_is_an_error_that_names_row_and_column(data: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        count_tokens(data, **options)


def test_the_row_of_a_wrong_id_is_the_selected_one(dataset: datasets.Dataset) -> None:
    many = datasets.concatenate_datasets([dataset] * 8)
    with pytest.raises(DataError, match="found id 12 in row 2 of column 'input_ids'"):
        count_tokens(many.select([0, 1, 38, 39]), full_size=12)
    with pytest.raises(DataError, match="found id 12 in row 1 of column 'input_ids'"):  # most rows of a stretch
        count_tokens(many.select([0, 3, 4, 5, 6]), full_size=12)


def test_the_row_of_a_wrong_id_is_found_in_any_chunk_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones(1_100_000, dtype=np.int32)  # several blocks in one piece
    rows[-1] = -2
    with pytest.raises(DataError, match="found id -2 in row 1099999:"):
        count_tokens(rows)
    monkeypatch.setattr("leanvocab.vocabulary.pieces.PIECE_IDS", 8)
    chunks = [[[1, 2]], [[3], []], [[4] * 30, [5]], [[6]], [[7]], [[8], [-9]]]
    with pytest.raises(DataError, match="found id -9 in row 8 of column 'input_ids'"):
        count_tokens(pa.table({"input_ids": pa.chunked_array(chunks)}))


def test_a_large_id_is_counted_where_the_full_size_allows_it() -> None:
    size = (1 << 24) + 5
    counts = count_tokens([[size - 1]], full_size=size)
    assert counts.counts[-1] == 1
    assert len(counts.counts) == size


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_first_wrong_id_is_named_whatever_thread_meets_one(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanvocab.vocabulary.pieces.PIECE_IDS", 64)
    rows = np.ones((2000, 16), dtype=np.int64)
    rows[1200:, 7] = -2
    rows[1100, 3] = -3
    with pytest.raises(DataError, match="found id -3 in row 1100:"):
        count_tokens(rows, num_workers=num_workers)


def test_the_first_wrong_id_is_named_although_a_later_one_is_met_before() -> None:
    later_was_met = threading.Event()

    def load_first() -> Any:
        assert later_was_met.wait(10)
        time.sleep(0.05)  # the other thread has stopped by now
        return np.array([[-1]])

    def load_later() -> Any:
        later_was_met.set()
        return np.array([[-2]])

    pieces = [Piece(load, 1, " of a test", lambda row: row) for load in (load_first, load_later)]
    with pytest.raises(DataError, match="found id -1 in row 0 of a test"):
        count_pieces(pieces, None, 2, ProgressBar("", None, False))


# ------------------------------------------------------------------------------------------ errors about data


@pytest.mark.parametrize(
    ("data", "columns", "message"),
    [
        (pa.table({"text": ["a"], "label": [1]}), None,
         r"found no column of token ids: expected one whose name is or ends in 'input_ids' .* "
         r"the data has 'text' \(string\), 'label' \(int64\)\. Tokenize the data first, or name .* columns="),
        (pa.table({"text": ["a"], "label": [1]}), "text",
         r"column 'text' holds text \(string\), expected token ids: tokenize it first; .* 'label' \(int64\)"),
        (pa.table({"text": ["a"], "label": [1]}), "ids", r"found no column 'ids': the data has 'text' \(string\)"),
        (pa.table({"input_ids": [["a"]]}), None, r"column 'input_ids' holds text \(list<.*string>\), .* tokenize"),
        (pa.table({"input_ids": [[0.5]]}), None, r"column 'input_ids' holds list<.*double>, expected integers"),
        ({"a": pa.table({"input_ids": [[1]]}), "b": pa.table({"x": [1]})}, "input_ids",
         r"found no column 'input_ids' of split 'b'"),
        (pa.array(["a"]).dictionary_encode(), None, r"the data holds dictionary<.*>, expected integers"),
        ({}, None, "the data has no columns"),
        ("some text", None, "found text, expected token ids: tokenize it first"),
        (["some text"], None, "found text of row 0, expected token ids: tokenize it first"),
        ([["some", "text"]], None, "found text of row 0 of row 0, expected token ids"),
        ([{"input_ids": [1]}, {"text": "a"}], None, r"found no column of token ids of row 1"),
        ([[1, 0.5]], None, r"the data in row 0 holds list<.*double>, expected integers"),
        ([[True]], None, r"the data in row 0 holds list<.*bool>, expected integers"),
        ([[1], [2, "a"]], None, r"the data in row 0 to 1 is not all integers \(token ids\): "),
        ([[2**80]], None, r"the data in row 0 is not all integers"),
        (np.array([0.5]), None, "the data holds an array of float64, expected integers"),
        (np.array(["a"]), None, r"the data holds text \(an array of <U1\)"),
        (torch.tensor([0.5]), None, "the data holds a tensor of torch.float32, expected integers"),
        (torch.tensor([True]), None, "the data holds a tensor of torch.bool, expected integers"),
        (torch.eye(3, dtype=torch.int64).to_sparse(), None, r"cannot count token ids in a torch.sparse_coo tensor"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), None, r"tensor on meta: expected a dense one"),
        (np.array([1]), "input_ids", r"columns=\['input_ids'\] names columns, but ndarray has none"),
        (5, None, "cannot find token ids in int: expected a data set, a table, an array"),
        (None, None, "cannot find token ids in NoneType"),
    ],
)  # fmt: skip
def test_data_without_token_ids_is_an_error_that_says_what_is_there(data: Any, columns: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        count_tokens(data, columns)


def test_columns_are_checked_before_anything_is_counted() -> None:
    splits = {"a": pa.table({"input_ids": [[-7]]}), "b": pa.table({"text": ["a"]})}
    with pytest.raises(DataError, match="of split 'b'"):  # not the wrong id of split 'a'
        count_tokens(splits)


@pytest.mark.parametrize("options", [{"full_size": 0}, {"full_size": True}, {"num_workers": 0}])
def test_sizes_and_workers_below_one_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"expected {next(iter(options))} of 1 or more, or None, got"):
        count_tokens([[1]], **options)


# ------------------------------------------------------------------------------------------ threads and progress


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_threads_count_the_same(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanvocab.vocabulary.pieces.PIECE_IDS", 1000)
    rng = np.random.default_rng(0)
    chunks = [[rng.integers(0, 50, rng.integers(0, 40)).tolist() for _ in range(200)] for _ in range(9)]
    table = pa.table({"input_ids": pa.chunked_array(chunks)})
    assert len(list(next(find_sources(table, None, "")).pieces)) > 5
    assert counted(table, num_workers=num_workers) == naive(chunks)


@pytest.mark.parametrize(
    ("num_workers", "num_ids", "full_size", "expected"),
    [
        (None, 5_000_000, None, 1),  # not worth a second thread
        (None, 500_000_000, 30_000, 4),
        (None, 500_000_000, 250_002, 4),
        (None, 500_000_000, 901_629, 2),  # each holds three arrays of that size
        (None, 500_000_000, 10_000_000, 1),
        (None, 500_000_000, None, 2),
        (None, None, 30_000, 1),  # a stream
        (7, 10, None, 7),
        (7, None, None, 1),
    ],
)
def test_threads_are_as_many_as_data_memory_and_processor_allow(
    num_workers: int | None, num_ids: int | None, full_size: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert choose_num_threads(num_workers, num_ids, full_size) == expected
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert choose_num_threads(None, num_ids, full_size) == 1


def test_an_interrupt_stops_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanvocab.vocabulary.pieces.PIECE_IDS", 64)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("leanvocab.vocabulary.counting_threads.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        count_tokens(np.ones((100_000, 8), dtype=np.int64), num_workers=2)


def test_progress_shows_when_asked_for_and_on_long_work_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count_tokens(ROWS)
    assert capsys.readouterr().err == ""
    count_tokens(ROWS, progress=True)
    shown = capsys.readouterr().err
    assert "Counting tokens" in shown
    assert "5.00/5.00" in shown
    monkeypatch.setattr("leanvocab.vocabulary.counting_threads.SECONDS_BEFORE_PROGRESS", -1.0)
    count_tokens(ROWS)
    assert "Counting tokens" in capsys.readouterr().err
    count_tokens(ROWS, progress=False)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------ the value object


def test_counts_add_up() -> None:
    total = count_tokens([[1, 1]]) + count_tokens([[4]])
    assert total.counts.tolist() == [0, 2, 0, 0, 1]
    assert total.num_tokens == 3
    assert total.token_ids.tolist() == [1, 4]
    assert sum([count_tokens([[1]]), count_tokens([[2]])]) == count_tokens([[1, 2]])
    sized = count_tokens([[1]], full_size=6) + count_tokens([[2]])
    assert sized == count_tokens([[1, 2]], full_size=6)
    assert (count_tokens(pa.table({"labels": [[1]]})) + count_tokens(pa.table({"input_ids": [[1]]}))).columns == (
        "labels",
        "input_ids",
    )


def test_counts_of_different_vocabularies_do_not_add_up() -> None:
    with pytest.raises(DataError, match="cannot add counts over 5 and 6 rows: they belong to different vocabularies"):
        count_tokens([[1]], full_size=5) + count_tokens([[1]], full_size=6)
    with pytest.raises(DataError, match="cannot add counts: id 7 occurs on one side, the other has 5 rows"):
        count_tokens([[1]], full_size=5) + count_tokens([[7]])


def test_counts_are_frozen_and_compare_by_value() -> None:
    counts = count_tokens([[1, 2]])
    with pytest.raises(ValueError, match="read-only"):
        counts.counts[0] = 1
    with pytest.raises(AttributeError):
        counts.full_size = 7  # type: ignore[misc]
    assert counts == count_tokens([[2], [1]])
    assert hash(counts) == hash(count_tokens([[2], [1]]))
    assert counts != count_tokens([[2], [2]])
    assert counts != count_tokens([[1, 2]], full_size=3)
    assert counts != [0, 1, 1]
    assert repr(count_tokens([[7, 1]], full_size=9)) == "TokenCounts(2 tokens, 2 ids, full_size=9)"


def test_a_callers_array_of_counts_stays_his() -> None:
    mine = np.array([1, 2])
    counts = TokenCounts(mine)
    mine[0] = 9
    assert counts.counts.tolist() == [1, 2]
    assert mine.flags.writeable


@pytest.mark.parametrize(
    ("counts", "full_size", "message"),
    [
        ([[1]], None, r"expected counts as a 1-D array of integers, got int64 of shape \(1, 1\)"),
        ([0.5], None, "got float64"),
        ([1, -1], None, "expected counts of 0 or more, got -1"),
        ([1, 2], 3, r"expected 3 counts \(full_size\), got 2"),
    ],
)
def test_counts_that_are_none_are_refused(counts: Any, full_size: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenCounts(np.array(counts), full_size)


def test_many_tokens_of_one_id_do_not_overflow() -> None:
    once = TokenCounts(np.array([2**62]))
    assert (once + TokenCounts(np.array([2**61]))).num_tokens == 2**62 + 2**61


LIGHT = """
import sys
import leanvocab.vocabulary.counts, leanvocab.vocabulary.partial_vocabulary
heavy = {name for name in ("torch", "transformers", "datasets", "pyarrow", "tqdm") if name in sys.modules}
assert not heavy, heavy
import numpy as np
assert leanvocab.vocabulary.counts.count_tokens(np.array([1, 1])).num_tokens == 2
heavy = {name for name in ("torch", "transformers", "datasets", "pyarrow", "tqdm") if name in sys.modules}
assert not heavy, heavy
"""


def test_counting_loads_none_of_the_heavy_libraries() -> None:
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
