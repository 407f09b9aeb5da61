"""A tokenizer's files with fewer tokens: each holds the new ids, and together they load as the class that they were."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from texts import small_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.tokenization_utils_tokenizers import TokenizersBackend

import leanvocab as lv
from leanvocab.trimming.tokenizer_contents import inserted_ids
from leanvocab.trimming.tokenizer_files import TokenizerFiles

TEXTS = ["hello world", "abc trim he"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "<mask>", "<|endoftext|>"]
WORDS = ["hello", "world", "trim", "cab", "abc"]
CHARS = sorted(set("".join(WORDS)))


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def put(folder: Path, **files: Any) -> Path:
    """A folder with files whose names are written with two underscores for a dot; contents that are no bytes or text as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name.replace("__", ".")).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def trim(source: Any, folder: Path, texts: list[str] = TEXTS) -> tuple[Any, Any, list[int]]:
    """(the tokenizer, the trimmed one, the kept ids), which split the texts alike."""
    before = AutoTokenizer.from_pretrained(source) if isinstance(source, Path) else source
    files = TokenizerFiles.read(source)
    encode = lambda tokenizer, text: tokenizer.backend_tokenizer.encode(text)  # noqa: E731
    ids = files.closed(np.unique([i for text in texts for i in encode(before, text).ids]))
    new = write(files.written(ids), folder)
    if isinstance(source, Path) and (source / "config.json").exists():
        (new / "config.json").write_bytes((source / "config.json").read_bytes())
    after = AutoTokenizer.from_pretrained(new)
    assert type(after) is type(before)
    for text in texts:
        assert ids[encode(after, text).ids].tolist() == encode(before, text).ids
        assert encode(after, text).tokens == encode(before, text).tokens
        assert after.decode(encode(after, text).ids) == before.decode(encode(before, text).ids)
    assert max(after.get_vocab().values()) + 1 == len(ids) < len(before)
    return before, after, ids.tolist()


def word_pieces() -> list[str]:
    return ["[PAD]", "unused", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARS, *("##" + c for c in CHARS), *WORDS, "##llo"]


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's kind of vocabulary and merges, with the special tokens of RoBERTa's kind around it."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in [*WORDS, *("Ġ" + word for word in WORDS)]:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            tokens.append(word[: end + 1])
    vocab = {token: place for place, token in enumerate(dict.fromkeys([*tokens, "<mask>", "<|endoftext|>"]))}
    return vocab, list(dict.fromkeys(merges))


# --- each file --------------------------------------------------------------------------------------------------------


def test_every_id_in_tokenizer_json_is_renumbered_and_all_else_stays(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.backend_tokenizer.enable_truncation(max_length=9)
    tokenizer.add_tokens(["new word"])
    tokenizer.chat_template = "{{ messages }}"
    before, after, ids = trim(tokenizer, tmp_path / "new", ["word7 word299"])
    assert ids == [0, 1, 2, 3, 4, 12, 304, 305]
    old, new = (json.loads(t.backend_tokenizer.to_str()) for t in (before, after))
    for part in ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert old[part] == new[part]
    assert [(token["id"], token["content"]) for token in new["added_tokens"]][-1] == (7, "new word")
    assert new["model"]["vocab"] == {
        "[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "word7": 5, "word299": 6,
    }  # fmt: skip
    assert after.chat_template == before.chat_template
    assert after("word7 new word")["input_ids"][:4] == [2, 5, 7, 3]


def test_ids_around_text_and_of_padding_follow_their_tokens(tmp_path: Path) -> None:
    vocab = {token: place for place, token in enumerate(["a", "b", "c", "<unk>", "[SEP]", "d", "[CLS]", "[PAD]"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 6))
    backend.post_processor = processors.Sequence([processors.ByteLevel(), pair])
    backend.enable_padding(pad_id=7, pad_token="[PAD]", length=6)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    _, after, ids = trim(tokenizer, tmp_path / "new", ["d"])
    assert ids == [3, 4, 5, 6, 7]
    assert after.backend_tokenizer.encode("d q").ids == [3, 2, 0, 1, 4, 4]


def test_a_vocabulary_of_lines_keeps_its_lines(tmp_path: Path) -> None:
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    base = put(tmp_path / "base", vocab__txt="\n".join(word_pieces()), tokenizer_config__json=config)
    _, after, ids = trim(base, tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["tokenizer_config.json", "vocab.txt"]
    assert (tmp_path / "new/vocab.txt").read_text().splitlines() == [word_pieces()[i] for i in ids]
    assert (tmp_path / "new/tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    assert after.unk_token_id == 1


def test_a_vocabulary_with_merges_keeps_the_merges_of_what_stays(tmp_path: Path) -> None:
    vocab, merges = byte_pairs()
    lines = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    base = put(
        tmp_path / "base",
        vocab__json=vocab,
        merges__txt=lines,
        tokenizer_config__json={"tokenizer_class": "RobertaTokenizer"},
        special_tokens_map__json={"bos_token": "<s>"},
    )
    _, after, _ = trim(base, tmp_path / "new", ["hello cab"])
    names = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(os.listdir(tmp_path / "new")) == names
    kept = (tmp_path / "new/merges.txt").read_text().splitlines()
    assert kept[0] == "#version: 0.2"
    assert [tuple(line.split(" ")) for line in kept[1:]] == [
        pair for pair in merges if "".join(pair) in after.get_vocab()
    ]
    assert json.loads((tmp_path / "new/vocab.json").read_text()) == after.get_vocab()


def test_ids_in_the_other_files_of_a_tokenizer_are_renumbered(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["new word"])
    tokenizer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    config |= {
        "added_tokens_decoder": {"305": {"content": "new word"} | flags},
        "pad_token_id": 0,
        "sep_token_ids": [3],
    }
    config |= {"pad_token_type_id": 0, "extra_ids": 0}
    put(
        tmp_path / "base",
        tokenizer_config__json=config,
        added_tokens__json={"new word": 305},
        chat_template__jinja="{{ 305 }}",
    )
    _, _, ids = trim(tmp_path / "base", tmp_path / "new", ["word9"])
    new = {name: (tmp_path / "new" / name).read_text() for name in os.listdir(tmp_path / "new")}
    written = json.loads(new["tokenizer_config.json"])
    assert [*written["added_tokens_decoder"]] == [str(ids.index(305))]
    assert (written["pad_token_id"], written["sep_token_ids"], written["extra_ids"]) == (0, [3], 0)
    assert json.loads(new["added_tokens.json"]) == {"new word": ids.index(305)}
    assert new["chat_template.jinja"] == "{{ 305 }}"


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def sentencepiece_model(kind: str, **options: Any) -> bytes:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    lines = [" ".join(WORDS[place % 5 :] + WORDS[: place % 3]) for place in range(60)]
    given = {"vocab_size": 34, "hard_vocab_limit": False, "minloglevel": 2} | options
    trainer.train(sentence_iterator=iter(lines), model_writer=model, model_type=kind, **given)
    return model.getvalue()


PAD_FIRST = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
PAD_AND_UNKNOWN = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}
NO_BEGINNING = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
BRACKETS = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
WITH_BYTES = {"vocab_size": 320, "byte_fallback": True}
OWN = {"control_symbols": ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"], "user_defined_symbols": ["<eop>"]}
SENTENCEPIECE = {
    "T5Tokenizer": ("spiece.model", "unigram", NO_BEGINNING),
    "PegasusTokenizer": ("spiece.model", "unigram", NO_BEGINNING),
    "AlbertTokenizer": ("spiece.model", "unigram", PAD_AND_UNKNOWN | {"control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}),
    "FNetTokenizer": ("spiece.model", "unigram", PAD_AND_UNKNOWN),
    "BigBirdTokenizer": ("spiece.model", "unigram", PAD_FIRST),
    "XLNetTokenizer": ("spiece.model", "unigram", OWN),
    "DebertaV2Tokenizer": ("spm.model", "unigram", {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3} | BRACKETS),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model", "unigram", {}),
    "CamembertTokenizer": ("sentencepiece.bpe.model", "unigram", {}),
    "BarthezTokenizer": ("sentencepiece.bpe.model", "unigram", {}),
    "MBartTokenizer": ("sentencepiece.bpe.model", "unigram", {}),
    "MBart50Tokenizer": ("sentencepiece.bpe.model", "unigram", {}),
    "NllbTokenizer": ("sentencepiece.bpe.model", "bpe", {}),
    "LlamaTokenizer": ("tokenizer.model", "bpe", WITH_BYTES),
    "GemmaTokenizer": ("tokenizer.model", "bpe", WITH_BYTES | PAD_FIRST),
    "TokenizersBackend": ("tokenizer.model", "bpe", WITH_BYTES),
}


@pytest.mark.parametrize("saved", [False, True], ids=["alone", "beside tokenizer.json"])
@pytest.mark.parametrize("class_name", SENTENCEPIECE)
def test_a_model_of_sentencepiece_keeps_its_pieces(tmp_path: Path, class_name: str, saved: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    name, kind, options = SENTENCEPIECE[class_name]
    base = put(tmp_path / "base", tokenizer_config__json={"tokenizer_class": class_name})
    (base / name).write_bytes(sentencepiece_model(kind, **options))
    try:
        read = AutoTokenizer.from_pretrained(base)
    except TypeError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot read it: {error}")
    texts = ["hello world", "world hello", "hello ☃"]
    if "▁world" not in read.tokenize(texts[0]):
        pytest.skip(f"transformers {transformers.__version__} does not see the words")
    if saved:
        read.save_pretrained(base)
    _, after, _ = trim(base, tmp_path / "new", texts)
    assert sorted(os.listdir(tmp_path / "new")) == sorted(os.listdir(base))
    old, new = (
        sentencepiece.SentencePieceProcessor(model_file=str(folder / name)) for folder in (base, tmp_path / "new")
    )
    for text in texts:
        assert new.encode(text, out_type=str) == old.encode(text, out_type=str)
    assert new.get_piece_size() < old.get_piece_size()
    assert {new.id_to_piece(i) for i in range(new.get_piece_size())} <= after.get_vocab().keys()


def test_a_file_that_can_only_be_read_is_left_out_beside_tokenizer_json(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path / "base")
    put(tmp_path / "base", tokenizer__model="aGVsbG8= 0\n", tekken__json={"vocab": []})
    trim(tmp_path / "base", tmp_path / "new", ["word9"])
    assert sorted(os.listdir(tmp_path / "new")) == ["tokenizer.json", "tokenizer_config.json"]
    assert TokenizerFiles.read(tmp_path / "base").names == {
        "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip


# --- classes of transformers ------------------------------------------------------------------------------------------


def made(cls: Any, kind: str) -> Any:
    """A tokenizer of a class with a small vocabulary."""
    if kind == "Unigram":
        pieces = [("▁", -2.0), *((char, -5.0) for char in CHARS), *(("▁" + word, -3.0) for word in WORDS)]
        return cls(vocab=[*((token, 0.0) for token in SPECIAL), *pieces, ("he", -3.5)])
    if kind == "WordPiece":
        tokens = [*SPECIAL, *CHARS, *("##" + char for char in CHARS), *WORDS, "he", "##llo"]
        return cls(vocab={token: place for place, token in enumerate(tokens)})
    tokens, merges = [*SPECIAL, "▁", "Ġ", *CHARS, *(char + "</w>" for char in CHARS)], []
    for word in [mark + word for word in WORDS for mark in ("▁", "Ġ", "")]:
        for end in range(1, len(word)):
            merges += [(word[:end], word[end]), (word[:end], word[end] + "</w>")]
    tokens = dict.fromkeys([*tokens, *("".join(pair) for pair in merges)])
    return cls(vocab={token: place for place, token in enumerate(tokens)}, merges=list(dict.fromkeys(merges)))


KINDS = {"Barthez": "Unigram", "Camembert": "Unigram", "MLuke": "Unigram"}
# Their vocabulary stands in their code, they need tags or a package, or they are of no kind of their own.
OTHERS = {"EsmcTokenizer", "MarkupLMTokenizer", "ParakeetTokenizer", "RoFormerTokenizer", "TokenizersBackend"}


def classes() -> list[tuple[str, str]]:
    named = {
        name: tokenizer_class_from_name(name) for name in sorted({n for n in TOKENIZER_MAPPING_NAMES.values() if n})
    }
    found = [(name, cls) for name, cls in named.items() if isinstance(cls, type) and issubclass(cls, TokenizersBackend)]
    kinds = {
        name: cls.model.__name__ if cls.model else KINDS.get(name.removesuffix("Tokenizer"), "") for name, cls in found
    }
    return [(name, kind) for name, kind in kinds.items() if name not in OTHERS]


@pytest.mark.parametrize(("name", "kind"), classes())
def test_the_result_is_of_the_same_class_of_transformers(tmp_path: Path, name: str, kind: str) -> None:
    made(tokenizer_class_from_name(name), kind).save_pretrained(tmp_path / "base")
    trim(tmp_path / "base", tmp_path / "new", ["hello world", "abc"])


@pytest.mark.parametrize(
    "name", ["BertTokenizer", "RobertaTokenizer", "T5Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer"]
)
def test_tokens_that_were_added_by_hand_stay_behind_the_others(tmp_path: Path, name: str) -> None:
    cls = tokenizer_class_from_name(name)
    tokenizer = made(cls, cls.model.__name__)
    tokenizer.add_tokens(["new", AddedToken("two words", single_word=True, lstrip=True)])
    tokenizer.add_special_tokens({"pad_token": "<pad two>"})
    tokenizer.chat_template = "{{ messages }}"
    before, after, ids = trim(tokenizer, tmp_path / "new", ["hello new", "abc two words two wordsy"])
    assert [after.convert_ids_to_tokens(len(ids) - back) for back in (3, 2, 1)] == ["new", "two words", "<pad two>"]
    assert (after.pad_token_id, after.chat_template) == (len(ids) - 1, "{{ messages }}")
    assert after.special_tokens_map == before.special_tokens_map


# --- rows and ids -----------------------------------------------------------------------------------------------------


def test_ids_without_a_token_stay_as_they_came_behind_all_tokens(tmp_path: Path) -> None:
    files = TokenizerFiles.read(small_tokenizer())
    ids = files.closed([9, 400, 309])
    assert ids.tolist() == [0, 1, 2, 3, 4, 9, 309, 400]
    after = AutoTokenizer.from_pretrained(write(files.written(ids), tmp_path / "new"))
    assert after.get_vocab()["word4"] == 5
    assert len(after) == 6


def test_an_id_without_a_token_among_them_is_an_error() -> None:
    vocab = {"<unk>": 0, "a": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), unk_token="<unk>"
    )
    tokenizer.add_tokens(["new"])
    files = TokenizerFiles.read(tokenizer)
    with pytest.raises(lv.errors.VocabularyError, match="with fewer tokens its ids would differ: 'new' 2 → 1"):
        files.written(files.closed([1]))


def test_ids_that_are_not_closed_are_an_error() -> None:
    vocab, merges = byte_pairs()
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files = TokenizerFiles.read(PreTrainedTokenizerFast(tokenizer_object=backend))
    ids = files.closed([vocab["cab"]])
    with pytest.raises(lv.errors.VocabularyError, match=rf"needs further ids for these \(\[{vocab['ca']}\]\)"):
        files.written(ids[ids != vocab["ca"]])
    with pytest.raises(lv.errors.VocabularyError, match="expected what closed"):
        files.written(ids[::-1])


def test_trimming_what_is_trimmed_changes_no_byte(tmp_path: Path) -> None:
    vocab, merges = byte_pairs()
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.normalizer = normalizers.NFC()
    trim(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), tmp_path / "new", ["hello cab"])
    again = TokenizerFiles.read(tmp_path / "new")
    ids = again.closed([])
    every = np.arange(len(AutoTokenizer.from_pretrained(tmp_path / "new")))
    assert set(ids) < set(every)
    written = again.written(again.closed(every))
    assert written == {name: (tmp_path / "new" / name).read_bytes() for name in os.listdir(tmp_path / "new")}


def test_with_texts_only_what_their_unknown_words_need_stays(tmp_path: Path) -> None:
    vocab = {token: i for i, token in enumerate(["[UNK]", "a", "abd", "abc", "##bcd", "##bde", "##b"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    files, texts = TokenizerFiles.read(tokenizer), ["a abd", "abcd abdx"]
    assert tokenizer(texts)["input_ids"] == [[1, 2], [0, 0]]
    assert files.closed([0, 1, 4, 5]).tolist() == [0, 1, 2, 3, 4, 5]
    assert files.closed([0, 1, 4, 5], []).tolist() == [0, 1, 4, 5]
    ids = files.closed([0, 1, 4, 5], ["abcd abdx a"])
    assert ids.tolist() == [0, 1, 3, 4, 5]
    after = AutoTokenizer.from_pretrained(write(files.written(ids), tmp_path / "new"))
    assert after("abcd abdx a")["input_ids"] == [0, 0, 1]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ByT5Tokenizer", "CanineTokenizer"])
def test_a_tokenizer_made_of_python_code_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(lv.errors.VocabularyError, match=f"{name} is not one of the tokenizers library's"):
        TokenizerFiles.read(getattr(transformers, name)())


def test_merges_that_are_left_out_at_random_are_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.1))
    with pytest.raises(lv.errors.VocabularyError, match=r"left out at random \(dropout 0.1\).*set dropout to null"):
        TokenizerFiles.read(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lv.errors.VocabularyError, match="cannot be loaded"):
        TokenizerFiles.read(tmp_path)
    with pytest.raises(lv.errors.VocabularyError, match="expected a folder with a tokenizer's files"):
        TokenizerFiles.read(tmp_path / "absent")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"new_part": [7]}, "its part 'new_part' is not known; ids may stand in it"),
        ({"post_processor": {"type": "New"}}, "its post-processor 'New' is not known; ids may stand in it"),
    ],
)
def test_a_part_in_which_ids_may_stand_is_named(parts: dict[str, Any], words: str) -> None:
    state = json.loads(small_tokenizer().backend_tokenizer.to_str())
    with pytest.raises(lv.errors.VocabularyError, match=words):
        inserted_ids(state | parts)


def test_a_field_that_seems_to_hold_ids_and_is_not_understood_is_named(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    put(tmp_path, tokenizer_config__json=config | {"language_ids": {"de": 7}})
    with pytest.raises(lv.errors.VocabularyError, match=r"language_ids in tokenizer_config\.json seems to hold ids"):
        TokenizerFiles.read(tmp_path)


def test_files_that_disagree_about_an_id_are_refused(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    put(tmp_path, added_tokens__json={"word9": 2})
    with pytest.raises(
        lv.errors.VocabularyError, match=r"added_tokens\.json gives 'word9' the id 2, the tokenizer has 14"
    ):
        TokenizerFiles.read(tmp_path)


def test_a_file_of_lines_that_is_another_vocabulary_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(word_pieces())}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
    put(tmp_path, vocab__txt="".join(line + "\n" for line in reversed(word_pieces())))
    with pytest.raises(lv.errors.VocabularyError, match=r"vocab\.txt gives '##llo' the id 0, the tokenizer has"):
        TokenizerFiles.read(tmp_path)


def test_an_id_of_no_token_that_pads_is_refused(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 900, "pad_type_id": 0, "pad_token": "[PAD]"}
    put(tmp_path, tokenizer__json=json.loads((tmp_path / "tokenizer.json").read_text()) | {"padding": padding})
    with pytest.raises(
        lv.errors.VocabularyError, match="id 900 is put around text or pads it, and there is no such token"
    ):
        TokenizerFiles.read(tmp_path)


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    config = {"tokenizer_class": "BertTokenizer"}
    put(tmp_path, vocab__txt="\n".join(word_pieces()), tokenizer_config__json=config, vocab__json={"a": [0]})
    with pytest.raises(lv.errors.VocabularyError, match=r"vocab\.json gives 'a' the id \[0\]"):
        TokenizerFiles.read(tmp_path)
    put(tmp_path, vocab__json={}, **{"tokenizer.4.0.json": {"model": {"vocab": 3}}})
    with pytest.raises(lv.errors.VocabularyError, match=r"its files hold something else than expected \(TypeError"):
        TokenizerFiles.read(tmp_path)


def test_an_id_below_zero_is_refused() -> None:
    with pytest.raises(lv.errors.VocabularyError, match="expected ids of tokens, got -3"):
        TokenizerFiles.read(small_tokenizer()).closed([5, -3])


def test_a_file_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    small_tokenizer().save_pretrained(base)
    (tmp_path / "elsewhere.json").write_text("{}")
    (base / "added_tokens.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(lv.errors.CheckpointError, match="leads out of the folder"):
        TokenizerFiles.read(base)
