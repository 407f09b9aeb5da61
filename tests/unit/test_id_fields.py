"""Fields of configs that hold token ids or sizes of the vocabulary."""

import json
from typing import Any

import pytest

from leanvocab.errors import CheckpointError, VocabularyError
from leanvocab.trimming.id_fields import NewIds, needed_ids, renumbered
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

KEPT = [0, 2, 5, 10, 11, 30, 31, 32]
NEW = {token_id: number for number, token_id in enumerate(KEPT)}
FULL_SIZE = 40


def new(config: dict[str, Any], padding: int = 0, full_size: int = FULL_SIZE) -> dict[str, Any]:
    """A config renumbered, which stays JSON."""
    made = renumbered(config, "config.json", NewIds(PartialVocabulary(KEPT, full_size), FULL_SIZE, padding))
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("pad_token_id", 5, 2),
        ("pad_token_id", -1, -1),
        ("pad_token_id", None, None),
        ("eos_token_id", [10, 11], [3, 4]),
        ("image_token_index", 30, 5),
        ("forced_decoder_ids", [[1, 10], [2, None]], [[1, 3], [2, None]]),
        ("force_words_ids", [[[5, 10]], [[2]]], [[[2, 3]], [[1]]]),
        ("lang_to_id", {"<|de|>": 10, "<|en|>": 11}, {"<|de|>": 3, "<|en|>": 4}),
        ("vocab_size", 40, 8),
        ("vocab_size_per_layer_input", 31, 6),
        ("decoder_vocab_size", 40, 8),
    ],
)
def test_ids_and_sizes_become_the_new_ones(field: str, value: Any, expected: Any) -> None:
    assert new({field: value}) == {field: expected}
    assert (
        new({"text_config": {"layers": [{field: value}], "vocab_size": 40, field: value}})["text_config"][field]
        == expected
    )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("suppress_tokens", [1, 2, 3, 30], [1, 5]),
        ("suppress_tokens", [-1], [-1]),
        ("begin_suppress_tokens", [1, 3], []),
        ("bad_words_ids", [[2, 3], [5, 10], [7]], [[2, 3]]),
        ("sequence_bias", [[[2, 10], -1.5], [[3], 2.0]], [[[1, 3], -1.5]]),
        ("vocabulary_map", {"<image>": 30, "a": 5, "gone": 6}, {"<image>": 5, "a": 2}),
    ],
)
def test_what_is_gone_leaves_lists_that_forbid_and_maps_of_all_tokens(field: str, value: Any, expected: Any) -> None:
    assert new({field: value}) == {field: expected}
    assert needed_ids({field: value}, "config.json", FULL_SIZE) == ({30} if field == "vocabulary_map" else set())


@pytest.mark.parametrize(
    "config",
    [
        {"type_vocab_size": 2, "entity_vocab_size": 40},
        {"tag_pad_id": 3, "subs_pad_id": 4, "t2u_pad_token_id": 7},
        {
            "max_new_tokens": 3,
            "num_image_tokens": 7,
            "mm_tokens_per_image": 3,
            "attn_layer_indices": [3],
            "mask_token": "[MASK]",
        },
        {"qformer_config": {"vocab_size": 99, "pad_token_id": 3}},
        {"vision_config": {"vocab_size": 40, "pad_token_id": 3}},
        {"label2id": {"a": 3}, "id2label": {3: "a"}, "ignore_index": -100, "problem_type": None},
    ],
)
def test_other_vocabularies_and_numbers_stay(config: dict[str, Any]) -> None:
    assert new(config) == json.loads(json.dumps(config))
    assert needed_ids(config, "config.json", FULL_SIZE) == set()


def test_ids_of_sounds_and_images_begin_after_what_is_kept_below_them() -> None:
    config = {
        "vision_config": {"vocab_offset": 30, "vocab_size": 2},
        "audio_config": {"vocab_offset": 32, "vocab_size": 1},
    }
    assert needed_ids(config, "config.json", FULL_SIZE) == {30, 31, 32}
    made = new(config)
    assert (made["vision_config"]["vocab_offset"], made["audio_config"]["vocab_offset"]) == (5, 7)


def test_what_lies_beyond_all_ids_stays_beyond_them() -> None:
    assert new({"image_token_id": 40, "video_token_id": 43}) == {"image_token_id": 8, "video_token_id": 11}
    assert new({"image_token_id": 40, "vocab_size": 40}, padding=4) == {"image_token_id": 12, "vocab_size": 12}


def test_a_token_without_a_row_has_its_number_among_the_kept_ids() -> None:
    vocabulary = PartialVocabulary([*KEPT, 44], 50)
    made = renumbered({"image_token_id": 44, "vocab_size": 40}, "config.json", NewIds(vocabulary, FULL_SIZE))
    assert made == {"image_token_id": 8, "vocab_size": 8}


def test_an_id_that_is_gone_and_needed_is_named() -> None:
    with pytest.raises(
        VocabularyError, match=r"config.json: text_config: eos_token_id: id 7 is not among the 8 kept ids.*=\[7\]"
    ):
        new({"text_config": {"eos_token_id": [5, 7]}})


@pytest.mark.parametrize("field", ["magic_token", "extra_tokens", "begin_word_ids", "token_special_index"])
def test_a_field_that_seems_to_hold_an_id_and_is_not_known_is_named(field: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"config.json: {field}: .*seems to be a token id, and this field is not known"
    ):
        new({field: [5]})
    assert new({field: ["text"]}) == {field: ["text"]}


def test_a_number_with_a_fraction_is_no_id() -> None:
    with pytest.raises(CheckpointError, match=r"pad_token_id: expected a token id, found 5\.0"):
        new({"pad_token_id": 5.0})


@pytest.mark.slow
def test_every_field_of_transformers_is_known() -> None:
    """The defaults of all configs: none has a field that seems to hold an id and is not known."""
    from transformers import CONFIG_MAPPING

    tried, unknown = 0, []
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # one that is made of others
            continue
        tried += 1
        try:
            needed_ids(config, model_type, config.get("vocab_size") or 1)
        except CheckpointError as error:
            unknown.append(str(error))
    assert unknown == []
    assert tried > 300
