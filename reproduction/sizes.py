"""Configs → parameters, full and partial, with the classification head; on the meta device, without memory."""

import copy
from dataclasses import dataclass, field
from typing import Any

from leanvocab.reports.memory import estimate_memory
from leanvocab.vocabulary.counts import TokenCounts
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from reproduction.sources import Sources


@dataclass(frozen=True)
class Reduction:
    """Parameters of a model, and what of them a partial vocabulary leaves out."""

    num_parameters: int
    num_embedding_parameters: int
    num_saved: int

    @property
    def embedding_percent(self) -> float:
        """Reduction of the embedding parameters, as in Table 2's upper half."""
        return 100 * self.num_saved / self.num_embedding_parameters

    @property
    def model_percent(self) -> float:
        """Reduction of all parameters, as in Table 2's lower half."""
        return 100 * self.num_saved / self.num_parameters

    @property
    def saved_millions(self) -> float:
        """Parameters left out, as in Table 3."""
        return self.num_saved / 1e6


@dataclass
class Sizes:
    """Models of the paper on the meta device, each built once."""

    sources: Sources
    _modules: dict[tuple[str, int], Any] = field(default_factory=dict)

    def reduction(self, checkpoint: str, num_labels: int, vocabulary: PartialVocabulary) -> Reduction:
        """Share that a partial vocabulary leaves out of a checkpoint with a head for so many labels."""
        estimate = estimate_memory(self._module(checkpoint, num_labels), vocabulary)
        return Reduction(
            estimate.full.num_parameters,
            estimate.full.num_vocabulary_parameters,
            estimate.full.num_parameters - estimate.partial.num_parameters,
        )

    def full(self, checkpoint: str, num_labels: int = 2) -> Reduction:
        """A checkpoint's parameters; nothing is left out."""
        return self.reduction(checkpoint, num_labels, everything(self.sources.config(checkpoint).vocab_size))

    def _module(self, checkpoint: str, num_labels: int) -> Any:
        if (checkpoint, num_labels) not in self._modules:
            import torch
            from transformers import AutoModelForSequenceClassification

            config = copy.deepcopy(self.sources.config(checkpoint))
            config.num_labels = num_labels
            with torch.device("meta"):
                module = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
            self._modules[checkpoint, num_labels] = module
        return self._modules[checkpoint, num_labels]


def everything(full_size: int) -> PartialVocabulary:
    """The vocabulary of all rows."""
    return PartialVocabulary(range(full_size), full_size)


def used_alone(counts: TokenCounts, full_size: int) -> PartialVocabulary:
    """The tokens that occur and no others, special tokens included: the paper's way."""
    return PartialVocabulary.from_counts(counts, full_size=full_size)


def with_special(counts: TokenCounts, tokenizer: Any, config: Any) -> PartialVocabulary:
    """The library's default: every special token is kept as well, and what the model can insert by itself."""
    return PartialVocabulary.from_counts(counts, full_size=config.vocab_size, tokenizer=tokenizer, model=config)
