"""A callback of transformers' Trainer. Saving and resuming need none of it: torch's own hooks do that work."""

import inspect
import os
import weakref
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback

from leanvocab.checkpoints.base_checkpoint import find_base
from leanvocab.checkpoints.delta_format import is_delta
from leanvocab.checkpoints.delta_loading import load_delta
from leanvocab.checkpoints.delta_saving import check_not_sharded
from leanvocab.checkpoints.optimizer_states import check_states_can_be_saved
from leanvocab.checkpoints.training_runs import make_delta_of_checkpoint
from leanvocab.errors import NotShrunkError, OptimizerError, SettingsError
from leanvocab.files.atomic_folders import clear_leftovers
from leanvocab.files.presence import is_folder
from leanvocab.model.shrink import shrink_
from leanvocab.model.status import check_shrunk_as, status
from leanvocab.partial.module import partial_modules
from leanvocab.trainers.data_sets import data_sets
from leanvocab.trainers.shrinking import around_the_model, find_rows, see_batches_of
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


class LeanVocabCallback(TrainerCallback):
    """Shrinks a Trainer's model, and checks before the first step that training will train it.

    `Trainer(…, callbacks=[LeanVocabCallback(vocabulary)])` shrinks it when the Trainer is made. Without a vocabulary it is shrunk
    when training begins, to what the data for training use, as `shrink_trainer_` does, and the optimizer that is there by then is
    handed over. Options go to `shrink_`. A model that is shrunk already is left as it is, or an error if that is not as asked for
    here. It stays shrunk after training, and saves in full (else `merge_` it).

    With `checkpoints="delta"` each checkpoint, once the Trainer has written it, becomes a delta with partial optimizer
    states: as large as what was trained. `resume_from_delta(trainer, checkpoint)` goes on from one. `base` says where the
    pretrained checkpoint lies, if the model does not.

    Raises:
        SettingsError, ModelError, DataError: as `shrink_trainer_` does, when training begins.
        VocabularyError, ModelError: as `shrink_` does, when the Trainer is made, where a vocabulary is given.

    Source: docs/training.md.
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
        self.checkpoints, self.base = checkpoints, base
        self._known: weakref.ref[nn.Module] | None = None  # the model that was looked at; its id may become another's

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": None}  # a weak reference cannot be copied

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Shrinks, before the Trainer builds an optimizer; `AlreadyShrunkError` for a model that is shrunk otherwise."""
        if model is not None and status(model):
            check_shrunk_as(model, self.vocabulary, self.options)
        elif model is not None and self.vocabulary is not None:
            shrink_(model, self.vocabulary, **self.options)
        self._known = None if model is None else weakref.ref(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Shrinks where no vocabulary was given, and checks that tables are shrunk as asked for (`NotShrunkError`, …), and that
        the optimizer holds them (`OptimizerError`).
        """
        optimizer = kwargs.get("optimizer")
        if model is None or optimizer is None:
            return
        if self.vocabulary is None and not status(model):
            self._shrink_to_data(args, model, optimizer, kwargs.get("train_dataloader"), kwargs.get("processing_class"))
        elif (self._known is None or self._known() is not model) and status(model):  # model_init has made another one
            check_shrunk_as(model, self.vocabulary, self.options)
        _check_held(model, optimizer)
        see_batches_of(args, model, kwargs.get("train_dataloader"))
        if self.checkpoints == "delta":
            check_not_sharded(model)  # now, not at the first save
            find_base(model, self.base)
            check_states_can_be_saved(optimizer, {id(module.weight) for module in partial_modules(model).values()})
            for path in Path(args.output_dir).glob(".checkpoint-*.leanvocab-*"):
                clear_leftovers(path.with_name(path.name[1:].partition(".leanvocab-")[0]))

    def _shrink_to_data(self, args: Any, model: nn.Module, optimizer: Any, batches: Any, tokenizer: Any) -> None:
        if around := around_the_model(args):
            raise NotShrunkError(
                f"{type(model).__name__} is not shrunk, and under {around} it is too late when training begins: call "
                "shrink_trainer_(trainer) before trainer.train(), or give LeanVocabCallback a vocabulary"
            )
        parts = data_sets("train_dataset", batches.dataset, batches.collate_fn, trains=True)
        vocabulary, options = find_rows(model, parts, tokenizer, args, self.options)
        shrink_(model, vocabulary, optimizer=optimizer, **options)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Makes a delta of the checkpoint that the Trainer has just written, where that was asked for."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.checkpoints == "delta" and state.is_world_process_zero and model is not None and is_folder(folder):
            make_delta_of_checkpoint(folder, model, kwargs.get("optimizer"), self.base)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Loads the best checkpoint where that is a delta, which the Trainer could not."""
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and model is not None and best and is_delta(Path(best)):
            load_delta(model, best, base=self.base)


def _check_held(model: nn.Module, optimizer: Any) -> None:
    """Raises where training would not train the partial tables: there are none, or the optimizer holds others."""
    shrunk = list(partial_modules(model).values())
    if not shrunk:
        raise NotShrunkError(
            f"{type(model).__name__} is not shrunk, though LeanVocabCallback has a vocabulary: the Trainer has made another "
            "model since (model_init): call shrink_(model, vocabulary) within model_init; or the callback came after the "
            "Trainer was made (add_callback): give it with callbacks="
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in shrunk:
        if module.weight.requires_grad and id(module.weight) not in held:
            raise OptimizerError(
                f"{module.table.name}: the optimizer does not hold the partial table, and would not train it; make the "
                "optimizer after shrink_, or hand it over: shrink_(…, optimizer=optimizer)"
            )
