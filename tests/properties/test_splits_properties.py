"""Text whose tokens are kept has the same tokens under new ids, whatever the tokenizer; what was unknown stays unknown."""

import json
import random
import tempfile
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from leanvocab.trimming.splits import closed_tokens, vocabulary_of
from leanvocab.trimming.tokenizer_contents import inserted_ids, trimmed_state
from leanvocab.trimming.tokenizer_files import TokenizerFiles

patient = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
ALPHABET = "abcé"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SNOWMAN = ["<0xE2>", "<0x98>", "<0x83>"]
SPLIT_AT_SPACES = {"type": "WhitespaceSplit"}


def with_model(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    empty = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    state = {"version": "1.0", **dict.fromkeys(empty), "pre_tokenizer": SPLIT_AT_SPACES, "added_tokens": []}
    return state | {"model": model} | parts


def loaded(state: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(state))


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text).ids for text in texts]


def trimmed(state: dict[str, Any], counted: set[int], *, byte_level: bool = False) -> tuple[Tokenizer, list[int]]:
    """The tokenizer of closed ids alone, and these in order."""
    vocab = vocabulary_of(state["model"])
    tokens = {token for token, token_id in vocab.items() if token_id in counted | inserted_ids(state)}
    closed = closed_tokens(state["model"], tokens, byte_level=byte_level)
    assert closed_tokens(state["model"], closed, byte_level=byte_level) == closed
    kept = sorted(inserted_ids(state) | {vocab[token] for token in closed})
    new = trimmed_state(state, state["model"]["type"], {old: place for place, old in enumerate(kept)})
    tokens = set(vocabulary_of(new["model"]))
    assert closed_tokens(new["model"], tokens, byte_level=byte_level) == tokens
    return loaded(new), kept


def check(state: dict[str, Any], counted: list[str], others: list[str], *, byte_level: bool = False) -> None:
    """Counted texts have the same tokens, and so has every other text whose tokens all stay."""
    before = loaded(state)
    after, kept = trimmed(state, {i for ids in ids_of(before, counted) for i in ids}, byte_level=byte_level)
    for text, ids in zip(counted + others, ids_of(before, counted + others), strict=True):
        if text in counted or set(ids) <= set(kept):
            now = after.encode(text)
            assert [kept[new] for new in now.ids] == ids, text
            assert now.tokens == before.encode(text).tokens
            assert after.decode(now.ids) == before.decode(ids)


texts = st.lists(st.text(alphabet=f"{ALPHABET}☃# ", max_size=12), max_size=6)


# --- BPE --------------------------------------------------------------------------------------------------------------

run = st.lists(st.sampled_from("aaabbb#☃ "), min_size=1, max_size=20).map("".join)
runs = st.lists(run, min_size=1, max_size=4)


def beginnings(word: str, prefix: str, suffix: str, has_bytes: bool, unknown: str | None) -> list[str]:
    """What a word is before the first merge."""
    symbols = [(prefix if place else "") + char for place, char in enumerate(word)]
    symbols[-1] += suffix
    for_snow = SNOWMAN if has_bytes else [unknown] if unknown else []
    return [part for symbol in symbols for part in (for_snow if "☃" in symbol else [symbol])]


def apply(symbols: list[str], pair: tuple[str, str], token: str) -> list[str]:
    if pair not in pairwise(symbols):
        return symbols
    place = list(pairwise(symbols)).index(pair)
    return [*symbols[:place], token, *apply(symbols[place + 2 :], pair, token)]


@st.composite
def bpe_models(draw: st.DrawFn, plain: bool = False) -> dict[str, Any]:
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    prefix = None if plain else draw(st.sampled_from(["", None, "##", "#"]))
    suffix = None if plain else draw(st.sampled_from(["", None, "</w>"]))
    has_bytes, unknown = not plain and draw(st.booleans()), draw(st.sampled_from([None, None if plain else "<unk>"]))
    tokens = ["<unk>", *(BYTES if has_bytes else ())]
    marks = product("ab#", {"", prefix or ""}, {"", suffix or ""})
    tokens += dict.fromkeys(before + char + after for char, before, after in marks)
    words = ["".join(chance.choices("aabb#☃", k=chance.randint(2, 9))) for _ in range(6)]
    lists = [beginnings(word, prefix or "", suffix or "", has_bytes, unknown) for word in words]
    merges: dict[tuple[str, str], str] = {}
    for _ in range(draw(st.integers(0, 40))):
        if pairs := [pair for symbols in lists for pair in pairwise(symbols) if pair[1].startswith(prefix or "")]:
            left, right = chance.choice(pairs)
            merges[left, right] = left + right[len(prefix or "") :]
            lists = [apply(symbols, (left, right), merges[left, right]) for symbols in lists]
    pool = [*tokens, *merges.values()]
    for token in set(merges.values()):  # further ways to it
        for cut in range(1, len(token)):
            if token[:cut] in pool and (prefix or "") + token[cut:] in pool:
                merges[token[:cut], (prefix or "") + token[cut:]] = token
    tokens += [token for token in dict.fromkeys(pool) if token not in tokens]
    tokens += ["abab"] if "abab" not in tokens and draw(st.booleans()) else []
    listed = list(merges)
    if draw(st.booleans()):
        chance.shuffle(listed)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": prefix,
        "end_of_word_suffix": suffix,
        "fuse_unk": draw(st.booleans()),
        "byte_fallback": has_bytes,
        "ignore_merges": not plain and draw(st.booleans()),
        "vocab": {token: place for place, token in enumerate(tokens)},
        "merges": listed,
    }


@settings(patient, max_examples=400)
@given(bpe_models(), runs, runs, st.sampled_from([SPLIT_AT_SPACES, None]))
def test_a_bpe_model_splits_kept_text_as_it_did(
    model: dict[str, Any], counted: list[str], others: list[str], pre_tokenizer: Any
) -> None:
    check(with_model(model, pre_tokenizer=pre_tokenizer), counted, others)


def tokens_on_the_way(model: dict[str, Any], token: str) -> set[str]:
    """Naive: all that BPE run on a token alone comes by."""
    symbols, seen = list(token), set(token)
    merges = [tuple(pair) for pair in model["merges"]]
    while pairs := [pair for pair in merges if pair in pairwise(symbols)]:
        place = list(pairwise(symbols)).index(pairs[0])
        symbols[place : place + 2] = ["".join(pairs[0])]
        seen |= set(symbols)
    return seen


@patient
@given(bpe_models(plain=True), runs)
def test_no_token_stays_that_no_derivation_comes_by(model: dict[str, Any], counted: list[str]) -> None:
    tokens = {token for text in counted for token in loaded(with_model(model)).encode(text).tokens}
    naive = tokens.union(*(tokens_on_the_way(model, token) for token in tokens))
    assert closed_tokens(model, tokens, byte_level=False) == naive


def test_a_merge_on_the_way_stays_without_which_a_word_would_split() -> None:
    vocab = {token: place for place, token in enumerate(["a", "b", "c", "ab", "abc"])}
    state = with_model({"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]]})
    assert loaded(state).encode("abc").tokens == ["abc"]
    naive = trimmed_state(state, "BPE", {0: 0, 1: 1, 2: 2, 4: 3})
    assert loaded(naive).encode("abc").tokens == ["a", "b", "c"]
    after, kept = trimmed(state, {4})
    assert after.encode("abc").tokens == ["abc"]
    assert kept == [0, 1, 2, 3, 4]


def test_tokens_that_are_looked_up_whole_need_no_merges() -> None:
    vocab = {token: place for place, token in enumerate(["a", "b", "ab", "ba"])}
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": [["a", "b"]]}
    assert closed_tokens(model, {"ba"}, byte_level=False) == {"ba"}


def test_the_way_that_is_taken_stays_alone_where_several_lead_to_a_token() -> None:
    vocab = {token: place for place, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = ["b c", "a b", "ab c", "a bc"]
    assert closed_tokens({"type": "BPE", "vocab": vocab, "merges": merges}, {"abc"}, byte_level=False) == {
        "a", "b", "c", "bc", "abc",
    }  # fmt: skip


# --- Unigram ----------------------------------------------------------------------------------------------------------


@st.composite
def unigram_models(draw: st.DrawFn) -> dict[str, Any]:
    pieces = draw(st.lists(st.text(alphabet=f"▁{ALPHABET}", min_size=1, max_size=4), max_size=25))
    scores = st.sampled_from([0.0, -1.0, -1.5, -2.0, -3.0, -7.25, -11.1])
    has_bytes = draw(st.booleans())
    vocab = [("<pad>", 0.0), ("<unk>", 0.0), *((token, 0.0) for token in (BYTES if has_bytes else ()))]
    vocab += [(piece, draw(scores)) for piece in pieces]
    return {"type": "Unigram", "unk_id": 1, "vocab": vocab, "byte_fallback": has_bytes}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


@patient
@given(unigram_models(), texts, texts, st.sampled_from([METASPACE, None]))
def test_a_unigram_model_splits_kept_text_as_it_did(
    model: dict[str, Any], counted: list[str], others: list[str], pre_tokenizer: Any
) -> None:
    check(with_model(model, pre_tokenizer=pre_tokenizer, decoder=METASPACE), counted, others)


def test_the_lowest_score_stays_from_which_that_of_unknown_characters_is_taken() -> None:
    vocab = [["<unk>", 0.0], ["ab☃", -22.0], ["a", -1.0], ["b", -1.0], ["qqq", -15.0]]
    state = with_model({"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False})
    assert loaded(state).encode("ab☃").tokens == ["ab☃"]
    vocab[4][1] = -1.5
    state = with_model(
        {"type": "Unigram", "unk_id": 0, "vocab": [*vocab[:2], *vocab[2:], ["q", -9.0]], "byte_fallback": False}
    )
    assert closed_tokens(state["model"], {"a"}, byte_level=False) == {"<unk>", "a", "ab☃"}


# --- WordPiece --------------------------------------------------------------------------------------------------------


@st.composite
def word_piece_models(draw: st.DrawFn) -> dict[str, Any]:
    starts = draw(st.sets(st.text(alphabet="abc", min_size=1, max_size=4), max_size=12))
    insides = draw(st.sets(st.text(alphabet="abc", min_size=1, max_size=4), max_size=12))
    tokens = ["[UNK]", *sorted(starts), *sorted("##" + text for text in insides)]
    return word_pieces(tokens)


def word_pieces(tokens: list[str]) -> dict[str, Any]:
    vocab = {token: place for place, token in enumerate(tokens)}
    marks = {"continuing_subword_prefix": "##", "unk_token": "[UNK]", "max_input_chars_per_word": 8}
    return {"type": "WordPiece", "vocab": vocab} | marks


WORDS = ["".join(chars) for size in range(1, 9) for chars in product("abc", repeat=size) if size < 7 or chars[0] == "a"]


@settings(patient, max_examples=60)
@given(word_piece_models(), st.data())
def test_a_word_piece_model_splits_every_kept_word_as_it_did(model: dict[str, Any], data: st.DataObject) -> None:
    counted = data.draw(st.sets(st.sampled_from(sorted(model["vocab"].values()))))
    before = loaded(with_model(model))
    after, kept = trimmed(with_model(model), counted)
    for word in WORDS:
        ids = before.encode(word).ids
        if set(ids) <= set(kept):
            assert [kept[new] for new in after.encode(word).ids] == ids, word


def test_a_piece_stays_that_leads_a_word_to_where_it_is_unknown() -> None:
    state = with_model(word_pieces(["[UNK]", "ab", "a", "##bc"]))
    assert loaded(state).encode("abc").tokens == ["[UNK]"]
    naive = trimmed_state(state, "WordPiece", {0: 0, 2: 1, 3: 2})
    assert loaded(naive).encode("abc").tokens == ["a", "##bc"]
    after, kept = trimmed(state, {0, 2, 3})
    assert after.encode("abc").tokens == ["[UNK]"]
    assert kept == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "counted", "added"),
    [
        (["a", "ab", "##bc", "##c"], {"a", "##bc"}, set()),  # each position has a piece
        (["a", "ab", "##b", "##bc"], {"ab", "##bc"}, set()),  # nothing shorter to begin with
        (["a", "abc", "##bcd"], {"a", "##bcd"}, {"abc"}),
        (["a", "ab", "##bcc", "##cb", "##ca", "##ccb"], {"a", "##bcc", "##ccb"}, {"ab"}),
        (["a", "ac", "ab", "##bc"], {"a", "##bc"}, {"ab"}),
        (["a", "aab", "##a", "##bc", "##ab"], {"a", "##a", "##bc"}, {"aab", "##ab"}),
    ],
)
def test_only_pieces_that_may_lead_there_stay(tokens: list[str], counted: set[str], added: set[str]) -> None:
    model = word_pieces(["[UNK]", *tokens])
    assert closed_tokens(model, counted, byte_level=False) == {"[UNK]"} | counted | added


# --- WordLevel, added tokens, and what stands around a text -----------------------------------------------------------


@st.composite
def parts(draw: st.DrawFn, model: dict[str, Any]) -> dict[str, Any]:
    """Added tokens in the model and beside it, a normalizer, a post-processor, padding, bytes."""
    size = len(model["vocab"])
    inside, _ = draw(st.sampled_from(sorted(vocabulary_of(model).items())))
    added = [(inside, vocabulary_of(model)[inside]), ("[X]", size), ("é a", size + 1)][draw(st.integers(0, 1)) :]
    flags = {name: draw(st.booleans()) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    token = {"id": "[X]", "ids": [size], "tokens": ["[X]"]}
    around = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[X]": token},
    }
    pair = {"type": "BertProcessing", "sep": ["[X]", size], "cls": ["é a", size + 1]}
    in_order = {
        "type": "Sequence",
        "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}, pair],
    }
    padding = {"strategy": {"Fixed": 7}, "direction": "Right", "pad_to_multiple_of": None, "pad_type_id": 0}
    return {
        "added_tokens": [{"id": token_id, "content": content} | flags for content, token_id in added],
        "post_processor": draw(st.sampled_from([None, around, pair, in_order])),
        "normalizer": draw(st.sampled_from([None, {"type": "Lowercase"}, {"type": "NFKD"}])),
        "padding": draw(st.sampled_from([None, padding | {"pad_id": size, "pad_token": "[X]"}])),
    }


def word_level_models() -> st.SearchStrategy[dict[str, Any]]:
    words = st.sets(st.text(alphabet=ALPHABET, min_size=1, max_size=3), max_size=20).map(sorted)
    listed = words.map(lambda found: {token: place for place, token in enumerate(["<unk>", *found])})
    return listed.map(lambda vocab: {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"})


@patient
@given(st.data(), st.one_of(word_level_models(), word_piece_models(), bpe_models(), unigram_models()), texts, texts)
def test_added_tokens_and_what_is_inserted_stay(
    data: st.DataObject, model: dict[str, Any], counted: list[str], others: list[str]
) -> None:
    check(with_model(model, **data.draw(parts(model))), [f"{text}[X]" for text in counted], others)


@settings(patient, max_examples=25)
@given(st.data(), st.one_of(word_level_models(), word_piece_models(), bpe_models(), unigram_models()), texts)
def test_files_of_any_tokenizer_load_with_the_same_tokens(
    data: st.DataObject, model: dict[str, Any], counted: list[str]
) -> None:
    unknown = "[UNK]" if model["type"] == "WordPiece" else "<unk>"
    state = with_model(model, **data.draw(parts(model)))
    before = PreTrainedTokenizerFast(tokenizer_object=loaded(state), unk_token=unknown)
    files, old = TokenizerFiles.read(before), loaded(json.loads(before.backend_tokenizer.to_str()))
    ids = files.closed({i for text in ids_of(old, counted) for i in text})
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.written(ids).items():
            Path(folder, name).write_bytes(content)
        after = AutoTokenizer.from_pretrained(folder)
        assert type(after) is type(before)
        assert len(after) == len(ids)
        for text, tokens in zip(counted, ids_of(old, counted), strict=True):
            assert ids[after.backend_tokenizer.encode(text).ids].tolist() == tokens
        again = TokenizerFiles.read(folder)
        written = again.written(again.closed(range(len(ids))))
        assert written == {name: Path(folder, name).read_bytes() for name in again.names}


@patient
@given(st.integers(0, 1 << 32), st.lists(st.text(max_size=12), max_size=5), st.lists(st.text(max_size=12), max_size=5))
def test_bytes_stay_where_text_comes_as_bytes(seed: int, counted: list[str], others: list[str]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    chance, tokens, merges = random.Random(seed), sorted(ByteLevel.alphabet()), {}
    for _ in range(200):
        left, right = chance.choice(tokens), chance.choice(tokens)
        merges[left, right] = None
        tokens += [] if left + right in tokens else [left + right]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": list(merges)}
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    state = with_model(model, pre_tokenizer=pre_tokenizer, decoder=pre_tokenizer)
    check(state, counted, others, byte_level=True)
    after, _ = trimmed(state, set(), byte_level=True)
    for text in others:
        assert after.decode(after.encode(text).ids) == text
