"""Training runs whose checkpoints are deltas: made of the Trainer's full ones, and full again to go on from."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanvocab.checkpoints.base_checkpoint import find_base
from leanvocab.checkpoints.delta_format import CONFIG, FILES, OPTIMIZER, read_delta
from leanvocab.checkpoints.delta_saving import write_delta
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.checkpoints.optimizer_states import read_full_states
from leanvocab.files.atomic_folders import sibling, written_whole
from leanvocab.files.headers import is_weights_file
from leanvocab.files.presence import is_file, is_there

_OPTIMIZER_STATES = "optimizer.pt"  # as the Trainer calls it


def make_delta_of_checkpoint(
    folder: Path, model: nn.Module, optimizer: Any, base: str | os.PathLike[str] | None = None
) -> None:
    """Puts a delta in the place of a full checkpoint of a Trainer, in one step; everything but weights and states stays."""
    replaced = (*FILES, _OPTIMIZER_STATES)
    with written_whole(folder, keeps=lambda name: not is_weights_file(name) and name not in replaced) as (new, _):
        write_delta(model, new, find_base(model, base), optimizer=optimizer, progress=False)


@contextlib.contextmanager
def full_checkpoint(
    checkpoint: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """A full checkpoint of a Trainer, made of a delta beside it, for as long as the block runs; any run resumes from it.

    Raises `CheckpointError` where delta and base do not fit one another.
    """
    source = Path(os.path.realpath(checkpoint))
    description, _ = read_delta(source)
    base_folder = find_base(None, base if base is not None else description.base_name).folder
    with sibling(source) as folder:
        merged = folder / "merged"
        merge_checkpoint(base=base_folder, delta=source, output=merged)
        # Weights and config of the merged folder, and what the Trainer wrote beside the delta, in one folder.
        for path in sorted(merged.iterdir()):
            if is_weights_file(path.name) or path.name == CONFIG:
                os.replace(path, folder / path.name)
        shutil.rmtree(merged)
        for path in sorted(source.iterdir()):
            if is_file(path) and path.name not in FILES:
                shutil.copy2(path, folder / path.name)
        if is_there(source / OPTIMIZER):
            torch.save(read_full_states(source, description), folder / _OPTIMIZER_STATES)
        yield folder
