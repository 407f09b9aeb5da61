"""Counts → PartialVocabulary: the kept token ids, and how they map to rows of the partial matrix. No torch."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from leanvocab.counts import TokenCounts
from leanvocab.errors import MissingTokenError, VocabularyError


class PartialVocabulary:
    """The sorted kept token ids and the full size; frozen."""

    __slots__ = ("_digest", "_full_size", "_table", "_token_ids", "_tokenizer")

    def __init__(self, token_ids: Iterable[int] | NDArray[Any], full_size: int) -> None:
        ids = np.sort(np.array(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids), dtype=np.int64))
        if len(ids) and (ids[0] < 0 or ids[-1] >= full_size):
            raise VocabularyError(f"expected token ids from 0 to {full_size - 1}, got {ids[0]} … {ids[-1]}")
        if (np.diff(ids) == 0).any():
            raise VocabularyError("expected each token id once")
        ids.flags.writeable = False
        self._token_ids = ids
        self._full_size = int(full_size)
        self._tokenizer: Any = None
        sized = np.concatenate([[full_size], ids]).astype("<i8")
        self._digest = hashlib.sha256(sized.tobytes()).hexdigest()
        self._table = np.full(full_size, -1, dtype=np.int32)
        self._table[ids] = np.arange(len(ids), dtype=np.int32)

    @classmethod
    def from_counts(
        cls,
        counts: TokenCounts | NDArray[Any],
        *,
        full_size: int | None = None,
        tokenizer: Any = None,
        model: Any = None,
        always_keep: Iterable[int] = (),
        min_count: int = 1,
        pad_to_multiple_of: int | None = None,
    ) -> Self:
        """Keep the counted ids, and every id that the tokenizer or the model can insert."""
        if not isinstance(counts, TokenCounts):
            counts = TokenCounts(counts)
        if full_size is None and model is not None:
            config = getattr(model, "config", model)
            full_size = getattr(config, "vocab_size", None)
        if full_size is None:
            full_size = counts.full_size
        if full_size is None and tokenizer is not None:
            full_size = len(tokenizer)
        if full_size is None:
            raise VocabularyError("full_size is unknown: give full_size=, model= or tokenizer=")
        kept = set(np.flatnonzero(counts.counts >= min_count).tolist()) | {int(i) for i in always_keep}
        inserted: set[int] = set()
        if tokenizer is not None:
            inserted |= set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        for config in (getattr(model, "config", model), getattr(model, "generation_config", None)):
            for name, value in (config.to_dict() if config is not None else {}).items():
                if re.search(r"token_(id|ids|index)$", name):
                    values = value if isinstance(value, list) else [value]
                    inserted |= {v for v in values if isinstance(v, int)}
        kept |= {i for i in inserted if 0 <= i < full_size}
        if pad_to_multiple_of:
            missing = -len(kept) % pad_to_multiple_of
            kept |= set([i for i in range(full_size) if i not in kept][:missing])
        vocabulary = cls(np.fromiter(kept, dtype=np.int64), full_size)
        vocabulary._tokenizer = tokenizer
        return vocabulary

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The kept token ids, sorted; read-only int64 [len(vocabulary)]."""
        return self._token_ids

    @property
    def full_size(self) -> int:
        """Rows of the full matrix."""
        return self._full_size

    @property
    def digest(self) -> str:
        """sha256 over the full size and the token ids."""
        return self._digest

    def __len__(self) -> int:
        return len(self._token_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._token_ids.tolist())

    def __contains__(self, token_id: object) -> bool:
        return isinstance(token_id, int) and 0 <= token_id < self._full_size and bool(self._table[token_id] >= 0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PartialVocabulary):
            return NotImplemented
        return self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __or__(self, other: "PartialVocabulary") -> "PartialVocabulary":
        if self._full_size != other._full_size:
            raise VocabularyError(f"full sizes differ: {self._full_size} and {other._full_size}")
        return PartialVocabulary(np.union1d(self._token_ids, other._token_ids), self._full_size)

    def describe(self, token_id: int) -> str:
        """Name a token for a message."""
        if self._tokenizer is None:
            return f"id {token_id}"
        return f"{self._tokenizer.convert_ids_to_tokens(int(token_id))!r} (id {token_id})"

    def to_partial(self, ids: Any) -> Any:
        """Token ids → partial ids; same kind, shape, dtype and device."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(ids, torch.Tensor):
            return torch.from_numpy(self.to_partial(ids.cpu().numpy())).to(ids.device)
        full = np.asarray(ids)
        partial = self._table[full]
        if (full < 0).any() or (partial < 0).any():
            first = np.flatnonzero(((full < 0) | (partial < 0)).reshape(-1))[0]
            raise MissingTokenError(f"{self.describe(int(full.reshape(-1)[first]))} is not in the partial vocabulary")
        return partial.astype(full.dtype)

    def to_full(self, ids: Any) -> Any:
        """Partial ids → token ids; same kind, shape, dtype and device."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(ids, torch.Tensor):
            return torch.from_numpy(self.to_full(ids.cpu().numpy())).to(ids.device)
        partial = np.asarray(ids)
        if partial.size and (partial.min() < 0 or partial.max() >= len(self)):
            raise VocabularyError(f"expected partial ids from 0 to {len(self) - 1}")
        return self._token_ids[partial].astype(partial.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file."""
        content = {"full_size": self._full_size, "digest": self._digest, "token_ids": self._token_ids.tolist()}
        Path(path).write_text(json.dumps(content))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote."""
        content = json.loads(Path(path).read_text())
        return cls(content["token_ids"], content["full_size"])
