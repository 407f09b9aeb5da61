"""The door to peft: LoRA on a shrunk model, and the trained rows as an adapter of peft's trainable-tokens kind."""

import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanvocab.checkpoints.base_checkpoint import find_base
from leanvocab.checkpoints.delta_format import read_delta
from leanvocab.checkpoints.delta_saving import write_delta
from leanvocab.errors import ModelError
from leanvocab.extras import require
from leanvocab.files.atomic_folders import written_whole
from leanvocab.files.tensor_files import read_tensor
from leanvocab.output.layer import RemapLinear
from leanvocab.partial.module import PartialModule, partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_WEIGHTS = "adapter_model.safetensors"


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
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"peft cannot put LoRA on {type(model).__name__}: {error}") from error


def export_trainable_tokens(
    model: nn.Module, directory: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the kept rows of a shrunk model as an adapter, whole or not at all: `PeftModel.from_pretrained(full, directory)`.

    Such an adapter holds rows alone, so nothing else may have been trained.

    Raises:
        ModelError: other tensors than the rows were trained, the tables have different vocabularies, or an output layer has
            a bias, which peft leaves out.
        NotShrunkError, CheckpointError: as `save_delta` does.
        MissingExtraError: peft is not installed.
    """
    peft = require("peft", extra="peft")
    from safetensors.torch import save_file

    checkpoint = find_base(model, base)
    _check_biases(model)
    with written_whole(directory) as (folder, target):
        parts = folder / "delta"
        parts.mkdir()
        write_delta(model, parts, checkpoint)
        vocabulary, tensors = _trained_rows(model, parts)
        config = peft.TrainableTokensConfig(
            token_indices=vocabulary.token_ids.tolist(),
            target_modules=list(tensors),
            base_model_name_or_path=checkpoint.name,
            revision=checkpoint.revision,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        named = {f"base_model.model.{path}.trainable_tokens_delta": rows for path, rows in tensors.items()}
        save_file(named, folder / _WEIGHTS, metadata={"format": "pt"})
        shutil.rmtree(parts)
    return target


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
    named = _named_modules(model, shrunk)
    rows = {path: read_tensor(file, names[id(module.table)]) for path, module in named.items()}
    return next(iter(delta.tables.values())).vocabulary, rows


def _named_modules(model: nn.Module, shrunk: dict[str, PartialModule]) -> dict[str, PartialModule]:
    """The modules that the adapter names. Where the config says that weights are tied, peft itself finds what is tied to the
    input embeddings, and an adapter that names it too cannot be loaded."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return shrunk
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    return {path: module for path, module in shrunk.items() if module is inputs or module.weight is not inputs.weight}


def _check_biases(model: nn.Module) -> None:
    for path, module in model.named_modules():
        bias = module.bias if isinstance(module, RemapLinear) else None
        if bias is not None and bool(bias.any()):
            raise ModelError(
                f"{path} has a bias, which peft's trainable tokens leave out of the output layer: the adapter would score "
                "otherwise. Save a delta (save_delta) or the whole model (save_full)"
            )
