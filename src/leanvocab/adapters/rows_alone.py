"""Trained rows as an adapter of their own: peft's trainable tokens, taken of a delta, which says what else was trained."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanvocab.checkpoints.base_checkpoint import Base
from leanvocab.checkpoints.delta_format import read_delta
from leanvocab.checkpoints.delta_saving import write_delta
from leanvocab.errors import ModelError
from leanvocab.files.tensor_files import read_tensor
from leanvocab.partial.module import PartialModule, partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


def rows_alone(model: nn.Module, checkpoint: Base, folder: Path, peft: Any) -> tuple[Any, dict[str, Tensor]]:
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


def named_modules(model: nn.Module, shrunk: dict[str, PartialModule]) -> dict[str, PartialModule]:
    """The modules that the adapter names. Where the config says that weights are tied, peft itself finds what is tied to the
    input embeddings, and an adapter that names it too cannot be loaded."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return shrunk
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    return {path: module for path, module in shrunk.items() if module is inputs or module.weight is not inputs.weight}
