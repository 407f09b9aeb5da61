"""Every language model that transformers maps to a text task, with an output layer over a partial vocabulary.

Each is built with its output layer tied to an input table, where it can be, and with one of its own. `output="frozen"` is
the full model with the gradients of the unused rows masked; `output="restricted"` is the full model with −inf as the logits
of the ids that are not kept, its gradients masked likewise. `output="full"` is in `test_architectures.py`.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from comparing import differing
from tiny_models import (
    BATCH,
    KNOWN_VERSION,
    LENGTH,
    MARKS,
    PAIRS,
    TABLES,
    UNBUILDABLE,
    VOCAB_SIZE,
    Pair,
    Tiny,
    build_or_reason,
    pair_named,
    tied_layers,
    vocabularies,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from training import check_same, far_apart, layout_of, outputs, seed_everything, ties_of

from leanvocab.errors import BypassError, LeanVocabError, LeanVocabWarning, ModelError, TiedOutputError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.output.layer import RemapLinear
from leanvocab.output.lazy_logits import LazyLogits
from leanvocab.partial.module import PartialModule
from leanvocab.reports.inventory import PARTIAL, take_inventory

CLOSE = 1e-5  # relative, in fp32
NUM_STEPS = 3
NUM_NEW_TOKENS = 3
LEARNING_RATE = 1e-2  # of plain SGD, which does not blow up what is zero but for rounding


@dataclass(frozen=True)
class Case:
    """A pair, whether its output layer is tied to an input table, and what becomes of it."""

    pair: Pair
    tied: bool
    mode: str

    def __str__(self) -> str:
        return f"{self.pair}-{'tied' if self.tied else 'untied'}-{self.mode}"


# Pairs whose output layer is never tied to an input table, whatever the config says.
NEVER_TIED = {
    "causal-lm": "bailing_hybrid bigbird_pegasus cpmant dbrx inkling2_text inkling_text kimi_linear mllama moshi "
    "musicgen musicgen_melody nemotron_h reformer rembert xlstm",
    "seq2seq-lm": "audioflamingo3 musicflamingo nemo_speechlm qwen2_audio vibevoice_asr voxtral",
    "masked-lm": "esmc ibert luke perceiver reformer rembert",
}

CASES = [
    Case(pair, tied, mode)
    for pair in PAIRS
    if pair.task != "sequence-classification" and str(pair) not in UNBUILDABLE
    for tied in (True, False)
    if not (tied and pair.model_type in NEVER_TIED[pair.task].split())
    for mode in ("frozen", "restricted")
]


def _marked() -> Iterator[Any]:
    """One case of each pair in every run, another of each kind for the next pair; all of them in `make test-slow`."""
    by_pair: dict[str, list[Case]] = {}
    for case in CASES:
        by_pair.setdefault(str(case.pair), []).append(case)
    for number, cases in enumerate(by_pair.values()):
        chosen = cases[number % len(cases)]
        for case in cases:
            yield pytest.param(case, id=str(case), marks=[] if case is chosen else pytest.mark.slow)


# What leanvocab refuses, in either mode: a table that is no torch.nn.Embedding, or code that reads a weight itself.
REFUSED: dict[str, tuple[type[LeanVocabError], str]] = {
    "ibert-masked-lm": (ModelError, "QuantEmbedding|does not say which table"),
    "perceiver-masked-lm": (ModelError, "PerceiverForMaskedLM has no output layer over the vocabulary"),
    "mobilebert-masked-lm": (BypassError, r"MobileBertLMPredictionHead.forward calls t on the weight"),
}

# Models whose own gradients in fp32 are 1e-5 away from those in float64 at these sizes, and ten times as far at each step.
# These run in float64 with small steps.
SENSITIVE = {"cpmant", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}

# Models whose loss is computed from the full logits, which is right but saves nothing: what they do to the logits first.
NOT_LEAN = {
    "inkling_text": "cuts the padding off the end of the vocabulary",
    "inkling2_text": "cuts the padding off the end of the vocabulary",
    "musicgen": "stacks the logits of several output layers",
    "musicgen_melody": "stacks the logits of several output layers",
    "prophetnet": "log_softmax and nll_loss, over logits of several streams that are transposed",
}

# Whose generate raises in the full model too.
CANNOT_GENERATE = dict.fromkeys(
    ["musicgen", "musicgen_melody"], "prompts of codebooks come from the whole Musicgen, of which this is the decoder"
)

# Pairs of which transformers itself sets the pad row to zero when it loads them tied, whatever the file holds.
PAD_ROW_IS_ZEROED_ON_LOADING = {"youtu-causal-lm", "funnel-masked-lm"}

pytestmark = MARKS


@pytest.mark.parametrize("case", list(_marked()))
def test_a_partial_output_layer_computes_trains_generates_saves_and_merges_as_the_full_one_masked(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build_or_reason(case.pair, tied=case.tied)
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    if is_tied(tiny) is not case.tied and not transformers.__version__.startswith(KNOWN_VERSION):
        pytest.skip("not built: tied in another way in this version of transformers")
    assert is_tied(tiny) is case.tied
    if case.pair.model_type in SENSITIVE:
        tiny.model.double()
        single = torch.Tensor.float  # to which norms would cast, whose rounding some steps blow up
        monkeypatch.setattr(torch.Tensor, "float", lambda each: each if each.dtype == torch.float64 else single(each))
    full, lean = tiny.model, copy.deepcopy(tiny.model)
    if str(case.pair) in REFUSED:
        check_refusal(case, tiny, lean, *REFUSED[str(case.pair)])
        record_property("refused", REFUSED[str(case.pair)][0].__name__)
        return
    if case.tied and input_table_is_tied(full):
        with pytest.raises(TiedOutputError, match='output="frozen" keeps unused rows'):
            shrink_(lean, vocabularies(tiny), output="full")
        check_same(full, lean)
    shrink(case, tiny, lean)
    assert status(lean).output == case.mode
    check_inventory(case, full, lean)

    looked_at = note_looks(monkeypatch)
    check_training(case, tiny, lean)
    assert bool(looked_at) is (case.pair.model_type in NOT_LEAN and not cuts_nothing(case, full)), looked_at
    record_property("looked_at", sorted(set(looked_at)))
    check_evaluation(case, tiny, lean)
    record_property("generates", check_generation(case, tiny, lean))
    check_merging(case, full, lean, tmp_path)


# --- shrinking --------------------------------------------------------------------------------------------------------


def is_tied(tiny: Tiny) -> bool:
    """Whether a layer that scores the vocabulary is tied to a table that takes ids."""
    return any(len(layer.weight) == VOCAB_SIZE for layer in tied_layers(tiny.model))  # type: ignore[arg-type]


def cuts_nothing(case: Case, model: Any) -> bool:
    """True for Inkling from transformers 5.24 on, whose output layer has no rows of padding."""
    return case.pair.model_type.startswith("inkling") and model.get_output_embeddings().out_features == VOCAB_SIZE


def input_table_is_tied(model: Any) -> bool:
    """False where an encoder's table takes the ids and the decoder's is tied: that one can stay whole."""
    table = model.get_input_embeddings().weight
    return any(layer.weight is table for layer in tied_layers(model))


def shrink(case: Case, tiny: Tiny, lean: Any) -> None:
    """Frozen is the default of what is tied."""
    asked: Any = None if case.tied and case.mode == "frozen" else case.mode
    with warnings.catch_warnings():
        if case.mode == "restricted":
            warnings.simplefilter("ignore", LeanVocabWarning)
            with pytest.warns(LeanVocabWarning, match="which is another objective"):
                shrink_(lean, vocabularies(tiny), output=asked)
        else:
            shrink_(lean, vocabularies(tiny), output=asked)


def check_inventory(case: Case, full: Any, lean: Any) -> None:
    """Every tensor of the vocabulary's size is listed, and those are said to be partial that are."""
    found = take_inventory(full, TABLES.get(case.pair.model_type, [None])[0]).tensors
    listed = {name for each in found for name in each.names}
    named = (*full.named_parameters(remove_duplicate=False), *full.named_buffers(remove_duplicate=False))
    assert {name for name, tensor in named if VOCAB_SIZE in tensor.shape} <= listed
    if case.pair.model_type not in TABLES:  # of which one is described at a time
        partial = {f"{path}.weight" for path, each in lean.named_modules() if isinstance(each, PartialModule)}
        assert {name for each in found if each.outcomes[case.mode] == PARTIAL for name in each.names} == partial


def check_refusal(case: Case, tiny: Tiny, lean: Any, error: type[LeanVocabError], message: str) -> None:
    """Refused when shrunk, or at the first forward; either way the model is whole (again)."""

    def shrink_and_run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LeanVocabWarning)
            shrink_(lean, vocabularies(tiny), output=case.mode)  # type: ignore[arg-type]
        lean(**tiny.inputs)

    with pytest.raises(error, match=message):
        shrink_and_run()
    if any(isinstance(each, PartialModule) for each in lean.modules()):
        merge_(lean)
    check_same(tiny.model, lean)


def shrunk_matrices(lean: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names of the parameters that are partial, each under every name that it has, and their ids."""
    for path, module in lean.named_modules():
        if isinstance(module, PartialModule):
            yield f"{path}.weight", module.table.token_ids


# --- the reference ----------------------------------------------------------------------------------------------------


class Restricted(TorchFunctionMode):
    """Puts −inf on the logits of all ids but the kept ones before a loss looks at them."""

    def __init__(self, lean: nn.Module) -> None:
        super().__init__()
        (self.outside, *others) = [outside_of(each) for each in lean.modules() if isinstance(each, RemapLinear)]
        assert all(torch.equal(each, self.outside) for each in others)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.cross_entropy, F.log_softmax, torch.log_softmax, Tensor.log_softmax):
            logits, *rest = args
            if logits.shape[-1] >= VOCAB_SIZE:
                args = (logits.masked_fill(self.outside[: logits.shape[-1]], -torch.inf), *rest)
        return func(*args, **(kwargs or {}))


def outside_of(layer: RemapLinear) -> Tensor:
    """Which ids are not kept, bool [full_size]."""
    outside = torch.ones(layer.table.full_size, dtype=torch.bool)
    outside[layer.table.token_ids] = False
    return outside


def reference(case: Case, lean: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return Restricted(lean) if case.mode == "restricted" else contextlib.nullcontext()


# --- training ---------------------------------------------------------------------------------------------------------


def check_training(case: Case, tiny: Tiny, lean: Any) -> None:
    full, inputs = tiny.model.train(), tiny.inputs
    lean.train()
    before = {name: full.get_parameter(name).detach().clone() for name, _ in shrunk_matrices(lean)}
    lr = LEARNING_RATE / (100 if case.pair.model_type in SENSITIVE else 1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for model in (full, lean)]
    for step in range(NUM_STEPS):
        with reference(case, lean):
            loss = loss_of(full, inputs, step)
        found = loss_of(lean, inputs, step)
        assert torch.isfinite(loss)
        assert found.item() == pytest.approx(loss.item(), rel=CLOSE)
        loss.backward()
        found.backward()
        for name, token_ids in shrunk_matrices(lean):
            mask_rows(full.get_parameter(name), token_ids)
        assert far_apart(gradients(full, lean), gradients(lean, lean), CLOSE) == []
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert far_apart(dict(full.state_dict()), dict(lean.state_dict()), CLOSE) == []
    took_part = []
    for name, token_ids in shrunk_matrices(lean):
        moved = (lean.state_dict()[name] != before[name]).any(1)
        trains = bool((full.state_dict()[name] != before[name]).any())  # Blt's patcher looks ids up and does not train
        assert bool(moved[token_ids].any()) == trains, f"{name} trains as it does in full"
        took_part.append(trains)
        moved[token_ids] = False
        assert not moved.any(), f"{name}: other rows stay as they are"
    assert any(took_part)


def loss_of(model: Any, inputs: dict[str, Any], seed: int) -> Tensor:
    seed_everything(seed)
    loss: Tensor = model(**copy.deepcopy(inputs)).loss  # FSMT writes to its inputs
    return loss


def mask_rows(parameter: Tensor, token_ids: Tensor) -> None:
    """Zero gradients for all rows but those of `token_ids`."""
    if parameter.grad is not None:
        kept = torch.zeros(len(parameter), 1)
        kept[token_ids] = 1
        parameter.grad *= kept


def gradients(model: nn.Module, lean: nn.Module) -> dict[str, Tensor]:
    """The gradients by name; of shrunk matrices, those of the kept rows."""
    partial = dict(shrunk_matrices(lean))
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {
        name: grad[partial[name]] if model is not lean and name in partial else grad for name, grad in found.items()
    }


def note_looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What made the full logits be computed in training, by the names of torch's functions; a list that grows."""
    names: list[str] = []
    compute, do = LazyLogits.compute, LazyLogits.__torch_function__
    doing: list[str] = []

    def note_function(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        doing.append(getattr(func, "__name__", str(func)))
        try:
            return do(func, types, args, kwargs)
        finally:
            doing.pop()

    def note_compute(logits: Any) -> Tensor:
        if logits.requires_grad:
            names.append(doing[-1] if doing else "?")
        return compute(logits)

    monkeypatch.setattr(LazyLogits, "__torch_function__", classmethod(note_function))
    monkeypatch.setattr(LazyLogits, "compute", note_compute)
    return names


# --- evaluation and generation ----------------------------------------------------------------------------------------


def check_evaluation(case: Case, tiny: Tiny, lean: Any) -> None:
    full, inputs = tiny.model.eval(), tiny.inputs
    lean.eval()
    outside = next(outside_of(each) for each in lean.modules() if isinstance(each, RemapLinear))
    with torch.no_grad():
        with reference(case, lean):
            expected = outputs(full, inputs, seed=7)
        found = outputs(lean, inputs, seed=7)
    assert len(expected) == len(found)
    has_logits = False
    for first, second in zip(expected, found, strict=True):
        assert first.shape == second.shape
        if first.shape[-1:] >= (VOCAB_SIZE,):
            has_logits = True
            if case.mode == "restricted":
                there = outside[: first.shape[-1]]  # without padding
                assert (second[..., there] == -torch.inf).all()
                first, second = first[..., ~there], second[..., ~there]
        assert far_apart({"output": first}, {"output": second}, CLOSE) == []
    assert has_logits


def check_generation(case: Case, tiny: Tiny, lean: Any) -> str:
    """Generates greedily; "", or why nothing could be generated with the full model either."""
    if not tiny.model.can_generate():
        return "transformers says that it cannot"
    if case.pair.model_type in CANNOT_GENERATE:
        return CANNOT_GENERATE[case.pair.model_type]
    expected = generated(tiny.model, tiny.inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*served from the base", category=LeanVocabWarning)
        found = generated(lean, tiny.inputs)
    if case.mode == "frozen":
        assert torch.equal(found, expected)
        return ""
    outside = next(outside_of(each) for each in lean.modules() if isinstance(each, RemapLinear))
    assert not outside[found].any()
    return ""


def generated(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Ids [batch, length], from prompts without padding."""
    seed_everything(7)
    end = LENGTH - 2 * (BATCH - 1)
    given = {name: value[:, :end] if value.ndim == 2 else value for name, value in inputs.items() if name != "labels"}
    ids: Tensor = model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=NUM_NEW_TOKENS)
    return ids


# --- saving and merging -----------------------------------------------------------------------------------------------


def check_merging(case: Case, full: Any, lean: Any, folder: Path) -> None:
    lean.save_pretrained(folder)
    loaded = type(full).from_pretrained(folder)
    merge_(lean)
    assert layout_of(lean) == layout_of(full)
    assert ties_of(loaded) == ties_of(full)
    if case.tied and str(case.pair) in PAD_ROW_IS_ZEROED_ON_LOADING:
        pad_id, rows = full.config.pad_token_id, loaded.get_input_embeddings().weight.detach()
        rows[pad_id] = lean.get_input_embeddings().weight.detach()[pad_id]
    assert differing(dict(loaded.state_dict()), dict(lean.state_dict())) == []
    assert far_apart(dict(full.state_dict()), dict(lean.state_dict()), CLOSE) == []


# --- what the tiny models show ----------------------------------------------------------------------------------------


CHANGE_THEIR_LOGITS = (
    "beam-causal-lm cohere-causal-lm falcon_h1-causal-lm gemma2-causal-lm gemma3_text-causal-lm granite-causal-lm "
    "granitemoehybrid-causal-lm hyperclovax-causal-lm nanochat-causal-lm recurrent_gemma-causal-lm xlstm-causal-lm "
    "bart-seq2seq-lm t5gemma-seq2seq-lm"
)


@pytest.mark.parametrize("name", CHANGE_THEIR_LOGITS.split())
def test_what_a_model_does_to_its_logits_shows_at_these_sizes(name: str) -> None:
    tiny = build_or_reason(pair_named(name))
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    raw: list[Tensor] = []
    layer = next(each for each in tiny.model.modules() if getattr(each, "out_features", None) == VOCAB_SIZE)
    layer.register_forward_hook(lambda module, args, output: raw.append(output.detach().clone()))
    logits = tiny.model(**tiny.inputs).logits
    assert (logits - raw[0]).norm() > 0.05 * raw[0].norm()


@pytest.mark.parametrize("name", ["gptj-causal-lm", "phi-causal-lm", "codegen-causal-lm", "bert-masked-lm"])
def test_the_bias_of_an_output_layer_shows_at_these_sizes(name: str) -> None:
    tiny = build_or_reason(pair_named(name))
    if isinstance(tiny, str):
        pytest.skip(f"not built: {tiny}")
    biases = [each for each in tiny.model.parameters() if each.shape == (VOCAB_SIZE,)]
    assert biases
    assert all(each.std() > 0.5 for each in biases)
