"""The partial vocabulary: which ids it keeps, how ids go both ways, its file, and data sets over partial ids."""

import copy
import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
import transformers

from leanvocab import PartialVocabulary, count_tokens
from leanvocab.errors import DataError, MissingTokenError, VocabularyError
from versions import ListFeature

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    made.add_special_tokens({"mask_token": "[MASK]"})
    made.add_tokens(["dogs"])  # id 11, added but not special
    return made


@pytest.fixture
def vocabulary() -> PartialVocabulary:
    return PartialVocabulary([5, 1, 9, 300], 1000)


def kept(*args: Any, **options: Any) -> list[int]:
    return PartialVocabulary.from_counts(*args, **options).token_ids.tolist()


# ------------------------------------------------------------------------------------------ the value object


def test_token_ids_are_sorted_and_read_only(vocabulary: PartialVocabulary) -> None:
    assert vocabulary.token_ids.tolist() == list(vocabulary) == [1, 5, 9, 300]
    assert vocabulary.token_ids.dtype == np.int64
    assert (len(vocabulary), vocabulary.full_size) == (4, 1000)
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.token_ids[0] = 2
    assert [token_id in vocabulary for token_id in (5, np.int64(5), 6, -1, 1000, "5")] == [True, True] + [False] * 4


@pytest.mark.parametrize("make", [list, tuple, set, iter, np.array, lambda ids: np.array(ids, np.uint8), torch.tensor])
def test_token_ids_come_from_any_iterable(make: Callable[[list[int]], Any]) -> None:
    assert PartialVocabulary(make([7, 3]), 8).token_ids.tolist() == [3, 7]


def test_a_vocabulary_is_frozen(vocabulary: PartialVocabulary) -> None:
    for name in ("token_ids", "full_size", "digest", *vars(vocabulary), "new"):
        with pytest.raises(AttributeError, match=f"a PartialVocabulary is frozen: cannot set '{name}'"):
            setattr(vocabulary, name, 1)
        with pytest.raises(AttributeError, match=f"cannot delete '{name}'"):
            delattr(vocabulary, name)
    ids = np.array([1, 2])
    mine = PartialVocabulary(ids, 5)
    ids[0] = 3
    assert mine.token_ids.tolist() == [1, 2]


def test_vocabularies_compare_by_value(vocabulary: PartialVocabulary) -> None:
    same = PartialVocabulary((300, 9, 5, 1), 1000)
    assert vocabulary == same
    assert hash(vocabulary) == hash(same)
    assert vocabulary != PartialVocabulary([1, 5, 9, 300], 1001)
    assert vocabulary != PartialVocabulary([1, 5, 9], 1000)
    assert vocabulary != [1, 5, 9, 300]
    assert repr(vocabulary) == f"PartialVocabulary(4 of 1,000 token ids, digest {vocabulary.digest[:12]}…)"


def test_the_digest_is_sha256_over_little_endian_numbers(vocabulary: PartialVocabulary) -> None:
    assert vocabulary.digest == hashlib.sha256(struct.pack("<5q", 1000, 1, 5, 9, 300)).hexdigest()


def test_copies_and_pickles_are_equal(vocabulary: PartialVocabulary, tokenizer: Any) -> None:
    assert copy.copy(vocabulary) is copy.deepcopy(vocabulary) is vocabulary
    named = PartialVocabulary.from_counts(count_tokens([[6]]), tokenizer=tokenizer)
    back = pickle.loads(pickle.dumps(named))
    assert back == named
    assert not back.token_ids.flags.writeable
    assert len(pickle.dumps(named)) < 1000  # without its tokenizer


@pytest.mark.parametrize(
    ("token_ids", "full_size", "message"),
    [
        ([1, 2, 1], 5, "expected each token id once, got id 1 more than once"),
        ([1, 5], 5, r"expected token_ids from 0 to 4 \(full_size=5\), got 5"),
        ([-1], 5, r"expected token_ids from 0 to 4 \(full_size=5\), got -1"),
        (np.array([2**63], np.uint64), 5, "got 9223372036854775808"),
        ([0.5], 5, "expected token_ids as 1-D integers, got float64"),
        ([True, False], 5, "expected token_ids as 1-D integers, got bool"),
        ([[1, 2]], 5, r"expected token_ids as 1-D integers, got int64 of shape \(1, 2\)"),
        (["a"], 5, "expected token_ids as 1-D integers, got <U1"),
        ([1], 0, "expected full_size from 1 to 2147483647, got 0"),
        ([1], 2**31, "expected full_size from 1 to 2147483647, got 2147483648"),
        ([1], True, "expected full_size as an integer, got True"),
        ([1], 5.0, "expected full_size as an integer, got 5.0"),
    ],
)
def test_ids_that_are_no_vocabulary_are_refused(token_ids: Any, full_size: Any, message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        PartialVocabulary(token_ids, full_size)


def test_set_operations(vocabulary: PartialVocabulary) -> None:
    other = PartialVocabulary([5, 6], 1000)
    assert (vocabulary | other).token_ids.tolist() == [1, 5, 6, 9, 300]
    assert (vocabulary & other).token_ids.tolist() == [5]
    assert (vocabulary - other).token_ids.tolist() == [1, 9, 300]
    assert len(other - other) == 0
    for combine in (vocabulary.__or__, vocabulary.__and__, vocabulary.__sub__):
        with pytest.raises(VocabularyError, match="cannot combine vocabularies of 1000 and 10 rows"):
            combine(PartialVocabulary([5], 10))
    with pytest.raises(TypeError):
        vocabulary | {5}  # type: ignore[operator]


def test_a_vocabulary_fits_a_larger_matrix_and_no_smaller_one(vocabulary: PartialVocabulary) -> None:
    assert vocabulary.with_full_size(1024) == PartialVocabulary([1, 5, 9, 300], 1024)
    with pytest.raises(VocabularyError, match=r"\(full_size=300\), got 300"):
        vocabulary.with_full_size(300)


# ------------------------------------------------------------------------------------------ both ways


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "int64", "uint64"])
def test_arrays_keep_their_dtype_and_shape(vocabulary: PartialVocabulary, dtype: str) -> None:
    ids = np.array([[300, 1], [9, 9]], dtype=dtype)
    partial_ids = vocabulary.to_partial(ids)
    assert partial_ids.tolist() == [[3, 0], [2, 2]]
    assert (partial_ids.dtype, partial_ids.shape) == (ids.dtype, ids.shape)
    back = vocabulary.to_full(partial_ids)
    assert back.dtype == ids.dtype
    assert np.array_equal(back, ids)
    assert vocabulary.to_partial(ids.T).tolist() == partial_ids.T.tolist()
    assert vocabulary.to_partial(np.array(5, dtype=dtype)).shape == ()
    assert vocabulary.to_partial(ids[:0]).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_tensors_keep_their_dtype_shape_and_device(vocabulary: PartialVocabulary, dtype: torch.dtype) -> None:
    ids = torch.tensor([[300, 1], [9, 9]], dtype=dtype)
    partial_ids = vocabulary.to_partial(ids.T)
    assert torch.equal(partial_ids, torch.tensor([[3, 2], [0, 2]], dtype=dtype))
    assert torch.equal(vocabulary.to_full(partial_ids), ids.T)
    assert partial_ids.device == ids.device
    assert torch.equal(vocabulary.to_partial(torch.tensor(5, dtype=dtype)), torch.tensor(1, dtype=dtype))


def test_lists_and_numbers_keep_their_kind(vocabulary: PartialVocabulary) -> None:
    nested = [[300, 1], [], (9, [5])]
    assert vocabulary.to_partial(nested) == [[3, 0], [], (2, [1])]
    assert vocabulary.to_full(vocabulary.to_partial(nested)) == nested
    assert (vocabulary.to_partial(9), type(vocabulary.to_partial(9))) == (2, int)
    assert (vocabulary.to_full(np.int32(3)), type(vocabulary.to_full(np.int32(3)))) == (300, np.int32)
    mixed = vocabulary.to_partial([np.array([5]), torch.tensor([9])])
    assert [type(part) for part in mixed] == [np.ndarray, torch.Tensor]


def test_minus_100_stays_only_where_it_is_asked_for(vocabulary: PartialVocabulary) -> None:
    labels = torch.tensor([[-100, 5], [9, -100]])
    assert vocabulary.to_partial(labels, ignore_index=-100).tolist() == [[-100, 1], [2, -100]]
    assert vocabulary.to_full(torch.tensor([-100, 1]), ignore_index=-100).tolist() == [-100, 5]
    with pytest.raises(
        MissingTokenError, match=r"id -100 at position \(0, 0\) is no token id: .*pass ignore_index=-100"
    ):
        vocabulary.to_partial(labels)
    with pytest.raises(VocabularyError, match="-100 at position 0 is no partial id: expected 0 to 3"):
        vocabulary.to_full([-100])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            np.array([[1, 5], [9, 7]]),
            r"^id 7 at position \(1, 1\) is not in the partial vocabulary of 4 token ids: count ",
        ),
        (torch.tensor([1, 0]), "^id 0 at position 1 is not in the partial vocabulary .* or keep it with always_keep="),
        ([[1], [5, 2]], r"^id 2 at position \(1, 1\) is not in"),
        ([np.array([1]), np.array([[3]])], r"^id 3 at position \(1, 0, 0\) is not in"),
        (2, "^id 2 is not in"),
        (np.int64(2), "^id 2 is not in"),
        (np.array(2), "^id 2 is not in"),
        (np.array([-1]), "^id -1 at position 0 is no token id: expected 0 to 999$"),
        (
            np.array([1000], np.uint64),
            "^id 1000 at position 0 is no token id: expected 0 to 999; if tokens were added",
        ),
        ([2**62], "^id 4611686018427387904 at position 0 is no token id"),
    ],
)
def test_an_unseen_id_is_an_error_that_names_id_and_position(
    vocabulary: PartialVocabulary, ids: Any, message: str
) -> None:
    with pytest.raises(MissingTokenError, match=message):
        vocabulary.to_partial(ids)


def test_an_unseen_id_is_an_error_that_names_the_token(tokenizer: Any) -> None:
    named = PartialVocabulary.from_counts(count_tokens([[6]]), tokenizer=tokenizer)
    with pytest.raises(MissingTokenError, match=r"^'mat' \(id 10\) at position 1 is not in the partial vocabulary"):
        named.to_partial([6, 10])
    assert named.describe(6) == "'cat' (id 6)"
    assert (named | PartialVocabulary([8], 12)).describe(8) == "'on' (id 8)"
    assert named.with_full_size(20).describe(15) == "id 15"
    assert pickle.loads(pickle.dumps(named)).describe(6) == "id 6"


def test_a_raw_tokenizer_and_a_processor_name_tokens(tokenizer: Any) -> None:
    class Processor:
        pass

    processor = Processor()
    processor.tokenizer = tokenizer  # type: ignore[attr-defined]
    for one in (tokenizer.backend_tokenizer, processor):
        named = PartialVocabulary.from_counts(count_tokens([[6]]), tokenizer=one)
        assert named.describe(6) == "'cat' (id 6)"
        assert named.token_ids.tolist() == [0, 1, 2, 3, 4, 6, 11]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4], "^4 at position 1 is no partial id: expected 0 to 3$"),
        (torch.tensor([[-1]]), r"^-1 at position \(0, 0\) is no partial id"),
        (np.array([0], np.uint8), "^uint8 cannot hold token ids up to 300: pass int32 or int64 partial ids$"),
    ],
)
def test_a_partial_id_out_of_range_is_an_error(vocabulary: PartialVocabulary, ids: Any, message: str) -> None:
    with pytest.raises(VocabularyError, match=message) as caught:
        vocabulary.to_full(ids)
    assert not isinstance(caught.value, MissingTokenError)


@pytest.mark.parametrize("way", ["to_partial", "to_full"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([0.5]), "got float64 values$"),
        (torch.tensor([True]), "got bool values$"),
        ([1, 0.5], "got float at position 1$"),
        ([[1], [True]], r"got bool at position \(1, 0\)$"),
        ([1, None], "got NoneType at position 1$"),
        ("1", "got str$"),
        ([2**70], "expected ids of at most 64 bits, got 1180591620717411303424"),
    ],
)
def test_what_are_no_ids_is_refused(vocabulary: PartialVocabulary, way: str, ids: Any, message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        getattr(vocabulary, way)(ids)


def test_an_empty_vocabulary_takes_empty_arrays_alone() -> None:
    nothing = PartialVocabulary([], 5)
    assert nothing.to_partial([]) == nothing.to_full([]) == []
    assert nothing.to_full(np.array([-100]), ignore_index=-100).tolist() == [-100]
    with pytest.raises(VocabularyError):
        nothing.to_full([0])


# ------------------------------------------------------------------------------------------ from counts


def test_just_the_counted_ids_are_kept_as_in_the_paper() -> None:
    assert kept(count_tokens([[4, 7, 7]], full_size=9)) == [4, 7]
    assert kept(np.array([0, 2, 0, 1]), full_size=9) == [1, 3]
    assert kept(count_tokens([]), full_size=9) == []


def test_rare_ids_are_dropped_by_min_count_but_not_those_to_keep(tokenizer: Any) -> None:
    counts = count_tokens([[5, 7, 7]], full_size=12)
    assert kept(counts, min_count=2) == [7]
    assert kept(counts, min_count=2, always_keep=[5]) == [5, 7]
    assert kept(counts, min_count=2, always_keep=np.array([8, 8], np.uint16)) == [7, 8]
    assert kept(counts, min_count=2, tokenizer=tokenizer) == [0, 1, 2, 3, 4, 7, 11]


def test_special_and_added_tokens_are_kept(tokenizer: Any) -> None:
    assert kept(count_tokens([[6]]), tokenizer=tokenizer) == [0, 1, 2, 3, 4, 6, 11]
    # Those without a row in the matrix are not.
    assert kept(count_tokens([[6]], full_size=11), tokenizer=tokenizer) == [0, 1, 2, 3, 4, 6]


def configs() -> list[Any]:
    generation = transformers.GenerationConfig(
        forced_bos_token_id=20, suppress_tokens=[31], begin_suppress_tokens=[32], bad_words_ids=[[33]], max_length=34
    )
    generation.lang_to_id = {"<|en|>": 21}
    generation.task_to_id = {"transcribe": 22}
    generation.forced_decoder_ids = [[35, 23]]
    nested = transformers.EncoderDecoderConfig(
        encoder={"model_type": "bert", "vocab_size": 50, "pad_token_id": 5},
        decoder={"model_type": "bert", "vocab_size": 50, "pad_token_id": 6, "bos_token_id": 7},
        decoder_start_token_id=8,
    )
    plain = {"pad_token_id": 3, "eos_token_id": [4, 5], "image_token_index": 6, "vocab_size": 50, "num_labels": 7}
    other = {
        "bos_index": 1,
        "image_start_id": 2,
        "speaker_id": 9,
        "layer_ids": [8],
        "out_indices": [7],
        "id2label": {0: 1},
    }
    image = {"vocabulary_map": {"IMGIMGAA": 40, "<|visual token 000001|>": 41, "word": 42, "<image>": 43}}
    return [
        pytest.param(generation, {20, 21, 22, 23}, id="generation config"),
        pytest.param(nested, {5, 6, 7, 8}, id="nested config"),
        pytest.param(plain, {3, 4, 5, 6}, id="a dictionary"),
        pytest.param(other, {1, 2}, id="other names"),
        pytest.param(image, {40, 41, 43}, id="image tokens"),
        pytest.param(
            {"eos_token_id": None, "pad_token_id": -1, "bos_token_id": True, "mask_token_id": "x"}, set(), id="none"
        ),
        pytest.param({"image_token_id": 50}, set(), id="a placeholder beyond the matrix"),
    ]


@pytest.mark.parametrize(("config", "expected"), configs())
def test_ids_that_a_config_can_insert_are_kept(config: Any, expected: set[int]) -> None:
    assert set(kept(count_tokens([[0]]), model=config, full_size=50)) >= expected
    inserted = set(kept(count_tokens([[0]]), model=config, full_size=50)) - {0}
    extra = (
        {1, 2, 3} if isinstance(config, transformers.PretrainedConfig) else set()
    )  # defaults of the configs themselves
    assert inserted - extra == expected - extra


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
@pytest.mark.parametrize("placeholder", [6, 60])
def test_the_id_that_composites_look_up_in_the_place_of_a_placeholder_is_kept(kind: str, placeholder: int) -> None:
    # Kimi, Muse Glimmer and Granite Speech write 0 over placeholders before the lookup, Gemma 3 over those beyond the table.
    config = {"text_config": {"vocab_size": 50}, f"{kind}_token_id": placeholder}
    expected = {0, 5, placeholder} if placeholder < 50 else {0, 5}
    assert set(kept(count_tokens([[5]]), model=config)) == expected
    assert kept(count_tokens([[5]]), model={"text_config": {"vocab_size": 50}, f"{kind}_token_id": None}) == [5]


BEYOND = [
    pytest.param({"vocab_size": 50, "image_token_id": 50}, id="a placeholder"),
    pytest.param({"text_config": {"vocab_size": 50}, "audio_token_index": 50}, id="a placeholder of a composite"),
    pytest.param({"vocab_size": 50, "additional_vocab_size": 1}, id="a table of further ids"),
]


@pytest.mark.parametrize("config", BEYOND)
def test_counted_ids_beyond_the_table_that_the_model_does_not_look_up_there_have_no_row(config: Any) -> None:
    """The data of composites have them, and their models write 0 over them before the lookup."""
    assert kept(count_tokens([[50, 7, 50]]), model=config) == [0, 7]
    with pytest.raises(
        VocabularyError, match=r"id 51 was counted 1 times, but the model's input embeddings have 50 rows"
    ):
        kept(count_tokens([[50, 7, 51]]), model=config)


@pytest.fixture(scope="module")
def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=40, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=9, forced_eos_token_id=2,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = 17
    return model


def test_ids_that_a_model_can_insert_are_kept(bart: Any) -> None:
    assert kept(count_tokens([[20]]), model=bart) == [0, 1, 2, 9, 17, 20]
    assert PartialVocabulary.from_counts(count_tokens([[20]]), model=bart).full_size == 40
    assert kept(count_tokens([[20]]), model=bart.config) == [0, 1, 2, 9, 20]
    assert kept(count_tokens([[20]]), model=torch.nn.ModuleDict({"wrapped": bart})) == [0, 1, 2, 9, 17, 20]


def test_the_padding_row_of_any_table_of_full_size_is_kept() -> None:
    model = torch.nn.ModuleList([torch.nn.Embedding(30, 4, padding_idx=6), torch.nn.Embedding(7, 4, padding_idx=5)])
    assert kept(count_tokens([[20]]), model=model, full_size=30) == [6, 20]


def test_the_full_size_is_the_first_that_is_known(bart: Any, tokenizer: Any) -> None:
    def size(**options: Any) -> int:
        counts = count_tokens([[3]], full_size=options.pop("counted_over", None))
        return PartialVocabulary.from_counts(counts, **options).full_size

    assert size(full_size=100, model=bart, tokenizer=tokenizer, counted_over=50) == 100
    assert size(model=bart, tokenizer=tokenizer, counted_over=30) == 40
    assert size(tokenizer=tokenizer, counted_over=30) == 30
    assert size(tokenizer=tokenizer) == 12
    assert size(model=torch.nn.Linear(2, 2), counted_over=30) == 30
    assert size(model={"vocab_size": 35}) == 35
    composite = transformers.EncoderDecoderConfig(
        encoder={"model_type": "bert", "vocab_size": 60}, decoder={"model_type": "bert", "vocab_size": 50}
    )
    assert size(model=composite) == 60  # the input is the encoder's
    with pytest.raises(VocabularyError, match=r"the full size is not known: pass full_size= .* model= or tokenizer="):
        size()


def test_the_rows_of_a_model_count_and_not_its_config(bart: Any) -> None:
    resized = copy.deepcopy(bart)
    resized.resize_token_embeddings(48)
    resized.config.vocab_size = 40
    assert PartialVocabulary.from_counts(count_tokens([[3]]), model=resized).full_size == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_size": 9}, "id 10 was counted 2 times, but full_size is 9: was the data tokenized for another model"),
        ({"model": {"vocab_size": 9}}, "but the model's input embeddings have 9 rows"),
        ({"full_size": 99, "always_keep": [99]}, r"expected always_keep from 0 to 98 \(full_size=99\), got 99"),
        ({"full_size": 99, "always_keep": ["a"]}, "expected always_keep as 1-D integers"),
        ({"full_size": 99, "min_count": 0}, "expected min_count of 1 or more, got 0"),
        ({"full_size": 99, "pad_to_multiple_of": 0}, "expected pad_to_multiple_of of 1 or more, or None, got 0"),
        ({"full_size": 0}, "expected full_size from 1"),
    ],
)
def test_counts_that_do_not_fit_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        PartialVocabulary.from_counts(count_tokens([[10, 10]]), **options)


def test_a_tokenizer_that_is_too_small_says_how_to_give_the_size(tokenizer: Any) -> None:
    with pytest.raises(
        VocabularyError, match="the tokenizer has ids below 12; if the model has more rows, pass model="
    ):
        PartialVocabulary.from_counts(count_tokens([[12]]), tokenizer=tokenizer)


def test_rounding_up_keeps_the_lowest_unused_ids_and_no_filler() -> None:
    counts = count_tokens([[0, 2, 7, 9, 8]], full_size=11)
    assert kept(counts, pad_to_multiple_of=4) == [0, 1, 2, 3, 4, 7, 8, 9]
    assert kept(counts, pad_to_multiple_of=5) == [0, 2, 7, 8, 9]
    assert kept(counts, pad_to_multiple_of=8, always_keep=[10]) == [0, 1, 2, 3, 7, 8, 9, 10]
    assert kept(counts, pad_to_multiple_of=64) == list(range(11))  # all there are


def test_real_tokenizers_keep_their_special_tokens(shared: Path) -> None:
    folder = shared / "data" / "tokenizers" / "bert-base-cased"
    config = json.loads((folder / "config.json").read_text())
    real = transformers.BertTokenizer.from_pretrained(folder)
    counts = count_tokens(real(["A cat sat on the mat."])["input_ids"])
    vocabulary = PartialVocabulary.from_counts(counts, tokenizer=real, model=config)
    assert vocabulary.full_size == config["vocab_size"] == 28996
    assert set(real.all_special_ids) <= set(vocabulary)
    assert len(vocabulary) < 20
    assert vocabulary.describe(real.mask_token_id) == f"'[MASK]' (id {real.mask_token_id})"


# ------------------------------------------------------------------------------------------ the file


def test_a_vocabulary_is_saved_for_people_and_loads_equal(
    vocabulary: PartialVocabulary, tokenizer: Any, tmp_path: Path
) -> None:
    vocabulary.save(tmp_path / "plain.json")
    assert (tmp_path / "plain.json").read_text() == (
        '{\n  "format": "leanvocab.vocabulary",\n  "version": 1,\n  "full_size": 1000,\n  "num_token_ids": 4,\n'
        f'  "digest": "{vocabulary.digest}",\n  "token_ids": [\n    1, 5, 9, 300\n  ]\n}}\n'
    )
    assert PartialVocabulary.load(tmp_path / "plain.json") == vocabulary
    named = PartialVocabulary.from_counts(count_tokens([[6]]), tokenizer=tokenizer)
    named.save(str(tmp_path / "named.json"))
    assert json.loads((tmp_path / "named.json").read_text())["tokens"]["6"] == "cat"
    assert PartialVocabulary.load(str(tmp_path / "named.json")) == named
    assert sorted(path.name for path in tmp_path.iterdir()) == ["named.json", "plain.json"]


@pytest.mark.parametrize("size", [0, 1, 16, 17, 1000])
def test_any_number_of_ids_is_saved_and_loaded(size: int, tmp_path: Path) -> None:
    vocabulary = PartialVocabulary(range(size), 2000)
    vocabulary.save(tmp_path / "v.json")
    assert PartialVocabulary.load(tmp_path / "v.json") == vocabulary


def test_saving_that_fails_leaves_the_old_file_and_nothing_else(
    vocabulary: PartialVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary.save(tmp_path / "v.json")

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        PartialVocabulary([1], 5).save(tmp_path / "v.json")
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]
    assert PartialVocabulary.load(tmp_path / "v.json") == vocabulary


GOOD = json.loads(
    '{"format": "leanvocab.vocabulary", "version": 1, "full_size": 9, "num_token_ids": 2, "digest": "", "token_ids": [1, 5]}'
) | {"digest": PartialVocabulary([1, 5], 9).digest}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, 6]}, "its digest is '.*', its content has '.*'"),
        ({"full_size": 10}, "its digest is"),
        ({"digest": 7}, "its digest is 7"),
        ({"token_ids": [1, 5.0]}, "expected 'token_ids' as a list of integers"),
        ({"token_ids": [1, True]}, "expected 'token_ids' as a list of integers"),
        ({"token_ids": {"1": 5}}, "expected 'token_ids' as a list of integers"),
        ({"token_ids": [5, 1]}, "expected 'token_ids' sorted, each once"),
        ({"token_ids": [5, 5]}, "expected 'token_ids' sorted, each once"),
        ({"token_ids": [-1, 5]}, "expected 'token_ids' of 0 or more"),
        ({"token_ids": [1, 9]}, r"expected token_ids from 0 to 8 \(full_size=9\), got 9"),
        ({"token_ids": [1, 2**70]}, "below the full size, got 1 to 1180591620717411303424"),
        ({"num_token_ids": 3}, "'num_token_ids' is 3, but there are 2 token ids"),
        ({"num_token_ids": 2.0}, "'num_token_ids' is 2.0"),
        ({"full_size": 2**40}, "expected full_size from 1 to 2147483647"),
        ({"full_size": 9.0}, "expected full_size as an integer, got 9.0"),
        ({"full_size": True}, "expected full_size as an integer, got True"),
        ({"full_size": None}, "expected full_size as an integer, got None"),
        ({"version": 2}, "expected version 1, got 2: was it written by another leanvocab"),
        ({"version": True}, "expected version 1, got True"),
        ({"format": "other"}, 'expected a JSON object with "format": "leanvocab.vocabulary"'),
        ({"note": 1}, "'note' is not known"),
    ],
)
def test_a_file_that_was_changed_is_an_error_that_names_it(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "v.json"
    path.write_text(json.dumps(GOOD))
    assert PartialVocabulary.load(path) == PartialVocabulary([1, 5], 9)
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(VocabularyError, match=f"v.json: .*{message}"):
        PartialVocabulary.load(path)


@pytest.mark.parametrize("name", GOOD)
def test_a_file_that_lacks_a_part_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text(json.dumps({key: value for key, value in GOOD.items() if key != name}))
    with pytest.raises(VocabularyError, match=f"v.json: .*{name}"):
        PartialVocabulary.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected JSON as PartialVocabulary.save writes it"),
        (b"\xff\xfe", "expected JSON .*: 'utf-8' codec"),
        (b"[1]", "expected a JSON object"),
        (b'{"full_size": 1, "full_size": 2}', "expected JSON .*: 'full_size' occurs twice"),
        (b'{"full_size": NaN}', "expected JSON .*: NaN is no number in JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"full_size": ' + b"9" * 5000 + b"}", "expected JSON .*: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_an_error_that_names_it(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "v.json").write_bytes(text)
    with pytest.raises(VocabularyError, match=f"v.json: {message}"):
        PartialVocabulary.load(tmp_path / "v.json")


def test_a_file_that_is_not_there_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PartialVocabulary.load(tmp_path / "v.json")


# ------------------------------------------------------------------------------------------ data sets over partial ids


@pytest.fixture
def dataset() -> datasets.Dataset:
    datasets.disable_progress_bars()
    features = datasets.Features(
        input_ids=ListFeature(datasets.Value("int32")),
        labels=datasets.LargeList(datasets.Value("int64")),
        text=datasets.Value("string"),
    )
    rows = {
        "input_ids": [[1, 5], [9], [], None, [300]],
        "labels": [[-100, 5], None, [], [1], [-100]],
        "text": list("abcde"),
    }
    return datasets.Dataset.from_dict(rows, features=features)


PARTIAL = {
    "input_ids": [[0, 1], [2], [], None, [3]],
    "labels": [[-100, 1], None, [], [0], [-100]],
    "text": list("abcde"),
}


COLUMNS = ["input_ids", "labels"]


def test_a_data_set_is_remapped_and_the_original_is_not(
    vocabulary: PartialVocabulary, dataset: datasets.Dataset
) -> None:
    before, fingerprint = dataset.to_dict(), dataset._fingerprint
    remapped = vocabulary.remap_dataset(dataset, COLUMNS)
    assert remapped.to_dict() == PARTIAL
    assert remapped.features == dataset.features
    assert remapped.data.schema.field("labels").type == pa.large_list(pa.int64())
    assert (dataset.to_dict(), dataset._fingerprint) == (before, fingerprint)


def test_selections_formats_and_splits_are_remapped(vocabulary: PartialVocabulary, dataset: datasets.Dataset) -> None:
    chosen = vocabulary.remap_dataset(dataset.select([4, 0, 0]), COLUMNS)
    assert chosen["input_ids"][:] == [[3], [0, 1], [0, 1]]
    formatted = vocabulary.remap_dataset(dataset.with_format("numpy", columns=["input_ids"]), COLUMNS)
    assert formatted.format == dataset.with_format("numpy", columns=["input_ids"]).format
    assert formatted[0]["input_ids"].tolist() == [0, 1]
    splits = vocabulary.remap_dataset(datasets.DatasetDict(a=dataset, b=dataset.select([1])), COLUMNS)
    assert isinstance(splits, datasets.DatasetDict)
    assert splits["b"]["input_ids"][:] == [[2]]

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        return {"length": [len(ids or []) for ids in batch["input_ids"]]}

    assert vocabulary.remap_dataset(dataset.with_transform(transform), COLUMNS)[:3] == {"length": [2, 1, 0]}


def test_named_columns_alone_are_remapped(vocabulary: PartialVocabulary, dataset: datasets.Dataset) -> None:
    assert vocabulary.remap_dataset(dataset, "labels").to_dict() == dataset.to_dict() | {"labels": PARTIAL["labels"]}
    with pytest.raises(DataError, match="found no column 'ids'"):
        vocabulary.remap_dataset(dataset, ["ids"])


def _token_classes(labels: Any = None) -> datasets.Dataset:
    """A data set for token classification whose classes are ids of the vocabulary too."""
    ignored = -100 if labels is None else -1  # which a class label may be in every version
    labels = ListFeature(datasets.Value("int64")) if labels is None else labels
    features = {"input_ids": ListFeature(datasets.Value("int32")), "labels": labels}
    rows = {"input_ids": [[1, 5], [9]], "labels": [[5, 1], [ignored]]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_lists_of_classes_are_not_taken_for_token_ids(vocabulary: PartialVocabulary) -> None:
    data = _token_classes()
    message = r"token ids or something else \(classes, say\): 'labels' \(list<.*int64>\).*columns=\['input_ids'\], say"
    with pytest.raises(DataError, match=message):
        vocabulary.remap_dataset(data)
    for of_another_kind in (data.data.table, data[:], data[0], datasets.DatasetDict(train=data)):
        with pytest.raises(DataError, match=message[: message.index(" \\(list")]):
            vocabulary.remap_dataset(of_another_kind)
    for stream in (data.to_iterable_dataset(), data.to_iterable_dataset().map(lambda row: row)):
        with pytest.raises(DataError, match="token ids or something else"):
            list(vocabulary.remap_dataset(stream))
    remapped = vocabulary.remap_dataset(data, "input_ids")
    assert remapped.to_dict() == {"input_ids": [[0, 1], [2]], "labels": [[5, 1], [-100]]}


@pytest.mark.parametrize(
    "labels", [ListFeature(datasets.ClassLabel(names=list("abcdefg"))), ListFeature(datasets.Value("float32"))]
)
def test_labels_that_are_declared_as_something_else_are_left(vocabulary: PartialVocabulary, labels: Any) -> None:
    data = _token_classes(labels)
    if "class" in str(labels).lower():
        data = data.select([0])
    assert vocabulary.remap_dataset(data)["labels"][:] == data["labels"][:]


@pytest.mark.parametrize(
    "name",
    ["label_ids", "token_ids", "completion_ids", "target_ids", "ner_tags", "ids", "chosen_labels", "sentence_ids"],
)
def test_a_column_that_may_hold_token_ids_or_not_has_to_be_named(vocabulary: PartialVocabulary, name: str) -> None:
    rows = {"input_ids": [[1, 5], [9]], name: [[5, 1], [9]]}
    with pytest.raises(DataError, match=f"token ids or something else .*'{name}'"):
        vocabulary.remap_dataset(datasets.Dataset.from_dict(rows))
    with pytest.raises(DataError, match=f"token ids or something else .*'{name}'.*columns=\\['{name}'\\]"):
        vocabulary.remap_dataset(datasets.Dataset.from_dict({name: rows[name]}))
    assert vocabulary.remap_dataset(rows, ["input_ids", name])[name] == [[1, 0], [2]]


@pytest.mark.parametrize(
    "name",
    ["token_type_ids", "position_ids", "special_tokens_mask", "attention_mask", "decoder_attention_mask", "bbox",
     "offset_mapping", "assistant_masks", "completion_mask", "word_ids"],
)  # fmt: skip
def test_what_a_tokenizer_writes_beside_ids_is_left(vocabulary: PartialVocabulary, name: str) -> None:
    rows = {"input_ids": [[1, 5], [9]], name: [[5, 1], [9]], "labels": [1, 5], "idx": [1, 9], "none": [[], []]}
    for data in (rows, datasets.Dataset.from_dict(rows)):
        remapped = vocabulary.remap_dataset(data)
        assert remapped["input_ids"][:] == [[0, 1], [2]]
        assert {column: remapped[column][:] for column in rows if column != "input_ids"} == {
            column: values for column, values in rows.items() if column != "input_ids"
        }


def test_pairs_of_preference_data_are_remapped(vocabulary: PartialVocabulary) -> None:
    names = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids", "decoder_input_ids")
    rows = {name: [[1, 5], [9]] for name in names} | {"chosen_attention_mask": [[1, 1], [1]]}
    remapped = vocabulary.remap_dataset(datasets.Dataset.from_dict(rows))
    assert remapped.to_dict() == rows | {name: [[0, 1], [2]] for name in names}


def test_a_data_set_on_disk_is_remapped_without_changing_its_files(
    vocabulary: PartialVocabulary, dataset: datasets.Dataset, tmp_path: Path
) -> None:
    dataset.save_to_disk(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    remapped = vocabulary.remap_dataset(datasets.load_from_disk(tmp_path), COLUMNS)
    assert remapped.to_dict() == PARTIAL
    again = PartialVocabulary([1, 5, 9, 300, 301], 1000).remap_dataset(datasets.load_from_disk(tmp_path), COLUMNS)
    assert again.to_dict() == PARTIAL
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_another_vocabulary_is_not_served_from_the_cache(
    vocabulary: PartialVocabulary, dataset: datasets.Dataset, tmp_path: Path
) -> None:
    dataset.save_to_disk(tmp_path)
    loaded = datasets.load_from_disk(tmp_path)
    vocabulary.remap_dataset(loaded, COLUMNS)
    other = PartialVocabulary([0, 1, 5, 9, 300], 1000).remap_dataset(loaded, COLUMNS)
    assert other["input_ids"][:] == [[1, 2], [3], [], None, [4]]


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_a_stream_is_remapped_as_it_is_read(
    vocabulary: PartialVocabulary, dataset: datasets.Dataset, form: str | None
) -> None:
    remapped = vocabulary.remap_dataset(dataset.select([0, 4]).to_iterable_dataset().with_format(form), COLUMNS)
    rows = list(remapped)
    assert [list(row["input_ids"]) for row in rows] == [[0, 1], [3]]
    assert [list(row["labels"]) for row in rows] == [[-100, 1], [-100]]
    assert [row["text"] for row in rows] == ["a", "e"]
    assert remapped.features == dataset.features
    unseen = PartialVocabulary([1, 5], 1000).remap_dataset(dataset.to_iterable_dataset(), COLUMNS)
    with pytest.raises(MissingTokenError, match="column 'input_ids': id 9 at position 0"):
        list(unseen)


def test_batches_and_tables_are_remapped(vocabulary: PartialVocabulary, dataset: datasets.Dataset) -> None:
    batch = transformers.BatchEncoding({"input_ids": torch.tensor([[1, 5]]), "attention_mask": torch.ones(1, 2)})
    remapped = vocabulary.remap_dataset(batch)
    assert isinstance(remapped, transformers.BatchEncoding)
    assert remapped["input_ids"].tolist() == [[0, 1]]
    assert remapped["attention_mask"] is batch["attention_mask"]
    assert batch["input_ids"].tolist() == [[1, 5]]
    lists = {"input_ids": [[1], [9]], "labels": [1, 0], "decoder_input_ids": [[5], None]}
    assert vocabulary.remap_dataset(lists) == lists | {"input_ids": [[0], [2]], "decoder_input_ids": [[1], None]}
    table = vocabulary.remap_dataset(dataset.data.table, COLUMNS)
    assert table.to_pydict() == PARTIAL
    assert table.schema == dataset.data.table.schema
    assert vocabulary.remap_dataset({"a": dataset}, COLUMNS)["a"].to_dict() == PARTIAL
    assert vocabulary.remap_dataset({"input_ids": pa.array([[1], None])})["input_ids"].to_pylist() == [[0], None]


def test_what_lies_in_null_rows_is_not_remapped(vocabulary: PartialVocabulary) -> None:
    values, null = pa.array([7, 7, 5, 9]), pa.array([True, False])
    offsets, sizes = pa.array([0, 2], pa.int32()), pa.array([2, 2], pa.int32())
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 4]), values, mask=null)
    views = pa.ListViewArray.from_arrays(offsets, sizes, values, mask=null)
    fixed = pa.FixedSizeListArray.from_arrays(values, 2, mask=null)
    for array in (lists, views, fixed):
        remapped = vocabulary.remap_dataset(pa.table({"input_ids": array}))["input_ids"]
        assert remapped.to_pylist() == [None, [1, 2]]


def test_an_unseen_id_in_a_data_set_is_an_error_that_names_row_and_column(dataset: datasets.Dataset) -> None:
    unseen = PartialVocabulary([1, 5, 9], 1000)
    rows = datasets.concatenate_datasets([dataset.select([0, 1])] * 1000 + [dataset])  # beyond the first batch
    with pytest.raises(MissingTokenError, match=r"row 2004 of column 'input_ids': id 300 at position 0 is not in"):
        unseen.remap_dataset(rows, COLUMNS)
    with pytest.raises(MissingTokenError, match=r"row 4 of column 'input_ids': id 300"):
        unseen.remap_dataset(dataset.data.table, COLUMNS)
    with pytest.raises(MissingTokenError, match=r"column 'input_ids': id 300 at position \(1, 0\)"):
        unseen.remap_dataset({"input_ids": [[1], [300]]})


@pytest.mark.parametrize("data", [np.array([1]), [[1]], "text"])
def test_arrays_alone_are_no_data_set_to_remap(vocabulary: PartialVocabulary, data: Any) -> None:
    with pytest.raises(
        DataError, match=r"cannot remap .*: arrays, tensors and lists go through to_partial\(ids\)|cannot"
    ):
        vocabulary.remap_dataset(data)
