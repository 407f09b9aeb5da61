"""Tokenizers of any kind, called alike: texts → token ids, cut or whole, as the tokenizer itself gives them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from leanvocab.errors import DataError
from leanvocab.texts.boundaries import Boundaries, UnprovenError, find_boundaries

# Methods that turn texts into ids; where transformers' own stand, the backend does all of the work.
_CALLS = ("__call__", "_encode_plus", "_call_one", "_batch_encode_plus", "prepare_for_tokenization")
_OWN_MODULES = (
    "transformers.tokenization_utils_base",
    "transformers.tokenization_utils_tokenizers",
    "transformers.tokenization_utils_fast",
)


def find_backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` that does all of a tokenizer's work; None where Python code has a part in it."""
    if type(tokenizer).__module__.partition(".")[0] == "tokenizers":
        return tokenizer
    classes = {next((c.__module__ for c in type(tokenizer).__mro__ if name in vars(c)), None) for name in _CALLS}
    return getattr(tokenizer, "backend_tokenizer", None) if classes <= {None, *_OWN_MODULES} else None


@dataclass(frozen=True)
class Encoder:
    """Ids of texts, each cut to `max_length` tokens, or whole (None)."""

    tokenizer: Any
    max_length: int | None = None

    def ids(
        self, texts: Sequence[str], seconds: Sequence[str] | None = None, *, special: bool = True
    ) -> Iterator[Sequence[int]]:
        """The ids of each text or pair, with the special ids that the tokenizer adds, or without."""
        if not len(texts):  # a tokenizer fails at none
            return
        backend = find_backend(self.tokenizer)
        if backend is None or (self.max_length is not None and backend is not self.tokenizer):
            yield from self._called(texts, seconds, special)
            return
        with _as_needed(backend, self.max_length):
            inputs = list(texts) if seconds is None else list(zip(texts, seconds, strict=True))
            for encoding in backend.encode_batch_fast(inputs, add_special_tokens=special):
                yield encoding.ids

    def special_ids(self, *, is_pair: bool) -> list[int]:
        """The ids that a tokenizer with boundaries adds to each text, or pair, whatever they are."""
        (ids,) = self.ids([""], [""] if is_pair else None)
        return list(ids)

    def boundaries(self) -> Boundaries | str:
        """Where texts may be cut before they are tokenized, or why they stay whole."""
        backend = find_backend(self.tokenizer)
        if backend is None:
            return "the tokenizer works in Python"
        if self.max_length is not None:
            return "they are cut to max_length"
        try:
            return find_boundaries(backend)
        except UnprovenError as why:
            return str(why)

    def _called(self, texts: Sequence[str], seconds: Sequence[str] | None, special: bool) -> Iterator[Sequence[int]]:
        cut = {"truncation": True, "max_length": self.max_length} if self.max_length else {"truncation": False}
        both = (list(texts),) if seconds is None else (list(texts), list(seconds))
        yield from self.tokenizer(*both, add_special_tokens=special, verbose=False, **cut)["input_ids"]


@contextmanager
def _as_needed(backend: Any, max_length: int | None) -> Iterator[None]:
    """No padding, and no cutting but to `max_length`, whatever the tokenizer's file says; as it was afterwards."""
    cut, padding = backend.truncation, backend.padding
    if max_length is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(max_length)
    backend.no_padding()
    try:
        yield
    finally:
        if cut is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**cut)
        if padding is not None:
            backend.enable_padding(**padding)


def check_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or that of a processor; raises DataError for what turns no texts into ids."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if find_backend(tokenizer) is None and not callable(tokenizer):
        raise DataError(
            f"expected a tokenizer of transformers or of tokenizers, got {type(tokenizer).__name__} (load one with "
            "AutoTokenizer.from_pretrained)"
        )
    return tokenizer
