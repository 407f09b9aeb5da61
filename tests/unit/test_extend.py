"""Further rows for a shrunk model between two steps: what follows is what a model that had them from the start does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing, same_bits, train
from models import FULL_SIZE, batch, small_gemma3n, small_lm, small_model, twins, unseen_ids, used_vocabulary
from references import QUIET, lm_batch, lm_vocabulary
from torch import Tensor, nn
from transformers import Gemma3nForCausalLM

import leanvocab as lv
from leanvocab.errors import ModelError, NotShrunkError, OptimizerError, VocabularyError
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

pytestmark = QUIET
FURTHER = unseen_ids().flatten().unique()[:7].tolist()

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
    "AMSGrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9),
    "Adagrad from one": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-1, initial_accumulator_value=1.0),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "Adadelta": lambda parameters: torch.optim.Adadelta(parameters),
}


def later_batch() -> dict[str, Tensor]:
    """The batch with further ids in it."""
    inputs = batch()
    inputs["input_ids"][:, 3] = torch.tensor(FURTHER)[torch.arange(len(inputs["input_ids"])) % len(FURTHER)]
    return inputs


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_as_in_the_full_model_to_the_bit(make: Any) -> None:
    full, lean = twins()
    lv.shrink_(lean, used_vocabulary())
    optimizers = [make(model.parameters()) for model in (full, lean)]
    weight = lean.roberta.embeddings.word_embeddings.weight
    before = [train(model, optimizer)[0] for model, optimizer in zip((full, lean), optimizers, strict=True)]
    assert before[0] == before[1]
    assert lv.extend_(lean, FURTHER, optimizer=optimizers[1]) is lean
    assert lean.roberta.embeddings.word_embeddings.weight is weight
    assert len(weight) == lv.status(lean).tables[0].num_rows == len({*used_vocabulary(), *FURTHER})
    assert differing(full, lean) == []
    after = [
        train(model, optimizer, **later_batch())[0] for model, optimizer in zip((full, lean), optimizers, strict=True)
    ]
    assert after[0] == after[1]
    assert differing(full, lean) == []
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for number, state in states[0].items():
        for key, value in state.items():
            assert same_bits(torch.as_tensor(value), torch.as_tensor(states[1][number][key])), (number, key)
    assert differing(full, lv.merge_(lean, optimizer=optimizers[1])) == []


def test_rows_have_decayed_where_decay_is_replayed() -> None:
    full, lean = twins()
    lv.shrink_(lean, used_vocabulary(), decay_unused_rows=True)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) for model in (full, lean)]
    for inputs in (batch(), later_batch()):
        losses = [
            train(model, optimizer, **inputs)[0] for model, optimizer in zip((full, lean), optimizers, strict=True)
        ]
        assert losses[0] == losses[1]
        lv.extend_(lean, FURTHER, optimizer=optimizers[1])
    assert differing(full, lean) == []


def test_a_cast_has_rounded_the_rows() -> None:
    full, lean = twins()
    lv.shrink_(lean, used_vocabulary())
    for model in (full, lean):
        model.bfloat16()
    lv.extend_(lean, FURTHER)
    full.eval(), lean.eval()
    assert same_bits(full(**later_batch()).logits, lean(**later_batch()).logits)


def test_a_gradient_that_was_accumulated_stays() -> None:
    full, lean = twins()
    lv.shrink_(lean, used_vocabulary())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (full, lean)]
    for inputs in (batch(), later_batch()):
        for model in (full, lean):
            torch.manual_seed(5)
            model.train()(**inputs).loss.backward()
        lv.extend_(lean, FURTHER, optimizer=optimizers[1])
    for optimizer in optimizers:
        optimizer.step()
    assert differing(full, lean) == []


@pytest.mark.parametrize("output", ["frozen", "restricted"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "bart-tied"])
def test_output_layers_get_the_rows_too_as_by_merging_and_shrinking_again(name: str, output: Any) -> None:
    lean = lv.shrink_(small_lm(name), lm_vocabulary(), output=output).train()
    further = [token_id for token_id in range(3, FULL_SIZE) if token_id not in lm_vocabulary()][:5]
    optimizer = torch.optim.AdamW(lean.parameters(), lr=1e-2, weight_decay=0.0)

    def steps(model: Any, by: torch.optim.Optimizer, ids: Any) -> list[float]:
        losses = []
        for number in range(3):
            loss = model(**lm_batch(number, ids=ids)).loss
            loss.backward()
            by.step()
            by.zero_grad()
            losses.append(loss.item())
        return losses

    steps(lean, optimizer, list(lm_vocabulary()))
    again, by = copy.deepcopy((lean, optimizer))
    union = lm_vocabulary() | PartialVocabulary(further, FULL_SIZE)
    lv.merge_(again, optimizer=by)
    lv.shrink_(again, union, output=output, optimizer=by)
    lv.extend_(lean, further, optimizer=optimizer)
    assert steps(lean, optimizer, list(union)) == steps(again, by, list(union))
    assert differing(lean, again) == []


def test_tables_for_each_layer_and_smaller_ones_get_what_they_have() -> None:
    size = FULL_SIZE - 20
    lean = lv.shrink_(Gemma3nForCausalLM(small_gemma3n()), PartialVocabulary([1, 2, 9], FULL_SIZE))
    lv.extend_(lean, [7, FULL_SIZE - 3])
    kept = {table.paths[0]: (table.num_rows, table.full_size) for table in lv.status(lean).tables}
    assert kept == {"model.embed_tokens": (5, FULL_SIZE), "model.embed_tokens_per_layer": (5, size)}
    assert set(lean.model.embed_tokens_per_layer.table.vocabulary) == {0, 1, 2, 7, 9}


def test_a_delta_after_it_holds_the_rows_and_merges(tmp_path: Path) -> None:
    full, lean = twins()
    full.save_pretrained(tmp_path / "base")
    lv.shrink_(lean, used_vocabulary())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0) for model in (full, lean)]
    for inputs in (batch(), later_batch()):
        for model, optimizer in zip((full, lean), optimizers, strict=True):
            train(model, optimizer, **inputs)
        lv.extend_(lean, FURTHER, optimizer=optimizers[1])
    lv.save_delta(lean, tmp_path / "delta", base=tmp_path / "base")
    lv.merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged")
    merged = type(full).from_pretrained(tmp_path / "merged")
    assert differing(full, merged) == []


def test_ids_that_are_there_change_nothing() -> None:
    lean = lv.shrink_(small_model(), used_vocabulary())
    data = lean.roberta.embeddings.word_embeddings.weight.data_ptr()
    lv.extend_(lean, used_vocabulary())
    assert lean.roberta.embeddings.word_embeddings.weight.data_ptr() == data


def test_one_table_of_two_is_named() -> None:
    model = nn.ModuleDict({"source": nn.Embedding(50, 4), "target": nn.Embedding(30, 4)})
    lv.shrink_(model, {"source": PartialVocabulary([1], 50), "target": PartialVocabulary([0], 30)})
    lv.extend_(model, {"target": [29, 3]})
    assert [table.num_rows for table in lv.status(model).tables] == [1, 3]
    with pytest.raises(ModelError, match="middle is no shrunk table; those are source, target"):
        lv.extend_(model, {"middle": [1]})


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    with pytest.raises(NotShrunkError, match="is not shrunk: it has all rows"):
        lv.extend_(small_model(), [1])
    lean = lv.shrink_(small_model(), used_vocabulary())
    with pytest.raises(VocabularyError, match=f"expected token_ids from 0 to {FULL_SIZE - 1}"):
        lv.extend_(lean, [FULL_SIZE])
    assert lv.status(lean).tables[0].num_rows == len(used_vocabulary())
    of_partial_ids = lv.shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([3, 8], 9), ids="partial")
    with pytest.raises(
        ModelError, match='shrunk with ids="partial", and with further rows each partial id would be another'
    ):
        lv.extend_(of_partial_ids, [5])


def test_an_optimizer_that_was_not_handed_over_gets_its_states_before_its_step() -> None:
    full, lean = twins()
    lv.shrink_(lean, used_vocabulary())
    optimizers = [train(model)[1] for model in (full, lean)]
    lv.extend_(lean, FURTHER)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert all(same_bits(states[0][n][key], states[1][n][key]) for n in states[0] for key in states[0][n])
    after = [train(model, each, **later_batch())[0] for model, each in zip((full, lean), optimizers, strict=True)]
    assert after[0] == after[1]
    assert differing(full, lean) == []


def test_hooks_on_the_weight_go_on_with_all_rows() -> None:
    lean, seen = lv.shrink_(small_model(), used_vocabulary()), []
    lean.roberta.embeddings.word_embeddings.weight.register_hook(lambda gradient: seen.append(gradient.shape[0]))
    train(lean, steps=1)
    lv.extend_(lean, FURTHER)
    train(lean, steps=1, **later_batch())
    assert seen == [FULL_SIZE, FULL_SIZE]


def test_between_a_forward_and_its_backward_it_is_an_error_before_the_step() -> None:
    lean = lv.shrink_(small_model(), used_vocabulary())
    optimizer = torch.optim.SGD(lean.parameters(), lr=0.1)
    loss = lean(**batch()).loss
    lv.extend_(lean, FURTHER)
    loss.backward()
    before = copy.deepcopy(lean.state_dict())
    with pytest.raises(
        OptimizerError, match=r"extend_ came between a forward and its backward\. Extend between two steps"
    ):
        optimizer.step()
    assert differing(before, lean.state_dict()) == []
    optimizer.zero_grad()
    train(lean, optimizer, **later_batch())


def test_a_model_whose_rows_others_hold_is_refused() -> None:
    lean = lv.shrink_(small_model(), used_vocabulary())
    lean.roberta.embeddings.word_embeddings.weight.ds_id = 1  # as DeepSpeed's ZeRO-3 names a parameter
    with pytest.raises(
        ModelError, match=r"was made of the rows that there were .* extend the model before it is wrapped"
    ):
        lv.extend_(lean, FURTHER)
