"""Composites of text with images or sound, as transformers maps them: shrinking changes nothing but a table's size."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing
from composites import COMPOSITES, batches, build_or_reason, prompt, vocabulary_of
from tiny_models import MARKS, Pair, Tiny
from torch import Tensor
from training import check_files, check_outputs, check_refusal, check_same, check_training, seed_everything

from leanvocab.errors import LeanVocabError, LeanVocabWarning
from leanvocab.model.shrink import merge_, shrink_

pytestmark = MARKS

NUM_NEW_TOKENS = 4

# Composites that leanvocab refuses, with the error.
REFUSED: dict[str, tuple[type[LeanVocabError], str]] = {}

# Composites with which nothing is generated here, in full either.
CANNOT_GENERATE = {
    "kyutai_speech_to_text": "takes waves, which a codec turns into codes",
    "pi0": "gives actions",
    "pop2piano": "asks for a composer, whom a processor knows",
    "vibevoice": "its scheduler is in diffusers, which is not installed",
    "voxtral_realtime": "as many tokens as the sound is long, and the prompt is",
}


@pytest.mark.parametrize("pair", COMPOSITES, ids=str)
def test_a_shrunk_composite_computes_trains_generates_saves_and_merges_as_the_full_one(
    pair: Pair, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tiny = build_or_reason(pair)
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    full, lean = tiny.model, copy.deepcopy(tiny.model)
    if str(pair) in REFUSED:
        check_refusal(tiny, lean, *REFUSED[str(pair)])
        record_property("refused", REFUSED[str(pair)][0].__name__)
        return
    shrink_(lean, vocabulary_of(tiny))

    for name, inputs in batches(tiny).items():
        for mode in (True, False):
            check_outputs(full.train(mode), lean.train(mode), inputs)
        check_training(full.train(), lean.train(), inputs)
        check_generation(tiny, lean, inputs)
        record_property("batch", name)
    assert differing(full.state_dict(), lean.state_dict()) == []
    check_files(full, lean, tmp_path)

    merge_(lean)
    check_same(full, lean)


def check_generation(tiny: Tiny, lean: Any, inputs: dict[str, Any]) -> None:
    if tiny.pair.model_type in CANNOT_GENERATE:
        return
    expected = generated(tiny.model, prompt(inputs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*served from the base", category=LeanVocabWarning)
        assert torch.equal(generated(lean, prompt(inputs)), expected)


def generated(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Ids [batch, length], greedily."""
    seed_everything(7)
    ids: Tensor = model.eval().generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=NUM_NEW_TOKENS)
    return ids
