"""Pieces of a WordPiece vocabulary without which an unknown word would split. No torch.

Greedy: at each position the longest piece is taken; a word is unknown where none begins. Let a word be unknown with all
pieces, and not with the kept ones alone. There the kept pieces run over the position at which all pieces end. The two ways part
at a dropped piece, and have no boundary in common from there on: overhang follows overhang, as in Sardinas' and Patterson's
test of codes. The dropped pieces from which such a chain leads to an unknown position stay; with them the two ways are one.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import NamedTuple


class _Overhang(NamedTuple):
    """Text that one way has taken already and the other has not."""

    text: str
    of_all: bool  # the way of all pieces is ahead; else that of the kept ones


def pieces_before_unknown(vocab: Collection[str], kept: Collection[str], prefix: str) -> set[str]:
    """Dropped pieces that have to stay, so that what is unknown stays unknown.

    Args:
        vocab: all pieces.
        kept: pieces that stay.
        prefix: mark of pieces that continue a word.
    """
    stay: set[str] = set()
    while new := _chained_pieces(set(vocab), set(kept) | stay, prefix):
        stay |= new
    return stay


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
