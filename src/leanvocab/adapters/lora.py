"""LoRA on a shrunk model."""

from typing import Any

from torch import nn

from leanvocab.errors import ModelError
from leanvocab.extras import require

# What peft trains whole in a classifier: every module whose name ends so.
_HEADS = ("classifier", "score")


def add_lora(model: nn.Module, adapter_type: str, rank: int, *, few_bits: bool = False) -> Any:
    """A model with LoRA on all linear layers but its output's; a new classification head trains beside it and is saved with it.

    `adapter_type` is peft's word for the task, such as CAUSAL_LM or SEQ_CLS.

    Raises `MissingExtraError` where peft is not installed, and `ModelError` where peft finds no layer that it can adapt.
    """
    peft = require("peft", extra="peft")
    if few_bits:  # after the model was shrunk: it casts vocabulary matrices to fp32
        model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(
        task_type=adapter_type,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.05,
        target_modules="all-linear",
        exclude_modules=_below_heads(model) if adapter_type == "SEQ_CLS" else None,
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"peft cannot put LoRA on {type(model).__name__}: {error}") from error


def _below_heads(model: nn.Module) -> list[str] | None:
    """Layers that peft takes for heads by the end of their names, such as DistilBERT's pre_classifier; it knows the others."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in names if name.endswith(_HEADS) and name.rpartition(".")[2] not in _HEADS] or None
