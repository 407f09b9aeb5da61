"""The door to transformers' Trainer. Shrinking, saving and resuming need none of it: torch's own hooks do that work."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from leanvocab.checkpoint import clear_leftovers, sibling, written_whole
from leanvocab.delta import (
    check_vocabularies,
    find_base,
    load_delta,
    paths_of_tables,
    warn_of_another_mode,
    widen_tables,
    write_delta,
)
from leanvocab.errors import NotShrunkError, OptimizerError, SettingsError
from leanvocab.headers import is_weights_file
from leanvocab.layout import CONFIG, FILES, OPTIMIZER, is_delta, read_delta
from leanvocab.merge import merge_checkpoint
from leanvocab.model import shrink_, status
from leanvocab.optimizerstates import check_states_can_be_saved, read_full_states
from leanvocab.partial_module import PartialModule
from leanvocab.vocabulary import PartialVocabulary

_OPTIMIZER_STATES = "optimizer.pt"  # as the Trainer calls it


class LeanVocabCallback(TrainerCallback):
    """Shrinks a Trainer's model when the Trainer is made, and checks before the first step that training will train it.

    `Trainer(model, args, train_dataset=…, callbacks=[LeanVocabCallback(vocabulary)])`; options go to `shrink_`. A model that
    is shrunk already is left as it is, and so is a callback without a vocabulary. The model stays shrunk after training,
    and saves in full; call `merge_(model)` for the full tables in memory.

    With `checkpoints="delta"` each checkpoint, once the Trainer has written it, becomes a delta with partial optimizer
    states: as large as what was trained. `resume_from_delta(trainer, checkpoint)` goes on from one. `base` says where the
    pretrained checkpoint lies, if the model does not.
    """

    def __init__(
        self,
        vocabulary: PartialVocabulary | None = None,
        *,
        checkpoints: Literal["full", "delta"] = "full",
        base: str | os.PathLike[str] | None = None,
        **options: Any,
    ):
        if checkpoints not in ("full", "delta"):
            raise SettingsError(f"checkpoints={checkpoints!r}: expected 'full' or 'delta'")
        self.vocabulary, self.options = vocabulary, options
        self.checkpoints, self.base = checkpoints, base

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Shrinks, before the Trainer builds an optimizer."""
        if model is not None and self.vocabulary is not None and not status(model):
            shrink_(model, self.vocabulary, **self.options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that the optimizer holds the tables that are to be trained: `NotShrunkError`, `OptimizerError`."""
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        if model is None or optimizer is None:
            return
        shrunk = [module for module in model.modules() if isinstance(module, PartialModule)]
        if not shrunk:
            what = (
                "give it a vocabulary, or call shrink_(model, vocabulary) before the Trainer is made"
                if self.vocabulary is None
                else "the Trainer has made another model since (model_init): call shrink_(model, vocabulary) within model_init"
            )
            raise NotShrunkError(f"{type(model).__name__} is not shrunk, though LeanVocabCallback is there: {what}")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for module in shrunk:
            if module.weight.requires_grad and id(module.weight) not in held:
                raise OptimizerError(
                    f"{module.table.name}: the optimizer does not hold the partial table, and would not train it; make the "
                    "optimizer after shrink_, or hand it over: shrink_(…, optimizer=optimizer)"
                )
        if self.checkpoints == "delta":
            find_base(model, self.base)  # now, not at the first save
            check_states_can_be_saved(optimizer, {id(module.weight) for module in shrunk})
            for path in Path(args.output_dir).glob(".checkpoint-*.leanvocab-*"):
                clear_leftovers(path.with_name(path.name[1:].partition(".leanvocab-")[0]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes a delta of the checkpoint that the Trainer has just written, where that was asked for."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        model = kwargs.get("model")
        if self.checkpoints == "delta" and state.is_world_process_zero and model is not None and folder.is_dir():
            make_delta_of_checkpoint(folder, model, kwargs.get("optimizer"), self.base)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Loads the best checkpoint where that is a delta, which the Trainer could not."""
        model, best = kwargs.get("model"), state.best_model_checkpoint
        if args.load_best_model_at_end and model is not None and best and is_delta(Path(best)):
            load_delta(model, best, base=self.base)


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
