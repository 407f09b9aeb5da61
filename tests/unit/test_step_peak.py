"""Peaks of a training step, found without memory, are those that torch's profiler sees."""

from typing import Any

import pytest
import torch
import transformers
from models import small_model, used_vocabulary
from torch import nn

import leanvocab as lv
from benchmarks._results import OURS
from benchmarks.estimate import FULL, MODELS, QUICK, ratios
from leanvocab.output.loss import chunk_bytes
from leanvocab.reports.memory_estimate import CARDS, SAVES_LITTLE, TrainingStep

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # peft, of GPT-2's layers
]

ON_CPU = TrainingStep(batch_size=4, length=16, on_cpu=True)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_an_estimate_is_what_is_held_and_what_the_profiler_finds(name: str, lora: bool) -> None:
    if lora:
        pytest.importorskip("peft")
    for who, its in ratios(name, lora=lora, batch_size=4, length=64).items():
        assert its["held"] == pytest.approx(1, abs=0.02), who
        assert its["peak"] == pytest.approx(1, abs=0.10), who


@pytest.mark.parametrize(
    ("name", "lora"),
    # BART adds a bias to its logits, of which little else is beside where activations are computed again.
    [("llama", False), pytest.param("bart", True, marks=pytest.mark.slow)],
)
def test_what_is_computed_again_is_not_held(name: str, lora: bool) -> None:
    its = ratios(name, lora=lora, batch_size=4, length=64, gradient_checkpointing=True)
    assert its[FULL]["peak"] == pytest.approx(1, abs=0.05)
    assert its[OURS]["peak"] == pytest.approx(1, abs=0.05)


def peaks(family: str = "llama-tied", **step: object) -> tuple[int, int]:
    estimate = lv.estimate_memory(small_model(family), used_vocabulary(), step=TrainingStep(**vars(ON_CPU) | step))
    assert estimate.no_peak is None
    return estimate.full.peak_bytes, estimate.partial.peak_bytes


def test_a_peak_grows_with_the_batch_and_falls_with_checkpoints_and_on_a_gpu() -> None:
    assert peaks(batch_size=8) > peaks() > peaks(gradient_checkpointing=True)
    classifier = small_model().config
    on_cpu, on_gpu = (
        lv.estimate_memory(classifier, 40, step=TrainingStep(batch_size=4, length=16, on_cpu=on_cpu)).full.peak_bytes
        for on_cpu in (True, False)
    )
    assert on_gpu < on_cpu  # the masks of its dropout are bytes


def test_a_peak_with_the_full_vocabulary_that_is_not_asked_for_is_not_told() -> None:
    options = {"step": TrainingStep(batch_size=2, length=8), "precision": "fp32"}
    both = lv.estimate_memory(small_model().config, 40, **options)
    one = lv.estimate_memory(small_model().config, 40, full_peak=False, **options)
    assert (one.full.peak_bytes, one.partial) == (0, both.partial)
    assert one.cards == {size: {"partial": True} for size in both.cards}
    assert "a card of 8 GB" in str(one)


def test_the_model_that_is_estimated_stays_as_it_is() -> None:
    model = small_model("llama-tied").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    functions = nn.functional.dropout, nn.functional.scaled_dot_product_attention
    lv.estimate_memory(model, used_vocabulary(), step=TrainingStep(batch_size=2, length=8, gradient_checkpointing=True))
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (nn.functional.dropout, nn.functional.scaled_dot_product_attention) == functions


class _AsksForValues(transformers.BertForSequenceClassification):
    def forward(self, input_ids: torch.Tensor, **others: object) -> object:
        return super().forward(input_ids=input_ids[:, : int(input_ids.numpy()[0, 0])], **others)


def test_a_model_that_needs_values_has_no_peak_and_says_why() -> None:
    model = _AsksForValues(small_model("bert-tied").config)
    estimate = lv.estimate_memory(model, used_vocabulary(), step=ON_CPU)
    assert (estimate.full.peak_bytes, estimate.partial.peak_bytes) == (0, 0)
    assert "Its peak is missing: the model cannot be run without values (" in str(estimate)
    assert "missing" in estimate.__str__()
    assert estimate.cards == {}


@pytest.mark.parametrize(("output", "is_said"), [("frozen", True), ("restricted", True), ("full", False)])
def test_the_cards_say_which_chunks_of_scores_are_counted(output: Any, is_said: bool) -> None:
    """Small cards hold fewer scores at once than the estimate, which knows no card; a card reports less than its name says."""
    reported = {size: int(0.98 * (size << 30)) for size in CARDS}
    less = {size: chunk_bytes("cuda") - chunk_bytes("cuda", num_bytes) >> 20 for size, num_bytes in reported.items()}
    assert less == {8: 256, 12: 256, 16: 0, 24: 0}
    config = transformers.GPT2Config(
        vocab_size=4096, n_embd=48, n_layer=1, n_head=2, tie_word_embeddings=output != "full"
    )
    options = {"auto_class": "AutoModelForCausalLM", "step": TrainingStep(batch_size=2, length=16), "output": output}
    shown = " ".join(lv.estimate_memory(config, 100, **options).notes)
    assert (
        "Scores count in chunks of 512 MiB; cards of 8 and 12 GB hold 256 MiB at once, which is less." in shown
    ) == is_said


def test_cards_are_told_for_a_gpu_at_the_batch_that_was_asked_for() -> None:
    config = transformers.XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, pad_token_id=1)
    step = TrainingStep(batch_size=4, length=64)
    estimate = lv.estimate_memory(config, 6_000, step=step)
    assert {size: tuple(fits.values()) for size, fits in estimate.cards.items()} == {
        8: (True, True),
        12: (True, True),
        16: (True, True),
        24: (True, True),
    }
    large = lv.estimate_memory(config, 6_000, step=TrainingStep(batch_size=64, length=128))
    assert large.cards[8] == {"full": False, "partial": True}
    shown = str(large)
    assert "a card of 8 GB" in shown
    assert "The step: batch 64 × 128, on a GPU." in shown
    assert "an estimate" in shown
    assert large.to_dict()["cards"] == large.cards


def test_a_tied_model_with_adapters_is_told_to_save_little() -> None:
    def freeze(model: nn.Module) -> None:
        model.requires_grad_(False)

    tied = lv.estimate_memory(small_model("llama-tied"), used_vocabulary(), adapt=freeze)
    assert tied.saves_little
    assert SAVES_LITTLE in str(tied)
    trained = lv.estimate_memory(small_model("llama-tied"), used_vocabulary())
    assert not trained.saves_little
    assert SAVES_LITTLE not in str(trained)


def test_a_shrunk_model_has_no_twin() -> None:
    model = lv.shrink_(small_model("llama-tied"), used_vocabulary())
    assert lv.estimate_memory(model, step=ON_CPU).no_peak == "the model is shrunk already; give its config"
