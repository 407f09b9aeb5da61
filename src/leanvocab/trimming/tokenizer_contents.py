"""Contents of a tokenizer's files with some of its tokens, under new ids: everything else in them stays as it is. No torch."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from leanvocab.errors import VocabularyError, shortened
from leanvocab.trimming.splits import merged, merges_of

NewIds = Mapping[int, int]
"""Ids of the tokens that stay → new ids."""

_PARTS = {
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model",
}  # fmt: skip
_PAIRS = {"BertProcessing": ("sep", "cls"), "RobertaProcessing": ("sep", "cls")}
_ID_FIELD = re.compile(r"(^|_)(ids?|index|idx)$")
_NO_ID_FIELD = re.compile(r"type_ids?$|^extra_ids$|^name_or_path$")


def inserted_ids(state: Mapping[str, Any]) -> set[int]:
    """Ids of added tokens, and those that a tokenizer puts around text or pads with; they are told by nothing in a text.

    Args:
        state: the content of tokenizer.json.

    Raises:
        VocabularyError: there is a part in which ids may stand that are not known.
    """
    if unknown := state.keys() - _PARTS:
        raise VocabularyError(f"its part {min(unknown)!r} is not known; ids may stand in it")
    ids = {token["id"] for token in state.get("added_tokens") or ()}
    for processor in _processors(state.get("post_processor")):
        ids |= {processor[name][1] for name in _PAIRS.get(processor["type"], ())}
        ids |= {token_id for token in (processor.get("special_tokens") or {}).values() for token_id in token["ids"]}
    return ids | ({state["padding"]["pad_id"]} if state.get("padding") else set())


def trimmed_state(state: Mapping[str, Any], kind: str, new_ids: NewIds) -> dict[str, Any]:
    """The content of tokenizer.json; `kind` is the type of its model, which older files leave out."""
    trimmed = dict(state)
    trimmed["model"] = _trimmed_model(state["model"], kind, new_ids)
    trimmed["added_tokens"] = [token | {"id": new_ids[token["id"]]} for token in state.get("added_tokens") or ()]
    if state.get("post_processor"):
        trimmed["post_processor"] = _renumbered_processor(state["post_processor"], new_ids)
    if state.get("padding"):
        trimmed["padding"] = state["padding"] | {"pad_id": new_ids[state["padding"]["pad_id"]]}
    return trimmed


def trimmed_map(name: str, ids: Mapping[str, Any], vocab: Mapping[str, int], new_ids: NewIds) -> dict[str, int]:
    """The content of vocab.json or added_tokens.json."""
    _check_same(name, ids.items(), vocab)
    return {token: new_ids[token_id] for token, token_id in ids.items() if token_id in new_ids}


def trimmed_lines(name: str, content: bytes, vocab: Mapping[str, int], new_ids: NewIds) -> bytes:
    """The content of vocab.txt, a token a line, whose number is its id."""
    lines = [(line, place) for place, line in enumerate(_lines(content)) if place in new_ids]
    _check_same(name, ((line.rstrip("\n"), place) for line, place in lines), vocab)
    return "".join(line for line, _ in lines).encode()


def trimmed_merges(content: bytes, model: Mapping[str, Any], vocab: Mapping[str, int], new_ids: NewIds) -> bytes:
    """The content of merges.txt: merges among the tokens that stay, and what is no merge."""
    kept = []
    for line in _lines(content):
        parts = line.rstrip("\n").split(" ")
        is_merge = len(parts) == 2 and not line.startswith("#version")
        if is_merge and any(vocab.get(token) not in new_ids for token in (*parts, merged(model, *parts))):
            continue
        kept.append(line)
    return "".join(kept).encode()


def trimmed_config(config: Mapping[str, Any], vocab: Mapping[str, int], new_ids: NewIds) -> dict[str, Any]:
    """The content of tokenizer_config.json.

    Raises:
        VocabularyError: a field seems to hold ids, and is not understood.
    """
    trimmed = dict(config)
    if "added_tokens_decoder" in config:
        added = {vocab[token["content"]]: token for token in config["added_tokens_decoder"].values()}
        trimmed["added_tokens_decoder"] = {str(new_ids[token_id]): token for token_id, token in added.items()}
    for name, value in config.items():
        if _ID_FIELD.search(name) and not _NO_ID_FIELD.search(name) and value is not None:
            values = value if isinstance(value, list) else [value]
            if not all(type(token_id) is int and token_id in new_ids for token_id in values):
                raise VocabularyError(f"{name} in tokenizer_config.json seems to hold ids: {shortened(value)}")
            renumbered = [new_ids[token_id] for token_id in values]
            trimmed[name] = renumbered if isinstance(value, list) else renumbered[0]
    return trimmed


def as_json(value: Any, indent: int | None = 2) -> bytes:
    """JSON as these files are written."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode()


def _check_same(name: str, ids: Iterable[tuple[str, Any]], vocab: Mapping[str, int]) -> None:
    for token, token_id in ids:
        if vocab.get(token) != token_id:
            raise VocabularyError(f"{name} gives {token!r} the id {token_id}, the tokenizer has {vocab.get(token)}")


def _lines(content: bytes) -> list[str]:
    """Lines with their ends, as they are read where a vocabulary is read."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").readlines()


def _trimmed_model(model: Mapping[str, Any], kind: str, new_ids: NewIds) -> dict[str, Any]:
    trimmed, vocab = dict(model), model["vocab"]
    if not isinstance(vocab, Mapping):
        trimmed["vocab"] = [entry for place, entry in enumerate(vocab) if place in new_ids]
        if model.get("unk_id") is not None:
            trimmed["unk_id"] = new_ids[model["unk_id"]]
        return trimmed
    kept = {token: new_ids[token_id] for token, token_id in vocab.items() if token_id in new_ids}
    trimmed["vocab"] = kept
    if kind == "BPE":
        merges = zip(model["merges"], merges_of(model), strict=True)
        trimmed["merges"] = [
            merge for merge, (left, right) in merges if {left, right, merged(model, left, right)} <= kept.keys()
        ]
    return trimmed


def _processors(processor: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if processor is None:
        return
    kind = processor.get("type")
    if kind == "Sequence":
        for part in processor["processors"]:
            yield from _processors(part)
    elif kind in ("TemplateProcessing", "ByteLevel", *_PAIRS):
        yield processor
    else:
        raise VocabularyError(f"its post-processor {kind!r} is not known; ids may stand in it")


def _renumbered_processor(processor: Mapping[str, Any], new_ids: NewIds) -> dict[str, Any]:
    renumbered = dict(processor)
    if processor["type"] == "Sequence":
        renumbered["processors"] = [_renumbered_processor(part, new_ids) for part in processor["processors"]]
    for name in _PAIRS.get(processor["type"], ()):
        token, token_id = processor[name]
        renumbered[name] = [token, new_ids[token_id]]
    if "special_tokens" in processor:
        renumbered["special_tokens"] = {
            name: token | {"ids": [new_ids[token_id] for token_id in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    return renumbered


# --- models of sentencepiece --------------------------------------------------------------------------------------------
# A model is a message whose fields of number 1 are the pieces in the order of their ids, each a message of a text (1), a
# score (2) and a type (3); see sentencepiece_model.proto.

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
