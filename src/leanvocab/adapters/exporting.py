"""The trained rows of a shrunk model, with LoRA where it has it, as one adapter of peft's on disk."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from leanvocab.adapters.rows_alone import rows_alone
from leanvocab.adapters.rows_beside_lora import beside_lora
from leanvocab.checkpoints.base_checkpoint import find_base
from leanvocab.errors import ModelError
from leanvocab.extras import require
from leanvocab.files.atomic_folders import written_whole
from leanvocab.output.layer import RemapLinear

_WEIGHTS = "adapter_model.safetensors"


def export_trainable_tokens(
    model: nn.Module, directory: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the kept rows of a shrunk model as an adapter, whole or not at all: `PeftModel.from_pretrained(full, directory)`.

    Such an adapter holds rows alone, so nothing else may have been trained; where the model has LoRA of peft's, it holds both.

    Raises:
        ModelError: other tensors than the rows (and LoRA) were trained, the tables have different vocabularies, or an output
            layer has a bias, which peft leaves out.
        NotShrunkError, CheckpointError: as `save_delta` does.
        MissingExtraError: peft is not installed.
    """
    peft = require("peft", extra="peft")
    checkpoint = find_base(model, base)
    _check_biases(model)
    with written_whole(directory) as (folder, target):
        if hasattr(model, "peft_config"):
            config, named = beside_lora(model, checkpoint, peft)
        else:
            config, named = rows_alone(model, checkpoint, folder, peft)
        config.base_model_name_or_path, config.revision = checkpoint.name, checkpoint.revision
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file(named, folder / _WEIGHTS, metadata={"format": "pt"})
    return target


def _check_biases(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, RemapLinear) and module.bias is not None and bool(module.bias.any()):
            raise ModelError(
                f"{path} has a bias, which peft's trainable tokens leave out of the output layer: the adapter would score "
                "otherwise. Save a delta (save_delta) or the whole model (save_full)"
            )
