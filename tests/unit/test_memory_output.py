"""Estimates of language models: what their output layers and their loss hold, against models that really hold it."""

import ctypes
import sys
from typing import Any

import pytest
import torch
import transformers
from models import FULL_SIZE, small_model, used_vocabulary
from torch import nn

import leanvocab as lv
from leanvocab.errors import ModelError, SettingsError, TiedOutputError
from leanvocab.model.shrink import shrink_
from leanvocab.output.frozen_rows import FrozenRows
from leanvocab.output.loss import CHUNK_BYTES
from leanvocab.partial.missing import MissingNote
from leanvocab.reports.peak import record_peak

KEPT = len(used_vocabulary())

# What a restricted softmax is, is said each time that a model is shrunk so.
pytestmark = pytest.mark.filterwarnings('ignore:.*output="restricted" trains a softmax:UserWarning')


def small_smollm(**changes: Any) -> transformers.LlamaConfig:
    """SmolLM2-135M in small: tied, as many tokens to a layer."""
    sizes = {
        "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "vocab_size": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.LlamaConfig(**sizes | changes)


def held_by_vocabulary(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Weights, gradients and AdamW states of the vocabulary matrices after one real step, frozen rows included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model(**batch).loss.backward()
    optimizer.step()
    layers = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    matrices = {id(layer.weight): layer.weight for layer in layers}.values()
    held = sum(each.nbytes + each.grad.nbytes for each in matrices)
    held += sum(value.nbytes for each in matrices for value in optimizer.state[each].values())
    for layer in layers:
        if getattr(getattr(layer, "table", None), "output", None) == "frozen" and isinstance(layer, nn.Linear):
            frozen = FrozenRows(layer.table, torch.device("cpu"), layer.weight.dtype).whole()
            held += sum(value.nbytes for value in (frozen.rows, frozen.id_of_column, frozen.column_of_id))
    return held


@pytest.mark.parametrize("mode", ["full", "frozen", "restricted"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_small_smollm_holds_what_was_estimated(tied: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrozenRows, "mapped_on", frozenset())  # as on a GPU
    config = small_smollm(tie_word_embeddings=tied)
    kept = lv.PartialVocabulary(range(0, 4096, 7), 4096)
    ids = torch.tensor(kept.token_ids[:24]).view(2, 12)
    batch = {"input_ids": ids, "labels": ids}
    if tied and mode == "full":
        with pytest.raises(TiedOutputError):
            lv.estimate_memory(config, kept, auto_class="AutoModelForCausalLM", output=mode)
        return
    estimate = lv.estimate_memory(config, kept, auto_class="AutoModelForCausalLM", output=mode)
    full = transformers.LlamaForCausalLM(config)
    partial = shrink_(transformers.LlamaForCausalLM(config), kept, output=mode)
    assert estimate.output == mode
    lm_head = 4 * 4096 * 48 * 4 + 4 if mode == "full" else 0  # stays whole, and is no part of what is made smaller
    assert estimate.full.vocabulary_bytes + lm_head == held_by_vocabulary(full, batch)
    assert estimate.partial.vocabulary_bytes + lm_head == held_by_vocabulary(partial, batch)
    assert estimate.partial.weights_bytes == sum(each.nbytes for each in partial.parameters())


@pytest.mark.parametrize("mode", ["frozen", "restricted"])
def test_a_matrix_of_262144_rows_follows_from_arithmetic(mode: str) -> None:
    """The shape of Gemma 3 270M's matrix, tied, 5,000 rows kept, AdamW in fp32."""
    rows, dim, kept = 262_144, 640, 5_000
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(small_smollm(vocab_size=rows, hidden_size=dim, num_attention_heads=5))
    model.tie_weights()
    estimate = lv.estimate_memory(model, kept, output=mode, num_tokens=512)
    assert estimate.full.vocabulary_bytes == pytest.approx(rows * dim * 16, rel=1e-6)
    frozen = (rows - kept) * dim * 4 if mode == "frozen" else 0
    assert estimate.partial.vocabulary_bytes == pytest.approx(kept * dim * 16 + frozen, rel=0.02)
    assert estimate.full.loss_bytes == 3 * 512 * rows * 4
    assert lv.estimate_memory(model, kept, output=mode, frozen_rows="host").partial.frozen_bytes == 0
    half = lv.estimate_memory(model, kept, output=mode, precision="bf16").partial
    assert half.frozen_bytes == pytest.approx(frozen / 2, rel=0.02)
    assert lv.estimate_memory(model, kept, output=mode, precision="mixed").partial.frozen_bytes == half.frozen_bytes


def test_the_mode_is_the_one_that_shrinking_takes_by_itself() -> None:
    for family, mode in (
        ("llama-tied", "frozen"),
        ("llama-untied", "full"),
        ("bert-tied", "frozen"),
        ("bart-tied", "frozen"),
    ):
        model = small_model(family)
        estimate = lv.estimate_memory(model, used_vocabulary())
        assert estimate.output == mode
        shrink_(model, used_vocabulary())
        assert lv.estimate_memory(model) == estimate
    assert lv.estimate_memory(small_model(), 40, num_tokens=100).output is None
    assert lv.estimate_memory(small_model(), 40, num_tokens=100).full.loss_bytes == 0


def test_a_shrunk_model_is_not_estimated_in_a_mode_that_it_does_not_have() -> None:
    model = shrink_(small_model("llama-tied"), used_vocabulary())
    assert lv.estimate_memory(model, output="frozen") == lv.estimate_memory(model)
    with pytest.raises(
        ModelError, match='is shrunk with output="frozen", and was to be estimated with output="restric'
    ):
        lv.estimate_memory(model, output="restricted")


@pytest.mark.parametrize("mode", ["frozen", "restricted"])
def test_the_id_maps_of_a_shrunk_language_model_are_counted_to_the_byte(mode: str) -> None:
    model = shrink_(small_model("llama-tied"), used_vocabulary(), output=mode)
    held = []
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        notes = [value for value in vars(layer).values() if isinstance(value, MissingNote)]
        parts = (*vars(layer).values(), *(part for note in notes for part in vars(note).values()))
        held += [value for value in parts if torch.is_tensor(value)]
    assert lv.estimate_memory(model).partial.remap_bytes == sum(value.nbytes for value in held)


def test_an_untied_output_layer_has_rows_of_its_own() -> None:
    model = small_model("llama-untied")
    estimate = lv.estimate_memory(model, {"model.embed_tokens": 20, "lm_head": 30}, output="frozen")
    assert [(t.path, t.full_rows, t.partial_rows) for t in estimate.tables] == [
        ("model.embed_tokens", FULL_SIZE, 20),
        ("lm_head", FULL_SIZE, 30),
    ]
    assert estimate.full.num_parameters - estimate.partial.num_parameters == (2 * FULL_SIZE - 50) * 48


def test_a_number_of_tokens_has_to_be_one() -> None:
    with pytest.raises(SettingsError, match="num_tokens=0: expected 1 or more tokens"):
        lv.estimate_memory(small_model("llama-tied"), 40, num_tokens=0)


@pytest.fixture
def nothing_kept() -> None:
    """What was freed goes back to the system: glibc would keep it, and what is held again would not be seen to grow."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD, in bytes
        libc.malloc_trim(0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", [None, "frozen", "restricted"])
def test_the_loss_holds_at_its_peak_what_was_estimated(
    mode: str | None, monkeypatch: pytest.MonkeyPatch, nothing_kept: None
) -> None:
    rows, num_tokens = 60_000, 512
    config = small_smollm(vocab_size=rows, hidden_size=12, intermediate_size=8, num_hidden_layers=1)
    model = transformers.LlamaForCausalLM(config)
    kept = lv.PartialVocabulary(range(0, rows, 2), rows)
    ids = torch.tensor(kept.token_ids[:num_tokens]).view(1, -1)
    monkeypatch.setattr(FrozenRows, "mapped_on", frozenset())  # as on a GPU: mapped rows have scores of kept ones twice
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 60 << 20)
    monkeypatch.setitem(CHUNK_BYTES, "cuda", 60 << 20)
    estimate = lv.estimate_memory(model, kept, output=mode, num_tokens=num_tokens)
    if mode is not None:
        shrink_(model, kept, output=mode)
    model(input_ids=ids[:, :2], labels=ids[:, :2]).loss.backward()  # what is held from the first step on
    with record_peak(0.0005) as peak:
        model(input_ids=ids, labels=ids).loss.backward()
    expected = (estimate.full if mode is None else estimate.partial).loss_bytes
    assert peak.anonymous_growth_bytes == pytest.approx(expected, rel=0.3)
