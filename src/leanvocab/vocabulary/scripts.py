"""Tokens of whole scripts, by Unicode: those that a text of the script can hold, pieces of characters too. No torch.

A character belongs to the scripts of its Script_Extensions: । is a sign of Devanagari, Bengali and others, and not common to all.
Python's own `unicodedata` knows no scripts: by the first words of characters' names 585 of XLM-R's 250,002 tokens are judged
otherwise, and what is no script finds nothing instead of being an error.
"""

import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import VocabularyError

_EVERYWHERE = r"\p{sc=Common}\p{sc=Inherited}"  # spaces, digits, signs, and marks on letters
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def script_ids(tokenizer: Any, scripts: Iterable[str]) -> NDArray[np.int64]:
    """The ids of all tokens with something of these scripts in them, and nothing of others, sorted.

    What no script has for its own (spaces, digits, most signs) may stand in any token; tokens of nothing else are those of the
    script `Common`. A piece of bytes that is no whole characters is kept where some text of the scripts can hold it.

    Args:
        tokenizer: of tokenizers, or of transformers with one of those within.
        scripts: names of Unicode: `Latin`, `Cyrillic`, `Han`, …; case does not matter.

    Raises:
        VocabularyError: there is no script of that name, or the tokenizer is written in Python.
    """
    wanted = _Texts(scripts)
    backend = _backend(tokenizer)
    read = _token_reader(backend)
    ids = (
        token_id
        for token, token_id in backend.get_vocab(with_added_tokens=False).items()
        if wanted.may_hold(read(token))
    )
    return np.sort(np.fromiter(ids, np.int64))


def check_scripts(scripts: Iterable[str]) -> list[str]:
    """The names, each a script of Unicode; raises `VocabularyError` for one that is none."""
    import regex

    names = [scripts] if isinstance(scripts, str) else list(scripts)
    for name in names:
        try:
            if re.fullmatch(r"[A-Za-z][A-Za-z _-]*", name):
                regex.compile(rf"\p{{scx={name}}}")
                continue
        except regex.error:
            pass
        raise VocabularyError(
            f"there is no script of Unicode {name!r}: expected a name such as Latin, Cyrillic, Arabic, Han, Devanagari, "
            "or Common (digits, punctuation, signs)"
        )
    return names


class _Texts:
    """All texts of some scripts: what they may hold."""

    def __init__(self, scripts: Iterable[str]) -> None:
        import regex

        own = "".join(rf"\p{{scx={name}}}" for name in check_scripts(scripts))
        self._own = regex.compile(f"[{own}]")
        self._allowed = regex.compile(f"[{own}{_EVERYWHERE}]")
        self._own_text = regex.compile(f"[{own}{_EVERYWHERE}]*[{own}][{own}{_EVERYWHERE}]*")
        self._text = regex.compile(f"[{own}{_EVERYWHERE}]*")

    def may_hold(self, token: str | bytes) -> bool:
        """True for a token with something of the scripts in it, and nothing of others."""
        try:
            text = token.decode() if isinstance(token, bytes) else token
        except UnicodeDecodeError as error:
            return self._may_hold_bytes(error.object)
        return self._own_text.fullmatch(text) is not None

    def _may_hold_bytes(self, token: bytes) -> bool:
        head, whole, tail = _in_characters(token)
        try:
            middle = whole.decode()
        except UnicodeDecodeError:
            return False
        if self._text.fullmatch(middle) is None or not {head, tail} - {b""} <= self._pieces_of_allowed:
            return False
        return bool({head, tail} & self._pieces_of_own) or self._own.search(middle) is not None

    @cached_property
    def _pieces_of_own(self) -> set[bytes]:
        return set(_pieces(self._own.findall(_all_characters())))

    @cached_property
    def _pieces_of_allowed(self) -> set[bytes]:
        return set(_pieces(self._allowed.findall(_all_characters())))


def _all_characters() -> str:
    return "".join(chr(point) for point in range(0x80, sys.maxunicode + 1) if not 0xD800 <= point < 0xE000)


def _pieces(characters: Collection[str]) -> Iterator[bytes]:
    """All bytes that are a part of one character: its beginning, its end or between."""
    for encoded in map(str.encode, characters):
        for start in range(len(encoded)):
            for stop in range(start + 1, len(encoded) + (start > 0)):
                yield encoded[start:stop]


def _in_characters(token: bytes) -> tuple[bytes, bytes, bytes]:
    """The end of a character, whole characters, and the beginning of one."""
    start = next((number for number, byte in enumerate(token) if byte & 0xC0 != 0x80), len(token))
    stop = next((number for number in range(len(token) - 1, start - 1, -1) if token[number] & 0xC0 != 0x80), start)
    lead = token[stop] if stop < len(token) else 0
    length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if stop + length <= len(token):  # the last character is whole
        stop = len(token)
    return token[:start], token[start:stop], token[stop:]


def _backend(tokenizer: Any) -> Any:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "get_vocab") or not hasattr(getattr(backend, "model", None), "__getstate__"):
        raise VocabularyError(
            f"{type(tokenizer).__name__} has no tokens that can be read by script: expected a tokenizer with a tokenizer.json "
            "(of tokenizers, or of transformers, where most are)"
        )
    return backend


def _token_reader(backend: Any) -> Any:
    """A function: a token as the tokenizer's file has it → its text, or its bytes, without marks of a word's middle or end."""
    options = json.loads(backend.model.__getstate__())
    if any(
        b'"ByteLevel"' in part.__getstate__() for part in (backend.decoder, backend.pre_tokenizer) if part is not None
    ):
        return _read_byte_signs
    prefix, suffix = options.get("continuing_subword_prefix") or "", options.get("end_of_word_suffix") or ""
    has_bytes = bool(options.get("byte_fallback"))

    def read(token: str) -> str | bytes:
        if has_bytes and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.removeprefix(prefix).removesuffix(suffix)

    return read


def _read_byte_signs(token: str) -> str | bytes:
    try:
        return bytes(map(_BYTES_OF_SIGNS.__getitem__, token))
    except KeyError:  # a token that was added, and is text
        return token


def _bytes_of_signs() -> dict[str, int]:
    """The characters that stand for bytes in byte-level tokenizers: printable ones for themselves, the others from Ā on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES_OF_SIGNS = _bytes_of_signs()
