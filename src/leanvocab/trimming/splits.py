"""Tokens that decide how text splits: with them kept, text of kept tokens has the tokens that it had. No torch.

Proven for the four models of the tokenizers library, given as its JSON has them (docs/decisions/trimmed-splits.md):

- BPE: the tokens that a kept token is merged from, one after the other, and every merge among kept tokens.
- Unigram: a piece with the lowest score, from which that of unknown characters is taken.
- WordPiece: pieces that are taken on the way to an unknown word, which another piece would lead through.
- WordLevel: nothing.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

from leanvocab.errors import VocabularyError

_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_BATCH = 1000  # texts at once
Pair = tuple[str, str]


def check_model(model: Mapping[str, Any]) -> None:
    """Raises `VocabularyError` for a model of which nothing is proven."""
    if model.get("type") not in _KINDS:
        raise VocabularyError(f"its model is {model.get('type')!r}, expected one of {', '.join(_KINDS)}")
    if model.get("dropout"):
        raise VocabularyError(
            f"its merges are left out at random (dropout {model['dropout']}), so that no count says which tokens a text has; "
            "set dropout to null in tokenizer.json"
        )


def vocabulary_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of a model → ids."""
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, Mapping) else {entry[0]: place for place, entry in enumerate(vocab)}


def merges_of(model: Mapping[str, Any]) -> list[Pair]:
    """Merges of a model in their order, which older files hold as texts."""
    merges = model.get("merges", ())
    return [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in merges)]


def merged(model: Mapping[str, Any], left: str, right: str) -> str:
    """The token that two tokens are merged to."""
    return left + right[len(model.get("continuing_subword_prefix") or "") :]


def closed_tokens(
    model: Mapping[str, Any], kept: Iterable[str], *, byte_level: bool, unknown_words: Iterable[str] | None = None
) -> set[str]:
    """Kept tokens, and those that have to stay for them.

    Args:
        model: the part "model" of tokenizer.json, with its type.
        kept: tokens of the model.
        byte_level: text comes to the model as bytes, each of which stays, as any other text needs them.
        unknown_words: words that have to stay unknown, to WordPiece. None: all that are.
    """
    vocab = vocabulary_of(model)
    tokens = set(kept) | {token for token in _always(model, byte_level) if token in vocab}
    if model["type"] == "BPE":
        return _Merges(model, vocab).closed(tokens)
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        if unknown_words is None:
            return tokens | _pieces_before_unknown(vocab, tokens, prefix)
        return tokens.union(*(_taken_pieces(word, vocab, prefix) for word in unknown_words))
    if model["type"] == "Unigram":
        lowest = min(score for _, score in model["vocab"])
        at_lowest = [piece for piece, score in model["vocab"] if score == lowest]
        return tokens if tokens.intersection(at_lowest) else tokens | {at_lowest[0]}
    return tokens


def _always(model: Mapping[str, Any], byte_level: bool) -> Iterator[str]:
    """Tokens for text that no token of the data stands for; some may not be there."""
    if model.get("unk_token") is not None:
        yield model["unk_token"]
    if (
        model.get("unk_id") is not None
    ):  # which classes of transformers know by its place alone, so that all before it stay
        yield from (piece for piece, _ in model["vocab"][: model["unk_id"] + 1])
    if model.get("byte_fallback"):
        yield from _BYTE_TOKENS
    if byte_level:
        from tokenizers.pre_tokenizers import ByteLevel

        prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        for char in ByteLevel.alphabet():
            yield from (char, prefix + char, char + suffix, prefix + char + suffix)


# --- BPE: derivations ---------------------------------------------------------------------------------------------------


class _Merges:
    """Merges of a BPE model, and the derivations of its tokens.

    In every text a token is made by the merges that make it alone, since none of them reaches over its ends. Further
    merges of the model change nothing, for they were not the first ones before either.
    """

    def __init__(self, model: Mapping[str, Any], vocab: Mapping[str, int]) -> None:
        self._vocab = vocab
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""
        self._ranks = {pair: rank for rank, pair in enumerate(merges_of(model))}
        self._ways: dict[str, list[Pair]] = defaultdict(list)
        for left, right in self._ranks:
            self._ways[merged(model, left, right)].append((left, right))
        self._symbols_without_text = {model.get("unk_token"), *(_BYTE_TOKENS if model.get("byte_fallback") else ())}

    def closed(self, tokens: Iterable[str]) -> set[str]:
        """Tokens, and all that they are merged from."""
        kept: set[str] = set()
        new = list(tokens)
        while new:
            token = new.pop()
            if token not in kept:
                kept.add(token)
                new += chain(*self._last_merges(token))
        return kept

    def _last_merges(self, token: str) -> Iterable[Pair]:
        """Pairs of which the last merge of a token may be; what is never made by merges has none."""
        ways = self._ways.get(token, [])
        if len(ways) < 2 or token in self._made_without_text:
            return ways
        return {last for symbols in self._beginnings(token) if (last := self._run(symbols)) is not None}

    def _run(self, symbols: list[str]) -> Pair | None:
        """The last merge by which symbols become one token; None where they do not."""
        last = None
        while len(symbols) > 1:
            ranks = (self._ranks.get(pair, len(self._ranks)) for pair in pairwise(symbols))
            rank, start = min((rank, start) for start, rank in enumerate(ranks))
            if rank == len(self._ranks):
                return None
            last = (symbols[start], symbols[start + 1])
            symbols[start : start + 2] = [last[0] + last[1][len(self._prefix) :]]
        return last

    def _beginnings(self, token: str) -> Iterator[list[str]]:
        """The symbols that a token's text is before the first merge: where a word begins or goes on, and where one ends."""
        inside = [False, True] if self._prefix and token.startswith(self._prefix) else [False]
        at_end = [False, True] if self._suffix and token.endswith(self._suffix) else [False]
        for goes_on in inside:
            for ends in at_end:
                text = token.removeprefix(self._prefix) if goes_on else token
                text = text.removesuffix(self._suffix) if ends else text
                symbols = [self._prefix + char for char in text]
                if symbols and not goes_on:
                    symbols[0] = text[0]
                if symbols and ends:
                    symbols[-1] += self._suffix
                if all(symbol in self._vocab for symbol in symbols):
                    yield symbols

    @cached_property
    def _made_without_text(self) -> set[str]:
        """Tokens that are merged from bytes or unknown characters, of which their text says nothing."""
        made, before = set(self._symbols_without_text), -1
        while len(made) > before:
            before = len(made)
            made |= {token for token, ways in self._ways.items() if any(not made.isdisjoint(pair) for pair in ways)}
        return made


# --- WordPiece: what is unknown stays unknown ---------------------------------------------------------------------------


class _Overhang(NamedTuple):
    """Text that one way has taken already and the other has not."""

    text: str
    of_all: bool  # the way of all pieces is ahead; else that of the kept ones


def _pieces_before_unknown(vocab: Collection[str], kept: Collection[str], prefix: str) -> set[str]:
    """Dropped pieces that have to stay, so that what is unknown stays unknown.

    Greedy: at each position the longest piece is taken; a word is unknown where none begins. Let a word be unknown with all
    pieces, and not with the kept ones alone. There the kept pieces run over the position at which all pieces end. The two ways
    part at a dropped piece, and have no boundary in common from there on: overhang follows overhang, as in Sardinas' and
    Patterson's test of codes. The dropped pieces from which such a chain leads to an unknown position stay; with them the two
    ways are one. These can be many. Where texts are at hand, the pieces that are taken in their own unknown words are enough.

    Args:
        vocab: all pieces.
        kept: pieces that stay.
        prefix: mark of pieces that continue a word.
    """
    stay: set[str] = set()
    while new := _chained_pieces(set(vocab), set(kept) | stay, prefix):
        stay |= new
    return stay


def _taken_pieces(word: str, vocab: Collection[str], prefix: str) -> list[str]:
    """Pieces that are taken from the beginning of a word, to its end or to where none begins."""
    pieces: list[str] = []
    at = 0
    while at < len(word):
        mark = prefix if at else ""
        end = next((end for end in range(len(word), at, -1) if mark + word[at:end] in vocab), at)
        if end == at:
            break
        pieces.append(mark + word[at:end])
        at = end
    return pieces


def words_that_split(before: Any, after: Any, texts: Collection[str]) -> set[str]:
    """Words of texts that a tokenizer does not know, and another one with fewer pieces splits, as its model has them.

    Args:
        before: a `tokenizers.Tokenizer` of WordPiece.
        after: the same with fewer pieces.
        texts: read as often as this is called.
    """
    unknown, prefix = before.model.unk_token, before.model.continuing_subword_prefix
    words = set()
    left = iter(texts)
    while batch := list(islice(left, _BATCH)):
        pairs = (tokenizer.encode_batch(batch, add_special_tokens=False) for tokenizer in (before, after))
        for was, now in zip(*pairs, strict=True):
            if was.tokens != now.tokens:
                pieces: dict[int | None, list[str]] = defaultdict(list)
                for token, number in zip(now.tokens, now.word_ids, strict=True):
                    pieces[number].append(token.removeprefix(prefix) if pieces[number] else token)
                lost = {number for token, number in zip(was.tokens, was.word_ids, strict=True) if token == unknown}
                words |= {"".join(pieces[number]) for number in lost if pieces[number] != [unknown]}
    return words


def _chained_pieces(vocab: set[str], kept: set[str], prefix: str) -> set[str]:
    continuing = {piece.removeprefix(prefix) for piece in vocab if piece.startswith(prefix)} - {""}
    continuing_kept = {piece.removeprefix(prefix) for piece in kept if piece.startswith(prefix)} - {""}
    if not any(_is_stuck(piece[at:], continuing) for piece in continuing_kept for at in range(1, len(piece))):
        return set()
    starts: dict[_Overhang, set[str]] = defaultdict(set)
    for pieces, among, mark in ((vocab, kept, ""), (continuing, continuing_kept, prefix)):
        for piece in pieces - among:
            if shorter := _longest(piece, among):
                starts[_Overhang(piece[len(shorter) :], True)].add(mark + piece)
    return {piece for start in _leading_to_stuck(starts, continuing, continuing_kept) for piece in starts[start]}


def _leading_to_stuck(starts: Collection[_Overhang], continuing: set[str], kept: set[str]) -> Iterator[_Overhang]:
    """Starts from which some chain of overhangs comes to a position at which no piece begins."""
    longer = {False: _by_beginning(continuing), True: _by_beginning(kept)}
    before: dict[_Overhang, list[_Overhang]] = defaultdict(list)
    new, seen, stuck = list(starts), set(starts), []
    while new:
        state = new.pop()
        if not state.of_all and _is_stuck(state.text, continuing):
            stuck.append(state)
            continue
        followers = kept if state.of_all else continuing
        following = [_Overhang(rest, not state.of_all) for rest in longer[state.of_all][state.text]]
        taken = _longest(state.text, followers)
        if taken and taken != state.text:
            following.append(_Overhang(state.text[len(taken) :], state.of_all))
        for state_after in following:
            before[state_after].append(state)
            if state_after not in seen:
                seen.add(state_after)
                new.append(state_after)
    leading = set(stuck)
    while stuck:
        earlier = set(before[stuck.pop()]) - leading
        leading |= earlier
        stuck += earlier
    return (start for start in starts if start in leading)


def _is_stuck(text: str, continuing: set[str]) -> bool:
    return not _longest(text, continuing)


def _longest(text: str, pieces: set[str]) -> str:
    """The longest piece with which a text begins, itself included; "" where there is none."""
    return next((text[:end] for end in range(len(text), 0, -1) if text[:end] in pieces), "")


def _by_beginning(pieces: set[str]) -> dict[str, list[str]]:
    """Texts with which longer pieces begin → what follows in each."""
    rests: dict[str, list[str]] = defaultdict(list)
    for piece in pieces:
        for end in range(1, len(piece)):
            rests[piece[:end]].append(piece[end:])
    return rests
