"""The door to transformers' Trainer. Shrinking, saving and resuming need none of it: torch's own hooks do that work."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from leanvocab.embedding import RemapEmbedding
from leanvocab.errors import NotShrunkError, OptimizerError
from leanvocab.model import shrink_, status
from leanvocab.vocabulary import PartialVocabulary


class LeanVocabCallback(TrainerCallback):  # type: ignore[misc]
    """Shrinks a Trainer's model when the Trainer is made, and checks before the first step that training will train it.

    `Trainer(model, args, train_dataset=…, callbacks=[LeanVocabCallback(vocabulary)])`; options go to `shrink_`. A model that
    is shrunk already is left as it is, and so is a callback without a vocabulary. The model stays shrunk after training,
    and saves in full; call `merge_(model)` for the full tables in memory.
    """

    def __init__(self, vocabulary: PartialVocabulary | None = None, **options: Any):
        self.vocabulary, self.options = vocabulary, options

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Shrinks, before the Trainer builds an optimizer."""
        if model is not None and self.vocabulary is not None and not status(model):
            shrink_(model, self.vocabulary, **self.options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that the optimizer holds the tables that are to be trained: `NotShrunkError`, `OptimizerError`."""
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        if model is None or optimizer is None:
            return
        shrunk = [module for module in model.modules() if isinstance(module, RemapEmbedding)]
        if not shrunk:
            raise NotShrunkError(
                f"{type(model).__name__} is not shrunk, though LeanVocabCallback is there: give it a vocabulary, or call "
                "shrink_(model, vocabulary) before the Trainer is made"
            )
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for module in shrunk:
            if module.weight.requires_grad and id(module.weight) not in held:
                raise OptimizerError(
                    f"{module.table.name}: the optimizer does not hold the partial table, and would not train it; make the "
                    "optimizer after shrink_, or hand it over: shrink_(…, optimizer=optimizer)"
                )
