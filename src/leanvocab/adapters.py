"""The door to peft: the trained rows as an adapter of its trainable-tokens kind, which other tools load too."""

import os
import shutil
from pathlib import Path

from torch import nn

from leanvocab.checkpoint import written_whole
from leanvocab.delta import find_base, write_delta
from leanvocab.errors import MissingExtraError, ModelError
from leanvocab.layout import read_delta
from leanvocab.partial_module import PartialModule
from leanvocab.tensorfiles import read_tensor

_WEIGHTS = "adapter_model.safetensors"


def export_trainable_tokens(
    model: nn.Module, directory: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the kept rows of a shrunk model as an adapter, whole or not at all: `PeftModel.from_pretrained(full, directory)`.

    Such an adapter holds rows alone, so nothing else may have been trained.

    Raises:
        ModelError: other tensors than the rows were trained, or the tables have different vocabularies.
        NotShrunkError, CheckpointError: as `save_delta` does.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import TrainableTokensConfig
    except ImportError as error:
        raise MissingExtraError("exporting an adapter needs peft: pip install 'leanvocab[peft]'") from error
    from safetensors.torch import save_file

    found = find_base(model, base)
    with written_whole(directory) as (folder, target):
        parts = folder / "delta"
        parts.mkdir()
        write_delta(model, parts, found)
        said, file = read_delta(parts)
        others = [name for name in said.tensors if name not in said.tables]
        if others:
            raise ModelError(
                f"an adapter of trainable tokens holds rows alone, and {len(others)} other tensors differ from the base, the "
                f"first of them {others[0]}; freeze them before training, or save a delta: save_delta"
            )
        digests = {table.vocabulary.digest for table in said.tables.values()}
        if len(digests) != 1:
            raise ModelError(
                f"an adapter of trainable tokens has one list of ids, found tables with {len(digests)} vocabularies"
            )
        paths = {path: module for path, module in model.named_modules() if isinstance(module, PartialModule)}
        names = {id(paths[name.removesuffix(".weight")].table): name for name in said.tables}
        tensors = {
            f"base_model.model.{path}.trainable_tokens_delta": read_tensor(file, names[id(module.table)])
            for path, module in paths.items()
        }
        vocabulary = next(iter(said.tables.values())).vocabulary
        config = TrainableTokensConfig(
            token_indices=vocabulary.token_ids.tolist(),
            target_modules=list(paths),
            base_model_name_or_path=found.name,
            revision=found.revision,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        shutil.rmtree(parts)
    return target
