"""Data → counts, with a tokenizer also of texts: how often each token id occurs in what the tokenizer makes of them.

Neither torch nor transformers is loaded here; the tokenizer is the caller's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from leanvocab.errors import DataError
from leanvocab.progress import ProgressBar
from leanvocab.texts.boundaries import Boundaries
from leanvocab.texts.counted_columns import Texts, choose_readers
from leanvocab.texts.distinct_pieces import DistinctPieces
from leanvocab.texts.encoders import Encoder, check_tokenizer
from leanvocab.texts.text_rows import Part, find_parts
from leanvocab.vocabulary import counts as token_counts
from leanvocab.vocabulary.counting_threads import add_counts
from leanvocab.vocabulary.counts import TokenCounts

_BYTES_TOKENIZED = 1 << 18


def count_tokens(
    data: Any,
    columns: str | Sequence[str | tuple[str, str]] | None = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    full_size: int | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> TokenCounts:
    """Count how often each token id occurs in data: in columns of token ids, or in what a tokenizer makes of texts.

    The data is read, never rewritten, cached or changed. Selected rows (`select`, `shuffle`, `train_test_split`) count
    as selected; a format or transform of a data set is looked through, not run. `-100` and nulls are not counted.

    Args:
        data: a `datasets.Dataset`, `DatasetDict` or `IterableDataset`; a `pyarrow` Table, RecordBatch, Array or
            ChunkedArray; a `ray.data.Dataset`; a numpy or torch array of any shape; a mapping of columns or of data sets;
            a `Path` to what `leanvocab count` reads; or an iterable of rows, batches, sequences or texts (which is consumed).
            With a tokenizer a tuple of two strings is a pair, and a list of strings is as many texts.
        columns: columns of token ids, or of texts; a tuple of two names is one of pairs. None: of token ids those in
            `leanvocab.vocabulary.columns`; where there are none and there is a tokenizer, chats (`messages`,
            `conversations`), or `prompt`, `completion`, `chosen` and `rejected`, or the usual columns of texts and pairs.
        tokenizer: of transformers or of tokenizers. Texts count with the special ids that it adds to each. Chats are
            written by its template; prompts count alone, and joined with what follows them.
        max_length: tokens to which a text, or a pair, is cut. None: none is cut.
        full_size: rows of the full matrix; an id outside is an error. None: not checked.
        num_workers: threads. None: as many as the processor allows, up to four, on large data; otherwise one. Streams
            are counted by one. Of a Ray data set, tasks at once (None: Ray decides). Of texts, which are tokenized on all
            cores, or on `RAYON_NUM_THREADS` of the environment, None alone.
        progress: True shows a progress bar, False does not. None: only once the work has taken two seconds.

    Raises:
        DataError: there is no column of token ids or texts, a named one is absent or holds something else, an id is
            negative or outside `full_size` (the message names column and row), or texts have `num_workers`.

    Source: paper, Section 4 ("before fine-tuning"): the tokens in D.
    """
    if max_length is not None and (tokenizer is None or isinstance(max_length, bool) or max_length < 1):
        raise DataError(f"max_length={max_length!r} cuts texts: expected 1 or more, and a tokenizer")
    if isinstance(data, Path):
        from leanvocab.texts.data_files import load_splits

        data = load_splits(data)
    if tokenizer is not None:
        parts = list(find_parts(data))
        named = [columns] if isinstance(columns, str) else columns
        if not any(_holds_token_ids(part, named) for part in parts):
            _check_no_workers(num_workers)
            token_counts.check_full_size(full_size)
            return _count_texts(parts, named, tokenizer, max_length, full_size, progress)
        data = parts[0].data if len(parts) == 1 else data  # an iterator whose first row was looked at
    of_ids: Any = columns
    return token_counts.count_tokens(data, of_ids, full_size=full_size, num_workers=num_workers, progress=progress)


def way_of_counting(tokenizer: Any, max_length: int | None = None) -> str:
    """How texts are counted with a tokenizer: by their distinct pieces, or whole, and why."""
    boundaries = Encoder(check_tokenizer(tokenizer), max_length).boundaries()
    return "distinct pieces" if isinstance(boundaries, Boundaries) else f"whole texts, since {boundaries}"


def _holds_token_ids(part: Part, columns: Sequence[Any] | None) -> bool:
    if columns is None or part.kinds is None:
        return bool(part.holds_token_ids)
    return any(name in part.kinds and part.kinds[name].leaf == "integer" for name in columns)


def _check_no_workers(num_workers: int | None) -> None:
    if num_workers is not None:
        raise DataError(
            f"num_workers={num_workers!r} is of token ids, and this data is text: expected None. A tokenizer takes all "
            "cores, or as many threads as RAYON_NUM_THREADS in the environment says"
        )


def _count_texts(
    parts: Sequence[Part],
    columns: Sequence[Any] | None,
    tokenizer: Any,
    max_length: int | None,
    full_size: int | None,
    progress: bool | None,
) -> TokenCounts:
    tokenizer = check_tokenizer(tokenizer)
    read = [(part, *choose_readers(part.kinds, columns, tokenizer, part.where)) for part in parts]
    known = [part.num_rows for part in parts]
    total = None if None in known else sum(filter(None, known))
    bar = ProgressBar("Counting tokens", total, progress, unit=" rows", after_seconds=2.0, anywhere=True)
    tally = TextTally(Encoder(tokenizer, max_length), full_size, progress)
    try:
        for part, _, readers in read:
            for rows in part.rows():
                for texts in chain.from_iterable(reader(rows, part.where) for reader in readers):
                    tally.add(texts)
                bar.add(rows.num_rows)
    finally:
        bar.close()
    names = dict.fromkeys(name for _, names, _ in read for name in names)
    return TokenCounts(tally.finish(), full_size, tuple(names))


class TextTally:
    """Counts of the ids of texts: of distinct pieces, where a tokenizer's boundaries are known, or of whole texts."""

    def __init__(self, encoder: Encoder, full_size: int | None, progress: bool | None) -> None:
        self._counts: NDArray[np.int64] = np.zeros(full_size or 0, np.int64)
        self._encoder, self._full_size = encoder, full_size
        boundaries = encoder.boundaries()
        self._pieces: DistinctPieces | None = None
        if isinstance(boundaries, Boundaries):
            self._pieces = DistinctPieces(boundaries, self._count_pieces, progress)

    def add(self, texts: Texts) -> None:
        """Count some texts or pairs."""
        if self._pieces is None:
            for part in _in_batches(texts):
                seconds = None if part.seconds is None else part.seconds.to_pylist()
                ids = self._encoder.ids(part.firsts.to_pylist(), seconds, special=not part.is_written)
                self._add(np.fromiter(chain.from_iterable(ids), np.int64))
            return
        for side in (texts.firsts, texts.seconds):
            if side is not None:
                self._pieces.add(side)
        if not texts.is_written:
            added = self._encoder.special_ids(is_pair=texts.seconds is not None)
            self._add(np.asarray(added, np.int64), np.full(len(added), len(texts.firsts)))

    def finish(self) -> NDArray[np.int64]:
        """The counts of all that was added."""
        if self._pieces is not None:
            self._pieces.hand_over()
        return self._counts

    def _count_pieces(self, texts: list[str], counts: NDArray[np.int64]) -> None:
        of_texts = list(self._encoder.ids(texts, special=False))
        ids = np.fromiter(chain.from_iterable(of_texts), np.int64)
        self._add(ids, np.repeat(counts, [len(of_text) for of_text in of_texts]))

    def _add(self, ids: NDArray[np.int64], times: NDArray[np.int64] | None = None) -> None:
        if self._full_size is not None and ids.size and ids.max() >= self._full_size:
            raise DataError(
                f"the tokenizer gave id {ids.max()}: expected ids below full_size={self._full_size}. Is it another model's?"
            )
        # Sums of integers in float64 are exact below 2**53.
        self._counts = add_counts(self._counts, np.bincount(ids, times).astype(np.int64, copy=False))


def _in_batches(texts: Texts) -> Iterator[Texts]:
    """The same texts in parts of a size whose tokens take some tens of megabytes."""
    offsets = np.concatenate([[0], np.cumsum(pc.binary_length(texts.firsts).to_numpy())])
    start = 0
    while start < len(texts.firsts):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + _BYTES_TOKENIZED, "right")) - 1)
        seconds = None if texts.seconds is None else texts.seconds[start:stop]
        yield replace(texts, firsts=texts.firsts[start:stop], seconds=seconds)
        start = stop
