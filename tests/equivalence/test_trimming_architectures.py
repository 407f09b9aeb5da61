"""Every architecture and task, trimmed on disk and loaded plainly: it computes what the full model does for what is kept."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composites
import pytest
import tiny_models
import torch
from comparing import same_bits
from composites import COMPOSITES, stand_ins
from safetensors.torch import load_file, save_file
from tiny_models import MARKS, PAIRS, VOCAB_SIZE, Pair, Tiny
from torch import Tensor
from training import far_apart, outputs, seed_everything, ties_of

from leanvocab.errors import LeanVocabError, ModelError
from leanvocab.files.headers import read_weights
from leanvocab.trimming.model_files import ModelFiles
from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

pytestmark = MARKS

IDS = ("input_ids", "labels", "decoder_input_ids")
CLOSE = 1e-5  # relative, in fp32: a matrix of other rows is multiplied in another order

SPEAKING = (
    "musicgen-causal-lm",
    "musicgen_melody-causal-lm",
    "kyutai_speech_to_text-multimodal-lm",
    "dia-speech-seq2seq",
)
REFUSED: dict[str, tuple[type[LeanVocabError], str]] = {
    "blt-causal-lm": (ModelError, "models of the type 'blt' cannot be trimmed: it hashes"),
    **dict.fromkeys(SPEAKING, (ModelError, "ids in its configs are codes of sounds")),
}

ALL = [*PAIRS, *COMPOSITES]
SAMPLE = random.Random(5).sample(ALL, 24)
CASES = [pytest.param(pair, id=str(pair), marks=[] if pair in SAMPLE else [pytest.mark.slow]) for pair in ALL]


def built(pair: Pair) -> tuple[Tiny, dict[str, dict[str, Any]]]:
    """The tiny model, and its batches; skips where there is none."""
    made = (composites if pair in COMPOSITES else tiny_models).build_or_reason(pair)
    if isinstance(made, str):
        pytest.skip(f"not built: {made}")
    batches = composites.batches(made) if pair in COMPOSITES else {"text": made.inputs}
    return made, batches


def trimmed(folder: Path, output: Path, batches: dict[str, dict[str, Any]]) -> PartialVocabulary:
    """Writes the folder with the ids of the batches alone, tensor by tensor, and gives the kept ids."""
    files = ModelFiles.read(folder)
    counted = [count_tokens({name: inputs[name] for name in IDS if name in inputs}) for inputs in batches.values()]
    ids = {token_id for counts in counted for token_id in counts.token_ids.tolist() if token_id < files.full_size}
    vocabulary = PartialVocabulary(sorted(ids | set(files.required_ids().tolist())), files.full_size)
    assert len(vocabulary) < vocabulary.full_size
    new_ids = files.new_ids(vocabulary)
    changed = files.trimmed_tensors(read_weights(folder).shapes, new_ids)
    output.mkdir()
    for name, content in files.written(new_ids).items():
        (output / name).write_bytes(content)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        for dim, size in enumerate(tensor.shape):
            kept = torch.from_numpy(vocabulary.token_ids[vocabulary.token_ids < size].copy())
            is_vocabulary = name in changed and dim in changed[name].dims
            assert is_vocabulary == (size in (files.text_size, files.full_size)), f"{name} {tuple(tensor.shape)}"
            if is_vocabulary:
                tensors[name] = tensors[name].index_select(dim, kept)
        assert name not in changed or tuple(tensors[name].shape) == changed[name].shape
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, output / "model.safetensors", {"format": "pt"}
    )
    return vocabulary


def renumbered(inputs: dict[str, Any], vocabulary: PartialVocabulary) -> dict[str, Any]:
    beyond = len(vocabulary) - vocabulary.full_size

    def new(ids: Tensor) -> Tensor:
        inside = ids < vocabulary.full_size
        return torch.where(
            inside, vocabulary.to_partial(torch.where(inside, ids, -100), ignore_index=-100), ids + beyond
        )

    return {name: new(value) if name in IDS else value for name, value in inputs.items()}


def check_outputs(full: Any, lean: Any, inputs: dict[str, Any], vocabulary: PartialVocabulary) -> dict[str, int]:
    """Every floating tensor: bits, but for scores of tokens, which a smaller matrix may round otherwise, and for losses."""
    from_labels = full.config.is_encoder_decoder and inputs["labels"].ndim > 1  # what its decoder is given
    given = {name: value for name, value in inputs.items() if name != "labels" or from_labels}
    wanted = {"output_hidden_states": True} if composites.takes(full, "output_hidden_states") else {}
    expected = outputs(full.eval(), given | wanted, seed=7)
    found = outputs(lean.eval(), renumbered(given, vocabulary) | wanted, seed=7)
    assert len(expected) == len(found) > 0
    counted = {"bits": 0, "rounded": 0}
    for first, second in zip(expected, found, strict=True):
        if first.ndim == 0:
            continue  # the loss: a softmax over fewer tokens
        for dim, size in enumerate(first.shape):
            if second.shape[dim] != size:
                kept = torch.from_numpy(vocabulary.token_ids[vocabulary.token_ids < size].copy())
                first = first.index_select(dim, kept)
        if same_bits(first, second):
            counted["bits"] += 1
        else:
            assert first.shape[-1] == len(vocabulary.below(min(VOCAB_SIZE, vocabulary.full_size))), "hidden states"
            assert far_apart({"scores": first}, {"scores": second}, CLOSE) == []
            counted["rounded"] += 1
    return counted


def generated(model: Any, inputs: dict[str, Any], suppressed: list[int] | None) -> Tensor:
    seed_everything(7)
    options = {"suppress_tokens": suppressed} if suppressed else {}
    ids: Tensor = model.eval().generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=4, **options)
    return ids


@pytest.mark.parametrize("pair", CASES)
def test_a_trimmed_model_computes_as_the_full_one(
    pair: Pair, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tiny, batches = built(pair)
    with stand_ins(pair):
        tiny.model.save_pretrained(tmp_path / "full")
        if str(pair) in REFUSED:
            error, message = REFUSED[str(pair)]
            with pytest.raises(error, match=message):
                ModelFiles.read(tmp_path / "full")
            return
        vocabulary = trimmed(tmp_path / "full", tmp_path / "lean", batches)
        full, lean = (type(tiny.model).from_pretrained(tmp_path / name) for name in ("full", "lean"))
    assert ties_of(full) == ties_of(lean)
    for inputs in batches.values():
        counted = check_outputs(full, lean, inputs, vocabulary)
        record_property("counted", counted)
