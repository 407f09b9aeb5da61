"""Threads that count: they take the pieces of data in turn, each with a tally of its own. No torch."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.progress import ProgressBar
from leanvocab.vocabulary.pieces import Piece
from leanvocab.vocabulary.sources import find_sources
from leanvocab.vocabulary.tally import Tally, add_counts

SECONDS_BEFORE_PROGRESS = 2.0
_IDS_WORTH_A_THREAD = 1 << 22
_MOST_THREADS, _BYTES_FOR_THREADS = 4, 56 << 20  # by default


def count_in_threads(
    data: Any, columns: list[str] | None, full_size: int | None, num_workers: int | None, progress: bool | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Counts [full_size, or the largest id + 1] of data of any kind, and the columns counted; see `count_tokens`."""
    sources = list(find_sources(data, columns))
    num_threads = choose_num_threads(num_workers, _sum_or_none(source.num_ids for source in sources), full_size)
    bar = ProgressBar(
        "Counting tokens",
        _sum_or_none(source.num_rows for source in sources),
        progress,
        unit=" rows",
        after_seconds=SECONDS_BEFORE_PROGRESS,
        anywhere=True,
    )
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
    affordable = _BYTES_FOR_THREADS // Tally.memory_bytes(full_size)
    return max(1, min(_MOST_THREADS, processors, affordable, num_ids // _IDS_WORTH_A_THREAD))


def _sum_or_none(numbers: Iterable[int | None]) -> int | None:
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total
