"""New tokens alone: of a table some rows train, and every other id looks up its row as it was."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import leanvocab as lv
from doors import models, pairs
from doors.peft import NEEDS, logits_of, lora, on_the_full_base
from doors.registry import Outcome, door
from doors.trainer import CLOSE, FROZEN, train

_LEFT_OUT = (models.FULL_SIZE - 8) * models.DIM


def new_ids() -> list[int]:
    """Ids of which the data have many."""
    return sorted(models.token_rows()[:, 1:5].unique().tolist())[-8:]


def lean(model: nn.Module) -> nn.Module:
    return lv.shrink_(model, lv.PartialVocabulary(new_ids(), models.FULL_SIZE), on_missing="frozen")


def masked(model: nn.Module) -> nn.Module:
    """The reference: the full model, whose vocabulary matrices get no gradient in other rows."""
    keeps = torch.zeros(models.FULL_SIZE, 1)
    keeps[new_ids()] = 1

    def of_new_rows(gradient: Tensor) -> Tensor:
        return gradient * keeps

    for parameter in model.parameters():
        if parameter.shape == (models.FULL_SIZE, models.DIM) and parameter.requires_grad:
            parameter.register_hook(of_new_rows)
    return model


@door('Trainer, new tokens alone (on_missing="frozen")')
@pairs.one_thread
def of_trainer(folder: Path) -> Outcome:
    """Clipping sums the squares of all gradients, other rows' zeros among them: their order is the one thing that differs."""
    runs = [
        train(change(models.make_model("roberta")), folder / name, max_grad_norm=0)
        for name, change in (("full", masked), ("lean", lean))
    ]
    return pairs.compare(*runs, _LEFT_OUT)


@pairs.one_thread
def _beside_lora(folder: Path, family: str, task: str, within: float = 0.0) -> Outcome:
    """LoRA and rows are exported as one adapter: on the full base it gives what the full run gives."""
    from leanvocab.adapters.exporting import export_trainable_tokens

    models.make_model(family).save_pretrained(folder / "base")
    kind: Any = type(models.make_model(family))
    runs = []
    for name in ("full", "lean"):
        model: Any = kind.from_pretrained(folder / "base")
        model = lora()(lean(model) if name == "lean" else model)
        model.get_input_embeddings().weight.requires_grad_(True)
        run = train(model if name == "lean" else masked(model), folder / name, task=task, max_grad_norm=0)
        logits = logits_of(model)
        if name == "lean":
            export_trainable_tokens(model, folder / "adapter")
            base = kind.from_pretrained(folder / "base")
            logits = on_the_full_base(model, base, folder / "adapter", within)["logits of the full base"]
        run.tensors["logits of the full base"] = logits
        runs.append(run)
    return pairs.compare(*runs, _LEFT_OUT)


@door('peft LoRA and new tokens, exported as one adapter (on_missing="frozen")', **NEEDS)
def beside_lora(folder: Path) -> Outcome:
    return _beside_lora(folder, "llama", "classification")


@door('peft LoRA and new tokens, exported as one adapter, tied (on_missing="frozen")', **NEEDS, **CLOSE)
def beside_lora_tied(folder: Path) -> Outcome:
    return _beside_lora(folder, "llama-tied", "causal-lm", FROZEN)
