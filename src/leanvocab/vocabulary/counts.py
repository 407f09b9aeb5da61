"""Data → counts: how often each token id occurs (the paper's Section 4, "Before fine-tuning"). No torch.

Pieces of data (`sources`) are flattened into arrays of ids, without a copy where Arrow allows it, and counted in blocks of a
bounded size by as many threads as help.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import DataError
from leanvocab.vocabulary.ray_data import count_in_workers, is_ray_dataset
from leanvocab.vocabulary.sources import Piece, Source, find_sources, flat

"""The label that losses ignore; it is no token id and is never counted."""

_LARGEST_GUESSED_SIZE = 1 << 24  # without full_size, a larger id is taken for a mistake: counts alone would take 128 MB
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 19, 1 << 20  # ids counted at once: 4 to 8 MB
_IDS_WORTH_A_THREAD = 1 << 22
_MOST_THREADS, _BYTES_FOR_THREADS = 4, 56 << 20  # by default
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
        counts = self.counts if _is_frozen(self.counts) else np.array(self.counts)
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
            ChunkedArray; a `ray.data.Dataset`, counted in Ray's workers; a numpy or torch array of any shape; a mapping of
            columns (a `BatchEncoding`) or of data sets; or an iterable of rows, batches or sequences (which is consumed).
        columns: the columns of token ids. None: every column whose name is or ends in `input_ids`, `labels` where they
            are sequences, and the other names in `leanvocab.vocabulary.columns`.
        full_size: rows of the full matrix; an id outside is an error. None: not checked.
        num_workers: threads. None: as many as the processor allows, up to four, on large data; otherwise one. Streams
            are counted by one. Of a Ray data set, tasks at once (None: Ray decides).
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
    if is_ray_dataset(data):
        return _count_ray_dataset(data, names, full_size, num_workers)
    sources = list(find_sources(data, names, ""))
    bar = _ProgressBar(progress, total=_sum_or_none(source.num_rows for source in sources))
    pieces = chain.from_iterable(source.pieces for source in sources)
    try:
        found, counted = _count(pieces, full_size, _num_threads(num_workers, sources, full_size), bar)
    finally:
        bar.close()
    named = dict.fromkeys(column for source in sources for column in source.columns)
    return replace(sum(found[1:], found[0]), columns=tuple(named | counted))


def _count_ray_dataset(
    data: Any, columns: list[str] | None, full_size: int | None, num_workers: int | None
) -> TokenCounts:
    total, named = count_in_workers(data, columns, full_size, num_workers, count_tokens)
    return TokenCounts(total, full_size, tuple(named))


def _is_frozen(counts: Any) -> bool:
    """Whether nobody can write to an array any more, so that it need not be copied (half of a small count's time)."""
    return isinstance(counts, np.ndarray) and counts.base is None and not counts.flags.writeable


class _BadIdError(Exception):
    """An id that cannot be counted, and in which piece: `_count` makes a DataError of the first."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class _Tally:
    """The counts of one thread. Ids are staged as int64 and counted by blocks, so that small pieces cost little.

    `np.bincount` itself finds negative ids, and ids that are too large show in its length: no pass over the ids is
    spent on checking them. Where a wrong one lies is looked up afterwards, in the pieces of the block.
    """

    def __init__(self, full_size: int | None) -> None:
        self._full_size = full_size
        self._counts = np.zeros(full_size or 0, dtype=np.int64)
        self._staged = np.empty(_LARGEST_BLOCK, dtype=np.int64)  # pages that are not used cost nothing
        self._num_staged = 0
        self._pieces: list[tuple[int, Piece]] = []
        self._ignores = False

    def add(self, number: int, piece: Piece) -> None:
        """Count a piece: its integers, nested as they may be."""
        if self._num_staged == 0:
            self._pieces.clear()  # all counted
        self._pieces.append((number, piece))
        for ids in piece.ids():
            # Blocks of int64 are counted where they lie. Smaller ones are not: copied together they are counted faster,
            # since bincount reads its input twice and pays for each id of the vocabulary in every call.
            num_blocks = len(ids) // self._block_size()
            if num_blocks and ids.dtype == np.int64 and ids.flags.c_contiguous:
                self.flush()
                for block in np.array_split(ids, num_blocks):
                    self._count(block)
            else:
                self._stage(ids)

    def flush(self) -> None:
        """Count what is staged."""
        if self._num_staged:
            self._count(self._staged[: self._num_staged])
            self._num_staged = 0
        del self._pieces[:-1]  # the last one may still be under way

    def result(self) -> TokenCounts:
        """All counts; the tally is not to be added to any more."""
        self._counts.flags.writeable = False
        return TokenCounts(self._counts, self._full_size)

    def _block_size(self) -> int:
        # Large enough to outweigh what bincount pays for each id of the vocabulary, small enough for the cache.
        return min(max(len(self._counts), _SMALLEST_BLOCK), _LARGEST_BLOCK)

    def _stage(self, ids: NDArray[Any]) -> None:
        if ids.dtype == np.uint64 and ids.size and ids.max() > np.iinfo(np.int64).max:
            self._refuse()  # it would turn negative, perhaps into -100
        while len(ids):
            part = ids[: self._block_size() - self._num_staged]
            stop = self._num_staged + len(part)
            np.copyto(self._staged[self._num_staged : stop], part, casting="unsafe")
            self._num_staged = stop
            ids = ids[len(part) :]
            if stop >= self._block_size():
                self.flush()

    def _count(self, ids: NDArray[np.int64]) -> None:
        # Ids to ignore are looked for once they have shown, and as long as they do.
        found = None if self._ignores else self._bincount(ids)
        if found is None:
            kept = np.compress(ids != IGNORE_INDEX, ids)
            self._ignores = len(kept) < len(ids)
            found = self._bincount(kept)
        if found is None:
            self._refuse()
        elif len(found) > len(self._counts):
            found[: len(self._counts)] += self._counts
            self._counts = found
        else:
            self._counts[: len(found)] += found

    def _bincount(self, ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
        try:
            found = np.bincount(ids)
        except (ValueError, MemoryError):  # a negative id, or an absurdly large one
            return None
        return found if len(found) <= _limit(self._full_size) else None

    def _refuse(self) -> NoReturn:
        for number, piece in self._pieces:
            array = piece.load()
            if _bad_ids(array, self._full_size):
                row, token_id = _find_bad_id(array, self._full_size)
                where = f"row {piece.row_number(row)}{piece.where}"
                raise _BadIdError(number, _describe_bad_id(token_id, where, self._full_size))
        raise MemoryError("there is not enough memory to count a block of token ids")


def _limit(full_size: int | None) -> int:
    return _LARGEST_GUESSED_SIZE if full_size is None else full_size


def _count(
    pieces: Iterator[Piece], full_size: int | None, num_threads: int, bar: "_ProgressBar"
) -> tuple[list[TokenCounts], dict[str, None]]:
    """Let threads take pieces in turn (numpy lets go of the interpreter while it counts); also the columns met.

    Where ids are wrong, the first piece's error is raised, however the threads raced.
    """
    columns: dict[str, None] = {}
    errors: dict[int, BaseException] = {}
    lock, numbered = threading.Lock(), enumerate(pieces)

    def next_piece() -> tuple[int, Piece | None]:
        with lock:
            number, piece = (-1, None) if errors else next(numbered, (-1, None))
            if piece is not None:
                columns.update(dict.fromkeys(piece.columns))
            return number, piece

    def work() -> TokenCounts:
        tally, number = _Tally(full_size), -1
        try:
            while True:
                number, piece = next_piece()
                if piece is None:
                    tally.flush()
                    return tally.result()
                tally.add(number, piece)
                with lock:
                    bar.update(piece.num_rows)
        except BaseException as error:
            errors[error.number if isinstance(error, _BadIdError) else number] = error
            raise

    try:
        found = [work()] if num_threads == 1 else _in_threads(work, num_threads, errors)
    except _BadIdError:
        raise DataError(str(errors[min(errors)])) from None
    return found, columns


def _in_threads(
    work: Callable[[], TokenCounts], num_threads: int, errors: dict[int, BaseException]
) -> list[TokenCounts]:
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(work) for _ in range(num_threads)]
        try:
            wait(futures)
        except BaseException as error:  # the user's interrupt: threads stop after their piece
            errors[-1] = error
            raise
    if errors:
        raise errors[min(errors)]
    return [future.result() for future in futures]


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
    for ids in flat(array):
        bad = ids[((ids < 0) & (ids != IGNORE_INDEX)) | (ids >= _limit(full_size))]
        if bad.size:
            return [int(bad[0])]
    return []


def _describe_bad_id(token_id: int, where: str, full_size: int | None) -> str:
    found = f"found id {token_id} in {where}"
    if token_id < 0:
        return f"{found}: token ids are 0 or more ({IGNORE_INDEX} alone is ignored)"
    if full_size is not None:
        return f"{found}: expected ids below full_size={full_size}. Was the data tokenized for another model?"
    return (
        f"{found}: no vocabulary is known to be so large, so this is probably no column of token ids; "
        "if it is one, pass full_size="
    )


def _num_threads(num_workers: int | None, sources: list[Source], full_size: int | None) -> int:
    num_ids = _sum_or_none(source.num_ids for source in sources)
    if num_ids is None:
        return 1
    if num_workers is not None:
        return num_workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Each holds its counts, those of a block, the block, and what it takes together.
    size = _LARGEST_BLOCK if full_size is None else full_size
    affordable = _BYTES_FOR_THREADS // (16 * size + 8 * max(size, _SMALLEST_BLOCK) + (4 << 20))
    return max(1, min(_MOST_THREADS, processors, affordable, num_ids // _IDS_WORTH_A_THREAD))


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
