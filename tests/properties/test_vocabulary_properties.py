"""The vocabulary does what a dictionary and Python's sets would do, for any ids; its file and its Arrow form lose nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leanvocab import PartialVocabulary, count_tokens
from leanvocab.errors import MissingTokenError, VocabularyError

SIZE = 60
ID_SETS = st.sets(st.integers(0, SIZE - 1))
LIST_TYPES = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@st.composite
def vocabularies(draw: st.DrawFn) -> PartialVocabulary:
    return PartialVocabulary(draw(ID_SETS.filter(bool)), SIZE)


def naive_remap(value: Any, vocabulary: PartialVocabulary) -> Any:
    """One id at a time, by position among the kept ids."""
    if isinstance(value, list):
        return [naive_remap(item, vocabulary) for item in value]
    return value if value is None or value == -100 else list(vocabulary).index(value)


@patient
@given(vocabularies(), st.data())
def test_ids_go_both_ways_as_positions_in_the_sorted_list(vocabulary: PartialVocabulary, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.lists(st.sampled_from(list(vocabulary)), max_size=5), max_size=5))
    partial_ids = vocabulary.to_partial(ids)
    assert partial_ids == naive_remap(ids, vocabulary)
    assert vocabulary.to_full(partial_ids) == ids
    for row in ids:
        for dtype in (np.int8, np.int32, np.int64):
            array = np.array(row, dtype=dtype)
            assert np.array_equal(vocabulary.to_full(vocabulary.to_partial(array)), array)
        tensor = torch.tensor(row, dtype=torch.int64)
        assert torch.equal(vocabulary.to_partial(tensor), torch.tensor(vocabulary.to_partial(row), dtype=torch.int64))


@patient
@given(vocabularies(), st.lists(st.integers(-3, SIZE + 3), max_size=8))
def test_only_kept_ids_are_ever_remapped(vocabulary: PartialVocabulary, ids: list[int]) -> None:
    missing = [position for position, token_id in enumerate(ids) if token_id not in set(vocabulary)]
    if not missing:
        assert vocabulary.to_partial(ids) == naive_remap(ids, vocabulary)
        return
    with pytest.raises(MissingTokenError, match=f"^id {ids[missing[0]]} at position {missing[0]} is "):
        vocabulary.to_partial(np.array(ids))


@patient
@given(vocabularies(), st.integers(-3, SIZE))
def test_only_partial_ids_go_back(vocabulary: PartialVocabulary, partial_id: int) -> None:
    if 0 <= partial_id < len(vocabulary):
        assert vocabulary.to_full(partial_id) == list(vocabulary)[partial_id]
    else:
        with pytest.raises(VocabularyError, match=f"^{partial_id} is no partial id"):
            vocabulary.to_full(partial_id)


@patient
@given(ID_SETS, ID_SETS)
def test_set_operations_are_those_of_sets(left: set[int], right: set[int]) -> None:
    one, other = PartialVocabulary(left, SIZE), PartialVocabulary(right, SIZE)
    assert set(one | other) == left | right
    assert set(one & other) == left & right
    assert set(one - other) == left - right
    assert (one == other) == (left == right) == (one.digest == other.digest) == (hash(one) == hash(other))
    assert all((token_id in one) == (token_id in left) for token_id in range(SIZE))


@patient
@given(ID_SETS, st.integers(1, 2**31 - 1 - SIZE))
def test_files_give_back_what_was_saved(tmp_path: Path, ids: set[int], beyond: int) -> None:
    vocabulary = PartialVocabulary(ids, SIZE + beyond)
    vocabulary.save(tmp_path / "v.json")
    loaded = PartialVocabulary.load(tmp_path / "v.json")
    assert loaded == vocabulary
    assert loaded.digest == vocabulary.digest


@patient
@given(vocabularies(), st.data())
def test_a_file_with_any_changed_byte_is_refused_or_equal(
    tmp_path: Path, vocabulary: PartialVocabulary, data: st.DataObject
) -> None:
    path = tmp_path / "v.json"
    vocabulary.save(path)
    text = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(text) - 1))
    text[position] = data.draw(st.integers(0, 255))
    path.write_bytes(text)
    try:
        outcome: Any = PartialVocabulary.load(path)
    except VocabularyError as error:
        outcome = str(error)
    assert outcome == vocabulary or "v.json: " in outcome


@patient
@given(ID_SETS, ID_SETS, st.integers(1, SIZE + 5), st.integers(1, 3))
def test_the_kept_ids_are_the_counted_and_the_wanted_ones_rounded_up(
    once: set[int], wanted: set[int], multiple: int, min_count: int
) -> None:
    rows = [[token_id] * (1 + token_id % 3) for token_id in sorted(once)]
    needed = {token_id for token_id in once if 1 + token_id % 3 >= min_count} | wanted
    counts = count_tokens(rows)
    plain = PartialVocabulary.from_counts(counts, full_size=SIZE, always_keep=wanted, min_count=min_count)
    assert set(plain) == needed
    padded = PartialVocabulary.from_counts(
        counts, full_size=SIZE, always_keep=wanted, min_count=min_count, pad_to_multiple_of=multiple
    )
    assert len(padded) == min(SIZE, -(-len(needed) // multiple) * multiple)
    assert set(padded) >= needed
    extra = sorted(set(padded) - needed)
    assert extra == [token_id for token_id in range(SIZE) if token_id not in needed][: len(extra)]


@st.composite
def arrow_lists(draw: st.DrawFn) -> tuple[PartialVocabulary, pa.Array]:
    vocabulary = draw(vocabularies())
    leaf = st.one_of(st.sampled_from(list(vocabulary)), st.none(), st.just(-100))
    rows = st.lists(st.one_of(st.none(), st.lists(leaf, max_size=4)), max_size=5)
    kind = draw(st.sampled_from(LIST_TYPES))(draw(st.sampled_from([pa.int8(), pa.int32(), pa.int64()])))
    if draw(st.booleans()):
        rows, kind = st.lists(st.one_of(st.none(), rows), max_size=3), draw(st.sampled_from(LIST_TYPES))(kind)
    array = pa.array(draw(rows), type=kind)
    return vocabulary, array.slice(draw(st.integers(0, len(array))))


@patient
@given(arrow_lists())
def test_arrow_lists_are_remapped_with_their_type_nulls_and_nesting(made: tuple[PartialVocabulary, pa.Array]) -> None:
    vocabulary, array = made
    remapped = vocabulary.remap_dataset(pa.table({"input_ids": array}))["input_ids"]
    remapped.validate(full=True)
    assert remapped.type == array.type
    assert remapped.to_pylist() == naive_remap(array.to_pylist(), vocabulary)


@patient
@given(vocabularies(), st.integers(1, 4), st.lists(st.booleans(), max_size=6), st.data())
def test_fixed_size_lists_are_remapped_and_what_lies_in_null_rows_is_not(
    vocabulary: PartialVocabulary, size: int, null: list[bool], data: st.DataObject
) -> None:
    leaf = st.one_of(st.sampled_from(list(vocabulary)), st.none())
    rows = [
        [SIZE + 1] * size if is_null else data.draw(st.lists(leaf, min_size=size, max_size=size)) for is_null in null
    ]
    values = pa.array([token_id for row in rows for token_id in row], pa.int32())
    array = pa.FixedSizeListArray.from_arrays(values, type=pa.list_(pa.int32(), size), mask=pa.array(null, pa.bool_()))
    part = array.slice(data.draw(st.integers(0, len(null))))
    remapped = vocabulary.remap_dataset(pa.table({"input_ids": part}))["input_ids"]
    remapped.validate(full=True)
    assert remapped.type == array.type
    assert remapped.to_pylist() == naive_remap(part.to_pylist(), vocabulary)
