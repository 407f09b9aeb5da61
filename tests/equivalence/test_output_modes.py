"""Frozen and restricted output layers against the full model: the same loss, the same gradients, over twenty steps."""

import copy
from typing import Any

import pytest
import torch
from models import FULL_SIZE, small_lm
from references import (
    LANGUAGE_MODELS,
    QUIET,
    check_close,
    check_twenty_steps,
    gradients,
    lm_batch,
    lm_vocabulary,
    mask_gradients,
    reference,
    token_loss,
)
from torch import Tensor

from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.output.frozen_rows import FrozenRows
from leanvocab.output.lazy_logits import LazyLogits

pytestmark = [*QUIET, pytest.mark.usefixtures("few_scores_at_once")]


@pytest.mark.parametrize("frozen_rows", ["device", "host"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_frozen_training_is_full_training_with_the_other_rows_gradients_masked(name: str, frozen_rows: str) -> None:
    check_twenty_steps(name, "frozen", frozen_rows=frozen_rows)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_frozen_rows_without_the_kept_ones_as_other_devices_hold_them_train_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenRows, "mapped_on", frozenset())
    check_twenty_steps(name, "frozen")


@pytest.mark.parametrize("held", ["mapped", "compact", "host"])
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_of_bf16_that_are_multiplied_in_fp32_stay_in_bf16(
    held: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `prepare_model_for_kbit_training` leaves them: the model is cast after it was shrunk."""
    if held == "compact":
        monkeypatch.setattr(FrozenRows, "mapped_on", frozenset())
    base = small_lm("gemma2-softcap").to(torch.bfloat16)
    full, lean = reference(base, "frozen", lm_vocabulary()).float(), copy.deepcopy(base)
    place: Any = "host" if held == "host" else "device"
    lean = shrink_(lean, lm_vocabulary(), output="frozen", frozen_rows=place).float()
    for model in (full, lean):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(**lm_batch()).loss.backward()
    check_close(gradients(lean, lm_vocabulary()), gradients(full, lm_vocabulary()), 0.02 if autocast else 1e-5)
    frozen = lean.lm_head.frozen_rows
    assert (frozen.sizes.stored if held == "host" else frozen.whole().rows.dtype) == torch.bfloat16
    assert status(lean).tables[0].full_size == len(merge_(lean).lm_head.weight)
    assert lean.lm_head.weight.dtype == torch.float32


def test_rows_of_fp32_are_not_copied_to_be_multiplied_in_bf16() -> None:
    lean = shrink_(small_lm("llama-tied"), lm_vocabulary(), output="frozen")
    with torch.autocast("cpu", torch.bfloat16):
        lean(**lm_batch()).loss.backward()
    assert lean.lm_head.frozen_rows.whole().rows.dtype == torch.float32


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_restricted_training_is_full_training_with_the_other_scores_at_minus_infinity(name: str) -> None:
    check_twenty_steps(name, "restricted")


@pytest.mark.parametrize("output", ["frozen", "restricted"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_in_bfloat16_the_lean_model_is_as_near_to_the_truth_as_the_full_one_over_20_steps(
    name: str, output: Any
) -> None:
    """At the lean model's weights of each step: its gradients, the full model's in bf16, and the true ones in fp32."""
    vocabulary = lm_vocabulary()
    base = small_lm(name).to(torch.bfloat16)
    truth, full, lean = (reference(base, output, vocabulary) for _ in range(3))
    truth, lean = truth.float(), shrink_(copy.deepcopy(base), vocabulary, output=output)
    optimizer = torch.optim.SGD(lean.parameters(), lr=0.01, momentum=0.9)
    steps = []
    for step in range(20):
        for model in (truth, full, lean):
            model.zero_grad()
            model(**lm_batch(step)).loss.backward()
        steps.append([gradients(model, vocabulary) for model in (truth, full, lean)])
        optimizer.step()
        for model in (truth, full):
            model.load_state_dict(lean.state_dict())
    largest = max(float(value.norm()) for truth, _, _ in steps for value in truth.values())
    for key in steps[0][0]:
        norm, of_full, of_lean = (
            torch.tensor(each).norm() for each in zip(*(errors(key, *step) for step in steps), strict=True)
        )
        assert of_lean <= 1.5 * of_full + 2**-9 * max(norm, 0.01 * largest), key


def errors(key: str, truth: dict[str, Tensor], *found: dict[str, Tensor]) -> tuple[float, ...]:
    """The norm of a true gradient, and of how far others are from it."""
    return float(truth[key].norm()), *(float((each[key].float() - truth[key]).norm()) for each in found)


ASKED: dict[str, dict[str, Any]] = {
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(26)},
    "logits_to_keep, a number": {"logits_to_keep": 6},
    "logits_to_keep, positions": {"logits_to_keep": torch.tensor([0, 3, 4, 9])},
    "shift_labels": {},
    "smoothed": {},
}


@pytest.mark.parametrize(
    ("asked", "output"),  # smoothing a restricted softmax is refused by name, as another test has it
    [
        (asked, output)
        for asked in ASKED
        for output in ("frozen", "restricted")
        if (asked, output) != ("smoothed", "restricted")
    ],
)
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma2-softcap", "cohere-scale", "granite-scaling"])
def test_what_a_forward_is_asked_for_means_what_it_means_in_the_full_model(name: str, asked: str, output: Any) -> None:
    """The loss and all gradients: divided by tokens of a whole batch, of some positions, of labels shifted before, smoothed."""
    vocabulary, base = lm_vocabulary(), small_lm(name)
    full, lean = reference(base, output, vocabulary), shrink_(copy.deepcopy(base), vocabulary, output=output)
    losses = []
    for model in (full, lean):
        losses.append(loss_of(model, asked, lm_batch()))
        losses[-1].backward()
    mask_gradients(full, vocabulary)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    check_close(gradients(lean, vocabulary), gradients(full, vocabulary), 1e-5)


def loss_of(model: Any, asked: str, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    if asked.startswith("logits_to_keep"):  # the model gives logits of some positions; their labels are ours to choose
        logits = model(batch["input_ids"], **ASKED[asked]).logits
        return model.loss_function(logits, labels[:, -logits.shape[1] :], vocab_size=FULL_SIZE)  # type: ignore[no-any-return]
    if asked == "shift_labels":  # as sequence parallelism has them
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return model(batch["input_ids"], labels=labels, shift_labels=shifted).loss  # type: ignore[no-any-return]
    if asked == "smoothed":
        return token_loss(model(batch["input_ids"]).logits, labels, label_smoothing=0.1)
    return model(**batch, **ASKED[asked]).loss  # type: ignore[no-any-return]


@pytest.mark.parametrize("output", ["frozen", "restricted"])
def test_logits_of_some_positions_in_evaluation_are_the_full_models(output: Any) -> None:
    base = small_lm("llama-tied").eval()
    lean = shrink_(copy.deepcopy(base), lm_vocabulary(), output=output).eval()
    full = reference(base, output, lm_vocabulary())
    for kept in (1, 4, torch.tensor([2, 5])):
        found, expected = (model(lm_batch()["input_ids"], logits_to_keep=kept).logits for model in (lean, full))
        torch.testing.assert_close(found.clone(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_no_training_step_makes_the_full_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LazyLogits) -> None:
        raise AssertionError("the full logits were made")

    lean = shrink_(small_lm(name), lm_vocabulary(), output="frozen")
    monkeypatch.setattr(LazyLogits, "compute", refuse)
    for inputs in (lm_batch(), {**lm_batch(), "num_items_in_batch": torch.tensor(26)}):
        if "num_items_in_batch" in inputs and name in ("bert-tied", "bart-tied", "t5-tied"):
            continue  # these do not take it
        lean(**inputs).loss.backward()


@pytest.mark.parametrize("held", ["mapped", "compact"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_evaluation_gives_the_full_models_logits_in_its_own_order(
    name: str, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if held == "compact":
        monkeypatch.setattr(FrozenRows, "mapped_on", frozenset())
    full = small_lm(name).eval()
    lean = shrink_(copy.deepcopy(full), lm_vocabulary(), output="frozen").eval()
    inputs = lm_batch()
    expected, found = full(**inputs), lean(**inputs)
    assert found.logits.shape == expected.logits.shape
    torch.testing.assert_close(found.logits.clone(), expected.logits, rtol=1e-5, atol=1e-5)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_restricted_model_gives_minus_infinity_outside_its_vocabulary(name: str) -> None:
    vocabulary = lm_vocabulary()
    full = small_lm(name).eval()
    lean = shrink_(copy.deepcopy(full), vocabulary, output="restricted").eval()
    expected, found = full(**lm_batch()).logits, lean(**lm_batch()).logits.clone()
    kept = torch.tensor(vocabulary.token_ids)
    torch.testing.assert_close(found[..., kept], expected[..., kept], rtol=1e-5, atol=1e-5)
    found[..., kept] = -torch.inf
    assert bool((found == -torch.inf).all())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name != "bert-tied"])
def test_generation_is_the_full_models(name: str, beams: int) -> None:
    full = small_lm(name).eval()
    prompt = {"input_ids": lm_batch()["input_ids"][:, :5]}
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    expected = full.generate(**prompt, **options)
    lean = shrink_(copy.deepcopy(full), lm_vocabulary(), output="frozen", on_missing="base").eval()
    assert torch.equal(lean.generate(**prompt, **options), expected)


def test_a_restricted_model_generates_kept_ids_alone() -> None:
    vocabulary = lm_vocabulary()
    lean = shrink_(small_lm("llama-tied"), vocabulary, output="restricted").eval()
    found = lean.generate(input_ids=lm_batch()["input_ids"], max_new_tokens=12, do_sample=True, pad_token_id=0)
    assert set(found.flatten().tolist()) <= set(vocabulary)


def test_the_full_mode_of_an_untied_model_is_ordinary_training_to_the_bit() -> None:
    full = small_lm("llama-untied")
    lean = shrink_(copy.deepcopy(full), lm_vocabulary())
    assert status(lean).output == "full"
    for model in (full, lean):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        for step in range(20):
            model(**lm_batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    merge_(lean)
    for first, second in zip(full.parameters(), lean.parameters(), strict=True):
        assert torch.equal(first, second)
