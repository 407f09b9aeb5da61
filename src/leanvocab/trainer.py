"""The door to transformers' Trainer. Shrinking, saving and resuming need none of it: torch's own hooks do that work."""

import inspect
import os
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import Trainer, TrainerCallback

from leanvocab.checkpoints.base_checkpoint import find_base
from leanvocab.checkpoints.delta_format import is_delta, read_delta
from leanvocab.checkpoints.delta_loading import (
    check_vocabularies,
    load_delta,
    paths_of_tables,
    warn_of_another_mode,
    widen_tables,
)
from leanvocab.checkpoints.delta_saving import check_not_sharded
from leanvocab.checkpoints.optimizer_states import check_states_can_be_saved
from leanvocab.checkpoints.training_runs import full_checkpoint, make_delta_of_checkpoint
from leanvocab.errors import NotShrunkError, OptimizerError, SettingsError
from leanvocab.files.atomic_folders import clear_leftovers
from leanvocab.model.shrink import shrink_
from leanvocab.model.status import check_shrunk_as, status
from leanvocab.partial.module import partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


class LeanVocabCallback(TrainerCallback):
    """Shrinks a Trainer's model when the Trainer is made, and checks before the first step that training will train it.

    `Trainer(…, callbacks=[LeanVocabCallback(vocabulary)])`; options go to `shrink_`. A model that is shrunk already is left as
    it is, or an error if that is not as asked for here. It stays shrunk after training, and saves in full (else `merge_` it).

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
        inspect.signature(shrink_).bind(None, vocabulary, **options)  # a TypeError for what is no option of it
        self.vocabulary, self.options = vocabulary, options
        self.checkpoints, self.base, self._known = checkpoints, base, 0  # the id of the model that was looked at

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Shrinks, before the Trainer builds an optimizer; `AlreadyShrunkError` for a model that is shrunk otherwise."""
        if model is not None and status(model):
            check_shrunk_as(model, self.vocabulary, self.options)
        elif model is not None and self.vocabulary is not None:
            shrink_(model, self.vocabulary, **self.options)
        self._known = id(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Checks that tables are shrunk as asked for (`NotShrunkError`, …), and the optimizer holds them (`OptimizerError`)."""
        optimizer = kwargs.get("optimizer")
        if model is None or optimizer is None:
            return
        if not (shrunk := list(partial_modules(model).values())):
            what = (
                "give it a vocabulary, or call shrink_(model, vocabulary) before the Trainer is made"
                if self.vocabulary is None
                else "the Trainer has made another model since (model_init): call shrink_(model, vocabulary) within model_init; "
                "or the callback came after the Trainer was made (add_callback): give it with callbacks="
            )
            raise NotShrunkError(f"{type(model).__name__} is not shrunk, though LeanVocabCallback is there: {what}")
        if id(model) != self._known:  # model_init has made another one, and shrunk it
            check_shrunk_as(model, self.vocabulary, self.options)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for module in shrunk:
            if module.weight.requires_grad and id(module.weight) not in held:
                raise OptimizerError(
                    f"{module.table.name}: the optimizer does not hold the partial table, and would not train it; make the "
                    "optimizer after shrink_, or hand it over: shrink_(…, optimizer=optimizer)"
                )
        if self.checkpoints == "delta":
            check_not_sharded(model)  # now, not at the first save
            find_base(model, self.base)
            check_states_can_be_saved(optimizer, {id(module.weight) for module in shrunk})
            for path in Path(args.output_dir).glob(".checkpoint-*.leanvocab-*"):
                clear_leftovers(path.with_name(path.name[1:].partition(".leanvocab-")[0]))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Makes a delta of the checkpoint that the Trainer has just written, where that was asked for."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.checkpoints == "delta" and state.is_world_process_zero and model is not None and folder.is_dir():
            make_delta_of_checkpoint(folder, model, kwargs.get("optimizer"), self.base)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Loads the best checkpoint where that is a delta, which the Trainer could not."""
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and model is not None and best and is_delta(Path(best)):
            load_delta(model, best, base=self.base)


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
        return trainer.train(resume_from_checkpoint=str(folder))
