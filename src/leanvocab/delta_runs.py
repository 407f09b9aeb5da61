"""Training runs whose checkpoints are deltas: made of the Trainer's full ones, and full again to go on from."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from leanvocab.checkpoint import sibling, written_whole
from leanvocab.delta import (
    check_vocabularies,
    find_base,
    paths_of_tables,
    warn_of_another_mode,
    widen_tables,
    write_delta,
)
from leanvocab.errors import OptimizerError, SettingsError
from leanvocab.headers import is_weights_file
from leanvocab.layout import CONFIG, FILES, OPTIMIZER, read_delta
from leanvocab.merge import merge_checkpoint
from leanvocab.optimizerstates import read_full_states

_OPTIMIZER_STATES = "optimizer.pt"  # as the Trainer calls it


def make_delta_of_checkpoint(
    folder: Path, model: nn.Module, optimizer: Any, base: str | os.PathLike[str] | None = None
) -> None:
    """Puts a delta in the place of a full checkpoint of a Trainer, in one step; everything but weights and states stays."""

    def keeps(name: str) -> bool:
        return not is_weights_file(name) and name not in (*FILES, _OPTIMIZER_STATES)

    with written_whole(folder, keeps=keeps) as (new, _):
        write_delta(model, new, find_base(model, base), optimizer=optimizer, progress=False)


def resume_from_delta(
    trainer: Trainer,
    checkpoint: str | os.PathLike[str],
    *,
    widen: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> Any:
    """Goes on training from a delta checkpoint, states included, and returns what `trainer.train` returns.

    The delta is made full beside the checkpoint for as long as loading and training take, since a Trainer resumes from
    full checkpoints alone. With `widen`, a model that was shrunk to another vocabulary is shrunk to the union of both.

    Raises:
        CheckpointError: the delta is of another vocabulary, or another base; before a step is taken.
        NotShrunkError: the trainer's model is not shrunk.
    """
    model = trainer.model
    if not isinstance(model, nn.Module):
        raise SettingsError("the trainer has no model yet; make it with one before resuming from a delta")
    said, _ = read_delta(Path(os.path.realpath(checkpoint)))
    paths = paths_of_tables(model, said)
    check_vocabularies(model, said, paths, widen)
    warn_of_another_mode(model, said)
    if widen and trainer.optimizer is not None:
        raise OptimizerError(
            "widen=True makes new tables, and the trainer has an optimizer already: let the trainer build it"
        )
    if widen:
        widen_tables(model, said, paths)
    with full_checkpoint(checkpoint, base=base) as folder:
        return trainer.train(resume_from_checkpoint=str(folder))


@contextlib.contextmanager
def full_checkpoint(
    checkpoint: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """A full checkpoint of a Trainer, made of a delta beside it, for as long as the block runs; any run resumes from it.

    Raises `CheckpointError` where delta and base do not fit one another.
    """
    source = Path(os.path.realpath(checkpoint))
    said, _ = read_delta(source)
    found = find_base(None, base if base is not None else said.base_name)
    with sibling(source) as folder:
        merged = folder / "merged"
        merge_checkpoint(base=found.folder, partial=source, output=merged)
        _collect(source, merged, folder)
        if (source / OPTIMIZER).exists():
            torch.save(read_full_states(source, said), folder / _OPTIMIZER_STATES)
        yield folder


def _collect(source: Path, merged: Path, folder: Path) -> None:
    """Weights and config of the merged folder, and what the Trainer wrote beside the delta, in one folder."""
    for path in sorted(merged.iterdir()):
        if is_weights_file(path.name) or path.name == CONFIG:
            os.replace(path, folder / path.name)
    shutil.rmtree(merged)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in FILES:
            shutil.copy2(path, folder / path.name)
