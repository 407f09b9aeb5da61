"""Sentencepiece's model files with some of their pieces; every other byte stays as it was. No protobuf is needed.

A model is a message whose fields of number 1 are the pieces in the order of their ids, each a message of a text (1), a
score (2) and a type (3); see sentencepiece_model.proto.
"""

from collections.abc import Callable, Iterator

from leanvocab.errors import VocabularyError

_PIECE, _TEXT, _TYPE = 1, 1, 3
_NORMAL, _UNKNOWN, _UNUSED = 1, 2, 5  # others are control symbols, bytes, and what a user defined
_NO_MODEL = "it is no model of sentencepiece's"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def own_pieces(content: bytes) -> list[str]:
    """Texts of the pieces that are not made by training: bytes, unknown, control symbols, and those that a user defined.

    Raises:
        VocabularyError: the content is no such model.
    """
    pieces = [_text_and_type(content[value:end]) for _, end, number, value in _fields(content) if number == _PIECE]
    if all(kind != _UNKNOWN for _, kind in pieces):  # every model has one
        raise VocabularyError(_NO_MODEL)
    return [text for text, kind in pieces if kind not in (_NORMAL, _UNUSED)]


def trimmed_pieces(content: bytes, is_kept: Callable[[str], bool]) -> bytes:
    """The model with its own pieces, and the others whose texts are kept.

    Raises:
        VocabularyError: the content is no such model.
    """
    own = set(own_pieces(content))
    return b"".join(
        content[start:end]
        for start, end, number, value in _fields(content)
        if number != _PIECE or (text := _text_and_type(content[value:end])[0]) in own or is_kept(text)
    )


def _text_and_type(piece: bytes) -> tuple[str, int]:
    text, kind = "", _NORMAL
    for _, end, number, value in _fields(piece):
        if number == _TEXT:
            text = piece[value:end].decode()
        elif number == _TYPE:
            kind, _ = _varint(piece, value)
    return text, kind


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, number, start of the value) of each field of a message; of bytes the value begins behind their length."""
    at = 0
    while at < len(message):
        start = at
        key, value = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            _, at = _varint(message, value)
        elif wire == _BYTES:
            length, value = _varint(message, value)
            at = value + length
        elif wire in (_FIXED32, _FIXED64):
            at = value + (4 if wire == _FIXED32 else 8)
        else:
            at = len(message) + 1
        if at > len(message) or not number:
            raise VocabularyError(_NO_MODEL)
        yield start, at, number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, the position behind it)."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise VocabularyError(_NO_MODEL)
