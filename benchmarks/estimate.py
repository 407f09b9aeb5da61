"""Estimated bytes beside measured ones: ten architectures, all weights and LoRA, with the full and a partial vocabulary.

Measured on a CPU in fp32 with fused AdamW: weights, gradients and states by their tensors, and the peak of the second step by
torch's profiler. Models are small and of published architectures, with random weights; rows have no padding.
"""

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._results import OURS, Figure, Result, Series
from benchmarks._rounds import Budget

ABOUT = About(
    name="estimate",
    measures="Bytes of training and the peak of a step: what `estimate_memory` says, over what is measured.",
    beside="torch's profiler",
    limit="the measured bytes",
    budget_seconds=400,
)
FULL = "full vocabulary"
KEPT = 3_000
_ENCODER = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32_000, "tie_word_embeddings": True}
_BART = {
    "vocab_size": 32_000, "d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
_DEBERTA = {**_ENCODER, "vocab_size": 32_000, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_CLASSIFICATION, _CAUSAL = "classification", "causal-lm"
# name → the class of its config, the task, its sizes
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "xlm-roberta": ("XLMRobertaConfig", _CLASSIFICATION, {**_ENCODER, "vocab_size": 50_000, "pad_token_id": 1}),
    "llama": ("LlamaConfig", _CAUSAL, _DECODER),
    "bert": ("BertConfig", _CLASSIFICATION, _ENCODER),
    "deberta-v2": ("DebertaV2Config", _CLASSIFICATION, _DEBERTA),
    "modernbert": ("ModernBertConfig", _CLASSIFICATION, {**_ENCODER, "intermediate_size": 512}),
    "gpt2": ("GPT2Config", _CAUSAL, {"n_layer": 4, "n_embd": 256, "n_head": 4}),
    "gemma3": ("Gemma3TextConfig", _CAUSAL, _DECODER),
    "qwen3, untied": ("Qwen3Config", _CAUSAL, {**_DECODER, "tie_word_embeddings": False}),
    "mt5": (
        "MT5Config",
        "seq2seq-lm",
        {"vocab_size": 32_000, "d_model": 256, "d_ff": 512, "num_layers": 4, "num_heads": 4},
    ),
    "bart": ("BartConfig", "seq2seq-lm", _BART),
}
QUICK = ("xlm-roberta", "llama")


def ratios(
    name: str, *, lora: bool, batch_size: int = 8, length: int = 128, **step: Any
) -> dict[str, dict[str, float]]:
    """Estimated over measured: the total of what is held, and the peak, with the full and with the partial vocabulary."""
    import leanvocab as lv
    from leanvocab.finetune.pretrained import estimate_run
    from leanvocab.finetune.settings import FineTuneSettings
    from leanvocab.reports.memory_estimate import TrainingStep

    settings = FineTuneSettings(task=MODELS[name][1], lora=lora)
    training = TrainingStep(batch_size=batch_size, length=length, on_cpu=True, **step)
    kept = lv.PartialVocabulary(range(KEPT), _config(name).vocab_size)
    estimate = estimate_run(_config(name), kept, settings, training)
    assert estimate.no_peak is None, estimate.no_peak
    compared = {}
    for who, footprint, vocabulary in ((FULL, estimate.full, None), (OURS, estimate.partial, kept)):
        held, peak = _measured(name, settings, training, vocabulary)
        others = footprint.remap_bytes + footprint.frozen_bytes + footprint.buffers_bytes
        compared[who] = {"held": (footprint.total_bytes - others) / held, "peak": footprint.peak_bytes / peak}
    return compared


def _config(name: str) -> Any:
    import transformers

    config_class, _, sizes = MODELS[name]
    return getattr(transformers, config_class)(**sizes)


def _measured(name: str, settings: Any, training: Any, kept: Any) -> tuple[int, int]:
    """Bytes of weights, gradients and states after a step, and the peak of the next one."""
    import torch
    import transformers
    from torch.profiler import ProfilerActivity, profile

    import leanvocab as lv
    from leanvocab.adapters.lora import add_lora
    from leanvocab.reports.state_bytes import held_bytes, tensor_bytes

    model: Any = getattr(transformers, settings.kind.auto_class).from_config(_config(name)).train()
    if kept is not None:
        lv.shrink_(model, kept)
    if settings.lora:
        model = add_lora(model, settings.kind.adapter_type, settings.lora_rank).train()
    model.config.use_cache = False
    if training.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(5, KEPT, (training.batch_size, training.length), generator=torch.Generator().manual_seed(0))
    labels = ids if settings.is_language_model else torch.zeros(len(ids), dtype=torch.long)

    def take_step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()

    take_step()
    held = held_bytes(model.parameters(), optimizer.state)
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        take_step()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = held["weights"] + held["states"] + sum(map(tensor_bytes, model.buffers()))
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return sum(held.values()), peak


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    names = QUICK[:1] if options.size == "small" else tuple(MODELS)
    for lora in (False, True):
        series, figures = [], []
        for name in names:
            with warnings.catch_warnings(action="ignore"):  # peft's, of GPT-2's layers and of names that are deprecated
                compared = ratios(name, lora=lora)
            for who, its in compared.items():
                series += [Series(f"{what}: estimated over measured", name, who, (its[what],), "×") for what in its]
                figures += [
                    Figure(f"{name}, {who}: {what}, off by", abs(its[what] - 1), "", bar=bar)
                    for what, bar in (("held", 0.02), ("peak", 0.10))
                ]
        yield Result(
            ABOUT.name, "Estimates beside measured bytes", "LoRA" if lora else "all weights", "cpu", tuple(series),
            tuple(figures), (), budget.spent, options.seconds,
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> list[Result]:
    options = read_options(parser(ABOUT), arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    main()
