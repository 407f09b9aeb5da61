"""Tokens of whole scripts: those that a text of the script can hold, in every kind of tokenizer."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import small_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from leanvocab import PartialVocabulary, count_tokens
from leanvocab.errors import VocabularyError
from leanvocab.vocabulary.scripts import script_ids

TEXTS = {
    "Devanagari": "नमस्ते दुनिया।",
    "Cyrillic": "Привет, мир",
    "Latin": "Où est naïveté?",
    "Han": "你好世界𠀀",
}


def of_words(*words: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))


def kept(tokenizer: Any, *scripts: str) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return [backend.id_to_token(token_id) for token_id in script_ids(tokenizer, scripts).tolist()]


def test_a_token_belongs_to_a_script_by_its_letters() -> None:
    tokenizer = of_words("the", "▁naïve", "##ing", "кот", "a猫", "猫", "ねこ", "123", "!", "▁", "e\u0301", "।", "ab1")
    assert kept(tokenizer, "Latin") == ["the", "▁naïve", "##ing", "e\u0301", "ab1"]
    assert kept(tokenizer, "Cyrillic") == ["кот"]
    assert kept(tokenizer, "Han") == ["猫"]
    assert kept(tokenizer, "Han", "Latin") == ["the", "▁naïve", "##ing", "a猫", "猫", "e\u0301", "ab1"]
    assert kept(tokenizer, "Common") == ["123", "!", "▁"]
    assert kept(tokenizer, "Devanagari") == ["।"]  # one sign of many scripts, and of no other
    assert kept(tokenizer, "latn") == kept(tokenizer, "LATIN") == kept(tokenizer, "Latin")


def test_a_sign_for_the_end_of_a_word_is_no_letter_of_it() -> None:
    model = models.BPE({"кот</w>": 0, "к</w>": 1, "a</w>": 2, "@x": 3, "@к": 4}, [], end_of_word_suffix="</w>")
    assert kept(Tokenizer(model), "Cyrillic") == ["кот</w>", "к</w>", "@к"]
    model = models.WordPiece({"[UNK]": 0, "xxд": 1, "xxd": 2}, unk_token="[UNK]", continuing_subword_prefix="xx")
    assert kept(Tokenizer(model), "Cyrillic") == ["xxд"]


def in_bytes(*texts: bytes) -> Tokenizer:
    """A byte-level tokenizer whose tokens are these bytes."""
    tokenizer = Tokenizer(models.BPE({shown(text): number for number, text in enumerate(texts)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_signs() -> dict[int, str]:
    """The characters that stand for bytes, in the tokenizers package's own order."""
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    signs = {}
    for point in [*range(0x80), *range(0x80, 0x800, 1), *range(0x800, 0x110000, 64)]:
        if not 0xD800 <= point < 0xE000:
            ((text, _),) = encoder.pre_tokenize_str(chr(point))
            signs.update(zip(chr(point).encode(), text, strict=True))
    return signs


BYTE_SIGNS = byte_signs()


def shown(text: bytes) -> str:
    return "".join(BYTE_SIGNS.get(byte, chr(byte)) for byte in text)  # bytes of no text (0xFF) stand for themselves


def test_pieces_of_bytes_that_are_no_whole_characters_are_kept_where_a_text_of_the_script_can_hold_them() -> None:
    ka, aa = "क".encode(), "ा".encode()
    pieces = [
        ka,
        ka[:2],
        ka[1:],
        b" " + ka[:1],
        aa + ka[:2],
        "д".encode(),
        "д".encode()[:1],
        "д".encode()[1:],
        b"abc",
        b" a",
    ]
    expected = [ka, ka[:2], ka[1:], b" " + ka[:1], aa + ka[:2], "д".encode()[1:]]
    tokenizer = in_bytes(*pieces)
    assert kept(tokenizer, "Devanagari") == [shown(piece) for piece in expected]
    assert shown(b"\xff") not in kept(in_bytes(b"\xff", b"\xc0a", b"a\xa9"), "Latin", "Common")


LETTERS = {"Cyrillic": "дяЖ ", "Han": "猫犬𠀀。", "Latin": "aé ﬁ", "Devanagari": "कार।", "Common": "1 !😀"}


@pytest.mark.parametrize("script", LETTERS)
@settings(max_examples=5, deadline=None)  # of many texts each
@given(st.data())
def test_every_piece_of_bytes_of_a_text_in_the_script_is_kept(script: str, data: st.DataObject) -> None:
    pieces: dict[bytes, bool] = {}
    for text in data.draw(st.lists(st.text(LETTERS[script], min_size=1, max_size=6), max_size=50)):
        own = [regex.fullmatch(rf"\p{{scx={script}}}", letter) is not None for letter in text for _ in letter.encode()]
        edges = sorted({0, len(own), *data.draw(st.lists(st.integers(0, len(own)), max_size=4))})
        pieces |= {text.encode()[start:stop]: any(own[start:stop]) for start, stop in pairwise(edges)}
    tokens = kept(in_bytes(*pieces), script)
    assert {shown(piece) for piece, holds_letter in pieces.items() if holds_letter} <= set(tokens)


def test_bytes_that_stand_for_unknown_characters_are_kept_with_their_script() -> None:
    vocab = [("<unk>", 0.0), ("<0xE4>", 0.0), ("<0xD0>", 0.0), ("<0x41>", 0.0), ("猫", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    assert kept(tokenizer, "Han") == ["<0xE4>", "猫"]
    assert kept(tokenizer, "Cyrillic") == ["<0xD0>"]
    plain = Tokenizer(models.Unigram(vocab, 0, byte_fallback=False))
    assert kept(plain, "Latin") == ["<unk>", "<0xE4>", "<0xD0>", "<0x41>"]  # no bytes there, but letters


@pytest.mark.parametrize("name", ["xlm-roberta-base", "gpt2", "bert-base-multilingual-cased"])
@pytest.mark.shared_data
def test_a_text_of_a_script_is_split_into_kept_tokens_of_a_real_tokenizer(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers" / name)
    for script, text in TEXTS.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert set(ids) <= {*script_ids(tokenizer, [script, "Common"]).tolist(), tokenizer.unk_token_id}, script


def test_a_vocabulary_keeps_whole_scripts_beside_what_was_counted() -> None:
    tokenizer = small_tokenizer()
    counts = count_tokens([[2, 9, 3]])
    assert len(PartialVocabulary.from_counts(counts, tokenizer=tokenizer, keep_scripts=["Latin"])) == 305
    assert len(PartialVocabulary.from_counts(counts, tokenizer=tokenizer, keep_scripts=["Greek"])) == 6
    with pytest.raises(VocabularyError, match=r"keep_scripts=\['Latin'\] needs the tokenizer: .* pass tokenizer="):
        PartialVocabulary.from_counts(counts, full_size=400, keep_scripts=["Latin"])


def test_a_script_that_unicode_does_not_have_is_an_error_that_names_some() -> None:
    for name in ("Klingon", "Lu", "Latin}", "", "English"):
        with pytest.raises(VocabularyError, match=r"no script of Unicode .*expected a name such as Latin, Cyrillic"):
            script_ids(small_tokenizer(), [name])


def test_a_tokenizer_in_python_is_refused_by_name() -> None:
    class OwnTokenizer:
        def convert_ids_to_tokens(self, token_id: int) -> str:
            return "a"

    with pytest.raises(VocabularyError, match=r"OwnTokenizer has no tokens that can be read .*tokenizer\.json"):
        script_ids(OwnTokenizer(), ["Latin"])


def test_scripts_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, leanvocab.vocabulary.scripts as s; from tokenizers import Tokenizer, models; "
        "s.script_ids(Tokenizer(models.WordLevel({'a': 0}, 'a')), ['Latin']); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []
