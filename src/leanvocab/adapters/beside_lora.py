"""LoRA and trained rows in one adapter: what it holds, and why it may not be had."""

import copy
import re
from typing import Any

from torch import Tensor, nn

from leanvocab.checkpoints.base_checkpoint import Base
from leanvocab.checkpoints.delta_saving import check_not_sharded, tables_of
from leanvocab.checkpoints.tensor_names import TensorNames
from leanvocab.errors import ModelError, NotShrunkError
from leanvocab.partial.module import PartialModule, partial_modules

# What peft puts between a path and the module.
_ADAPTED = re.compile(r"\.(base_layer|modules_to_save|original_module)\b")


def beside_lora(model: Any, checkpoint: Base, peft: Any) -> tuple[Any, dict[str, Tensor]]:
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
    named = named_modules(inner, partial_modules(inner))
    _check_what_trains(model, named, tensors)
    config = copy.deepcopy(configs[0])
    config.trainable_token_indices = {
        path: module.table.vocabulary.token_ids.tolist() for path, module in named.items()
    }
    for path, module in named.items():
        tensors[f"base_model.model.{path}.token_adapter.trainable_tokens_delta"] = module.weight.detach()
    return config, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _check_rest_is_the_base(model: nn.Module, checkpoint: Base) -> None:
    names = TensorNames(model, checkpoint.weights.shapes)
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


def named_modules(model: nn.Module, shrunk: dict[str, PartialModule]) -> dict[str, PartialModule]:
    """The modules that the adapter names. Where the config says that weights are tied, peft itself finds what is tied to the
    input embeddings, and an adapter that names it too cannot be loaded."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return shrunk
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    return {path: module for path, module in shrunk.items() if module is inputs or module.weight is not inputs.weight}
