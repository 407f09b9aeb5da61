"""Composites of text with images or sounds, as transformers maps them: shrinking changes nothing but a table's size.

Placeholders of images and sounds are in no text that is counted: the model says which ids it needs.
"""

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing
from composites import (
    COMPOSITES,
    UNBUILDABLE,
    batches,
    build_or_reason,
    prompt,
    stand_ins,
    vocabulary_of,
)
from tiny_models import MARKS, VOCAB_SIZE, Pair, tied_layers
from torch import Tensor
from training import check_files, check_outputs, check_same, check_training, seed_everything, ties_of

from leanvocab.choices import OutputMode
from leanvocab.errors import BypassError, LeanVocabWarning
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status

pytestmark = MARKS

NUM_NEW_TOKENS = 4
CLOSE = 2e-5  # relative, in fp32

# Composites with which nothing is generated here, in full either.
CANNOT_GENERATE = {
    "kyutai_speech_to_text": "takes waves, which a codec turns into codes",
    "pi0": "gives actions",
    "pop2piano": "asks for a composer, whom a processor knows",
    "vibevoice": "its scheduler is in diffusers, which is not installed",
    "voxtral_realtime": "as many tokens as the sound is long, and the prompt is",
}


# Composites whose files, byte for byte the full model's, transformers itself does not load into the class that it maps them to.
CANNOT_BE_LOADED = ("shieldgemma2",)

# Twelve that every run of the tests has.
BUILDABLE = [pair for pair in COMPOSITES if str(pair) not in UNBUILDABLE]
DOZEN = random.Random(3).sample(BUILDABLE, 12)
CASES = [pytest.param(pair, id=str(pair), marks=[] if pair in DOZEN else [pytest.mark.slow]) for pair in COMPOSITES]


@pytest.mark.parametrize("pair", CASES)
def test_a_shrunk_composite_computes_trains_generates_saves_and_merges_as_the_full_one(
    pair: Pair, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tiny = build_or_reason(pair)
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    full, lean = tiny.model, copy.deepcopy(tiny.model)
    shrink_(lean, vocabulary_of(tiny))

    its_batches = batches(tiny)
    for inputs in its_batches.values():
        for mode in (True, False):
            check_outputs(full.train(mode), lean.train(mode), inputs)
        check_training(full.train(), lean.train(), inputs)
        if pair.model_type not in CANNOT_GENERATE:
            check_generation(full, lean, inputs)
    assert differing(full.state_dict(), lean.state_dict()) == []
    check_files(full, lean, tmp_path)
    if pair.model_type not in CANNOT_BE_LOADED:
        check_loading(pair, full, tmp_path / "lean")

    merge_(lean)
    check_same(full, lean)
    record_property("batches", list(its_batches))
    record_property("not_generated", CANNOT_GENERATE.get(pair.model_type, ""))


@pytest.mark.parametrize("pair", CASES)
def test_a_composite_with_a_tied_output_layer_computes_generates_and_merges_as_the_full_one(pair: Pair) -> None:
    """By default its other rows are frozen, and in the softmax still, which adds in another order."""
    tiny = build_or_reason(pair, tied=True)
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    if not any(layer.weight.shape[0] == VOCAB_SIZE for layer in tied_layers(tiny.model)):
        pytest.skip("its output layer is not tied")
    full, lean = tiny.model, copy.deepcopy(tiny.model)
    if pair.model_type == "idefics":
        with pytest.raises(BypassError, match=r"lm_head: IdeficsDecoupledLinear\.forward multiplies by the weight"):
            shrink_(lean, vocabulary_of(tiny))
        check_same(full, lean)
        return
    shrink_(lean, vocabulary_of(tiny))
    assert status(lean).output == "frozen"
    for inputs in batches(tiny).values():
        for mode in (True, False):
            expected, found = (loss_of(model.train(mode), inputs) for model in (full, lean))
            assert found == pytest.approx(expected, rel=CLOSE)
        if pair.model_type not in CANNOT_GENERATE:
            check_generation(full, lean, inputs)
    merge_(lean.train(full.training))
    check_same(full, lean)


def loss_of(model: Any, inputs: dict[str, Any]) -> float:
    seed_everything(7)
    loss: float = model(**inputs).loss.item()
    return loss


def check_generation(full: Any, lean: Any, inputs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*served from the base", category=LeanVocabWarning)
        assert torch.equal(generated(full, prompt(inputs)), generated(lean, prompt(inputs)))


def generated(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Ids [batch, length], greedily."""
    seed_everything(7)
    ids: Tensor = model.eval().generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=NUM_NEW_TOKENS)
    return ids


def check_loading(pair: Pair, full: Any, folder: Path) -> None:
    """Loaded plainly, what the shrunk model saved is the full one."""
    with stand_ins(pair):
        loaded = type(full).from_pretrained(folder)
    assert ties_of(loaded) == ties_of(full)
    assert differing(dict(full.state_dict()), dict(loaded.state_dict())) == []


@pytest.mark.parametrize("mode", ["frozen", "restricted"])
def test_an_output_layer_of_idefics_that_is_not_tied_can_only_stay_whole(mode: OutputMode) -> None:
    tiny = build_or_reason(next(pair for pair in COMPOSITES if pair.model_type == "idefics"))
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    with pytest.raises(BypassError, match=r"lm_head: IdeficsDecoupledLinear\.forward multiplies by the weight itself"):
        shrink_(tiny.model, vocabulary_of(tiny), output=mode)


def test_a_bound_on_what_cannot_be_built() -> None:
    assert len(BUILDABLE) >= len(COMPOSITES) - 3
