"""Every architecture and task, trimmed on disk and loaded plainly: it computes what the full model does for what is kept."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composites
import pytest
import tiny_models
import torch
from comparing import same_bits
from composites import COMPOSITES, prompt, stand_ins
from tiny_models import MARKS, PAIRS, VOCAB_SIZE, Pair, Tiny, tied_layers
from training import far_apart, outputs, seed_everything, ties_of
from trimming import kept_of, new_ids_of, trim

from leanvocab.errors import LeanVocabError, ModelError
from leanvocab.files.headers import read_weights
from leanvocab.trimming.model_files import ModelFiles
from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

pytestmark = MARKS

IDS = ("input_ids", "labels", "decoder_input_ids")
MEDIA = re.compile("visual|vision|audio")
CLOSE = 1e-5  # relative, in fp32: a matrix of other rows is multiplied in another order

CANNOT_BE_LOADED = ("shieldgemma2",)
MERGED = "is merged of several tensors when it is loaded"
SPEAKING = (
    "musicgen-causal-lm",
    "musicgen_melody-causal-lm",
    "kyutai_speech_to_text-multimodal-lm",
    "dia-speech-seq2seq",
)
REFUSED: dict[str, tuple[type[LeanVocabError], str]] = {
    "blt-causal-lm": (ModelError, "models of the type 'blt' cannot be trimmed: it hashes"),
    "molmo2-multimodal-lm": (ModelError, MERGED),
    **dict.fromkeys(SPEAKING, (ModelError, "ids in its configs are codes of sounds")),
}

ALL = [*PAIRS, *COMPOSITES]
SAMPLE = random.Random(5).sample(ALL, 16)
CASES = [pytest.param(pair, id=str(pair), marks=[] if pair in SAMPLE else [pytest.mark.slow]) for pair in ALL]


def built(pair: Pair, *, tied: bool = False) -> tuple[Tiny, dict[str, dict[str, Any]]]:
    """The tiny model, and its batches; skips where there is none."""
    made = (composites if pair in COMPOSITES else tiny_models).build_or_reason(pair, tied=tied)
    if isinstance(made, str):
        pytest.skip(f"not built: {made}")
    batches = composites.batches(made) if pair in COMPOSITES else {"text": made.inputs}
    return made, batches


def trimmed(folder: Path, output: Path, batches: dict[str, dict[str, Any]]) -> PartialVocabulary:
    """Writes the folder with the ids of the batches alone, and gives the kept ids."""
    counted = [count_tokens({name: inputs[name] for name in IDS if name in inputs}) for inputs in batches.values()]
    vocabulary, changed = trim(folder, output, {i for counts in counted for i in counts.token_ids.tolist()})
    assert len(vocabulary) < vocabulary.full_size
    for name, shape in read_weights(folder).shapes.items():
        dims = tuple(dim for dim, size in enumerate(shape) if size in (VOCAB_SIZE, vocabulary.full_size))
        # Towers for images have tables of their own, and layers, that are of the same size here.
        assert MEDIA.search(name) or dims == (changed[name].dims if name in changed else ())
    return vocabulary


@pytest.mark.parametrize("pair", [case for case in CASES if case.values[0].task != "sequence-classification"])
def test_a_trimmed_model_whose_output_layer_is_tied_computes_as_the_full_one(pair: Pair, tmp_path: Path) -> None:
    if str(pair) in REFUSED or pair.model_type in ("dbrx", *CANNOT_BE_LOADED):
        pytest.skip("refused, untied too; a config that refuses ties; files that transformers does not load")
    tiny, batches = built(pair, tied=True)
    if not tied_layers(tiny.model):
        pytest.skip("its output layer is not tied")
    with stand_ins(pair):
        tiny.model.save_pretrained(tmp_path / "full")
        vocabulary = trimmed(tmp_path / "full", tmp_path / "lean", batches)
        full, lean = (type(tiny.model).from_pretrained(tmp_path / name) for name in ("full", "lean"))
    assert ties_of(full) == ties_of(lean)
    for inputs in batches.values():
        check_outputs(full, lean, inputs, vocabulary)


def test_ids_of_images_and_sounds_keep_their_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n: those from an offset on are looked up in other tables, and the last row pads sounds."""
    sizes = {
        "text_config.pad_token_id": 5,
        "text_config.vocab_size_per_layer_input": 240,
        "vision_config.vocab_offset": 240,
        "vision_config.vocab_size": 30,
    }
    offsets = tiny_models.Override(
        "gemma3n", "as they are", sizes | {"audio_config.vocab_offset": 270, "audio_config.vocab_size": 30}
    )
    monkeypatch.setattr(composites, "OVERRIDES", [*composites.OVERRIDES, offsets])
    pair = next(pair for pair in COMPOSITES if pair.model_type == "gemma3n")
    tiny, batches = built(pair)
    inputs = batches["text"] | {"input_ids": batches["text"]["input_ids"].clone()}
    inputs["input_ids"][0, 1:5] = torch.tensor([240, 269, 271, 299])
    with stand_ins(pair):
        tiny.model.save_pretrained(tmp_path / "full")
        ids = inputs["input_ids"].unique().tolist()
        vocabulary, changed = trim(tmp_path / "full", tmp_path / "lean", ids)
        full, lean = (type(tiny.model).from_pretrained(tmp_path / name) for name in ("full", "lean"))
        with pytest.raises(ModelError, match="computes with ids behind its vocabulary"):
            ModelFiles.read(tmp_path / "full").new_ids(vocabulary, 64)
    assert set(range(240, 300)) <= set(vocabulary)
    per_layer = changed["model.language_model.embed_tokens_per_layer.weight"]
    assert per_layer.shape[0] == len(vocabulary) - 60
    check_outputs(full, lean, inputs, vocabulary)


def renumbered(inputs: dict[str, Any], vocabulary: PartialVocabulary) -> dict[str, Any]:
    return {name: new_ids_of(value, vocabulary) if name in IDS else value for name, value in inputs.items()}


def check_outputs(full: Any, lean: Any, inputs: dict[str, Any], vocabulary: PartialVocabulary) -> dict[str, int]:
    """Every floating tensor: bits, but for scores of tokens, which a smaller matrix may round otherwise, and for losses."""
    is_text_to_text = full.config.is_encoder_decoder or type(full).__name__ == "BlipForQuestionAnswering"
    from_labels = is_text_to_text and inputs["labels"].ndim > 1  # what its decoder is given
    given = {name: value for name, value in inputs.items() if name != "labels" or from_labels}
    try:
        expected = outputs(full.eval(), given | {"output_hidden_states": True}, seed=7)
        given["output_hidden_states"] = True
    except Exception:  # a class that does not take it
        expected = outputs(full.eval(), given, seed=7)
    found = outputs(lean.eval(), renumbered(given, vocabulary), seed=7)
    assert len(expected) == len(found) > 0
    counted = {"bits": 0, "rounded": 0}
    for first, second in zip(expected, found, strict=True):
        if first.ndim == 0:
            continue  # the loss: a softmax over fewer tokens
        for dim, size in enumerate(first.shape):
            if second.shape[dim] != size:
                first = kept_of(first, dim, vocabulary)
        if same_bits(first, second):
            counted["bits"] += 1
        else:
            assert first.shape[-1] == len(vocabulary.below(min(VOCAB_SIZE, vocabulary.full_size))), "hidden states"
            assert far_apart({"scores": first}, {"scores": second}, CLOSE) == []
            counted["rounded"] += 1
    return counted


def check_generation(full: Any, lean: Any, inputs: dict[str, Any], vocabulary: PartialVocabulary) -> str:
    """Greedy text, where the full model is kept within the vocabulary; "", or why there is none in full either.

    Near ties are no other text: from where the best two scores of the full model are equal within rounding, any may follow.
    """
    if not full.can_generate():
        return "the class generates nothing"
    gone = sorted(set(range(vocabulary.full_size)) - set(vocabulary))
    given = prompt(inputs)
    try:
        expected = generated(full, given, suppress_tokens=gone)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    found = generated(lean, renumbered(given, vocabulary))
    start = expected.sequences.shape[1] - len(expected.scores)
    for number, scores in enumerate(expected.scores):
        first, second = scores.double().topk(2).values.T
        if ((first - second) < CLOSE * first.abs().clamp(min=1)).any():
            return ""
        column = expected.sequences[:, start + number]
        assert torch.equal(
            renumbered({"input_ids": column}, vocabulary)["input_ids"], found.sequences[:, start + number]
        )
    return ""


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    seed_everything(7)
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 4, "return_dict_in_generate": True}
    return model.eval().generate(**inputs, **settings, output_scores=True, **options)


@pytest.mark.parametrize("pair", CASES)
def test_a_trimmed_model_computes_as_the_full_one(
    pair: Pair, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if pair.model_type in CANNOT_BE_LOADED:
        pytest.skip("not built: transformers does not load its own files into the class that it maps them to")
    tiny, batches = built(pair)
    with stand_ins(pair):
        tiny.model.save_pretrained(tmp_path / "full")
        if str(pair) in REFUSED:
            error, message = REFUSED[str(pair)]
            with pytest.raises(error, match=message):
                trimmed(tmp_path / "full", tmp_path / "lean", batches)
            assert not (tmp_path / "lean").exists()
            record_property("refused", error.__name__)
            return
        vocabulary = trimmed(tmp_path / "full", tmp_path / "lean", batches)
        full, lean = (type(tiny.model).from_pretrained(tmp_path / name) for name in ("full", "lean"))
    assert ties_of(full) == ties_of(lean)
    for inputs in batches.values():
        record_property("counted", check_outputs(full, lean, inputs, vocabulary))
        record_property("not_generated", check_generation(full, lean, inputs, vocabulary))
