"""QLoRA: a model in 4 bits, whose vocabulary matrices are the largest tensors left."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from doors import models, pairs
from doors.peft import logits_of, lora, on_the_full_base
from doors.registry import SLOW, Outcome, door
from doors.trainer import APART, FROZEN, train
from leanvocab.model.shrink import merge_
from leanvocab.model.status import status

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
    folder: Path,
    family: str = "llama-untied",
    output: str | None = None,
    prepare: bool = True,
    tables: int = 1,
    losses_within: float | None = None,
    **options: Any,
) -> Outcome:
    """Shrunk, prepared for training in few bits, LoRA on; losses, the adapter, and what it gives on the full base and merged."""
    from peft import prepare_model_for_kbit_training

    def base() -> nn.Module:
        return quantized(folder, family)

    prepared = prepare_model_for_kbit_training if prepare else lambda model: model
    trained = {key: value for key, value in options.items() if key not in ("lora", "shrink")}
    runs = []
    for name in ("full", "lean"):
        model = models.lean(base(), output=output, **options.get("shrink", {})) if name == "lean" else base()
        model = lora(target_modules="all-linear", **options.get("lora", {}))(prepared(model))
        if name == "full" and output == "frozen":
            models.masked(model)
        run = train(model, folder / name, task="causal-lm", **trained)
        within = FROZEN if output == "frozen" else 0.0
        run.tensors |= on_the_full_base(model, prepared(base()), folder / name / "final", within)
        run.tensors |= _merged(model, run.tensors["logits of the full base"], output)
        runs.append(run)
    if losses_within is not None:
        apart = max(abs(left - right) for left, right in zip(runs[0].losses, runs[1].losses, strict=True))
        assert apart <= losses_within, f"losses are {apart:.1e} apart, expected at most {losses_within:.0e}"
    return pairs.compare(*runs, models.left_out(tables))


def _merged(model: Any, logits: torch.Tensor, output: str | None) -> dict[str, torch.Tensor]:
    """The adapter merged into 4-bit layers, then the table: what is not in few bits, and logits where they are the same bits.

    Merging rounds to 4 bits again, where a difference in rounding can become one of 4 bits.
    """
    model.state_dict()  # a CPU's forward has laid 4-bit weights out anew; this undoes it, and peft merges what it finds
    merged = model.merge_and_unload()
    if status(merged):
        merge_(merged)
    found = {f"merged {name}": each.clone() for name, each in merged.named_parameters() if each.is_floating_point()}
    merged_logits = logits_of(merged)
    apart = pairs.relative_difference(logits, merged_logits)
    assert apart < 0.4, f"logits of the merged model are {apart:.1e} apart from those of the trained one"
    return found if output else found | {"logits of the merged model": merged_logits}


@door('QLoRA (nf4, double quantization) after shrink_, untied (output="full")', **NEEDS)
def untied(folder: Path) -> Outcome:
    return pair(folder)


@door('QLoRA after shrink_, tables for each layer (Gemma 4, output="full")', **NEEDS)
def per_layer(folder: Path) -> Outcome:
    return pair(folder, "gemma4-untied", "full", tables=3)


@door('QLoRA after shrink_, tied (output="frozen")', **NEEDS, **_CLOSE)
def tied(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "frozen")


@door('QLoRA after shrink_, tied (output="frozen", frozen_rows="host")', **NEEDS, **_CLOSE, **SLOW)
def tied_host(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "frozen", shrink={"frozen_rows": "host"})


@door(
    'QLoRA after shrink_, bf16 autocast, tied (output="frozen")',
    expects="different",
    why="losses are within 1e-3; of LoRA's first gradients, which start from zero, Adam makes steps of full size, so that small "
    "ones change their sign where bf16 rounds the two products of the output layer apart",
    **NEEDS,
    **SLOW,
)
def tied_bf16(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "frozen", losses_within=1e-3, bf16=True, learning_rate=1e-4)


@door(
    'QLoRA after shrink_, tied (output="restricted")',
    expects="different",
    why="the softmax is over the kept rows alone, which is another objective",
    **NEEDS,
    **SLOW,
)
def tied_restricted(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "restricted")


@door('QLoRA after shrink_, untied (output="frozen")', **NEEDS, **_CLOSE, **SLOW)
def frozen(folder: Path) -> Outcome:
    return pair(folder, "llama-untied", "frozen", tables=2)


@door('QLoRA without prepare_model_for_kbit_training, untied (output="full")', **NEEDS, **SLOW)
def unprepared(folder: Path) -> Outcome:
    return pair(folder, prepare=False)


@door(
    'QLoRA, bf16 autocast, optim="paged_adamw_8bit" (which pages on a GPU alone), untied (output="full")',
    **NEEDS,
    **SLOW,
)
def paged(folder: Path) -> Outcome:
    return pair(folder, bf16=True, optim="paged_adamw_8bit")


@door('QLoRA with modules_to_save=[embedding], untied (output="full")', **NEEDS, **SLOW)
def with_table(folder: Path) -> Outcome:
    return pair(folder, lora={"modules_to_save": ["embed_tokens"]})


@door('QLoRA with modules_to_save=[embedding], tied (output="frozen")', **NEEDS, **_CLOSE)
def tied_with_table(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "frozen", lora={"modules_to_save": ["embed_tokens"]})


@door('QLoRA with modules_to_save=[embedding, output layer], tied (output="frozen")', **NEEDS, **_CLOSE, **SLOW)
def tied_with_both(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", "frozen", lora={"modules_to_save": ["embed_tokens", "lm_head"]})


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
