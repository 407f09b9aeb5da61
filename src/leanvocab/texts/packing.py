"""Sequences of token ids → blocks of a bounded length, so that little of a batch is padding. Pure functions on lists.

Texts are joined and cut, as GPT-3 and transformers' run_clm do it: nothing is lost, and the texts of a block see one another.
Examples that have to stay whole (a prompt and its completion) are laid beside one another instead; their positions restart
at 0, from which transformers' attention masks tell them apart.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from leanvocab.choices import IGNORE_INDEX

Row = dict[str, list[int]]


def join_and_cut(texts: Iterable[Sequence[int]], length: int) -> Iterator[Row]:
    """Blocks of `length` ids from the texts in their order, each of which ends as it should end; the last may be shorter.

    The first id of a block is no label: nothing stands before it to predict it from.
    """
    stream = chain.from_iterable(texts)
    while len(block := list(islice(stream, length))) > 1:
        yield _labelled(block)


def lay_side_by_side(rows: Iterable[Row], length: int) -> Iterator[Row]:
    """Blocks of at most `length` ids, each of whole examples (`input_ids`, `labels`), with `position_ids`.

    Each example goes into the first block that has room for it (first fit); an example longer than `length` is alone in its
    block. Blocks come as they are full.
    """
    blocks: list[Row] = []  # those that still have room
    for row in rows:
        size = len(row["input_ids"])
        at = next((at for at, block in enumerate(blocks) if len(block["input_ids"]) + size <= length), len(blocks))
        if at == len(blocks):
            blocks.append({"input_ids": [], "labels": [], "position_ids": []})
        block = blocks[at]
        block["input_ids"] += row["input_ids"]
        block["labels"] += [IGNORE_INDEX, *row["labels"][1:]]  # not to be predicted from the example before
        block["position_ids"] += range(size)
        if len(block["input_ids"]) >= length - 1:  # no example is shorter than two
            yield blocks.pop(at)
        elif len(blocks) > _MOST_OPEN:
            yield blocks.pop(0)
    yield from blocks


_MOST_OPEN = 256  # blocks that are looked through for room


def _labelled(block: list[int]) -> Row:
    return {"input_ids": block, "labels": [IGNORE_INDEX, *block[1:]]}


def num_learned(row: dict[str, Any]) -> int:
    """Number of labels of an example that are not ignored."""
    return sum(label != IGNORE_INDEX for label in row["labels"])
