"""Where texts may be cut, and why they stay whole with a tokenizer for which nothing is proven."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

import leanvocab as lv
from leanvocab.texts.boundaries import Boundaries, find_boundaries
from leanvocab.texts.counting import way_of_counting
from leanvocab.texts.distinct_pieces import DistinctPieces

WORDS = {"[UNK]": 0, "the": 1, "cat": 2, "\u2581the": 3, "\u2581cat": 4, "Ġcat": 5}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def made(**parts: Any) -> Tokenizer:
    parts = {"model": models.WordLevel(WORDS, unk_token="[UNK]"), "pre_tokenizer": pre_tokenizers.Whitespace()} | parts
    tokenizer = Tokenizer(parts.pop("model"))
    added = parts.pop("added", None)
    for name, part in parts.items():
        if part is not None:
            setattr(tokenizer, name, part)
    if added:
        tokenizer.add_tokens([added])
    return tokenizer


def cut(tokenizer: Tokenizer, text: str) -> list[str]:
    data, boundaries = text.encode(), find_boundaries(tokenizer)
    assert isinstance(boundaries, Boundaries)
    edges = [0, *sorted(boundaries.cuts(np.frombuffer(data, np.uint8)).tolist()), len(data)]
    return [data[start:stop].decode() for start, stop in pairwise(edges)]


LINES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_lines(**options: Any) -> Tokenizer:
    return made(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LINES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
        **options,
    )


def bert(**options: Any) -> Tokenizer:
    parts = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    return made(**(parts | options))


@pytest.mark.parametrize(
    ("tokenizer", "text", "pieces"),
    [
        (bert(), "é\u0600 (b)中文c\n\t'", ["é\u0600", " ", "(", "b", ")", "中", "文", "c", "\n", "\t", "'"]),
        (bert(), "㐀\U00020000\u4dff\ua000一鿿", ["㐀\U00020000\u4dff\ua000", "一", "鿿"]),
        (bert(added=AddedToken("[x]")), "a[x]b[ ]c", ["a", "[x]", "b", "[", " ]", "c"]),
        (bert(added=AddedToken("中文", normalized=False)), "a中文,", ["a中文", ","]),
        (bert(added=AddedToken("x", single_word=True)), "a,b 中c", ["a,b", " 中c"]),
        (bert(normalizer=normalizers.BertNormalizer(handle_chinese_chars=False)), "a,中文", ["a", ",", "中文"]),
        (bert(normalizer=normalizers.NFC()), "a<b c", ["a<b", " c"]),
        (made(), "a b  c\n\td\r\ne ", ["a", " b", " ", " c", "\n", "\td", "\r\ne", " "]),
        (made(pre_tokenizer=BYTES), "a b  c\n\td", ["a", " b", "  c", "\n\td"]),
        (made(pre_tokenizer=BYTES), "f(x1)='s é2.", ["f", "(", "x", "1", ")='s", " é2", "."]),
        (made(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "a b\nc", ["a", " b\nc"]),
        (made(pre_tokenizer=pre_tokenizers.Metaspace()), "a b  c\nd", ["a", " b", "  c\nd"]),
        (by_lines(), "a.\n b\nc d.\ne", ["a", ".\n b", "\n", "c", " d", ".\n", "e"]),
        (by_lines(added=AddedToken("x", lstrip=True)), "a.\ne", ["a", ".\ne"]),
        (by_lines(), "f(x1) it's\n_é.\u0301", ["f", "(x", "1", ")", " it", "'s", "\n", "_é.\u0301"]),
        (by_lines(added=AddedToken("a.1")), "a.1b.2a.", ["a.1", "b", ".", "2", "a."]),
        (by_lines(added=AddedToken("x", single_word=True)), "f(x1)", ["f(x1)"]),
        (by_lines(added=AddedToken("1\u212a"), normalizer=normalizers.NFC()), "1K 1L", ["1K", " 1", "L"]),
        (made(), "人 é ไป \U0001d4b3 \u00a0 \u0600 z", ["人", " é", " ไป", " \U0001d4b3 \u00a0 \u0600 z"]),
    ],
)
def test_texts_are_cut_where_words_begin(tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    assert cut(tokenizer, text) == pieces


GEMMA = made(
    normalizer=normalizers.Replace(" ", "\u2581"), pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous")
)
LLAMA2 = made(
    pre_tokenizer=None,
    normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
)
TWICE = processors.TemplateProcessing(single="$A $A", pair="$A $B", special_tokens=[])
UNPROVEN = {
    "the tokenizer has no pre-tokenizer": LLAMA2,
    "the tokenizer's normalizer has the part Replace": GEMMA,
    "the tokenizer's model draws by chance": made(model=models.BPE(dropout=0.1)),
    "the tokenizer's pre-tokenizer splits by an unknown pattern": made(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), BYTES])
    ),
    "the tokenizer's pre-tokenizer is UnicodeScripts": made(pre_tokenizer=pre_tokenizers.UnicodeScripts()),
    "the tokenizer's pre-tokenizer does not split at spaces": made(pre_tokenizer=pre_tokenizers.Metaspace(split=False)),
    "the tokenizer's pre-tokenizer has the part Split": made(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split("a", "removed")])
    ),
    "the tokenizer's normalizer has the part Prepend": made(normalizer=normalizers.Prepend("x")),
    "the tokenizer's normalizer has the part NFKC": made(normalizer=normalizers.NFKC(), pre_tokenizer=BYTES),
    "the tokenizer's normalizer has the part Strip": made(
        normalizer=normalizers.Strip(), pre_tokenizer=pre_tokenizers.Metaspace()
    ),
    "the tokenizer's normalizer replaces {'String': 'a b'}": made(normalizer=normalizers.Replace("a b", "c")),
    "the tokenizer's normalizer replaces {'Regex': ' .'}": made(normalizer=normalizers.Replace(Regex(" ."), "c")),
    "the tokenizer's post-processor makes A, A of a single": made(post_processor=TWICE),
    "the tokenizer's added token 'the cat' has white space in it": made(added=AddedToken("the cat")),
    "the tokenizer's added token 'x' takes the white space behind it": made(
        added=AddedToken("x", rstrip=True), pre_tokenizer=BYTES
    ),
}


@pytest.mark.parametrize("reason", UNPROVEN)
def test_texts_stay_whole_where_no_boundary_is_proven_and_count_the_same(reason: str) -> None:
    tokenizer = UNPROVEN[reason]
    assert find_boundaries(tokenizer) == reason
    assert way_of_counting(tokenizer) == f"whole texts, since {reason}"
    texts = ["the cat", "cat  the\n", "", "the cat"]
    counts = lv.count_tokens(texts, tokenizer=tokenizer)
    if "chance" not in reason:
        assert counts.num_tokens == sum(Counter(i for e in tokenizer.encode_batch(texts) for i in e.ids).values())


def test_a_part_in_python_is_unproven() -> None:
    class Custom:
        def normalize(self, normalized: Any) -> None:
            normalized.lowercase()

    tokenizer = made(normalizer=normalizers.Normalizer.custom(Custom()))
    assert find_boundaries(tokenizer) == "the tokenizer's normalizer cannot be read"


def test_what_the_tokenizer_cannot_tell_apart_is_one_piece() -> None:
    handed: list[tuple[str, int]] = []

    def tokenize(texts: list[str], counts: Any) -> None:
        handed.extend(
            (word, count) for text, count in zip(texts, counts.tolist(), strict=True) for word in text.split()
        )

    boundaries = find_boundaries(bert())
    assert isinstance(boundaries, Boundaries)
    pieces = DistinctPieces(boundaries, tokenize)
    pieces.add(pa.array(["cat cat(cat)\ncat", "\tcat  cat"], pa.large_string()))
    pieces.hand_over()
    assert sorted(handed) == [("(", 1), (")", 1), ("cat", 6)]


@pytest.mark.parametrize("limits", [{}, {"bytes_cut": 10}, {"bytes_cut": 10, "most_bytes": 1}])
def test_pieces_are_handed_over_with_their_counts_however_little_is_held(limits: dict[str, int]) -> None:
    handed: Counter[str] = Counter()

    def tokenize(texts: list[str], counts: Any) -> None:
        for text, count in zip(texts, counts.tolist(), strict=True):
            for word in text.split():
                handed[word] += count

    texts = [f"a b{i % 3} c{i} " * 2 for i in range(20)] + ["", " "]
    boundaries = find_boundaries(made())
    assert isinstance(boundaries, Boundaries)
    pieces = DistinctPieces(boundaries, tokenize, **limits)
    for start in range(0, len(texts), 7):
        pieces.add(pa.array(texts[start : start + 7], pa.large_string()))
    pieces.hand_over()
    assert handed == Counter(" ".join(texts).split())
