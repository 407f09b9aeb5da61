"""Cutting texts at boundaries changes no id: every tokenizer, every script, and what is made to break it."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import leanvocab as lv
from leanvocab.texts.boundaries import Boundaries, SpaceBoundaries, WordBoundaries, find_boundaries

REPO = Path(__file__).parents[2]
SHARED = next((beside / "shared" for beside in REPO.parents if (beside / "shared/data/tokenizers").is_dir()), REPO)
CONFIGS = [*SHARED.glob("data/tokenizers/*/config.json"), *REPO.glob(".cache/models/*/tokenizer.json")]
FOLDERS = sorted({file.parent.name: file.parent for file in CONFIGS}.values())
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "The cat's hat: 12,345 hats -- it's \"so\" cold.", "Größe naïve İstanbul ΣΑΣ ﬁn ½", "我们去北京。今天",
    "ผมไปที่นั่น ครับ", "यह एक परीक्षण है", "هذا اختبار ؀٣", "한국어 시험",
    "def f(x):\n    return x\n\n\tpass\r\n", "“quotes” … — ``so'' e\u0301a\u0300",
]  # fmt: skip

patient = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

# --- texts ---------------------------------------------------------------------------------------------------------------

_SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\r",
    " \n",
    "\n ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\u0085",
    "\v",
    "\x1c",
]
_ODD = [
    "\u200b", "\u200d", "\ufeff", "\u00ad", "\0", "\x07", "\u0301", "\u0308", "\u0600", "\u06dd",
    "\u070f", "\u0d4e", "\u0e33", "\uff9e", "´", "¨", "\u2581", "Ġ", "ﷺ", "\u1fbf", "\u0958",
    "\u1100", "\u1161", "\u11a8", "👩‍👧", "🇩🇪", "🏽", "𝒳", "\ufffd", "\U000e0041", "İ", "ſ", "'S",
    "'s", "''", "``", "½", "²", "١", "१२", "…", "。", "、", "中", "文字", "ก็", "ำ", "e\u0301",
    "a\u0328\u0301", "ﬁ", "㍿", "Ⅷ", "\u2126", "\u0338", "\u0323", "\u1fef", "\u037e", "≠", "，", "京", "\u4e00",
    "\u9fff", "\u4dff", "\ua000", "\u3400", "\uf900", "\U00020000",
]  # fmt: skip
_WORDS = [
    "the", "Cat", "it's", "hats", "12", "3456", "x", "Größe", ".", ",", "--", "?!", "(", "/", "naïve",
    "ΣΑΣ", "हिन्दी", "ไป", "한국", "العربية", "<mask>", "[MASK]", "<s>", "</s>", "<|endoftext|>", "<tok>", "foo", "<extra_id_0>",
    "C++", "_x", "'Tis", "不了", "=", "<", ">", "`", "_", "[", "]", "mask", "tok", "+", "C",
]  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(_WORDS),
        st.sampled_from(_SPACES),
        st.sampled_from(_ODD),
        st.characters(codec="utf-8"),
        st.text("asT19('=<|>_.-\u0338\u0301\u212a \n", max_size=6),  # kinds of ASCII that meet
    ),
    max_size=14,
).map("".join)

# --- tokenizers ----------------------------------------------------------------------------------------------------------


def _trained(model: Any, normalizer: Any = None, pre_tokenizer: Any = None, alphabet: Any = ()) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    kind = {"BPE": trainers.BpeTrainer, "Unigram": trainers.UnigramTrainer, "WordPiece": trainers.WordPieceTrainer}
    options: dict[str, Any] = {"vocab_size": 500, "special_tokens": ["<unk>"], "show_progress": False}
    if isinstance(model, models.Unigram):
        options["unk_token"] = "<unk>"
    tokenizer.train_from_iterator(
        [*CORPUS, *_WORDS], kind[type(model).__name__](initial_alphabet=list(alphabet), **options)
    )
    return tokenizer


def _bytes(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    return _trained(models.BPE(), normalizer, pre_tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _unigram(normalizer: Any, *pre: Any) -> Tokenizer:
    return _trained(models.Unigram(), normalizer, pre_tokenizers.Sequence([*pre]))


def _wordpiece(normalizer: Any) -> Tokenizer:
    return _trained(models.WordPiece(unk_token="<unk>"), normalizer, pre_tokenizers.BertPreTokenizer())


def _with_added(tokenizer: Tokenizer, **options: bool) -> Tokenizer:
    raw = ("不了",) if options.get("normalized") is False else ()  # BERT's normalizer would put spaces into it
    for content in ("<tok>", "foo", "Cat", "Größe", "C++", "_x", "'Tis", "<|a1|>", "9T", "1\u212a", "s'", *raw):
        tokenizer.add_tokens([AddedToken(content, **options)])
    return tokenizer


def _split(pattern: str) -> Any:
    by_pattern = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _charsmap() -> Any:
    """The normalizer of sentencepiece's models, which comes in files alone; NFKC where there is none."""
    file = next((folder / "tokenizer.json" for folder in FOLDERS if folder.name == "t5-small"), None)
    return normalizers.NFKC() if file is None else Tokenizer.from_file(str(file)).normalizer


_BYTE_LEVEL, _META = pre_tokenizers.ByteLevel, pre_tokenizers.Metaspace
_RUNS = normalizers.Replace(Regex(" {2,}"), " ")
_SPACES_AS_ONE = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
_BERT = pre_tokenizers.BertPreTokenizer
ALBERT = [
    normalizers.Replace("``", '"'),
    normalizers.Replace("''", '"'),
    normalizers.NFKD(),
    normalizers.StripAccents(),
]
MADE = {
    "bytes": lambda: _bytes(_BYTE_LEVEL(add_prefix_space=False)),
    "bytes, a first space": lambda: _bytes(_BYTE_LEVEL(add_prefix_space=True)),
    "digits and bytes": lambda: _bytes(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL(add_prefix_space=False)])
    ),
    "by lines": lambda: _bytes(_split(LLAMA3)),
    "by lines in NFC": lambda: _bytes(_split(LLAMA3), normalizers.NFC()),
    "bert cased": lambda: _wordpiece(normalizers.BertNormalizer(lowercase=False)),
    "bert uncased": lambda: _wordpiece(normalizers.BertNormalizer()),
    "bert, controls kept": lambda: _wordpiece(normalizers.BertNormalizer(clean_text=False)),
    "bert, ideographs in words": lambda: _wordpiece(normalizers.BertNormalizer(handle_chinese_chars=False)),
    "bert by characters": lambda: _wordpiece(
        normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()])
    ),
    "bert, composed": lambda: _wordpiece(normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])),
    "bert, then a first space": lambda: _trained(
        models.WordPiece(unk_token="<unk>"),
        normalizers.BertNormalizer(),
        pre_tokenizers.Sequence([_BERT(), _META(prepend_scheme="first")]),
    ),
    "bert without a normalizer": lambda: _wordpiece(None),
    "words, always a space": lambda: _unigram(_charsmap(), pre_tokenizers.WhitespaceSplit(), _META()),
    "words, a first space": lambda: _unigram(
        _charsmap(), pre_tokenizers.WhitespaceSplit(), _META(prepend_scheme="first")
    ),
    "metaspace always": lambda: _unigram(_charsmap(), _META()),
    "metaspace first": lambda: _unigram(None, _META(prepend_scheme="first")),
    "metaspace never": lambda: _unigram(normalizers.NFKC(), _META(prepend_scheme="never")),
    "metaspace, runs as one": lambda: _unigram(normalizers.Sequence([_charsmap(), _RUNS]), _META()),
    "metaspace, stripped": lambda: _unigram(
        normalizers.Sequence([_SPACES_AS_ONE, normalizers.NFC(), normalizers.Strip(left=False)]),
        _META(),
    ),
    "albert": lambda: _unigram(
        normalizers.Sequence([*ALBERT, normalizers.Lowercase(), _charsmap(), _RUNS]), _META()
    ),
}  # fmt: skip
ADDED: dict[str, dict[str, bool]] = {
    "plain": {},
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "single": {"single_word": True},
    "raw": {"normalized": False},
}


@cache
def tokenizer_named(name: str, added: str | None = None) -> Tokenizer:
    if name in MADE:
        tokenizer = MADE[name]()
        return tokenizer if added is None else _with_added(tokenizer, **ADDED[added])
    tokenizer = AutoTokenizer.from_pretrained(next(path for path in FOLDERS if path.name == name)).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@cache
def boundaries_of(name: str, added: str | None = None) -> Boundaries:
    boundaries = find_boundaries(tokenizer_named(name, added))
    assert isinstance(boundaries, Boundaries), boundaries
    return boundaries


def pieces_of(boundaries: Boundaries, text: str) -> Iterator[str]:
    data = text.encode()
    cuts = sorted(boundaries.cuts(np.frombuffer(data, np.uint8)).tolist())
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        yield data[start:stop].decode()


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def check(text: str, name: str, added: str | None = None) -> None:
    tokenizer, boundaries = tokenizer_named(name, added), boundaries_of(name, added)
    pieces = list(pieces_of(boundaries, text))
    assert "".join(pieces) == text
    assert [token_id for piece in pieces for token_id in ids(tokenizer, piece)] == ids(tokenizer, text)
    if boundaries.ignores_space:
        apart = "".join(" " + piece.lstrip(" \t\r\n") for piece in pieces)
        assert "".join(pieces_of(boundaries, apart)) == apart
        assert ids(tokenizer, apart) == ids(tokenizer, text)


@pytest.mark.parametrize("name", [*MADE, *(folder.name for folder in FOLDERS)])
@patient
@example("ａ\u00a0\u0301 b´ c\u0600 d \u0301e  f")
@example("a=\u0338b<\u0323\u0338c,中\u0301文")
@given(TEXTS)
def test_the_ids_of_the_pieces_are_those_of_the_text(name: str, text: str) -> None:
    check(text, name)


@pytest.mark.parametrize("name", [*MADE, *(folder.name for folder in FOLDERS)])
def test_berts_are_cut_at_punctuation_where_their_normalizer_works_on_characters(name: str) -> None:
    is_bert = name.startswith(("bert", "distilbert", "minilm"))
    is_proven = is_bert and name not in ("bert, composed", "bert, then a first space")
    assert isinstance(boundaries_of(name), WordBoundaries) == is_proven


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("name", MADE)
@settings(patient, max_examples=15)
@given(TEXTS)
def test_added_tokens_are_found_in_the_pieces_as_in_the_text(name: str, added: str, text: str) -> None:
    without = boundaries_of(name)
    if added == "rstrip" and isinstance(without, SpaceBoundaries) and not without.within_runs:
        assert "takes the white space behind it" in str(find_boundaries(tokenizer_named(name, added)))
        return
    check(text, name, added)


@pytest.mark.parametrize("name", [*MADE, *(folder.name for folder in FOLDERS)])
@settings(patient, max_examples=8)
@given(st.lists(TEXTS, max_size=8), st.booleans())
def test_counts_are_those_of_tokenizing_everything(name: str, texts: list[str], pairs: bool) -> None:
    tokenizer = tokenizer_named(name)
    data = [(text, text[::-1]) for text in texts] if pairs else texts
    everything = Counter(token_id for of_text in tokenizer.encode_batch(data) for token_id in of_text.ids)
    counts = lv.count_tokens(data, tokenizer=tokenizer)
    assert {int(token_id): int(counts.counts[token_id]) for token_id in counts.token_ids} == everything
