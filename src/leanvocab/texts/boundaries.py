"""Boundaries at which a text may be cut before it is tokenized: the ids of the pieces are those of the text, in its order.

They are proven, component by component, for the normalizers, pre-tokenizers, models and added tokens that are listed here;
with any other, texts stay whole (docs/decisions/counting-text.md). A boundary that is not seen costs time alone.
"""

import json
import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Classes of the character before a boundary, each of which is one of the class below as well.
_MARK, _SOLID, _WORD = 1, 2, 3
_NEVER = 255
_SPACES = " \t\n\r"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Here punctuation takes the line breaks behind it, and a line break begins no word.
_BY_LINES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
}
_SPACE_SIGN = "\u2581"  # sentencepiece's
_RUNS_OF_SPACES = (" {2,}", r"\s{2,}|[\n\r\t]")
_TO_WORDS = ("BertPreTokenizer", "WhitespaceSplit", "Whitespace")
_WITHIN_WORDS = (*_TO_WORDS, "Punctuation", "Digits", "Metaspace", "ByteLevel")
_KEEPING_MARKS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Precompiled")
_BY_CHARACTER = ("BertNormalizer", "NFD", "NFKD", "StripAccents", "Lowercase")  # and in the order of marks behind one
_BEFORE, _BEHIND, _LEAD = 1, 2, 4
_OTHER, _LETTER, _DIGIT, _SIGN = range(4)
_IDEOGRAPHS = range(0x4E00, 0xA000)  # in UTF-8 from E4 B8 80 to E9 BF BF
_POST_PROCESSORS = ("ByteLevel", "BertProcessing", "RobertaProcessing", "TemplateProcessing")


class _UnprovenError(Exception):
    """A part of a tokenizer for which no boundary is proven; the message says which."""


class Boundaries(ABC):
    """Where texts may be cut.

    `ignores_space`: white space at a cut has no part in the ids, so that a piece is the same with it and without.
    """

    ignores_space = False

    @abstractmethod
    def cuts(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Positions in UTF-8 where pieces begin; texts may lie side by side, since nothing is looked up before a text's end."""


@dataclass(frozen=True)
class SpaceBoundaries(Boundaries):
    """White space before which texts are cut, by the class that the character before it must have.

    `within_runs`: between two white spaces, too; `at_lines`: between a line break and what is visible ASCII.
    """

    needed: tuple[tuple[int, int], ...]
    within_runs: bool = False
    at_lines: bool = False

    def cuts(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        spaces = np.flatnonzero(data <= ord(" "))
        spaces = spaces[spaces > 0]
        here, before = data[spaces], data[spaces - 1]
        is_cut = _classes_before(data, spaces) >= self._needed[here]
        if self.within_runs:
            both = (self._needed[here] != _NEVER) & (self._needed[before] != _NEVER)
            is_cut |= both & ~((before == ord("\r")) & (here == ord("\n")))
        cuts = spaces[is_cut]
        if not self.at_lines:
            return cuts
        lines = spaces[here == ord("\n")] + 1
        lines = lines[lines < len(data)]
        return np.concatenate([cuts, lines[(data[lines] > ord(" ")) & (data[lines] < 0x7F)]])

    @cached_property
    def _needed(self) -> NDArray[np.uint8]:
        table = np.full(256, _NEVER, np.uint8)
        for byte, least in self.needed:
            table[byte] = least
        return table


@dataclass(frozen=True)
class KindBoundaries(SpaceBoundaries):
    """White space as above, and wherever letters, digits and punctuation of ASCII meet, but before a letter that may continue.

    `joins`: punctuation behind which a letter is of the same word. `uncut`: pairs of characters that added tokens hold.
    """

    joins: str = ""
    uncut: frozenset[str] = frozenset()

    def cuts(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        kinds = _kinds()[data]
        meeting = np.flatnonzero(kinds[1:] != kinds[:-1]) + 1
        meeting = meeting[self._apart[data[meeting - 1], data[meeting]]]
        return np.concatenate([super().cuts(data), meeting])

    @cached_property
    def _apart(self) -> NDArray[np.bool_]:
        """Whether texts are cut between two bytes."""
        kinds = _kinds()
        apart: NDArray[np.bool_] = (kinds[:, None] != kinds) & (kinds[:, None] != _OTHER) & (kinds != _OTHER)
        joins = np.isin(np.arange(256), list(self.joins.encode()))
        apart &= ~(joins[:, None] & (kinds == _LETTER))
        for pair in self.uncut:
            if pair.isascii():
                apart[ord(pair[0]), ord(pair[1])] = False
        return apart


@cache
def _kinds() -> NDArray[np.uint8]:
    kinds = np.full(256, _OTHER, np.uint8)
    for kind, characters in ((_LETTER, string.ascii_letters), (_DIGIT, string.digits), (_SIGN, string.punctuation)):
        kinds[list(characters.encode())] = kind
    return kinds


@dataclass(frozen=True)
class WordBoundaries(Boundaries):
    """ASCII characters before which and behind which texts are cut, whatever is around them; and ideographs, on both sides."""

    before: str
    behind: str
    ideographs: bool
    ignores_space = True

    def cuts(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        kinds = self._kinds[data]
        is_cut = (kinds & _BEFORE) != 0
        is_cut[1:] |= (kinds[:-1] & _BEHIND) != 0
        if self.ideographs:
            leads = np.flatnonzero(kinds[:-2] & _LEAD)
            leads = leads[(data[leads] > 0xE4) | (data[leads + 1] >= 0xB8)]
            is_cut[leads] = True
            behind = leads + 3
            is_cut[behind[behind < len(data)]] = True
        is_cut[:1] = False
        return np.flatnonzero(is_cut)

    @cached_property
    def _kinds(self) -> NDArray[np.uint8]:
        table = np.zeros(256, np.uint8)
        table[list(self.before.encode())] |= _BEFORE
        table[list(self.behind.encode())] |= _BEHIND
        table[0xE4:0xEA] |= _LEAD
        return table


def _classes_before(data: NDArray[np.uint8], positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The class of the character that ends before each position; 0 for those beyond the basic plane."""
    points = data[positions - 1].astype(np.int64)
    beyond = np.flatnonzero(points > 0x7F)
    last, second, third = (data[np.maximum(positions[beyond] - back, 0)].astype(np.int64) for back in (1, 2, 3))
    of_two = ((second & 0x1F) << 6) | (last & 0x3F)
    of_three = ((third & 0x0F) << 12) | ((second & 0x3F) << 6) | (last & 0x3F)
    is_of_three = ((second & 0xC0) == 0x80) & ((third & 0xF0) == 0xE0)
    points[beyond] = np.where((second & 0xE0) == 0xC0, of_two, np.where(is_of_three, of_three, 0))
    return _classes()[points]


@cache
def _classes() -> NDArray[np.uint8]:
    """The class of each character of the basic plane.

    Only of characters that Unicode 3.2 had: what tokenizers know of later ones depends on their age. Characters that join what
    follows them (the prepended ones of grapheme clusters) are none of these, nor is sentencepiece's sign for a space.
    """
    classes = np.zeros(1 << 16, np.uint8)
    for point in chain(range(0x21, 0x7F), range(0xA1, 0xD800), range(0xE000, 0xFFFD)):
        char = chr(point)
        category = unicodedata.category(char)
        if category[0] not in "LMNPS" or unicodedata.ucd_3_2_0.category(char)[0] != category[0]:
            continue
        compatible = unicodedata.normalize("NFKC", char)
        if any(part == _SPACE_SIGN or unicodedata.category(part)[0] in "CZ" for part in compatible):
            continue
        is_mark = category[0] == "M" or point in (
            0x0E33,
            0x0EB3,
            0xFF9E,
            0xFF9F,
        )  # letters that clusters treat as marks
        ends_word = all(unicodedata.category(end)[0] in "LN" for end in (char, unicodedata.normalize("NFC", char)[-1]))
        classes[point] = _MARK if is_mark else _WORD if ends_word else _SOLID
    return classes


def find_boundaries(backend: Any) -> Boundaries | str:
    """Where texts may be cut for a `tokenizers.Tokenizer`; or why they stay whole, since no boundary is proven to be safe."""
    try:
        return _proven(backend)
    except _UnprovenError as why:
        return str(why)


def _proven(backend: Any) -> Boundaries:
    _check_model(backend.model)
    _check_post_processor(backend.post_processor)
    normalizers = list(_components(backend.normalizer, "normalizer"))
    pre_tokenizers = list(_components(backend.pre_tokenizer, "pre-tokenizer"))
    if not pre_tokenizers:
        raise _UnprovenError("the tokenizer has no pre-tokenizer")
    kinds = [part["type"] for part in pre_tokenizers]
    added = list(backend.get_added_tokens_decoder().values())
    if kinds[0] in _TO_WORDS:
        boundaries = _of_words(pre_tokenizers, normalizers, backend.normalizer)
    elif kinds[0] == "Metaspace":
        boundaries = _of_metaspace(pre_tokenizers, normalizers, backend.normalizer)
    else:
        boundaries = _of_bytes(pre_tokenizers, normalizers, backend.normalizer, added)
    _check_added_tokens(added, backend.normalizer, is_of_words=boundaries.within_runs)
    if not boundaries.needed:
        raise _UnprovenError("the tokenizer's normalizer keeps no white space as it is")
    if kinds == ["BertPreTokenizer"] and len(boundaries.needed) == len(_SPACES):
        return _of_bert(normalizers, backend.normalizer, added) or boundaries
    return boundaries


def _of_bert(normalizers: list[Any], normalizer: Any, added: list[Any]) -> Boundaries | None:
    """White space, punctuation and ideographs are words of their own, or none, where each character is normalized alone.

    An added token may hold punctuation, in which it is not cut; whether one that has to be a single word is found depends
    on what is beside it.
    """
    if any(part["type"] not in _BY_CHARACTER for part in normalizers) or any(token.single_word for token in added):
        return None
    written = [text for token in added for text in _written(token, normalizer)]
    unbegun = {char for text in written for char in text[1:]}
    unended = {char for text in written for char in text[:-1]}
    return WordBoundaries(
        before=_SPACES + "".join(char for char in string.punctuation if char not in unbegun),
        behind="".join(char for char in string.punctuation if char not in unended),
        ideographs=any(part.get("handle_chinese_chars") for part in normalizers)
        and not any(ord(char) in _IDEOGRAPHS for char in chain.from_iterable(written)),
    )


def _of_words(parts: list[Any], normalizers: list[Any], normalizer: Any) -> SpaceBoundaries:
    """White space divides words and is left out: nothing that it becomes, or that is near it, can change that."""
    _check_kinds(parts, _WITHIN_WORDS, "pre-tokenizer")
    for part in normalizers:
        if part["type"] == "Replace":
            if not _replaces_runs(part) and not _replaces_within_words(part):
                raise _UnprovenError(f"the tokenizer's normalizer replaces {part['pattern']}")
        else:
            _check_kinds([part], (*_KEEPING_MARKS, "BertNormalizer", "StripAccents", "Strip"), "normalizer")
    kept = [
        space for space in _SPACES if (between := _normalized(normalizer, f"a{space}b")[1:-1]) and between.isspace()
    ]
    return SpaceBoundaries(tuple((ord(space), _MARK) for space in kept), within_runs=True)


def _of_metaspace(parts: list[Any], normalizers: list[Any], normalizer: Any) -> SpaceBoundaries:
    """A space begins a piece and is its first character, whatever is behind it."""
    _check_kinds(parts[1:], ("Punctuation", "Digits"), "pre-tokenizer")
    if not parts[0].get("split", True):
        raise _UnprovenError("the tokenizer's pre-tokenizer does not split at spaces")
    for part in normalizers:
        if part["type"] == "Replace":
            if not _replaces_runs(part) and not (_replaces_within_words(part) and part["content"]):
                raise _UnprovenError(f"the tokenizer's normalizer replaces {part['pattern']}")
        elif not (part["type"] == "Strip" and not part["strip_left"]):
            _check_kinds([part], (*_KEEPING_MARKS, "StripAccents"), "normalizer")
    kept = [space for space in _SPACES if _normalized(normalizer, f"a{space}b") == "a b"]
    if normalizers:  # what stands before a space must not become one, or nothing
        for point in np.flatnonzero(_classes() >= _SOLID).tolist():
            became = _normalized(normalizer, chr(point))
            if not became or any(map(str.isspace, became)):
                raise _UnprovenError(f"the tokenizer's normalizer makes {became!r} of {chr(point)!r}")
    return SpaceBoundaries(tuple((ord(space), _SOLID) for space in kept))


def _of_bytes(parts: list[Any], normalizers: list[Any], normalizer: Any, added: list[Any]) -> SpaceBoundaries:
    """Patterns none of whose matches has white space behind something else, but for line breaks, which are an exception."""
    _check_kinds(normalizers, ("NFC",), "normalizer")
    if parts[0]["type"] == "Digits":
        parts = parts[1:]
    kinds = [part["type"] for part in parts]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise _UnprovenError(f"the tokenizer's pre-tokenizer is {' and '.join(kinds) or 'Digits'}")
    last = parts[-1]
    pattern = _GPT2 if last["use_regex"] else None
    if len(parts) == 2:
        is_plain = parts[0]["behavior"] == "Isolated" and not parts[0]["invert"] and not last["use_regex"]
        pattern = parts[0]["pattern"].get("Regex") if is_plain and not last["add_prefix_space"] else None
    if pattern == _GPT2 and last["add_prefix_space"]:  # a piece that begins with anything else would get one
        return SpaceBoundaries(((ord(" "), _MARK),))
    if pattern == _GPT2:
        return _by_kinds(SpaceBoundaries(tuple((ord(space), _MARK) for space in _SPACES)), "'", added, normalizer)
    if pattern in _BY_LINES:
        needed = (*((ord(space), _MARK) for space in " \t"), *((ord(space), _WORD) for space in "\n\r"))
        boundaries = SpaceBoundaries(needed, at_lines=not any(token.lstrip for token in added))
        return _by_kinds(boundaries, string.punctuation, added, normalizer)
    raise _UnprovenError("the tokenizer's pre-tokenizer splits by an unknown pattern")


def _by_kinds(boundaries: SpaceBoundaries, joins: str, added: list[Any], normalizer: Any) -> SpaceBoundaries:
    """With cuts where kinds meet as well: no match goes from one to another, but for what begins a word.

    A token that has to be a single word asks what is beside it.
    """
    if any(token.single_word for token in added):
        return boundaries
    written = chain.from_iterable(_written(token, normalizer) for token in added)
    uncut = frozenset("".join(pair) for text in written for pair in pairwise(text))
    return KindBoundaries(boundaries.needed, at_lines=boundaries.at_lines, joins=joins, uncut=uncut)


def _components(component: Any, what: str) -> Iterator[Mapping[str, Any]]:
    """A component and those in it, as a tokenizer's file has them; raises `_UnprovenError` for one that is no part of a file."""
    if component is None:
        return
    try:
        state = json.loads(component.__getstate__())
    except Exception as error:  # made of Python code
        raise _UnprovenError(f"the tokenizer's {what} cannot be read") from error
    yield from _flat(state)


def _flat(state: Any) -> Iterator[Mapping[str, Any]]:
    if state["type"] != "Sequence":
        yield state
        return
    for name in ("normalizers", "pretokenizers", "processors"):
        for part in state.get(name, ()):
            yield from _flat(part)


def _check_kinds(parts: list[Any], proven: tuple[str, ...], what: str) -> None:
    for part in parts:
        if part["type"] not in proven:
            raise _UnprovenError(f"the tokenizer's {what} has the part {part['type']}")


def _check_model(model: Any) -> None:
    kind = type(model).__name__
    if kind not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        raise _UnprovenError(f"the tokenizer's model is {kind}")
    if any(getattr(model, name, None) for name in ("dropout", "alpha", "nbest_size")):
        raise _UnprovenError("the tokenizer's model draws by chance")


def _check_post_processor(post_processor: Any) -> None:
    for part in _components(post_processor, "post-processor"):
        _check_kinds([part], _POST_PROCESSORS, "post-processor")
        if part["type"] == "TemplateProcessing":
            for name, sequences in (("single", ["A"]), ("pair", ["A", "B"])):
                ids = [item["Sequence"]["id"] for item in part[name] if "Sequence" in item]
                if sorted(ids) != sequences:
                    raise _UnprovenError(f"the tokenizer's post-processor makes {', '.join(ids)} of a {name}")


def _check_added_tokens(added: list[Any], normalizer: Any, *, is_of_words: bool) -> None:
    for token in added:
        if any(map(str.isspace, chain.from_iterable(_written(token, normalizer)))):
            raise _UnprovenError(f"the tokenizer's added token {token.content!r} has white space in it")
        if token.rstrip and not is_of_words:
            raise _UnprovenError(f"the tokenizer's added token {token.content!r} takes the white space behind it")


def _written(token: Any, normalizer: Any) -> list[str]:
    """An added token as texts have it, and as normalized ones do where it is searched for in those."""
    return [token.content] + ([_normalized(normalizer, token.content)] if token.normalized else [])


def _replaces_runs(part: Mapping[str, Any]) -> bool:
    return part["pattern"].get("Regex") in _RUNS_OF_SPACES and part["content"] == " "


def _replaces_within_words(part: Mapping[str, Any]) -> bool:
    pattern = part["pattern"].get("String")
    return bool(pattern) and not any(map(str.isspace, pattern + part["content"]))


def _normalized(normalizer: Any, text: str) -> str:
    return text if normalizer is None else str(normalizer.normalize_str(text))
