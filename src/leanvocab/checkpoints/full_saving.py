"""Full checkpoints of a shrunk model, whole or not at all, whatever lies in their folder (docs/decisions/full-checkpoints.md).

transformers itself is unsafe over the folder that a model was loaded from: from one file to shards it leaves a stale
`model.safetensors` beside them, which wins on reload; from shards to one file it deletes the shards first, so that a full
disk leaves no weights.
"""

import os
from pathlib import Path
from typing import Any

from torch import nn

from leanvocab.checkpoints.delta_format import FILES, TRAINING_NOTE, is_delta, write_training_note
from leanvocab.errors import CheckpointError
from leanvocab.files.atomic_folders import written_whole
from leanvocab.files.headers import SAVED_WEIGHTS, SINGLE
from leanvocab.partial.module import partial_modules
from leanvocab.partial.sharded import first_sharded


def save_full(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> Path:
    """Saves the model with its full vocabulary in `directory`, whole or not at all, and returns the folder.

    Other files that lie there (tokenizer, notes) stay; weights of an earlier save do not. Saving over the folder that the
    model came from is safe, whatever its sharding. `options` go to `save_pretrained` (`max_shard_size=`, …); a model without
    that method is written as `model.safetensors`. Beside a model that is shrunk with output="restricted", which is another
    objective, `leanvocab_training.json` says so.

    Raises:
        CheckpointError: `directory` is no folder, or other processes hold some of the rows (FSDP2: hand over what was
            gathered, `state_dict=…`).
        OSError: it cannot be written. In both cases nothing has changed.

    Source: paper, Section 4: the model stays "structurally identical".
    """
    sharded = first_sharded(model)
    if sharded is not None and options.get("state_dict") is None:  # one alone would wait for the others
        raise CheckpointError(
            f"{sharded}: its rows are sharded over processes, and one process writes the folder; gather the state dict in all of "
            "them (get_model_state_dict with StateDictOptions(full_state_dict=True, cpu_offload=True)) and hand it to the first "
            "one's save_full(model, folder, state_dict=…)"
        )
    tables = [module.table for module in partial_modules(model).values()]
    restricted = {table.name: table.vocabulary for table in tables if table.output == "restricted"}
    stale = FILES if is_delta(Path(directory)) else (TRAINING_NOTE,)  # a delta's weights are an earlier save's too
    with written_whole(directory, keeps=lambda name: name not in stale and not SAVED_WEIGHTS.fullmatch(name)) as (
        folder,
        target,
    ):
        write_model(model, folder, options)
        if restricted:
            write_training_note(folder, restricted)
    return target


def write_model(model: nn.Module, folder: Path, options: dict[str, Any]) -> None:
    """Writes into `folder` what the model itself saves, by `save_pretrained` where it has that."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, **options)  # type: ignore[operator]
        return
    if options:
        raise CheckpointError(f"{type(model).__name__} has no save_pretrained to take the options {', '.join(options)}")
    from safetensors.torch import save_model

    save_model(model, str(folder / SINGLE), metadata={"format": "pt"})
