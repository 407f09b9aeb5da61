"""Peaks of memory on the emulated accelerator in one training step, beside what `estimate_memory` says. Run as a script, it
prints them: `python tests/support/device_peaks.py`. Counted, not measured: what kernels take inside is not among it."""

import functools
import gc
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import accelerator
import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from triton_stand_in import kernels_run

from leanvocab.model.shrink import merge_, shrink_
from leanvocab.reports.memory import estimate_memory
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

FULL_SIZE, DIM, NUM_KEPT, NUM_TOKENS = 32_768, 256, 4_096, 512
MODES: dict[str, dict[str, Any] | None] = {
    "ordinary": None,
    "frozen, device": {"output": "frozen"},
    "frozen, host": {"output": "frozen", "frozen_rows": "host"},
    "restricted": {"output": "restricted"},
}
DTYPES = ("fp32", "bf16", "autocast bf16")


@dataclass(frozen=True)
class Peaks:
    """Bytes on the device: at the peak of each phase of the third step, of a batch more, and of the merge after it."""

    forward: int
    backward: int
    step: int
    merging: int
    merged: int
    accumulating: int  # in a batch whose gradients are added to those of another one
    activations: int  # of the model below its output layer, when the loss is computed
    copies: int  # of the weights of layers, that autocast makes and keeps while the model runs
    between_steps: int  # weights, states, frozen rows, and what finds the rows
    estimated: int  # by `estimate_memory`: weights, gradients, states, frozen rows and the loss at once

    @property
    def training(self) -> int:
        return max(self.forward, self.backward, self.step)


def kept_vocabulary() -> PartialVocabulary:
    chosen = np.random.default_rng(0).choice(np.arange(3, FULL_SIZE), NUM_KEPT - 3, replace=False)
    return PartialVocabulary(np.unique(np.r_[0, 1, 2, chosen]), FULL_SIZE)


def _model(dtype: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=FULL_SIZE, hidden_size=DIM, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)


def _estimated(dtype: str, mode: str) -> int:
    options = MODES[mode] or {}
    precision = "mixed" if dtype == "autocast bf16" else None
    vocabulary = kept_vocabulary()
    estimate = estimate_memory(_model(dtype), vocabulary, precision=precision, num_tokens=NUM_TOKENS, **options)
    return int((estimate.full if mode == "ordinary" else estimate.partial).total_bytes)


@functools.cache
def peaks_of(dtype: str, mode: str, *, computes: bool = False) -> Peaks:
    """Three steps of AdamW with a Llama of 32,768 × 256, tied, of which 4,096 rows are kept, on 512 tokens."""
    gc.collect()
    with accelerator.in_use(computes=computes):
        start_bytes = torch.get_device_module(accelerator.NAME).memory_allocated()
        peaks = _run(_model(dtype).to(accelerator.NAME).train(), dtype, mode)
    gc.collect()
    *peaks, activations, copies, between_steps = peaks
    peaks = [num_bytes - start_bytes for num_bytes in (*peaks, between_steps)]
    return Peaks(*peaks[:-1], activations, copies, peaks[-1], estimated=_estimated(dtype, mode))


@functools.cache
def loss_traffic(dtype: str, mode: str, *, by_kernels: bool = False) -> dict[str, float]:
    """Passes of the loss over its scores [tokens, columns], by operation: bytes that it reads and writes on the device, forward
    and backward, over the scores' bytes. Aside are products, and the arrival of rows from the host. `by_kernels`: those in
    Triton do what they can, run by a stand-in, for which the device has to compute."""
    run_kernels = kernels_run() if by_kernels else nullcontext(Counter[str]())
    with accelerator.in_use(computes=by_kernels), run_kernels as moved:
        model: Any = shrink_(_model(dtype).to(accelerator.NAME).train(), kept_vocabulary(), **(MODES[mode] or {}))
        hidden = torch.zeros(NUM_TOKENS, DIM, dtype=model.dtype, device=accelerator.NAME, requires_grad=True)
        labels = torch.zeros(NUM_TOKENS, dtype=torch.int64, device=accelerator.NAME)
        for _ in range(2):  # the first brings the frozen rows
            model.lm_head.weight.grad = hidden.grad = None  # what is added to them is no pass of the loss
            moved.clear()
            with accelerator.watch() as seen:
                torch.nn.functional.cross_entropy(model.lm_head(hidden), labels).backward()
    columns = NUM_KEPT if mode == "restricted" else FULL_SIZE
    scores_bytes = NUM_TOKENS * columns * model.dtype.itemsize
    passes: Counter[str] = Counter()
    for (name, line), num_bytes in seen.traffic.items():
        is_aside = name in ("mm", "addmm") or line.startswith("devices.py")
        passes[name] += 0 if is_aside else num_bytes / scores_bytes
    passes.update({name: num_bytes / scores_bytes for name, num_bytes in moved.items()})
    return {name: share for name, share in passes.most_common() if share > 0.01}


def _run(model: Any, dtype: str, mode: str) -> list[int]:
    vocabulary = kept_vocabulary()
    options = MODES[mode]
    if options is not None:
        shrink_(model, vocabulary, **options)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(vocabulary), (4, NUM_TOKENS // 4), generator=generator)
    ids = torch.tensor(vocabulary.token_ids)[chosen].to(accelerator.NAME)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    autocast = torch.autocast(accelerator.NAME, torch.bfloat16) if dtype == "autocast bf16" else nullcontext()
    for _ in range(3):
        with accelerator.watch() as forward, autocast:
            loss = model(input_ids=ids, labels=ids).loss
        with accelerator.watch() as backward:
            loss.backward()
        with accelerator.watch() as step:
            optimizer.step()
        del loss
        optimizer.zero_grad()
    between_steps = _allocated()
    for _ in range(2):
        with accelerator.watch() as accumulating:
            with autocast:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            del loss
    optimizer.zero_grad()
    activations, copies = _activations(model, ids, autocast)
    with accelerator.watch() as merging:
        if options is not None:
            merge_(model, optimizer=optimizer)
    peaks = [seen.peak_bytes for seen in (forward, backward, step, merging)]
    return [*peaks, _allocated(), accumulating.peak_bytes, activations, copies, between_steps]


def _allocated() -> int:
    return int(torch.get_device_module(accelerator.NAME).memory_allocated())


def _activations(model: Any, ids: torch.Tensor, autocast: Any) -> tuple[int, int]:
    """What the model below its output layer holds for its backward, and autocast's copies of weights beside it."""
    before = _allocated()
    with autocast:
        hidden = model.model(input_ids=ids)
        layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
        copies = sum(2 * layer.weight.numel() for layer in layers) if not isinstance(autocast, nullcontext) else 0
        held = _allocated() - before - copies
    del hidden
    return held, copies and copies + 2 * model.lm_head.weight.numel()


if __name__ == "__main__":
    for dtype in DTYPES:
        for mode in MODES:
            found = peaks_of(dtype, mode)
            parts = " · ".join(f"{name} {value / 1e6:.1f}" for name, value in vars(found).items())
            if mode != "ordinary" and not dtype.startswith("autocast"):
                for by_kernels in (False, True):
                    passes = loss_traffic(dtype, mode, by_kernels=by_kernels)
                    shares = {name: round(share, 1) for name, share in passes.items()}
                    how = " by kernels" if by_kernels else ""
                    print(f"{dtype:14} {mode:15} passes{how} {sum(passes.values()):.1f}", shares)
            print(f"{dtype:14} {mode:15} peak {found.training / 1e6:6.1f} MB ({parts})", flush=True)
