"""Going on with a Trainer from a checkpoint, a delta too."""

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from leanvocab.checkpoints.delta_format import read_delta
from leanvocab.checkpoints.delta_loading import check_vocabularies, paths_of_tables, warn_of_another_mode, widen_tables
from leanvocab.checkpoints.tensor_names import saved_names_loaded
from leanvocab.checkpoints.training_runs import full_checkpoint
from leanvocab.errors import OptimizerError, SettingsError


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
    delta, _ = read_delta(Path(os.path.realpath(checkpoint)))
    paths = paths_of_tables(model, delta)
    check_vocabularies(model, delta, paths, widen)
    warn_of_another_mode(model, delta)
    if widen:
        if trainer.optimizer is not None:
            raise OptimizerError(
                "widen=True makes new tables, and the trainer has an optimizer already: let the trainer build it"
            )
        widen_tables(model, delta, paths)
    with full_checkpoint(checkpoint, base=base) as folder:
        return train_from(trainer, folder)


def train_from(trainer: Trainer, checkpoint: Path | None) -> Any:
    """Trains from a full checkpoint on, or from the start; weights are found under the names that checkpoints have for them."""
    assert trainer.model is not None
    with saved_names_loaded(trainer.model):
        return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
