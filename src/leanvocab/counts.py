"""Data → counts: how often each token id occurs (the paper's Section 4, "Before fine-tuning"). No torch.

Pieces of data (`leanvocab.sources`) are flattened into arrays of ids, without a copy where Arrow allows it, and counted
in blocks of a bounded size by as many threads as help.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import DataError
from leanvocab.sources import Piece, Source, find_sources

IGNORE_INDEX = -100
"""The label that losses ignore; it is no token id and is never counted."""

_LARGEST_GUESSED_SIZE = 1 << 24  # without full_size, a larger id is taken for a mistake: counts alone would take 128 MB
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 17, 1 << 19  # ids counted at once; 4 MB of int64 at most
_ROWS_COPIED = 1024  # rows flattened at once where Arrow must copy them
_IDS_WORTH_A_THREAD = 1 << 23
_MOST_THREADS = 4  # by default; each holds up to 16 MB
_SECONDS_BEFORE_PROGRESS = 2.0


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token id occurs.

    `counts` is a read-only int64 array, indexed by token id, of length `full_size`; where that is not known (None), of
    the largest id that occurs plus one. `columns` names the columns that were counted, where the data has columns.
    Counts add up: `count_tokens(train) + count_tokens(validation)`.
    """

    counts: NDArray[np.int64]
    full_size: int | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = np.array(self.counts)
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
        """How many tokens were counted."""
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
        total = np.zeros(longest, dtype=np.int64)
        total[: len(self.counts)] += self.counts
        total[: len(other.counts)] += other.counts
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


def count_tokens(
    data: Any,
    columns: str | Sequence[str] | None = None,
    *,
    full_size: int | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> TokenCounts:
    """Count how often each token id occurs in data.

    The data is read, never rewritten, cached or changed. Selected rows (`select`, `shuffle`, `train_test_split`) count
    as selected; a format or transform of a data set is looked through, not run. `-100` and nulls are not counted.

    Args:
        data: a `datasets.Dataset`, `DatasetDict` or `IterableDataset`; a `pyarrow` Table, RecordBatch, Array or
            ChunkedArray; a numpy or torch array of any shape; a mapping of columns (a `BatchEncoding`) or of data sets;
            or an iterable of rows, batches or sequences (which is consumed).
        columns: the columns of token ids. None: every column whose name is or ends in `input_ids`, `labels` where they
            are sequences, and the other names in `leanvocab.columns`.
        full_size: rows of the full matrix; an id outside is an error. None: not checked.
        num_workers: threads. None: as many as the processor allows, up to four, on large data; otherwise one. Streams
            are counted by one.
        progress: True shows a progress bar, False does not. None: only once the work has taken two seconds.

    Raises:
        DataError: there is no column of token ids, a named one is absent or holds no integers, or an id is negative or
            outside `full_size` (the message names column and row).
    """
    names = [columns] if isinstance(columns, str) else None if columns is None else list(columns)
    if full_size is not None and (isinstance(full_size, bool) or full_size < 1):
        raise DataError(f"expected full_size of 1 or more, or None, got {full_size!r}")
    if num_workers is not None and num_workers < 1:
        raise DataError(f"expected num_workers of 1 or more, or None, got {num_workers!r}")
    sources = list(find_sources(data, names, ""))
    bar = _ProgressBar(progress, total=_sum_or_none(source.num_rows for source in sources))
    pieces = chain.from_iterable(source.pieces for source in sources)
    try:
        tallies, counted = _count(pieces, full_size, _num_threads(num_workers, sources), bar)
    finally:
        bar.close()
    found = sum((tally.result() for tally in tallies[1:]), tallies[0].result())
    named = dict.fromkeys(column for source in sources for column in source.columns)
    return TokenCounts(found.counts, full_size, tuple(named | counted))


class _BadIdError(Exception):
    """An id that cannot be counted; where it lies is found out afterwards."""


class _Tally:
    """The counts of one thread. Ids are staged as int64 and counted by blocks, so that small pieces cost little."""

    def __init__(self, full_size: int | None) -> None:
        self._full_size = full_size
        self._limit = _LARGEST_GUESSED_SIZE if full_size is None else full_size
        self._counts = np.zeros(full_size or 0, dtype=np.int64)
        self._staged = np.empty(_LARGEST_BLOCK, dtype=np.int64)
        self._num_staged = 0

    def add(self, array: Any) -> None:
        """Count an Arrow or numpy array of integers, nested as it may be."""
        for ids in _flat(array):
            for start in range(0, len(ids), _LARGEST_BLOCK):
                self._add_block(ids[start : start + _LARGEST_BLOCK])

    def result(self) -> TokenCounts:
        self._flush()
        return TokenCounts(self._counts, self._full_size)

    def _add_block(self, ids: NDArray[Any]) -> None:
        # A block of int64 is counted where it lies; another one is cast into the staging buffer (bincount is slower).
        direct = ids.dtype == np.int64 and ids.flags.c_contiguous and len(ids) >= self._block_size()
        if not direct:
            if self._num_staged + len(ids) > len(self._staged):
                self._flush()
            stage = self._staged[self._num_staged : self._num_staged + len(ids)]
            if ids.dtype == np.uint64 and ids.size and ids.max() >= self._limit:
                raise _BadIdError  # it would turn negative below
            np.copyto(stage, ids, casting="unsafe")
            ids = stage
        # Read as unsigned, negative ids are the largest: one pass checks both ends.
        if ids.size and ids.view(np.uint64).max() >= self._limit:
            kept = _without_ignored(ids)
            if kept.size and kept.view(np.uint64).max() >= self._limit:
                raise _BadIdError
            if not direct:
                stage[: len(kept)] = kept
            ids = kept
        if direct:
            self._count(ids)
        else:
            self._num_staged += len(ids)
            if self._num_staged >= self._block_size():
                self._flush()

    def _block_size(self) -> int:
        # Large enough to outweigh what bincount pays for each id of the vocabulary, small enough for the cache.
        return min(max(4 * len(self._counts), _SMALLEST_BLOCK), _LARGEST_BLOCK)

    def _flush(self) -> None:
        self._count(self._staged[: self._num_staged])
        self._num_staged = 0

    def _count(self, ids: NDArray[np.int64]) -> None:
        found = np.bincount(ids)
        if len(found) > len(self._counts):
            found[: len(self._counts)] += self._counts
            self._counts = found
        else:
            self._counts[: len(found)] += found


def _without_ignored(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.compress(ids != IGNORE_INDEX, ids)


def _flat(array: Any) -> Iterator[NDArray[Any]]:
    """The integers in an Arrow or numpy array, as 1-D arrays; without a copy where there are no nulls."""
    if isinstance(array, np.ndarray):
        yield from _flat_numpy(array)
    else:
        yield from _flat_arrow(array)


def _flat_numpy(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    if array.ndim == 1 or array.flags.forc:
        yield array.ravel(order="K") if array.ndim != 1 else array
    elif array.size:
        rows = max(1, _LARGEST_BLOCK * len(array) // array.size)
        for start in range(0, len(array), rows):
            part = array[start : start + rows]
            if len(part) == 1 and part.size > _LARGEST_BLOCK:
                yield from _flat_numpy(part[0])
            else:
                yield part.reshape(-1)


def _flat_arrow(array: Any) -> Iterator[NDArray[Any]]:
    import pyarrow as pa

    if isinstance(array, pa.ExtensionArray):
        yield from _flat_arrow(array.storage)
    elif pa.types.is_integer(array.type):
        if array.null_count == 0:
            yield array.to_numpy(zero_copy_only=True)
        else:
            for start in range(0, len(array), _LARGEST_BLOCK):
                yield array.slice(start, _LARGEST_BLOCK).drop_null().to_numpy(zero_copy_only=True)
    elif not pa.types.is_null(array.type):
        # `flatten` leaves out what lies in null rows and outside a slice; it copies unless the rows lie side by side.
        copies = array.null_count > 0 or "view" in str(array.type)
        step = _ROWS_COPIED if copies else max(len(array), 1)
        for start in range(0, len(array), step):
            yield from _flat_arrow(array.slice(start, step).flatten())


def _count(
    pieces: Iterator[Piece], full_size: int | None, num_threads: int, bar: "_ProgressBar"
) -> tuple[list[_Tally], dict[str, None]]:
    """Let threads take pieces in turn. numpy lets go of the interpreter while it counts."""
    tallies = [_Tally(full_size) for _ in range(num_threads)]
    columns: dict[str, None] = {}
    errors: dict[int, BaseException] = {}
    lock, numbered = threading.Lock(), enumerate(pieces)

    def work(tally: _Tally) -> None:
        while True:
            with lock:
                number, piece = next(numbered, (0, None)) if not errors else (0, None)
                if piece is None:
                    return
                columns.update(dict.fromkeys(piece.columns))
            try:
                _count_piece(tally, piece, full_size)
            except BaseException as error:
                with lock:
                    errors[number] = error
                raise
            with lock:
                bar.update(piece.num_rows)

    if num_threads == 1:
        work(tallies[0])
        return tallies, columns
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(work, tally) for tally in tallies]
        try:
            for future in futures:
                future.exception()  # wait
        except BaseException as error:  # the user's interrupt: the threads stop after their piece
            errors[-1] = error
    if errors:
        raise errors[min(errors)]  # the first piece's, however the threads raced
    for future in futures:
        future.result()  # an error of the data itself, while a thread fetched its next piece
    return tallies, columns


def _count_piece(tally: _Tally, piece: Piece, full_size: int | None) -> None:
    array = piece.load()
    try:
        tally.add(array)
    except _BadIdError:
        row, token_id = _find_bad_id(array, full_size)
        raise DataError(_describe_bad_id(token_id, piece.row_number(row), piece.where, full_size)) from None


def _find_bad_id(array: Any, full_size: int | None) -> tuple[int, int]:
    """The first row, and in it the first id, that cannot be counted: by halves, so that any nesting will do."""
    start, stop = 0, len(array)
    while stop - start > 1:
        middle = (start + stop) // 2
        if _bad_ids(array[start:middle], full_size):
            stop = middle
        else:
            start = middle
    return start, _bad_ids(array[start:stop], full_size)[0]


def _bad_ids(array: Any, full_size: int | None) -> list[int]:
    limit = _LARGEST_GUESSED_SIZE if full_size is None else full_size
    for ids in _flat(array):
        bad = ids[((ids < 0) & (ids != IGNORE_INDEX)) | (ids >= limit)] if ids.size else ids
        if bad.size:
            return [int(bad[0])]
    return []


def _describe_bad_id(token_id: int, row: int, where: str, full_size: int | None) -> str:
    found = f"found id {token_id} in row {row}{where}"
    if token_id < 0:
        return f"{found}: token ids are 0 or more ({IGNORE_INDEX} alone is ignored)"
    if full_size is not None:
        return f"{found}: expected ids below full_size={full_size}. Was the data tokenized for another model?"
    return (
        f"{found}: no vocabulary is known to be so large, so this is probably no column of token ids; "
        "if it is one, pass full_size="
    )


def _num_threads(num_workers: int | None, sources: list[Source]) -> int:
    num_ids = _sum_or_none(source.num_ids for source in sources)
    if num_ids is None:
        return 1
    if num_workers is not None:
        return num_workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_THREADS, processors, num_ids // _IDS_WORTH_A_THREAD))


def _sum_or_none(numbers: Iterable[int | None]) -> int | None:
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


class _ProgressBar:
    """A tqdm bar that is made, and tqdm imported, only when the work has turned out long."""

    def __init__(self, wanted: bool | None, total: int | None) -> None:
        self._wanted = wanted
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._bar: Any = None

    def update(self, num_rows: int) -> None:
        self._done += num_rows
        if self._bar is not None:
            self._bar.update(num_rows)
        elif self._wanted or (self._wanted is None and time.monotonic() - self._started > _SECONDS_BEFORE_PROGRESS):
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(
                total=self._total, initial=self._done, desc="Counting tokens", unit=" rows", unit_scale=True
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
