"""Batches of token ids: padding by position, masks by seed, epoch and row."""

import numpy as np
import pytest
import torch
from models import FULL_SIZE
from texts import language_model, language_tokenizer

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import DataError
from leanvocab.finetune.collators import (
    EpochCallback,
    MaskingCollator,
    PaddingCollator,
    mask_to_validate,
)
from leanvocab.finetune.language_modeling import LanguageTask
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

MASK, SPECIAL, KEPT = 4, [0, 1, 2, 3, 4], np.arange(100, 150)


def masking(**options):
    return MaskingCollator(0, MASK, KEPT, SPECIAL, **{"seed": 5} | options)


def long_rows(num_rows=200, length=50):
    chance = np.random.default_rng(0)
    return [{"input_ids": [2, *chance.integers(200, 300, size=length).tolist(), 3]} for _ in range(num_rows)]


def test_padding_is_by_position_not_by_id():
    # 3 is the end of sequence and pads: the one that stands in the data is attended to, and learned.
    batch = PaddingCollator(3)(
        [{"input_ids": [7, 3], "labels": [IGNORE_INDEX, 3]}, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}]
    )
    assert batch["input_ids"].tolist() == [[7, 3, 3], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 3, IGNORE_INDEX], [7, 8, 9]]


def test_without_a_padding_id_an_id_of_the_data_pads():
    assert PaddingCollator(None)([{"input_ids": [7, 5]}, {"input_ids": [8]}])["input_ids"].tolist() == [[7, 5], [8, 7]]


def test_packed_rows_are_padded_with_an_example_of_its_own_and_have_no_attention_mask():
    rows = [
        {"input_ids": [7, 8, 9, 9, 9], "labels": [IGNORE_INDEX] * 5, "position_ids": [0, 1, 0, 1, 2]},
        {"input_ids": [7, 8], "labels": [IGNORE_INDEX, 8], "position_ids": [0, 1]},
    ]
    batch = PaddingCollator(0)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]


def test_masks_are_berts_recipe_with_words_from_the_kept_ids():
    rows = long_rows()
    batch = masking(masked_ratio=0.3)(rows)
    originals, inputs, labels = (torch.tensor([row["input_ids"] for row in rows]), batch["input_ids"], batch["labels"])
    chosen = labels != IGNORE_INDEX
    assert torch.equal(labels[chosen], originals[chosen])
    assert torch.equal(inputs[~chosen], originals[~chosen])
    assert not chosen[:, 0].any()  # special tokens
    assert not chosen[:, -1].any()
    is_mask, is_word = inputs[chosen] == MASK, (inputs[chosen] >= 100) & (inputs[chosen] < 150)
    stays = inputs[chosen] == originals[chosen]
    assert (is_mask | is_word | stays).all()
    ratios = [chosen[:, 1:-1].float().mean(), is_mask.float().mean(), is_word.float().mean(), stays.float().mean()]
    assert np.allclose(ratios, [0.3, 0.8, 0.1, 0.1], atol=0.02)
    assert len(inputs[chosen][is_word].unique()) > 45  # of 50


def test_masks_depend_on_seed_epoch_and_row_alone():
    rows, collator = long_rows(4), masking()
    first = collator(rows)
    again = collator(rows[::-1])  # another batch order, no matter what was drawn before
    assert torch.equal(first["labels"], again["labels"].flip(0))
    assert torch.equal(first["input_ids"], again["input_ids"].flip(0))
    assert not torch.equal(first["labels"], masking(seed=6)(rows)["labels"])
    collator.epoch = 1
    assert not torch.equal(first["labels"], collator(rows)["labels"])
    collator.epoch = 0
    torch.rand(3), np.random.default_rng().random()
    assert torch.equal(first["labels"], collator(rows)["labels"])


def test_masks_to_validate_with_do_not_change_with_the_epoch():
    import datasets

    split, collator = datasets.Dataset.from_list(long_rows(4)), masking()
    masked = mask_to_validate(split, collator)
    before = collator(list(masked))
    collator.epoch = 3
    after = collator(list(masked))
    assert torch.equal(before["input_ids"], after["input_ids"])
    assert torch.equal(before["labels"], after["labels"])
    assert (before["labels"] != IGNORE_INDEX).any(dim=1).all()
    assert not torch.equal(before["labels"], collator(list(split))["labels"])


def test_each_row_has_a_mask_however_short():
    batch = masking(masked_ratio=0.01)([{"input_ids": [2, 200, 3]}, {"input_ids": [2, 200, 201, 3]}])
    assert (batch["labels"] != IGNORE_INDEX).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize(("epoch", "number"), [(None, 0), (0, 0), (0.5, 0), (2.0, 2), (1.9999999999, 2)])
def test_the_epoch_of_the_trainer_is_that_of_the_masks(epoch, number):
    collator = masking()
    EpochCallback(collator).on_epoch_begin(None, type("State", (), {"epoch": epoch}), None)
    assert collator.epoch == number


def test_a_target_is_shifted_into_the_decoder():
    task = LanguageTask("seq2seq-lm", "prompts", ("prompt", "completion"), "train", None)
    network = language_model("t5")
    collator, _ = task.batches({}, network, language_tokenizer(), None, FineTuneSettings(task="seq2seq-lm"), 0)
    batch = collator([{"input_ids": [7, 8], "labels": [9, 10, 3]}, {"input_ids": [7], "labels": [9, 3]}])
    assert batch["labels"].tolist() == [[9, 10, 3], [9, 3, IGNORE_INDEX]]
    assert batch["decoder_input_ids"].tolist() == [[0, 9, 10], [0, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_data_without_a_word_to_mask_are_an_error():
    task = LanguageTask("masked-lm", "text", ("text",), "train", None)
    with pytest.raises(DataError, match="no token but special ones: there is no word to mask"):
        task.batches(
            {},
            None,
            language_tokenizer(),
            PartialVocabulary([0, 3, 4], FULL_SIZE),
            FineTuneSettings(task="masked-lm"),
            0,
        )
