"""Threads that count: they take the pieces of data in turn, each with a tally of its own. No torch."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import reduce
from itertools import chain
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import RESIZE_FIRST, DataError
from leanvocab.progress import ProgressBar
from leanvocab.vocabulary.pieces import Piece, flat_ids
from leanvocab.vocabulary.sources import find_sources

SECONDS_BEFORE_PROGRESS = 2.0
_IDS_WORTH_A_THREAD = 1 << 22
_MOST_THREADS, _BYTES_FOR_THREADS = 4, 56 << 20  # by default
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 19, 1 << 20  # ids counted at once: 4 to 8 MB
_LARGEST_GUESSED_SIZE = 1 << 24  # without full_size, a larger id is taken for a mistake: counts alone would take 128 MB


def count_in_threads(
    data: Any, columns: list[str] | None, full_size: int | None, num_workers: int | None, progress: bool | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Counts [full_size, or the largest id + 1] of data of any kind, and the columns counted; see `count_tokens`."""
    sources = list(find_sources(data, columns))
    num_threads = choose_num_threads(num_workers, _sum_or_none(source.num_ids for source in sources), full_size)
    num_rows, after = _sum_or_none(source.num_rows for source in sources), SECONDS_BEFORE_PROGRESS
    bar = ProgressBar("Counting tokens", num_rows, progress, unit=" rows", after_seconds=after, anywhere=True)
    pieces = chain.from_iterable(source.pieces for source in sources)
    try:
        counts, counted = count_pieces(pieces, full_size, num_threads, bar)
    finally:
        bar.close()
    names = [*(source.column for source in sources), *counted]
    return counts, list(dict.fromkeys(name for name in names if name is not None))


def count_pieces(
    pieces: Iterable[Piece], full_size: int | None, num_threads: int, bar: ProgressBar
) -> tuple[NDArray[np.int64], list[str | None]]:
    """Let threads take pieces in turn (numpy lets go of the interpreter while it counts); also the columns met.

    Where ids are wrong, the first piece's error is raised, however the threads raced.
    """
    columns: dict[str | None, None] = {}
    errors: dict[int, BaseException] = {}
    lock, numbered = threading.Lock(), enumerate(pieces)

    def take_pieces() -> Iterator[tuple[int, Piece]]:
        while True:
            with lock:
                number, piece = (-1, None) if errors else next(numbered, (-1, None))
                if piece is None:
                    return
                columns[piece.column] = None
            yield number, piece
            with lock:
                bar.add(piece.num_rows)

    def work() -> NDArray[np.int64]:
        tally = Tally(full_size)
        try:
            for number, piece in take_pieces():
                tally.add(number, piece)
            tally.flush()
        except BaseException as error:
            errors[tally.number] = error
            raise
        return tally.counts

    parts = [work()] if num_threads == 1 else _in_threads(work, num_threads, errors)
    return reduce(add_counts, parts), list(columns)


def _in_threads(
    work: Callable[[], NDArray[np.int64]], num_threads: int, errors: dict[int, BaseException]
) -> list[NDArray[np.int64]]:
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


def choose_num_threads(num_workers: int | None, num_ids: int | None, full_size: int | None) -> int:
    """The user's number of threads, or as many as data, memory and processor allow; one for a stream."""
    if num_ids is None:
        return 1
    if num_workers is not None:
        return num_workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = LARGEST_BLOCK if full_size is None else full_size
    # The most that a tally holds: its counts, those of a block, the block, and what it takes together.
    affordable = _BYTES_FOR_THREADS // (16 * size + 8 * max(size, SMALLEST_BLOCK) + (4 << 20))
    return max(1, min(_MOST_THREADS, processors, affordable, num_ids // _IDS_WORTH_A_THREAD))


def _sum_or_none(numbers: Iterable[int | None]) -> int | None:
    known = list(numbers)
    return None if None in known else sum(filter(None, known))


class Tally:
    """The counts of one thread. Ids are staged as int64 and counted by blocks, so that small pieces cost little.

    `np.bincount` itself finds negative ids, and ids that are too large show in its length: no pass over the ids is
    spent on checking them. Where a wrong one lies is looked up afterwards, in the pieces of the block.

    Attributes:
        counts: int64, indexed by token id, of all that was counted before the last `flush`.
        number: the number of the piece that is being counted; after a DataError, of the piece with the wrong id.
    """

    def __init__(self, full_size: int | None) -> None:
        self.counts = np.zeros(full_size or 0, dtype=np.int64)
        self.number = -1
        self._limit = _LARGEST_GUESSED_SIZE if full_size is None else full_size
        self._full_size = full_size
        self._staged = np.empty(LARGEST_BLOCK, dtype=np.int64)  # pages that are not used cost nothing
        self._num_staged = 0
        self._pieces: list[tuple[int, Piece]] = []
        self._ignores = False

    def add(self, number: int, piece: Piece) -> None:
        """Count a piece: its integers, nested as they may be.

        Raises:
            DataError: an id, of this piece or an earlier one, is negative or too large.
        """
        if self._num_staged == 0:
            self._pieces.clear()  # all counted
        self._pieces.append((number, piece))
        self.number = number
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

    def _block_size(self) -> int:
        # Large enough to outweigh what bincount pays for each id of the vocabulary, small enough for the cache.
        return min(max(len(self.counts), SMALLEST_BLOCK), LARGEST_BLOCK)

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
        counts = None if self._ignores else self._bincount(ids)
        if counts is None:
            kept = np.compress(ids != IGNORE_INDEX, ids)
            self._ignores = len(kept) < len(ids)
            counts = self._bincount(kept)
        if counts is None:
            self._refuse()
        self.counts = add_counts(self.counts, counts)

    def _bincount(self, ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
        try:
            counts = np.bincount(ids)
        except (ValueError, MemoryError):  # a negative id, or an absurdly large one
            return None
        return counts if len(counts) <= self._limit else None

    def _refuse(self) -> NoReturn:
        for number, piece in self._pieces:
            self.number, rows = number, piece.load()
            if self._wrong_ids(rows):
                row, token_id = self._find_wrong_id(rows)
                raise DataError(self._describe(token_id, f"row {piece.row_number(row)}{piece.where}"))
        raise MemoryError("there is not enough memory to count a block of token ids")

    def _find_wrong_id(self, rows: Any) -> tuple[int, int]:
        """The first row, and in it the first id, that cannot be counted: by halves, so that any nesting will do."""
        start, stop = 0, len(rows)
        while stop - start > 1:
            middle = (start + stop) // 2
            start, stop = (start, middle) if self._wrong_ids(rows[start:middle]) else (middle, stop)
        return start, self._wrong_ids(rows[start:stop])[0]

    def _wrong_ids(self, rows: Any) -> list[int]:
        """The first wrong id of some rows, if there is one."""
        for ids in flat_ids(rows):
            wrong = ids[((ids < 0) & (ids != IGNORE_INDEX)) | (ids >= self._limit)]
            if wrong.size:
                return [int(wrong[0])]
        return []

    def _describe(self, token_id: int, where: str) -> str:
        described = f"found id {token_id} in {where}"
        if token_id < 0:
            return f"{described}: token ids are 0 or more ({IGNORE_INDEX} alone is ignored)"
        if self._full_size is not None:
            return (
                f"{described}: expected ids below full_size={self._full_size}. "
                f"Was the data tokenized for another model? Or {RESIZE_FIRST}"
            )
        return (
            f"{described}: no vocabulary is known to be so large, so this is probably no column of token ids; "
            "if it is one, pass full_size="
        )


def add_counts(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of two counts; it is written into the longer one."""
    shorter, longer = (right, left) if len(left) >= len(right) else (left, right)
    longer[: len(shorter)] += shorter
    return longer
