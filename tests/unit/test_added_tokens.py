"""Tokens that were added to a tokenizer, and a model that was not resized for them: each error names resizing."""

from collections.abc import Callable

import pytest
import torch
from models import EXACT, make_model, small_model
from texts import small_tokenizer
from transformers import PreTrainedTokenizerBase

from leanvocab.errors import MissingTokenError, VocabularyError
from leanvocab.model.shrink import shrink_
from leanvocab.reports.memory import estimate_memory
from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

RESIZING = r"if tokens were added to the tokenizer, resize the model before: model\.resize_token_embeddings\(len\(tokenizer\)\)"


def before_and_after() -> tuple[PreTrainedTokenizerBase, int, list[list[int]]]:
    """A tokenizer with a token more than a model has rows, the number of rows, and data with that token."""
    tokenizer = small_tokenizer()
    num_rows = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    return tokenizer, num_rows, [[5, 6, len(tokenizer) - 1]]


def test_building_a_vocabulary_names_resizing() -> None:
    tokenizer, num_rows, data = before_and_after()
    for size in ({"model": small_model(vocab_size=num_rows)}, {"full_size": num_rows}):
        with pytest.raises(VocabularyError, match=rf"was the data tokenized for another model\? Or {RESIZING}"):
            PartialVocabulary.from_counts(count_tokens(data), tokenizer=tokenizer, **size)


@pytest.mark.parametrize("use", [shrink_, estimate_memory])
def test_a_vocabulary_that_is_larger_than_the_table_names_resizing(use: Callable[..., object]) -> None:
    tokenizer, num_rows, data = before_and_after()
    vocabulary = PartialVocabulary.from_counts(count_tokens(data), tokenizer=tokenizer)
    with pytest.raises(VocabularyError, match=rf"full size is {num_rows + 1}, the table has {num_rows}.*; {RESIZING}"):
        use(small_model(vocab_size=num_rows), vocabulary)
    model = small_model(vocab_size=num_rows)
    model.resize_token_embeddings(len(tokenizer))
    use(model, vocabulary)


@pytest.mark.parametrize("training", [False, True])
def test_looking_up_an_added_token_names_resizing(training: bool) -> None:
    _, num_rows, data = before_and_after()
    vocabulary = PartialVocabulary.from_counts(count_tokens([[5, 6]]), full_size=num_rows)
    model = shrink_(small_model(vocab_size=num_rows), vocabulary).train(training)
    with pytest.raises(
        MissingTokenError, match=rf"id {num_rows} at position \(0, 2\) .* is no token id: .*; {RESIZING}"
    ):
        model(torch.tensor(data))
    with pytest.raises(MissingTokenError, match=rf"id {num_rows} at position 0 is no token id: .*; {RESIZING}"):
        vocabulary.to_partial(torch.tensor([num_rows]))


def test_an_added_token_among_labels_names_resizing() -> None:
    _, num_rows, data = before_and_after()
    model = make_model("llama-tied", EXACT, vocab_size=num_rows)
    shrink_(model, PartialVocabulary.from_counts(count_tokens([[5, 6]]), full_size=num_rows))
    with pytest.raises(IndexError, match=rf"label {num_rows} at flat position \d+ is no token id.* {RESIZING}"):
        _ = model(torch.tensor([[5, 6, 5, 6]]), labels=torch.tensor([[5, *data[0]]])).loss
