"""Counts → PartialVocabulary: the kept token ids, and how they map to rows of the partial matrix. No torch.

The map and its inverse are f in the paper's Section 4.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import RESIZE_FIRST, MissingTokenError, VocabularyError
from leanvocab.extras import is_tensor
from leanvocab.vocabulary.counts import TokenCounts
from leanvocab.vocabulary.coverage import check_coverage, covering_ids
from leanvocab.vocabulary.remap import remap_dataset
from leanvocab.vocabulary.scripts import check_scripts, script_ids
from leanvocab.vocabulary.special_ids import (
    ids_looked_up_elsewhere,
    model_full_size,
    model_ids,
    tokenizer_full_size,
    tokenizer_ids,
)
from leanvocab.vocabulary.vocabulary_file import compose, parse

_LARGEST_SIZE = 2**31 - 1

Position = tuple[int, ...] | None
"""The position of an array in nested lists; None: the value is no list and no array, and has none."""


class PartialVocabulary:
    """The kept token ids, sorted, and the full size. Frozen, hashable, and equal where both are equal.

    The partial id of a token is its position among the kept ids, so partial ids keep the order of token ids and never
    exceed them: they fit wherever the token ids fitted.

    Args:
        token_ids: the ids to keep, in any order, each once.
        full_size: rows of the full matrix.

    Raises:
        VocabularyError: an id occurs twice, lies outside `full_size` or is no integer.
    """

    _token_ids: NDArray[np.int64]
    _full_size: int
    _tokenizer: Any = None
    _size_is_minimum = False  # True: the size is the tokenizer's, and nothing said how many rows the model has

    def __init__(self, token_ids: Iterable[int] | NDArray[Any], full_size: int) -> None:
        size = _checked_size(full_size)
        ids = np.sort(_checked_ids(token_ids, size, "token_ids"))
        twice = ids[1:][ids[1:] == ids[:-1]]
        if twice.size:
            raise VocabularyError(f"expected each token id once, got id {twice[0]} more than once")
        ids.flags.writeable = False
        vars(self).update(_token_ids=ids, _full_size=size)

    @classmethod
    def from_counts(
        cls,
        counts: TokenCounts | NDArray[Any],
        *,
        full_size: int | None = None,
        tokenizer: Any = None,
        model: Any = None,
        always_keep: Iterable[int] | NDArray[Any] = (),
        min_count: int = 1,
        coverage: float | None = None,
        keep_scripts: Iterable[str] = (),
        pad_to_multiple_of: int | None = None,
    ) -> Self:
        """Keep the ids that were counted, and those that the tokenizer or the model can insert.

        Without `tokenizer`, `model` and `always_keep` these are just the counted ids, as in the paper. What is drawn at
        random in training is not known here: the random words of masked language modelling (the collator's
        `random_replace_prob=0` draws none) may be any token.

        Args:
            counts: what `count_tokens` gave, or an int array indexed by token id.
            full_size: rows of the full matrix. None: those of the model's input embeddings or its config; else that of
                the counts; else that of the tokenizer.
            tokenizer: its special and added tokens are kept, and it names tokens in messages.
            model: a model or a config; ids that it or its generation config can insert are kept. Ids beyond its table that
                it does not look up there may be counted: placeholders of images and sounds have no row.
            always_keep: further ids to keep.
            min_count: ids counted less often are dropped. Above 1 the data then holds ids that are not in the
                vocabulary, which is an error in training.
            coverage: of these, the most frequent ids that make up so many percent of the tokens (99.9, say). None: all.
            keep_scripts: scripts of Unicode (`Latin`, `Han`, `Common`, …) whose tokens are all kept, counted or not.
            pad_to_multiple_of: keep further unused ids, the lowest ones, until the number of kept ids is a multiple (or
                all are kept). None: no rounding. They are real rows, so that none is a filler
                (docs/decisions/padding-with-real-rows.md).

        Raises:
            VocabularyError: the full size is not known, or a counted or kept id lies outside it.
        """
        counts = counts if isinstance(counts, TokenCounts) else TokenCounts(counts)
        size, source, is_minimum = _find_full_size(full_size, model, counts, tokenizer)
        beyond = set(counts.token_ids[counts.token_ids >= size].tolist())
        if beyond and (unknown := beyond - ids_looked_up_elsewhere(model)):
            outside = max(unknown)
            raise VocabularyError(
                f"id {outside} was counted {counts.counts[outside]} times, but {source}: "
                f"was the data tokenized for another model? Or {RESIZE_FIRST}"
            )
        keep = np.zeros(size, dtype=np.bool_)
        keep[_frequent_ids(counts.counts[:size], min_count, coverage)] = True
        keep[_checked_ids(always_keep, size, "always_keep")] = True
        keep[_ids_of_scripts(keep_scripts, tokenizer, size)] = True
        # An id at or beyond the full size has no row (image placeholders, tokens added without resizing the model).
        inserted = tokenizer_ids(tokenizer) | model_ids(model, size)
        keep[[token_id for token_id in inserted if token_id < size]] = True
        if pad_to_multiple_of is not None:
            _round_up(keep, pad_to_multiple_of)
        return cls(np.flatnonzero(keep), size)._with(tokenizer, is_minimum)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The kept token ids, sorted; read-only int64 [len(vocabulary)]. The index is the partial id."""
        return self._token_ids

    @property
    def full_size(self) -> int:
        """Rows of the full matrix."""
        return self._full_size

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, over the full size and the token ids; it does not depend on the machine."""
        content = np.concatenate([[self._full_size], self._token_ids]).astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()

    def fitted_to(self, num_rows: int) -> "PartialVocabulary":
        """The same ids over a table of `num_rows`, where only a tokenizer said how large the full vocabulary is.

        Tables are often longer than their tokenizer (Qwen3: 151,936 rows for 151,669 tokens). A vocabulary whose size was
        given, or came from a model, fits tables of that size alone, and is returned as it is.
        """
        return self.with_full_size(num_rows) if self._size_is_minimum and num_rows > self._full_size else self

    def below(self, num_rows: int) -> "PartialVocabulary":
        """The kept ids below `num_rows`, over a matrix of so many rows: of an output layer, or a table, of another size."""
        if num_rows == self._full_size:
            return self
        return PartialVocabulary(self._token_ids[self._token_ids < num_rows], num_rows)._with(self._tokenizer)

    def to_partial(self, ids: Any, *, ignore_index: int | None = None) -> Any:
        """Token ids → partial ids, of the same kind (array, tensor, nested lists, int), shape, dtype and device.

        Args:
            ids: token ids.
            ignore_index: this value stays as it is; -100 for labels. None: every value must be a token id.

        Raises:
            MissingTokenError: an id is not in the vocabulary; the message names token, id and position.
        """
        return _map_ids(ids, partial(self._array_to_partial, ignore_index=ignore_index), ())

    def to_full(self, ids: Any, *, ignore_index: int | None = None) -> Any:
        """Partial ids → token ids, of the same kind, shape, dtype and device.

        Raises:
            VocabularyError: an id is no partial id, or the dtype cannot hold the token ids.
        """
        return _map_ids(ids, partial(self._array_to_full, ignore_index=ignore_index), ())

    def remap_dataset(self, dataset: Any, columns: str | Iterable[str] | None = None) -> Any:
        """The data set over partial ids, D' in the paper's Section 4, for a model shrunk with `ids="partial"`.

        Takes a `datasets.Dataset`, `DatasetDict` or `IterableDataset` (remapped as it is read), a `pyarrow.Table` or a
        mapping of arrays, and gives the same. Columns keep their types, `-100` and nulls, other columns are untouched,
        and so is the original.

        Args:
            columns: the columns of token ids. None: those whose name is or ends in `input_ids`, where no other column may
                hold token ids as well. Labels that an output layer scores are no such column: it stays whole.

        Raises:
            MissingTokenError: an id is not in the vocabulary (for a stream: once it is read).
            DataError: there is no column of token ids, a named one is absent or holds no integers, or none is named and
                a column of lists of integers leaves a doubt.
        """
        names = [columns] if isinstance(columns, str) else None if columns is None else list(columns)
        return remap_dataset(dataset, names, partial(self.to_partial, ignore_index=IGNORE_INDEX))

    def describe(self, token_id: int) -> str:
        """A token for a message: `'▁hello' (id 17)`, or `id 17` where no tokenizer is known."""
        token = self._token(token_id)
        return f"id {token_id}" if token is None else f"{token!r} (id {token_id})"

    def with_full_size(self, full_size: int) -> "PartialVocabulary":
        """The same token ids in a matrix of another size: a tokenizer may have fewer tokens than the model has rows."""
        return PartialVocabulary(self._token_ids, full_size)._with(self._tokenizer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for people and `load`; whole or not at all.

        Where the tokenizer is known, the file names the tokens too; `load` does not read them.
        """
        path = Path(path)
        ids = self._token_ids.tolist()
        tokens = {token_id: token for token_id in ids if (token := self._token(token_id)) is not None}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(compose(self._full_size, ids, self.digest, tokens))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            VocabularyError: the file is not such a file, or was changed; the message names it and what is wrong.
        """
        try:
            content = parse(Path(path).read_bytes())
            vocabulary = cls(content["token_ids"], content["full_size"])
            if vocabulary.digest != content["digest"]:
                raise VocabularyError(f"its digest is {content['digest']!r}, its content has {vocabulary.digest!r}")
        except VocabularyError as error:
            raise VocabularyError(f"{os.fspath(path)}: {error}") from None
        return vocabulary

    def __len__(self) -> int:
        return len(self._token_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._token_ids.tolist())

    def __contains__(self, token_id: object) -> bool:
        if not isinstance(token_id, int | np.integer) or not 0 <= token_id < self._full_size:
            return False
        return bool(self._partial_ids[token_id] >= 0)

    def __or__(self, other: "PartialVocabulary") -> "PartialVocabulary":
        return self._combined(other, np.union1d) if isinstance(other, PartialVocabulary) else NotImplemented

    def __and__(self, other: "PartialVocabulary") -> "PartialVocabulary":
        return self._combined(other, np.intersect1d) if isinstance(other, PartialVocabulary) else NotImplemented

    def __sub__(self, other: "PartialVocabulary") -> "PartialVocabulary":
        return self._combined(other, np.setdiff1d) if isinstance(other, PartialVocabulary) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PartialVocabulary):
            return NotImplemented
        return self._full_size == other._full_size and np.array_equal(self._token_ids, other._token_ids)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"PartialVocabulary({len(self):,} of {self._full_size:,} token ids, digest {self.digest[:12]}…)"

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a PartialVocabulary is frozen: cannot set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a PartialVocabulary is frozen: cannot delete {name!r}")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The tokenizer stays behind: it only names tokens in messages, and may be large.
        return type(self), (self._token_ids, self._full_size)

    def _with(self, tokenizer: Any, size_is_minimum: bool = False) -> Self:
        vars(self).update(_tokenizer=getattr(tokenizer, "tokenizer", tokenizer), _size_is_minimum=size_is_minimum)
        return self

    def _token(self, token_id: int) -> str | None:
        try:
            convert = getattr(self._tokenizer, "convert_ids_to_tokens", None) or self._tokenizer.id_to_token
            token = convert(int(token_id))
        except Exception:  # a message must not fail for the lack of a name
            return None
        return token if isinstance(token, str) else None

    @cached_property
    def _partial_ids(self) -> NDArray[np.int32]:
        """The partial id of every token id, int32 [full_size]; -1 where there is none. Never handed out."""
        partial_ids = np.full(self._full_size, -1, dtype=np.int32)
        partial_ids[self._token_ids] = np.arange(len(self), dtype=np.int32)
        return partial_ids

    def _array_to_partial(self, ids: NDArray[Any], position: Position, *, ignore_index: int | None) -> NDArray[Any]:
        if ids.size and ids.min() >= 0 and ids.max() < self._full_size:
            partial_ids: NDArray[Any] = self._partial_ids[ids]
            if partial_ids.min() >= 0:  # as it should be: all else is for the others
                return partial_ids.astype(ids.dtype)
        inside = (ids >= 0) & (ids < self._full_size)
        partial_ids = self._partial_ids[np.where(inside, ids, 0).astype(np.intp)]
        missing = ~inside | (partial_ids < 0)
        remapped = partial_ids.astype(ids.dtype)
        if ignore_index is not None:
            ignored = ids == ignore_index
            missing &= ~ignored
            remapped[ignored] = ids[ignored]
        if missing.any():
            first = tuple(np.argwhere(missing)[0].tolist())
            self._refuse(int(ids[first]), _shown(position, first))
        return remapped

    def _refuse(self, token_id: int, position: str) -> NoReturn:
        if not 0 <= token_id < self._full_size:
            hint = " (pass ignore_index=-100 where ids are labels)" if token_id == IGNORE_INDEX else ""
            hint = f"; {RESIZE_FIRST}" if token_id >= self._full_size else hint
            raise MissingTokenError(
                f"id {token_id}{position} is no token id: expected 0 to {self._full_size - 1}{hint}"
            )
        raise MissingTokenError(
            f"{self.describe(token_id)}{position} is not in the partial vocabulary of {len(self):,} token ids: "
            "count the data that holds it too, or keep it with always_keep="
        )

    def _array_to_full(self, ids: NDArray[Any], position: Position, *, ignore_index: int | None) -> NDArray[Any]:
        inside = (ids >= 0) & (ids < len(self))
        ignored = ids == ignore_index if ignore_index is not None else np.zeros(ids.shape, dtype=np.bool_)
        wrong = ~inside & ~ignored
        if wrong.any():
            first = tuple(np.argwhere(wrong)[0].tolist())
            shown = f"{int(ids[first])}{_shown(position, first)}"
            raise VocabularyError(f"{shown} is no partial id: expected 0 to {len(self) - 1}")
        if len(self) == 0:
            return ids.copy()
        if self._token_ids[-1] > np.iinfo(ids.dtype).max:
            raise VocabularyError(
                f"{ids.dtype} cannot hold token ids up to {self._token_ids[-1]}: pass int32 or int64 partial ids"
            )
        full: NDArray[Any] = self._token_ids[np.where(inside, ids, 0).astype(np.intp)].astype(ids.dtype)
        full[ignored] = ids[ignored]
        return full

    def _combined(self, other: "PartialVocabulary", combine: Callable[..., NDArray[np.int64]]) -> "PartialVocabulary":
        if self._full_size != other._full_size:
            raise VocabularyError(
                f"cannot combine vocabularies of {self._full_size} and {other._full_size} rows: they belong to "
                "different models"
            )
        combined = PartialVocabulary(combine(self._token_ids, other._token_ids), self._full_size)
        tokenizer = self._tokenizer if self._tokenizer is not None else other._tokenizer
        return combined._with(tokenizer, self._size_is_minimum and other._size_is_minimum)


def _checked_size(full_size: Any) -> int:
    if isinstance(full_size, bool) or not isinstance(full_size, int | np.integer):
        raise VocabularyError(f"expected full_size as an integer, got {full_size!r}")
    if not 1 <= full_size <= _LARGEST_SIZE:
        raise VocabularyError(f"expected full_size from 1 to {_LARGEST_SIZE}, got {full_size}")
    return int(full_size)


def _checked_ids(ids: Any, full_size: int, what: str) -> NDArray[np.int64]:
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise VocabularyError(f"expected {what} as 1-D integers, got {array.dtype} of shape {array.shape}")
    outside = array[(array < 0) | (array >= full_size)]
    if outside.size:
        raise VocabularyError(f"expected {what} from 0 to {full_size - 1} (full_size={full_size}), got {outside[0]}")
    return array.astype(np.int64)


def _find_full_size(full_size: int | None, model: Any, counts: TokenCounts, tokenizer: Any) -> tuple[int, str, bool]:
    """The full size, where it comes from as a message says it, and whether only a tokenizer gives it: a minimum."""
    if full_size is not None:
        return _checked_size(full_size), f"full_size is {full_size}", False
    num_rows = model_full_size(model)
    if num_rows is not None:
        return _checked_size(num_rows), f"the model's input embeddings have {num_rows} rows", False
    if counts.full_size is not None:
        return counts.full_size, f"the counts are over {counts.full_size} ids", False
    if tokenizer is not None:
        size = tokenizer_full_size(tokenizer)
        return size, f"the tokenizer has ids below {size}; if the model has more rows, pass model= or full_size=", True
    raise VocabularyError(
        "the full size is not known: pass full_size= (rows of the input embeddings), model= or tokenizer="
    )


def _frequent_ids(counts: NDArray[np.int64], min_count: int, coverage: float | None) -> NDArray[np.int64]:
    if isinstance(min_count, bool) or min_count < 1:
        raise VocabularyError(f"expected min_count of 1 or more, got {min_count!r}")
    if coverage is None:
        return np.flatnonzero(counts >= min_count)
    check_coverage(coverage)
    ids = covering_ids(counts, coverage)
    return ids[counts[ids] >= min_count]


def _ids_of_scripts(scripts: Iterable[str], tokenizer: Any, full_size: int) -> NDArray[np.int64]:
    names = check_scripts(scripts)
    if not names:
        return np.zeros(0, np.int64)
    if tokenizer is None:
        raise VocabularyError(f"keep_scripts={names!r} needs the tokenizer: it says what a token is; pass tokenizer=")
    ids = script_ids(tokenizer, names)
    return ids[ids < full_size]


def _round_up(keep: NDArray[np.bool_], multiple: int) -> None:
    if isinstance(multiple, bool) or multiple < 1:
        raise VocabularyError(f"expected pad_to_multiple_of of 1 or more, or None, got {multiple!r}")
    wanted = -int(keep.sum()) % multiple
    keep[np.flatnonzero(~keep)[:wanted]] = True


def _map_ids(ids: Any, map_array: Callable[[NDArray[Any], Position], NDArray[Any]], position: Position) -> Any:
    """Apply a map of arrays to an array, a tensor, an int or nested lists."""
    if is_tensor(ids):
        torch = sys.modules["torch"]
        return torch.from_numpy(_map_ids(ids.detach().cpu().numpy(), map_array, position)).to(ids.device)
    if isinstance(ids, list | tuple):
        if all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in ids):
            return type(ids)(map_array(_as_int64(ids), position).tolist())
        return type(ids)(_map_ids(item, map_array, (*(position or ()), number)) for number, item in enumerate(ids))
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        return map_array(ids, position) if ids.ndim else map_array(ids.reshape(1), None).reshape(())
    if isinstance(ids, int | np.integer) and not isinstance(ids, bool):
        mapped = map_array(_as_int64([ids]), position or None)[0]
        return int(mapped) if isinstance(ids, int) else type(ids)(mapped)
    what = f"{ids.dtype} values" if hasattr(ids, "dtype") else type(ids).__name__
    raise VocabularyError(
        f"expected integer ids as an array, a tensor, lists or an int, got {what}{_shown(position, ())}"
    )


def _as_int64(ids: Any) -> NDArray[np.int64]:
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError:
        raise VocabularyError(f"expected ids of at most 64 bits, got {max(ids, key=abs)}") from None


def _shown(position: Position, first: tuple[int, ...]) -> str:
    if position is None or not (indices := (*position, *first)):
        return ""
    return f" at position {indices[0] if len(indices) == 1 else indices}"
