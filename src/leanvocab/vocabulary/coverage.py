"""Coverage: the fewest rows, the most frequent first, that make up a share of all tokens that were counted. No torch."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import VocabularyError

SHOWN_PERCENTS = (99.0, 99.9, 99.99, 100.0)


def counts_by_rank(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts of the used ids, the most frequent first."""
    return np.sort(counts[counts > 0])[::-1]


def rows_to_cover(counts: NDArray[np.int64], percents: Iterable[float] = SHOWN_PERCENTS) -> dict[float, int]:
    """The fewest rows whose tokens make up each share, in percent, of all tokens; `counts` are indexed by token id."""
    cumulative = np.cumsum(counts_by_rank(counts))
    total = int(cumulative[-1]) if len(cumulative) else 0
    return {percent: _fewest(cumulative, total, percent) for percent in percents}


def covering_ids(counts: NDArray[np.int64], percent: float) -> NDArray[np.int64]:
    """The ids of the fewest rows that cover a share, sorted; of equally frequent ids the lower ones are taken."""
    (num_rows,) = rows_to_cover(counts, [percent]).values()
    return np.sort(np.argsort(-counts, kind="stable")[:num_rows])


def check_coverage(percent: Any) -> None:
    """Raises `VocabularyError` for what is no share in percent; a ratio (0.999) is none, and is not taken for one."""
    is_number = isinstance(percent, int | float) and not isinstance(percent, bool)
    if not is_number or not 1 < percent <= 100:
        raise VocabularyError(
            f"expected coverage in percent of the tokens, above 1 and up to 100 (99.9, say), got {percent!r}"
        )


def _fewest(cumulative: NDArray[np.int64], total: int, percent: float) -> int:
    # As a person writes the number, and in integers: 0.999 * 1000 need not be 999 in floating point.
    needed = -(-Fraction(repr(percent)) * total // 100)
    return int(np.searchsorted(cumulative, int(needed))) + 1 if needed else 0
