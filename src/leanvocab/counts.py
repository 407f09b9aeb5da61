"""Data → counts: how often each token id occurs. No torch."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import DataError

IGNORE_INDEX = -100
"""The label that losses ignore; it is no token id."""


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token id occurs: `counts` is a read-only int64 array, indexed by token id."""

    counts: NDArray[np.int64]
    full_size: int | None = None

    def __post_init__(self) -> None:
        counts = np.array(self.counts, dtype=np.int64)
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)

    @property
    def num_tokens(self) -> int:
        """How many tokens were counted."""
        return int(self.counts.sum())

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The ids that occur, sorted."""
        return np.flatnonzero(self.counts).astype(np.int64, copy=False)

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        total = np.zeros(max(len(self.counts), len(other.counts)), dtype=np.int64)
        total[: len(self.counts)] += self.counts
        total[: len(other.counts)] += other.counts
        return TokenCounts(total, self.full_size if self.full_size is not None else other.full_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenCounts):
            return NotImplemented
        return self.full_size == other.full_size and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]


def count_tokens(
    data: Any,
    columns: str | Sequence[str] | None = None,
    *,
    full_size: int | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> TokenCounts:
    """Count how often each token id occurs in data."""
    names = [columns] if isinstance(columns, str) else columns
    total = np.zeros(full_size or 0, dtype=np.int64)
    for ids in _arrays(data, names):
        flat = ids.reshape(-1)
        flat = flat[flat != IGNORE_INDEX].astype(np.int64)
        if flat.size == 0:
            continue
        if flat.min() < 0 or (full_size is not None and flat.max() >= full_size):
            raise DataError(f"expected token ids from 0 to {full_size}, found {flat.min()} … {flat.max()}")
        found = np.bincount(flat, minlength=len(total))
        found[: len(total)] += total
        total = found
    return TokenCounts(total, full_size)


def _arrays(data: Any, columns: Sequence[str] | None) -> Iterator[NDArray[Any]]:
    datasets, torch, pyarrow = (sys.modules.get(name) for name in ("datasets", "torch", "pyarrow"))
    if isinstance(data, str | bytes):
        raise DataError("expected token ids, got text: tokenize first")
    if datasets is not None and isinstance(data, datasets.Dataset):
        yield from _arrays(data.with_format("arrow")[:], columns)
    elif datasets is not None and isinstance(data, datasets.DatasetDict):
        for split in data.values():
            yield from _arrays(split, columns)
    elif pyarrow is not None and isinstance(data, pyarrow.Table | pyarrow.RecordBatch):
        for name in columns or [n for n in data.column_names if n.endswith("input_ids")]:
            yield from _arrays(data.column(name), None)
    elif pyarrow is not None and isinstance(data, pyarrow.ChunkedArray):
        for chunk in data.chunks:
            yield from _arrays(chunk, None)
    elif pyarrow is not None and isinstance(data, pyarrow.Array):
        while not pyarrow.types.is_integer(data.type):
            data = data.flatten()
        yield data.drop_null().to_numpy(zero_copy_only=False)
    elif torch is not None and isinstance(data, torch.Tensor):
        yield data.detach().cpu().numpy()
    elif isinstance(data, np.ndarray):
        yield data
    elif isinstance(data, Mapping):
        for name in columns or [n for n in data if n.endswith("input_ids")]:
            yield from _arrays(data[name], None)
    elif isinstance(data, Iterable):
        for row in data:
            yield from _arrays(np.array([row]) if isinstance(row, int | np.integer) else row, columns)
    else:
        raise DataError(f"cannot count token ids in {type(data).__name__}")
