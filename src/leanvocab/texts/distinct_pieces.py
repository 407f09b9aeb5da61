"""Texts → their distinct pieces, and how often each comes; what is held of them is bounded."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from leanvocab.progress import ProgressBar
from leanvocab.texts.boundaries import Boundaries

_BYTES_CUT = 8 << 20
_MOST_BYTES = 32 << 20
_BYTES_JOINED = 1 << 11  # of pieces that come as often: tokenized as one text, which costs less than one by one
_JOINED_AT_ONCE = 512
_NOTHING, _SPACE = (pa.scalar(text, pa.large_string()) for text in ("", " "))

Tokenized = Callable[[list[str], NDArray[np.int64]], None]
"""What takes texts, and how often each counts."""


class DistinctPieces:
    """The pieces of all texts that were added since they were last handed over.

    Texts are cut `bytes_cut` at a time; pieces are handed over when they take `most_bytes`, under a progress bar (`progress` as
    that of `count_tokens`).
    """

    def __init__(
        self,
        boundaries: Boundaries,
        tokenize: Tokenized,
        progress: bool | None = False,
        *,
        bytes_cut: int = _BYTES_CUT,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._boundaries, self._tokenize = boundaries, tokenize
        self._progress = progress
        self._bytes_cut, self._most_bytes = bytes_cut, most_bytes
        self._texts: list[pa.LargeStringArray] = []
        self._num_bytes = 0
        self._counted: list[pa.Table] = []
        self._num_merged = 0

    def add(self, texts: pa.LargeStringArray) -> None:
        """Count the pieces of some texts."""
        start = 0
        sizes = np.cumsum(np.diff(_offsets_of(texts)))
        while start < len(texts):
            done = sizes[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(sizes, done + self._bytes_cut - self._num_bytes, "right")))
            self._texts.append(texts.slice(start, stop - start))
            self._num_bytes += int(sizes[stop - 1] - done)
            start = stop
            if self._num_bytes >= self._bytes_cut:
                self._cut()

    def hand_over(self) -> None:
        """Let all pieces be tokenized, and forget them."""
        if self._texts:
            self._cut()
        if self._counted:
            self._merge()
            (table,), self._counted, self._num_merged = self._counted, [], 0
            bar = ProgressBar(
                "Tokenizing pieces", table.num_rows, self._progress, unit="", after_seconds=2.0, anywhere=True
            )
            try:
                for texts, counts, num_pieces in self._joined(table):
                    self._tokenize(texts, counts)
                    bar.add(num_pieces)
            finally:
                bar.close()

    def _cut(self) -> None:
        texts = pa.concat_arrays(self._texts)
        self._texts, self._num_bytes = [], 0
        offsets = _offsets_of(texts)
        data = _data_of(texts)[offsets[0] : offsets[-1]]
        if not len(data):  # empty texts have no pieces
            return
        begins = np.zeros(len(data) + 1, np.bool_)
        begins[self._boundaries.cuts(data)] = True
        begins[offsets - offsets[0]] = True
        counted = pc.value_counts(_strings(data, np.flatnonzero(begins)))
        pieces, counts = counted.flatten()
        if self._boundaries.ignores_space:  # one spelling of each, which is a boundary wherever it is joined
            pieces = pc.binary_join_element_wise(_NOTHING, pc.ascii_ltrim(pieces, " \t\n\r"), _SPACE)
        self._counted.append(pa.table({"piece": pieces, "count": counts}))
        if sum(map(len, self._counted)) > 2 * self._num_merged:
            self._merge()
        if sum(table.nbytes for table in self._counted) > self._most_bytes:
            self.hand_over()

    def _merge(self) -> None:
        if sum(map(len, self._counted)) > self._num_merged:
            together = pa.concat_tables(self._counted)
            pieces = together.column("piece").combine_chunks().dictionary_encode()
            # A quarter of the time of a group_by. Sums of integers in float64 are exact below 2**53.
            counts = np.bincount(pieces.indices.to_numpy(), together.column("count").to_numpy()).astype(np.int64)
            self._counted = [pa.table({"piece": pieces.dictionary, "count": counts})]
        self._num_merged = len(self._counted[0])

    def _joined(self, table: pa.Table) -> Iterator[tuple[list[str], NDArray[np.int64], int]]:
        """Texts of pieces that come equally often, how often, and of how many: side by side where they may be cut again."""
        pieces = table.column("piece").combine_chunks()
        counts = table.column("count").to_numpy()
        firsts = pc.binary_slice(pieces.cast(pa.large_binary()), 0, 1)
        order = np.lexsort((counts, firsts.dictionary_encode().indices.to_numpy()))
        pieces, counts = pieces.take(pa.array(order)), counts[order]
        offsets, data = _offsets_of(pieces), _data_of(pieces)
        is_boundary = np.zeros(len(data) + 1, np.bool_)
        is_boundary[self._boundaries.cuts(data)] = True
        blocks = offsets[:-1] // _BYTES_JOINED
        goes_on = is_boundary[offsets[1:-1]] & (counts[1:] == counts[:-1]) & (blocks[1:] == blocks[:-1])
        begins = np.flatnonzero(np.concatenate([[True], ~goes_on]))
        texts = _strings(_data_of(pieces), np.append(offsets[begins], offsets[-1]))
        counts = counts[begins]
        for start in range(0, len(texts), _JOINED_AT_ONCE):
            stop = min(start + _JOINED_AT_ONCE, len(texts))
            num_pieces = int(np.append(begins, len(pieces))[stop] - begins[start])
            yield texts[start:stop].to_pylist(), counts[start:stop], num_pieces


def _offsets_of(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    offsets = np.frombuffer(texts.buffers()[1], np.int64) if len(texts) else np.zeros(1, np.int64)
    return offsets[texts.offset : texts.offset + len(texts) + 1] if len(texts) else offsets


def _data_of(texts: pa.LargeStringArray) -> NDArray[np.uint8]:
    data = texts.buffers()[2]
    return np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)


def _strings(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> pa.LargeStringArray:
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, buffers[1], buffers[2])
