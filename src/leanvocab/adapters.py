"""The door to peft: LoRA on a shrunk model, and the trained rows as an adapter of peft's trainable-tokens kind."""

import copy
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from leanvocab.checkpoints.base_checkpoint import Base, find_base
from leanvocab.checkpoints.delta_format import read_delta
from leanvocab.checkpoints.delta_saving import check_not_sharded, tables_of, write_delta
from leanvocab.checkpoints.tensor_names import TensorNames
from leanvocab.errors import ModelError, NotShrunkError
from leanvocab.extras import require
from leanvocab.files.atomic_folders import written_whole
from leanvocab.files.tensor_files import read_tensor
from leanvocab.output.layer import RemapLinear
from leanvocab.partial.module import PartialModule, partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_WEIGHTS = "adapter_model.safetensors"
_ADAPTED = re.compile(
    r"\.(base_layer|modules_to_save|original_module)\b"
)  # what peft puts between a path and the module


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
            config, named = _beside_lora(model, checkpoint, peft)
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


def _beside_lora(model: Any, checkpoint: Base, peft: Any) -> tuple[Any, dict[str, Tensor]]:
    """The config of the active adapter with the rows in it, and the tensors of both."""
    configs = [model.peft_config[name] for name in model.active_adapters]
    if (
        len(configs) != 1
        or configs[0].peft_type != peft.PeftType.LORA
        or configs[0].trainable_token_indices is not None
    ):
        kinds = ", ".join(str(config.peft_type.value) for config in configs)
        raise ModelError(
            "rows go into one adapter with LoRA that has no trainable tokens of its own; active are: "
            f"{kinds or 'none'}. Save the adapter with peft (model.save_pretrained), and the rows in a full model (merge_, then "
            "merge_and_unload)"
        )
    inner = model.get_base_model()
    check_not_sharded(inner)
    _check_rest_is_the_base(inner, checkpoint)
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    named = _named_modules(inner, partial_modules(inner))
    _check_what_trains(model, named, tensors)
    config = copy.deepcopy(configs[0])
    config.trainable_token_indices = {
        path: module.table.vocabulary.token_ids.tolist() for path, module in named.items()
    }
    for path, module in named.items():
        tensors[f"base_model.model.{path}.token_adapter.trainable_tokens_delta"] = module.weight.detach()
    return config, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _check_rest_is_the_base(model: nn.Module, checkpoint: Base) -> None:
    names = TensorNames(model, checkpoint.weights)
    tables = tables_of(model)
    if not tables:
        raise NotShrunkError(f"{type(model).__name__} is not shrunk, so that nothing says which rows were trained")
    adapted = next(filter(_ADAPTED.search, partial_modules(model)), None)
    if adapted is not None:
        raise ModelError(
            f"{_ADAPTED.split(adapted)[0]} has an adapter of its own, and peft has no place for rows beside it; adapt other "
            "layers"
        )
    for table, path in tables.items():
        if not checkpoint.holds_rest_of(table, names.table(path)):
            raise ModelError(
                f"{table.name}: rows outside the vocabulary differ from those of {checkpoint.folder}, and an adapter does not "
                "hold them; name the checkpoint that the model comes from: base='folder'"
            )


def _check_what_trains(model: nn.Module, named: dict[str, PartialModule], tensors: dict[str, Tensor]) -> None:
    """Raises `ModelError` where rows that are to be saved do not train, or something trains that is not to be saved."""
    for path, module in named.items():
        if not module.weight.requires_grad:
            raise ModelError(
                f"{path}: its rows do not train, since peft freezes what has no adapter; after get_peft_model, and before the "
                "optimizer is built: model.get_input_embeddings().weight.requires_grad_(True), and that of "
                "model.get_output_embeddings() where it is shrunk too"
            )
    saved = {tensor.data_ptr() for tensor in tensors.values()} | {module.weight.data_ptr() for module in named.values()}
    training = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = [name for name, parameter in training.items() if parameter.data_ptr() not in saved]
    if others:
        raise ModelError(
            f"an adapter holds LoRA and rows alone, and {len(others)} other parameters train, the first of them {others[0]}; "
            "freeze them before training, or merge the adapter (merge_, then merge_and_unload) and save the whole model"
        )


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
        if isinstance(module, RemapLinear) and module.bias is not None and bool(module.bias.any()):
            raise ModelError(
                f"{path} has a bias, which peft's trainable tokens leave out of the output layer: the adapter would score "
                "otherwise. Save a delta (save_delta) or the whole model (save_full)"
            )
