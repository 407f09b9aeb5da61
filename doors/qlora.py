"""QLoRA: a model in 4 bits, whose vocabulary matrices are the largest tensors left."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from doors import models, pairs
from doors.peft import lora
from doors.registry import Outcome, door
from doors.trainer import APART, train

NEEDS: dict[str, Any] = {"needs": ("bitsandbytes", "peft"), "pip": "'leanvocab[peft,quantization]'"}
_CLOSE: dict[str, Any] = {
    "expects": "close",
    "within": 1e-2,
    "why": f"{APART}, which layers that compute in bf16 make larger",
}


def quantized(folder: Path, family: str, dtype: str = "bfloat16") -> Any:
    """A model of a family, saved in a folder and loaded in 4 bits."""
    from transformers import BitsAndBytesConfig

    base = folder / "base"
    if not base.exists():
        models.make_model(family).to(getattr(torch, dtype)).save_pretrained(base)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    kind: Any = type(models.make_model(family))
    return kind.from_pretrained(base, quantization_config=four_bits, dtype=dtype, device_map="cpu")


@pairs.one_thread
def pair(
    folder: Path, family: str = "llama-untied", output: str | None = None, prepare: bool = True, **options: Any
) -> Outcome:
    """Shrunk, prepared for training in few bits, LoRA on; the adapter that is saved is compared, and the losses."""
    from peft import prepare_model_for_kbit_training

    runs = []
    for name in ("full", "lean"):
        model: nn.Module = quantized(folder, family)
        if name == "lean":
            models.lean(model, output=output, **options.get("shrink", {}))
        if prepare:
            model = prepare_model_for_kbit_training(model)
        model = lora(target_modules="all-linear", **options.get("lora", {}))(model)
        trained = {key: value for key, value in options.items() if key not in ("lora", "shrink")}
        runs.append(train(model, folder / name, task="causal-lm", **trained))
    return pairs.compare(*runs, models.left_out())


@door('QLoRA (nf4, double quantization) after shrink_, untied (output="full")', **NEEDS)
def untied(folder: Path) -> Outcome:
    return pair(folder)


@door('QLoRA after shrink_, tied (output="frozen")', **NEEDS, **_CLOSE)
def tied(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "frozen")


@door('QLoRA after shrink_, tied (output="frozen", frozen_rows="host")', **NEEDS, **_CLOSE)
def tied_host(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "frozen", shrink={"frozen_rows": "host"})


@door(
    'QLoRA after shrink_, bf16 autocast, tied (output="frozen")',
    expects="different",
    why="losses are close; of LoRA's first gradients, which start from zero, Adam makes steps of full size, so that small ones "
    "change their sign where bf16 rounds the two products of the output layer apart",
    **NEEDS,
)
def tied_bf16(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "frozen", bf16=True, learning_rate=1e-4)


@door(
    'QLoRA after shrink_, tied (output="restricted")',
    expects="different",
    why="the softmax is over the kept rows alone, which is another objective",
    **NEEDS,
)
def tied_restricted(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "restricted")


@door('QLoRA after shrink_, untied (output="frozen")', **NEEDS, **_CLOSE)
def frozen(folder: Path) -> Outcome:
    return pair(folder, "llama-untied", "frozen")


@door('QLoRA without prepare_model_for_kbit_training, untied (output="full")', **NEEDS)
def unprepared(folder: Path) -> Outcome:
    return pair(folder, prepare=False)


@door('QLoRA, bf16 autocast, bitsandbytes\' paged AdamW in 8 bits, untied (output="full")', **NEEDS)
def paged(folder: Path) -> Outcome:
    return pair(folder, bf16=True, optim="paged_adamw_8bit")


@door('QLoRA with modules_to_save=[embedding], untied (output="full")', **NEEDS)
def with_table(folder: Path) -> Outcome:
    return pair(folder, lora={"modules_to_save": ["embed_tokens"]})


@door(
    "QLoRA, shrunk after prepare_model_for_kbit_training",
    expects="refused",
    refuses="call shrink_ first and prepare_model_for_kbit_training after it",
    why="that function casts whole vocabulary matrices to fp32, which is the memory to be saved",
    **NEEDS,
)
def prepared_first(folder: Path) -> Outcome:
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(quantized(folder, "llama-untied"))
    return pairs.refused(lambda: models.lean(model))
