"""Counting equals the naive count of the same rows, for any data."""

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leanvocab import count_tokens

IDS = st.integers(0, 40)
LABELS = st.one_of(IDS, st.just(-100), st.none())
ROWS = st.lists(st.one_of(st.none(), st.lists(LABELS, max_size=9)), max_size=12)
LIST_TYPES = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64()]

# Data sets are made in memory; a slow machine is no failure of counting.
patient = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def naive(rows: Any) -> Counter[int]:
    """Ids in nested lists, one at a time."""
    if isinstance(rows, list):
        return sum(map(naive, rows), Counter())
    return Counter() if rows is None or rows == -100 else Counter([rows])


def counted(data: Any, **options: Any) -> Counter[int]:
    return Counter(dict(enumerate(count_tokens(data, **options).counts.tolist()))) - Counter()


@st.composite
def chunked(draw: st.DrawFn) -> pa.ChunkedArray:
    """Ragged rows with nulls, in chunks that are slices of longer arrays, of any list and integer type."""
    kind = draw(st.sampled_from(LIST_TYPES))(draw(st.sampled_from(INTEGERS)))
    chunks = []
    for rows in draw(st.lists(ROWS, max_size=4)):
        start = draw(st.integers(0, len(rows)))
        chunks.append(pa.array(rows, type=kind).slice(start, draw(st.integers(0, len(rows)))))
    return pa.chunked_array(chunks, type=kind)


@patient
@given(chunked())
def test_any_arrow_lists_count_as_their_rows(array: pa.ChunkedArray) -> None:
    assert counted(array) == naive(array.to_pylist())


@patient
@given(st.lists(st.one_of(st.none(), st.lists(ROWS, max_size=3)), max_size=4))
def test_lists_of_lists_count_as_their_rows(rows: list[Any]) -> None:
    array = pa.array(rows, type=pa.list_(pa.list_(pa.list_(pa.int64()))))
    assert counted(array) == counted(rows) == counted(iter(rows)) == naive(rows)


@patient
@given(st.integers(1, 4), st.lists(st.booleans(), max_size=8), st.data())
def test_fixed_size_lists_count_what_is_not_in_null_rows(size: int, null: list[bool], data: st.DataObject) -> None:
    values = data.draw(st.lists(LABELS, min_size=size * len(null), max_size=size * len(null)))
    kind = pa.list_(pa.int64(), size)
    array = pa.FixedSizeListArray.from_arrays(pa.array(values, pa.int64()), type=kind, mask=pa.array(null, pa.bool_()))
    part = array.slice(data.draw(st.integers(0, len(null))))
    assert counted(part) == naive(part.to_pylist())


@patient
@given(st.lists(st.lists(st.lists(IDS, max_size=6), min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_any_selection_counts_as_the_rows_that_it_shows(chunks: list[Any], data: st.DataObject) -> None:
    kind = pa.list_(pa.int32())
    table = pa.table({"input_ids": pa.chunked_array(chunks, type=kind)})
    selected = data.draw(st.lists(st.integers(0, table.num_rows - 1), max_size=30))
    dataset = datasets.Dataset(table).select(selected, keep_in_memory=True)
    again = dataset.select(range(len(selected) // 2), keep_in_memory=True)
    for selection in (dataset, again):
        assert counted(selection) == naive(list(selection["input_ids"]))


@patient
@given(st.lists(st.lists(LABELS.filter(lambda value: value is not None), max_size=20), max_size=8), st.integers(1, 7))
def test_blocks_of_any_size_count_the_same(rows: list[list[int]], block: int) -> None:
    expected = naive(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanvocab.vocabulary.tally.SMALLEST_BLOCK", block)
        patch.setattr("leanvocab.vocabulary.tally.LARGEST_BLOCK", 2 * block)
        patch.setattr("leanvocab.vocabulary.pieces.PIECE_IDS", 3)
        patch.setattr("leanvocab.vocabulary.sources.IDS_GATHERED", block)
        for dtype in (np.int32, np.int64):
            assert counted([np.array(row, dtype=dtype) for row in rows]) == expected
            assert counted(pa.array(rows, type=pa.list_(pa.from_numpy_dtype(dtype))), num_workers=2) == expected
        assert counted(rows) == expected


@patient
@given(st.lists(st.lists(st.lists(IDS, max_size=6), max_size=5), min_size=1, max_size=4))
def test_counts_of_parts_add_up_to_the_count_of_all(parts: list[Any]) -> None:
    total = sum(count_tokens(part) for part in parts)
    everything = count_tokens([row for part in parts for row in part])
    assert total == everything
    assert total.num_tokens == sum(len(row) for part in parts for row in part)


@patient
@given(st.lists(st.lists(st.integers(-99, 60), min_size=1, max_size=9), min_size=1, max_size=9))
def test_the_first_wrong_id_is_the_one_that_is_named(rows: list[list[int]]) -> None:
    wrong = [(row, value) for row, ids in enumerate(rows) for value in ids if not 0 <= value < 50]
    if not wrong:
        assert counted(rows, full_size=50) == naive(rows)
        return
    first = f"found id {wrong[0][1]} in row {wrong[0][0]}:"
    for data in (rows, pa.array(rows), pa.chunked_array([rows[:1], rows[1:]], type=pa.list_(pa.int64()))):
        with pytest.raises(ValueError, match=first):
            count_tokens(data, full_size=50)
