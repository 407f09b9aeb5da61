"""Rows that stay but do not train: new tokens alone are trained, and every other id looks up the row of the base."""

import copy
import gc
from typing import Any

import accelerator
import pytest
import torch
from comparing import differing, same_bits
from growing_runs import adamw
from models import FULL_SIZE, language_batch, small_lm, small_model, twins
from models import batch as classified
from references import check_close, masked_run
from torch import Tensor, nn

import leanvocab as lv
from leanvocab.errors import MissingTokenError, ModelError
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

ACCELERATOR = pytest.mark.skipif(not accelerator.can_be_emulated(), reason="torch can emulate a device from 2.13 on")
NEW = PartialVocabulary(range(FULL_SIZE - 10, FULL_SIZE), FULL_SIZE)


def with_new_tokens(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {name: value.clone() for name, value in inputs.items()}
    inputs["input_ids"][:, 3] = torch.arange(FULL_SIZE - 6, FULL_SIZE)
    if inputs["labels"].shape == inputs["input_ids"].shape:
        inputs["labels"][:, 3] = inputs["input_ids"][:, 3]
    return inputs


def run(model: Any, inputs: dict[str, Tensor], *, masks: bool, make: Any = adamw) -> list[float]:
    return masked_run(model, inputs, NEW if masks else None, make, steps=5)[0]


@pytest.mark.parametrize("family", ["roberta", "bert", "llama"])
def test_an_input_table_trains_as_a_full_one_whose_other_rows_have_no_gradient(family: str) -> None:
    full, lean = twins(family)
    inputs = with_new_tokens(classified())
    inputs["input_ids"][:, -1] = 2
    lv.shrink_(lean, NEW, on_missing="frozen")
    assert run(lean, inputs, masks=False) == run(full, inputs, masks=True)
    assert differing(full, lean) == []
    assert lv.status(lean).tables[0].on_missing == "frozen"
    assert lv.status(lean).tables[0].num_served == 0
    assert len(lean.get_input_embeddings().weight) == 10


@pytest.mark.parametrize("family", ["llama-tied", "bert-tied", "gpt2-tied", "bart-tied", "gemma2-softcap"])
def test_a_tied_matrix_trains_as_a_full_one_whose_other_rows_have_no_gradient(family: str) -> None:
    full = small_lm(family)
    lean = lv.shrink_(copy.deepcopy(full), NEW, on_missing="frozen")
    inputs = with_new_tokens(language_batch())

    def sgd(parameters: Any) -> torch.optim.Optimizer:  # Adam would make steps of rounding
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    losses = run(lean, inputs, masks=False, make=sgd), run(full, inputs, masks=True, make=sgd)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    lv.merge_(lean)
    check_close(dict(lean.named_parameters()), dict(full.named_parameters()), 1e-4)


@ACCELERATOR
@pytest.mark.parametrize("family", ["roberta", "llama-tied"])
def test_on_a_device_nothing_waits_and_rows_of_a_tied_matrix_are_there_once(family: str) -> None:
    inputs = with_new_tokens(classified() if family == "roberta" else language_batch())
    make = small_model if family == "roberta" else small_lm
    with accelerator.in_use():
        there = {name: value.to(accelerator.NAME) for name, value in inputs.items()}
        losses, waits, peaks = [], [], []
        for on_missing in ("frozen", "error"):
            lean = make(family).to(accelerator.NAME)
            everything = PartialVocabulary(range(FULL_SIZE), FULL_SIZE)
            lv.shrink_(lean, NEW if on_missing == "frozen" else everything, on_missing=on_missing)
            lean.train()
            torch.manual_seed(0)
            lean(**there).loss.backward()
            torch.manual_seed(0)
            with accelerator.watch() as seen:
                loss = lean(**there).loss
            losses.append(float(loss.detach()))
            waits.append(len(seen.waits))
            peaks.append(seen.start_bytes)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert waits[0] <= waits[1]
        if family == "llama-tied":
            rows_bytes = FULL_SIZE * 32 * 4
            assert peaks[0] < peaks[1] + rows_bytes


@ACCELERATOR
def test_an_id_that_is_none_is_an_error_before_the_step_on_a_device_and_at_once_on_a_cpu() -> None:
    lean = lv.shrink_(small_model(), NEW, on_missing="frozen").train()
    with pytest.raises(MissingTokenError, match=r"id 500 at position \(0, 1\) of the input is no token id"):
        lean(input_ids=torch.tensor([[3, FULL_SIZE]]))
    with accelerator.in_use():
        lean.to(accelerator.NAME)
        optimizer = torch.optim.SGD(lean.parameters(), lr=0.1)
        lean(input_ids=torch.tensor([[3, FULL_SIZE]]).to(accelerator.NAME)).logits.sum().backward()
        with pytest.raises(MissingTokenError, match="id 500 at flat position 1 of the input is no token id"):
            optimizer.step()


def test_evaluation_gives_what_the_full_model_gives() -> None:
    full, lean = twins()
    lv.shrink_(lean, NEW, on_missing="frozen")
    for model in (full, lean):
        model.eval()
    inputs = with_new_tokens(classified())
    assert same_bits(full(**inputs).logits, lean(**inputs).logits)


def test_casts_reach_the_frozen_rows() -> None:
    full, lean = twins()
    lv.shrink_(lean, NEW, on_missing="frozen")
    for model in (full, lean):
        model.bfloat16().eval()
    assert same_bits(full(**with_new_tokens(classified())).logits, lean(**with_new_tokens(classified())).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay_unused_rows": True}, "rows that do not train would be decayed"),
        ({"frozen_rows": "host"}, "would wait for the device at each forward"),
        ({"ids": "partial"}, "needs full ids"),
        ({"output": "restricted"}, "most labels had no probability"),
    ],
)
def test_options_that_contradict_frozen_rows_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        lv.shrink_(small_lm("llama-tied"), NEW, on_missing="frozen", **options)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_lookups_that_depend_on_other_rows_are_refused(option: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(FULL_SIZE, 4, **option))
    with pytest.raises(ModelError, match=f"on_missing='frozen' with {next(iter(option))}="):
        lv.shrink_(model, NEW, embedding="0", on_missing="frozen")


@ACCELERATOR
def test_frozen_rows_leave_a_device_with_the_model() -> None:
    inputs = with_new_tokens(classified())
    gc.collect()  # models of other tests
    with accelerator.in_use():
        lean = lv.shrink_(small_model().to(accelerator.NAME), NEW, on_missing="frozen").train()
        lean(**{name: value.to(accelerator.NAME) for name, value in inputs.items()})
        lean.cpu()
        with accelerator.watch() as seen:
            assert lean(**inputs).loss.isfinite()
        assert seen.start_bytes == 0


@ACCELERATOR
def test_a_vocabulary_of_all_rows_has_none_that_are_frozen() -> None:
    inputs = with_new_tokens(classified())
    losses = []
    with accelerator.in_use():
        for name in ("cpu", accelerator.NAME):
            lean = small_model().to(name).eval()
            lv.shrink_(lean, PartialVocabulary(range(FULL_SIZE), FULL_SIZE), on_missing="frozen")
            losses.append(float(lean(**{key: value.to(name) for key, value in inputs.items()}).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
