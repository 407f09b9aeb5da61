"""The protocol of tasks: all that the main job asks of one. Classification and language modeling complete it."""

from typing import Any, ClassVar, Protocol

from leanvocab.errors import DataError
from leanvocab.finetune.settings import DataSettings, FineTuneSettings
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


class Task(Protocol):
    """A task whose splits and columns were found and checked. Its public fields stand in the run's `finetune.json`."""

    train_split: str
    eval_split: str | None

    has_new_head: ClassVar[bool] = False
    """True where a head is new if the checkpoint has none of that size; else what is missing of it is announced."""

    @property
    def understood(self) -> dict[str, Any]:
        """What was understood of the data, in plain values: the task, its columns by what they hold, and names of classes."""

    @property
    def token_columns(self) -> tuple[str, ...]:
        """Columns of the encoded data with ids to count."""
        return ("input_ids",)

    @property
    def replaces_head(self) -> bool:
        """True where a head is new though the checkpoint has one of that size, which was trained for something else."""
        return False

    @property
    def draws_words(self) -> bool:
        """True where training draws words from the kept ids, which are counted for it with the full vocabulary too."""
        return False

    def set_labels(self, config: Any) -> None:
        """Writes into a model's config what its head is for."""
        return  # labels that are token ids need nothing

    def check_network(self, network: Any, settings: DataSettings) -> None:
        """Raises an error where the model itself cannot do the task: before it trains for hours."""
        return  # any model with such a head will do

    def encode(self, splits: Any, tokenizer: Any, settings: DataSettings) -> tuple[Any, tuple[str, ...]]:
        """Token ids of every split, with `labels` where they are known; and what a user should know of them."""

    def batches(
        self, encoded: Any, network: Any, tokenizer: Any, kept: PartialVocabulary | None, settings: FineTuneSettings
    ) -> tuple[Any, tuple[Any, ...]]:
        """The collator, and the callbacks that a Trainer needs with it."""

    def scoring(self) -> dict[str, Any]:
        """A Trainer's arguments that make scores of what the model gives."""


def find_eval_split(splits: Any, settings: DataSettings) -> str | None:
    """The split to validate on: the one that is named, or the first whose name begins with validation; else None.

    Raises:
        DataError: there is no split of the name that was given.
    """
    if settings.eval_split is None:
        return next((name for name in sorted(splits) if name.startswith("validation")), None)
    if settings.eval_split not in splits:
        raise DataError(
            f"there is no split {settings.eval_split!r} to validate on (eval_split); the data set has "
            f"{', '.join(splits)}"
        )
    return settings.eval_split
