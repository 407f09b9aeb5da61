"""Trained rows, alone or beside LoRA, as an adapter of peft's trainable-tokens kind."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from leanvocab.adapters.beside_lora import beside_lora, named_modules
from leanvocab.checkpoints.base_checkpoint import Base, find_base
from leanvocab.checkpoints.delta_format import read_delta
from leanvocab.checkpoints.delta_saving import write_delta
from leanvocab.errors import ModelError
from leanvocab.extras import require
from leanvocab.files.atomic_folders import written_whole
from leanvocab.files.tensor_files import read_tensor
from leanvocab.output.layer import RemapLinear
from leanvocab.partial.module import partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

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

    Source: docs/new-tokens.md; the form is that of peft's trainable tokens (`peft/tuners/trainable_tokens`).
    """
    peft = require("peft", extra="peft")
    checkpoint = find_base(model, base)
    _check_biases(model)
    with written_whole(directory) as (folder, target):
        if hasattr(model, "peft_config"):
            config, named = beside_lora(model, checkpoint, peft)
        else:
            config, named = _rows_alone(model, checkpoint, folder, peft)
        config.base_model_name_or_path, config.revision = checkpoint.name, checkpoint.revision
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file(named, folder / _WEIGHTS, metadata={"format": "pt"})
    return target


def _rows_alone(model: nn.Module, checkpoint: Base, folder: Path, peft: Any) -> tuple[Any, dict[str, Tensor]]:
    """The config of an adapter of trainable tokens, and its tensors."""
    parts = folder / "delta"
    parts.mkdir()
    write_delta(model, parts, checkpoint)
    vocabulary, tensors = _trained_rows(model, parts)
    shutil.rmtree(parts)
    config = peft.TrainableTokensConfig(token_indices=vocabulary.token_ids.tolist(), target_modules=list(tensors))
    return config, {f"base_model.model.{path}.trainable_tokens_delta": rows for path, rows in tensors.items()}


def _trained_rows(model: nn.Module, parts: Path) -> tuple[PartialVocabulary, dict[str, Tensor]]:
    """The vocabulary of a delta, and the rows of each module that the adapter names."""
    delta, file = read_delta(parts)
    others = [name for name in delta.tensors if name not in delta.tables]
    if others:
        raise ModelError(
            f"an adapter of trainable tokens holds rows alone, and {len(others)} other tensors differ from the base, the "
            f"first of them {others[0]}; freeze them before training, or save a delta: save_delta"
        )
    digests = {table.vocabulary.digest for table in delta.tables.values()}
    if len(digests) != 1:
        raise ModelError(
            f"an adapter of trainable tokens has one list of ids, found tables with {len(digests)} vocabularies"
        )
    shrunk = partial_modules(model)
    names = {id(shrunk[name.removesuffix(".weight")].table): name for name in delta.tables}
    named = named_modules(model, shrunk)
    rows = {path: read_tensor(file, names[id(module.table)]) for path, module in named.items()}
    return next(iter(delta.tables.values())).vocabulary, rows


def _check_biases(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, RemapLinear) and module.bias is not None and bool(module.bias.any()):
            raise ModelError(
                f"{path} has a bias, which peft's trainable tokens leave out of the output layer: the adapter would score "
                "otherwise. Save a delta (save_delta) or the whole model (save_full)"
            )
