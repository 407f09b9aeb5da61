"""Coverage is what a naive count of the most frequent rows says, to the last token."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanvocab import PartialVocabulary, TokenCounts, count_tokens
from leanvocab.errors import VocabularyError
from leanvocab.vocabulary.coverage import covering_ids, rows_to_cover

PERCENTS = st.sampled_from(["1.5", "50", "90", "99", "99.9", "99.99", "100"])


def naive_ids(counts: list[int], percent: str) -> list[int]:
    """The most frequent ids, the lower one first among equals, until they make up the share."""
    ids, covered = [], 0
    for token_id in sorted((i for i, count in enumerate(counts) if count), key=lambda i: (-counts[i], i)):
        if covered >= Fraction(percent) / 100 * sum(counts):
            break
        ids.append(token_id)
        covered += counts[token_id]
    return sorted(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 12) | st.integers(0, 10**6), max_size=40), PERCENTS)
def test_the_ids_that_cover_are_the_naive_ones(counts: list[int], percent: str) -> None:
    array = np.array(counts, np.int64)
    naive = naive_ids(counts, percent)
    assert covering_ids(array, float(percent)).tolist() == naive
    assert rows_to_cover(array, [float(percent)]) == {float(percent): len(naive)}


def test_of_equally_frequent_ids_the_lower_ones_cover() -> None:
    assert covering_ids(np.array([0, 2, 2, 2, 4]), 60).tolist() == [1, 4]


def test_a_share_is_met_exactly_and_not_by_rounding() -> None:
    counts = np.array([999, 1])  # in floating point 0.999 * 1000 may lie above 999
    assert rows_to_cover(counts, [99.9, 99.91]) == {99.9: 1, 99.91: 2}
    large = np.array([10**15 - 1, 1])
    assert rows_to_cover(large, [99.9999999999999, 100]) == {99.9999999999999: 1, 100: 2}


def test_nothing_counted_needs_no_rows() -> None:
    assert rows_to_cover(np.zeros(5, np.int64), [99, 100]) == {99: 0, 100: 0}
    assert covering_ids(np.zeros(0, np.int64), 99).tolist() == []


def test_a_vocabulary_covers_a_share_and_keeps_what_is_to_be_kept() -> None:
    counts = count_tokens([[5] * 90 + [7] * 9 + [2]], full_size=12)
    assert list(PartialVocabulary.from_counts(counts, coverage=90)) == [5]
    assert list(PartialVocabulary.from_counts(counts, coverage=99)) == [5, 7]
    assert list(PartialVocabulary.from_counts(counts, coverage=99.5, always_keep=[11])) == [2, 5, 7, 11]
    # An id has to be frequent enough and among those that cover.
    assert list(PartialVocabulary.from_counts(counts, coverage=100, min_count=9)) == [5, 7]
    assert list(PartialVocabulary.from_counts(counts, coverage=90, min_count=9)) == [5]


@pytest.mark.parametrize("coverage", [0, -3, 0.999, 1, 100.1, float("nan"), True, "99"])
def test_a_coverage_that_is_no_percentage_is_an_error(coverage: object) -> None:
    with pytest.raises(VocabularyError, match=r"expected coverage in percent of the tokens, above 1 and up to 100"):
        PartialVocabulary.from_counts(TokenCounts(np.array([1, 2])), full_size=2, coverage=coverage)
