"""Fields of configs that hold token ids, or sizes of the vocabulary: renumbered, and the ids that they need. No torch.

One walk serves both: it shows each id and each size to a `_Visitor`, which notes it or gives the new one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from leanvocab.errors import CheckpointError, VocabularyError, shortened
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import VOCABULARY_MAP, holds_ids, is_id_dictionary, is_image_token

# Sizes of the text's vocabulary. All others are of another one (segments, entities, codes of sounds, pronunciations, …).
_SIZE_NAME = re.compile(r"^(src_|tgt_|decoder_|unpadded_|text_|text_encoder_)?vocab_size(_per_layer_input)?$")
_OFFSET_NAME = (
    "vocab_offset"  # where ids of images and sounds begin (Gemma 3n); as many follow as its config's `vocab_size`
)
# What generation never writes: an id that is gone cannot be written, so it leaves these lists.
_FORBIDDING = re.compile(r"(^|_)suppress_tokens$|^bad_words_ids$|^sequence_bias$")
_DEMANDING = re.compile(r"^force_words_ids$|^forced_decoder_ids$")
# Ids of XPath tags and subscripts (MarkupLM), of codes of sounds and units of speech: other vocabularies.
_OF_OTHERS = re.compile(r"^(tag|subs)_pad_id$|^(tts_codec|codec|codebook|t2u|vocoder|audio_stream)_")
_MEDIA_NAME = re.compile(r"^(vision|image|audio|vq)_")
_SEEMS_AN_ID = re.compile(r"(^|_)token$|tokens$|_ids?$|(^|_)tokens?_\w*(id|idx|index|indices)s?$")
_IS_NONE = re.compile(
    r"^(num|n|max|min|use|pred|max_new|default|mm|total)_|_(num|length|per_\w+)$|^(task|lang|speaker|label|layer)_id$|_per_\w+$"
    r"|(layer|hook|type|position|expert|block|prompt|question_type|adapter|device|process|commit)_ids?$"
    r"|_new_tokens$|_id_per_seconds$"
)


class _Visitor(Protocol):
    def token(self, where: str, token_id: int) -> int:
        """An id that has to stay."""

    def forbidden(self, token_id: int) -> int | None:
        """An id that may go; None: it is gone."""

    def size(self, size: int) -> int:
        """The size of the vocabulary, or the number of ids below one."""


@dataclass(frozen=True)
class NewIds:
    """The kept ids, which become 0, 1, 2, … in their order; `text_size` is the `vocab_size` of the text's config, which gets
    `padding` rows more than are kept."""

    vocabulary: PartialVocabulary
    text_size: int
    padding: int = 0

    def size(self, size: int) -> int:
        """The new number of rows of a matrix, or field, of that size."""
        kept = int(self.vocabulary.token_ids.searchsorted(size))
        return kept + (self.padding if size >= self.text_size else 0)

    def forbidden(self, token_id: int) -> int | None:
        """The new id; None where it is gone. What lies beyond all ids stays beyond them, as far as it did."""
        beyond = token_id - self.vocabulary.full_size
        if beyond >= 0:
            return len(self.vocabulary) + self.padding + beyond
        position = int(self.vocabulary.token_ids.searchsorted(token_id))
        is_kept = position < len(self.vocabulary) and self.vocabulary.token_ids[position] == token_id
        return position if is_kept else None

    def token(self, where: str, token_id: int) -> int:
        """The new id; raises `VocabularyError` where it is gone."""
        new = self.forbidden(token_id)
        if new is None:
            raise VocabularyError(
                f"{where}: {self.vocabulary.describe(token_id)} is not among the {len(self.vocabulary):,} kept ids, and the "
                f"model inserts it or compares with it; keep it with PartialVocabulary.from_counts(…, always_keep=[{token_id}])"
            )
        return new


@dataclass
class _Noted:
    ids: set[int] = field(default_factory=set)

    def token(self, where: str, token_id: int) -> int:
        self.ids.add(token_id)
        return token_id

    def forbidden(self, token_id: int) -> int | None:
        return token_id

    def size(self, size: int) -> int:
        return size


def renumbered(config: Mapping[str, Any], file: str, new_ids: NewIds) -> dict[str, Any]:
    """A config with new ids and sizes: of a model, a generation, a processor; `file` is its name in errors.

    Ids that are gone leave the lists that forbid tokens. Raises `VocabularyError` where another field holds one, and
    `CheckpointError` for a field that seems to hold an id and is not understood.
    """
    return _walked(config, file, new_ids, new_ids.text_size)


def needed_ids(config: Mapping[str, Any], file: str, text_size: int) -> set[int]:
    """The ids that a config inserts or compares with; some may lie beyond the vocabulary. Raises `CheckpointError`."""
    noted = _Noted()
    _walked(config, file, noted, text_size)
    return noted.ids


def is_size_field(name: str) -> bool:
    """True for the name of a field that holds the size of the text's vocabulary."""
    return bool(_SIZE_NAME.match(name))


def _walked(config: Mapping[Any, Any], where: str, visitor: _Visitor, text_size: int) -> dict[str, Any]:
    walked: dict[str, Any] = {}
    for name, value in config.items():
        its = f"{where}: {name}"
        if not isinstance(name, str):  # numbers of classes, of patches
            walked[name] = value
        elif isinstance(value, Mapping) and is_id_dictionary(name) and not _OF_OTHERS.match(name):
            walked[name] = _dictionary(its, name, value, visitor)
        elif isinstance(value, Mapping) and _is_other_vocabulary(name, value, text_size):
            walked[name] = _other_vocabulary(its, value, visitor)
        elif isinstance(value, Mapping) and not name.endswith("2id") and not name.startswith("id2"):
            walked[name] = _walked(value, its, visitor, text_size)
        elif is_size_field(name) and type(value) is int:
            walked[name] = visitor.size(value)
        else:
            walked[name] = _field(its, name, value, visitor)
    return walked


def _is_other_vocabulary(name: str, part: Mapping[str, Any], text_size: int) -> bool:
    """True for a part that has a vocabulary, and not the text's: codes of images and sounds (Ovis 2), or another tokenizer's."""
    size = part.get("vocab_size")
    return size is not None and (size != text_size or _MEDIA_NAME.search(name) is not None)


def _other_vocabulary(where: str, config: Mapping[str, Any], visitor: _Visitor) -> dict[str, Any]:
    """A part with a vocabulary of its own, whose ids stay; those that lie in the text's vocabulary begin at an offset."""
    offset = config.get(_OFFSET_NAME)
    if type(offset) is not int:
        return dict(config)
    for token_id in range(offset, offset + config["vocab_size"]):
        visitor.token(f"{where}: {_OFFSET_NAME}", token_id)
    return {**config, _OFFSET_NAME: visitor.size(offset)}


def _dictionary(where: str, name: str, ids: Mapping[str, Any], visitor: _Visitor) -> dict[str, Any]:
    """Names and ids: all stay, but for a map of the whole vocabulary, in which those of images do."""
    walked = {}
    for key, token_id in ids.items():
        may_go = name == VOCABULARY_MAP and not is_image_token(str(key))
        new = _forbidden(where, token_id, visitor) if may_go else _token(where, token_id, visitor)
        if new is not _GONE:
            walked[key] = new
    return walked


def _field(where: str, name: str, value: Any, visitor: _Visitor) -> Any:
    if _OF_OTHERS.match(name):
        return value
    if name == "forced_decoder_ids" and isinstance(value, list | tuple):  # pairs of a position and an id
        return [[pair[0], _token(where, pair[1], visitor)] for pair in value]
    if name == "sequence_bias" and isinstance(value, list | tuple):  # pairs of ids and a number
        kept = ((_forbidden(where, ids, visitor), bias) for ids, bias in value)
        return [[ids, bias] for ids, bias in kept if ids is not _GONE]
    if _FORBIDDING.search(name) and isinstance(value, list | tuple):
        return [new for each in value if (new := _forbidden(where, each, visitor)) is not _GONE]
    if holds_ids(name) or _DEMANDING.match(name):
        return _token(where, value, visitor)
    if _SEEMS_AN_ID.search(name) and not _IS_NONE.search(name) and any(_numbers(value)):
        raise CheckpointError(
            f"{where}: {shortened(value)} seems to be a token id, and this field is not known; trimming would leave it as it is, "
            "and another token may have that id then. Take the field away if nothing reads it"
        )
    return value


_GONE = object()


def _token(where: str, value: Any, visitor: _Visitor) -> Any:
    if isinstance(value, list | tuple):
        return [_token(where, each, visitor) for each in value]
    if isinstance(value, float):
        raise CheckpointError(f"{where}: expected a token id, found {value!r}")
    return visitor.token(where, value) if type(value) is int and value >= 0 else value


def _forbidden(where: str, value: Any, visitor: _Visitor) -> Any:
    """The new id, or sequence of ids; `_GONE` where it can no longer be written."""
    if isinstance(value, list | tuple):
        new = [_forbidden(where, each, visitor) for each in value]
        return _GONE if any(each is _GONE for each in new) else new
    if type(value) is not int or value < 0:
        return value
    kept = visitor.forbidden(value)
    return _GONE if kept is None else kept


def _numbers(value: Any) -> Iterator[bool]:
    """True for each number in a field that may be an id."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    else:
        yield type(value) is int and value > 0
