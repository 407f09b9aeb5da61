"""The tally of one thread: pieces of token ids are counted by blocks, and the first id that cannot be is named. No torch."""

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import DataError
from leanvocab.vocabulary.flatten import flat_ids
from leanvocab.vocabulary.pieces import Piece

SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 19, 1 << 20  # ids counted at once: 4 to 8 MB
_LARGEST_GUESSED_SIZE = 1 << 24  # without full_size, a larger id is taken for a mistake: counts alone would take 128 MB


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

    @staticmethod
    def memory_bytes(full_size: int | None) -> int:
        """The most that a tally holds: its counts, those of a block, the block, and what it takes together."""
        size = LARGEST_BLOCK if full_size is None else full_size
        return 16 * size + 8 * max(size, SMALLEST_BLOCK) + (4 << 20)

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
                "Was the data tokenized for another model?"
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
