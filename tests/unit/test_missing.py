import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import differing, train
from models import FULL_SIZE, batch, small_lm, small_model, twins, unseen_ids, used_vocabulary
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from leanvocab.errors import LeanVocabError, LeanVocabWarning, MissingTokenError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.partial.embedding import RemapEmbedding
from leanvocab.reports.vocabulary_use import vocabulary_use
from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import compiling

TABLE = "roberta.embeddings.word_embeddings"


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the way that an accelerator takes, where looking at values would wait for the device."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def test_an_unseen_id_in_training_is_an_error_that_names_token_id_position_and_module() -> None:
    words = {f"word{i}": i for i in range(500)}
    backend = Tokenizer(models.WordLevel(words, unk_token="word0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="word1")
    ids = batch()["input_ids"]
    vocabulary = PartialVocabulary.from_counts(
        torch.bincount(ids.flatten(), minlength=500).numpy(), tokenizer=tokenizer
    )
    model = shrink_(small_model(), vocabulary)
    unseen = int(unseen_ids()[0, 0])
    ids[2, 5] = unseen
    with pytest.raises(
        MissingTokenError, match=rf"{TABLE}: token .*word{unseen}.*{unseen}.* at position \(2, 5\) of the input"
    ) as e:
        model(ids)
    assert "always_keep" in str(e.value)
    assert isinstance(e.value, IndexError)


@pytest.mark.parametrize("wrong", [-1, -100, 500, 2**31 - 1])
@pytest.mark.parametrize("training", [True, False])
def test_an_id_that_is_none_is_an_error_in_every_mode_and_never_wraps_around(wrong: int, training: bool) -> None:
    model = shrink_(small_model(), used_vocabulary()).train(training)
    table = model.get_submodule(TABLE)
    for dtype in (torch.int64, torch.int32):
        with pytest.raises(
            MissingTokenError, match=rf"id {wrong} at position \(0, 1\) of the input is no token id: expected 0 … 499"
        ):
            table(torch.tensor([[0, wrong]], dtype=dtype))


def test_tokens_that_were_added_while_the_model_was_not_resized_are_told_to_be_resized_for() -> None:
    """The tokenizer knows an id that the model has no row for: every message on it names what gives it one."""
    added, lm = FULL_SIZE, small_lm("llama-tied")
    counted = count_tokens([[0, added]])
    kept, larger = used_vocabulary(), PartialVocabulary.from_counts(counted, full_size=FULL_SIZE + 1)
    labels = torch.tensor([[0, added]])
    shrunk, shrunk_lm = shrink_(small_model(), kept), shrink_(lm, kept)
    refused: list[Callable[[], Any]] = [
        lambda: count_tokens([[0, added]], full_size=FULL_SIZE),
        lambda: PartialVocabulary.from_counts(counted, model=small_model()),
        lambda: vocabulary_use(counted, full_size=FULL_SIZE),
        lambda: kept.to_partial([0, added]),
        lambda: kept.remap_dataset({"input_ids": [[0, added]]}),
        lambda: shrink_(small_model(), larger),
        lambda: shrunk.get_submodule(TABLE)(torch.tensor([[0, added]])),
        lambda: shrunk_lm(input_ids=torch.tensor([[0, 2]]), labels=labels),
    ]
    for refuse in refused:
        with pytest.raises((LeanVocabError, IndexError), match=r"model\.resize_token_embeddings\(len\(tokenizer\)\)"):
            refuse()


def test_an_id_that_is_negative_has_nothing_to_do_with_added_tokens() -> None:
    with pytest.raises(MissingTokenError, match=r"ignored labels \(-100\) do not reach the embedding$"):
        shrink_(small_model(), used_vocabulary()).get_submodule(TABLE)(torch.tensor([[0, -100]]))


def test_evaluation_reads_unseen_rows_from_the_base_with_one_warning_and_a_count() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary()).eval()
    ids = torch.cat([unseen_ids(), batch()["input_ids"][:1, :8]])
    with pytest.warns(LeanVocabWarning, match=r"served from the base; status\(model\) counts them"):
        assert torch.equal(model(ids).logits, full.eval()(ids).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
    assert status(model).tables[0].num_served == 2 * unseen_ids().numel()


def test_served_rows_have_no_gradient_and_leave_no_trace() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary(), on_missing="base")
    ids = torch.cat([unseen_ids(), batch()["input_ids"][:1, :8]])
    with pytest.warns(LeanVocabWarning):
        model(ids).logits.sum().backward()
    table = model.get_submodule(TABLE)
    used = set(used_vocabulary().to_partial(ids[1]).tolist())
    touched = set(table.weight.grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert touched <= used
    assert differing(full, model) == []


def test_a_limited_norm_applies_to_served_rows_too() -> None:
    full = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5))
    model = shrink_(copy.deepcopy(full), PartialVocabulary([3, 8], 9)).eval()
    with pytest.warns(LeanVocabWarning):
        assert torch.equal(model(torch.tensor([8, 5, 3])), full(torch.tensor([8, 5, 3])))


def test_errors_may_be_asked_for_in_evaluation_too() -> None:
    model = shrink_(small_model(), used_vocabulary(), on_missing="error").eval()
    with pytest.raises(MissingTokenError):
        model(unseen_ids())


@pytest.mark.usefixtures("deferred")
def test_on_a_device_the_error_comes_before_the_step_touches_a_parameter() -> None:
    model = shrink_(small_model(), used_vocabulary())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    before = copy.deepcopy(model.state_dict())
    inputs = batch()
    inputs["input_ids"][3, 4] = unseen_ids()[0, 1]
    model(**inputs).loss.backward()
    with pytest.raises(
        MissingTokenError, match=rf"id {int(unseen_ids()[0, 1])}.* at flat position {3 * 12 + 4} of the input"
    ):
        optimizer.step()
    assert differing(before, model.state_dict()) == []


@pytest.mark.usefixtures("deferred")
def test_on_a_device_the_first_of_several_accumulated_batches_is_named_and_training_can_go_on() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad = batch()
    bad["input_ids"][0, 3] = unseen_ids()[0, 0]
    for inputs in (bad, batch()):
        model(**inputs)
    with pytest.raises(MissingTokenError, match=f"id {int(unseen_ids()[0, 0])}"):
        optimizer.step()
    optimizer.zero_grad()
    expected, _ = train(full)
    assert train(model)[0] == expected


@pytest.mark.usefixtures("deferred")
def test_on_a_device_a_missing_row_reads_nan_and_puts_no_gradient_into_another() -> None:
    model = shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([3, 8], 9))
    output = model(torch.tensor([[3, 5], [-1, 100]]))
    assert output[0, 0].isfinite().all()
    assert output[[0, 1, 1], [1, 0, 1]].isnan().all()
    output[0].nansum().backward()
    table = model[0]
    assert isinstance(table, RemapEmbedding)
    assert table.weight.grad.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.usefixtures("deferred")
def test_the_lookup_of_a_device_gives_the_same_bits() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    assert train(model)[0] == train(full)[0]
    assert differing(full, merge_(model)) == []


@compiling
def test_a_compiled_step_raises_before_it_touches_a_parameter() -> None:
    model = shrink_(small_model(), used_vocabulary())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    inputs = batch()
    inputs["input_ids"][3, 4] = unseen_ids()[0, 1]
    compiled(**inputs).loss.backward()
    torch.compiler.reset()
    with pytest.raises(MissingTokenError):
        optimizer.step()
    assert differing(before, model.state_dict()) == []


def test_an_empty_batch_is_no_error() -> None:
    model = shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([3, 8], 9))
    assert model(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 4)
