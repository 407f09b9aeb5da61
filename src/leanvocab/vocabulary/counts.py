"""Data → counts: how often each token id occurs (the paper's Section 4, "Before fine-tuning"). No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import DataError
from leanvocab.extras import is_instance
from leanvocab.vocabulary.counting_threads import add_counts, count_in_threads
from leanvocab.vocabulary.ray_data import count_in_workers


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """The occurrences of each token id.

    `counts` is a read-only int64 array, indexed by token id, of length `full_size`; where that is not known (None), of
    the largest id that occurs plus one. `columns` names the columns that were counted, where the data has columns.
    Counts add up: `count_tokens(train) + count_tokens(validation)`.

    Raises:
        DataError: counts that are added are over different full sizes.

    Source: paper, Section 3: the tokens that a data set uses.
    """

    counts: NDArray[np.int64]
    full_size: int | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = self.counts  # what nobody can write to any more need not be copied: half of a small count's time
        is_frozen = isinstance(given, np.ndarray) and given.base is None and not given.flags.writeable
        counts = given if is_frozen else np.array(given)
        if counts.ndim != 1 or (counts.dtype.kind not in "iu" and counts.size):
            raise DataError(f"expected counts as a 1-D array of integers, got {counts.dtype} of shape {counts.shape}")
        if counts.size and counts.min() < 0:
            raise DataError(f"expected counts of 0 or more, got {counts.min()}")
        if self.full_size is not None and len(counts) != self.full_size:
            raise DataError(f"expected {self.full_size} counts (full_size), got {len(counts)}")
        counts = counts.astype(np.int64, copy=False)
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "columns", tuple(self.columns))

    @property
    def num_tokens(self) -> int:
        """The number of tokens that were counted."""
        return int(self.counts.sum())

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The ids that occur, sorted."""
        return np.flatnonzero(self.counts).astype(np.int64, copy=False)

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        """Counts of both data sets. A size that is known on one side holds for both.

        Raises:
            DataError: the full sizes differ, or an id of one side lies outside the full size of the other.
        """
        if not isinstance(other, TokenCounts):
            return NotImplemented
        sizes = {size for size in (self.full_size, other.full_size) if size is not None}
        if len(sizes) > 1:
            raise DataError(
                f"cannot add counts over {self.full_size} and {other.full_size} rows: "
                "they belong to different vocabularies"
            )
        full_size = next(iter(sizes), None)
        longest = max(len(self.counts), len(other.counts))
        if full_size is not None and longest > full_size:
            raise DataError(f"cannot add counts: id {longest - 1} occurs on one side, the other has {full_size} rows")
        total = add_counts(self.counts.copy(), other.counts.copy())
        return TokenCounts(total, full_size, tuple(dict.fromkeys(self.columns + other.columns)))

    def __radd__(self, other: object) -> "TokenCounts":
        """Lets `sum()` start from 0."""
        return self if other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenCounts):
            return NotImplemented
        return self.full_size == other.full_size and np.array_equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash((self.full_size, self.counts.tobytes()))

    def __repr__(self) -> str:
        return f"TokenCounts({self.num_tokens:,} tokens, {len(self.token_ids):,} ids, full_size={self.full_size})"


def check_full_size(full_size: int | None) -> None:
    """Raises `DataError` for a number of rows that is none."""
    if full_size is not None and (isinstance(full_size, bool) or full_size < 1):
        raise DataError(f"expected full_size of 1 or more, or None, got {full_size!r}")


def count_tokens(
    data: Any,
    columns: str | Sequence[str] | None = None,
    *,
    full_size: int | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> TokenCounts:
    """Count how often each token id occurs in columns of token ids: `leanvocab.count_tokens`, texts aside.

    `columns` None: every column whose name is or ends in `input_ids`, `labels` where they are sequences, and the other names in
    `leanvocab.vocabulary.columns`. A Ray data set is counted in Ray's workers.

    Raises:
        DataError: there is no column of token ids, a named one is absent or holds no integers, or an id is negative or
            outside `full_size` (the message names column and row).
    """
    names = [columns] if isinstance(columns, str) else None if columns is None else list(columns)
    check_full_size(full_size)
    if num_workers is not None and num_workers < 1:
        raise DataError(f"expected num_workers of 1 or more, or None, got {num_workers!r}")
    if is_instance(data, "ray.data", "Dataset"):
        counts, counted = count_in_workers(data, names, full_size, num_workers)
    else:
        counts, counted = count_in_threads(data, names, full_size, num_workers, progress)
    counts.flags.writeable = False  # nobody else has it: it need not be copied
    return TokenCounts(counts, full_size, tuple(counted))
