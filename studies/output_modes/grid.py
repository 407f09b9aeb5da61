"""Runs of the study: the fine-tunings, and the base that they are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MODES = ("full", "frozen", "restricted")
VOCABULARIES = ("trained", "dataset")
"""trained: the tokens of the text that is trained on. dataset: those of every split of that data set."""


@dataclass(frozen=True)
class Settings:
    """Amounts that are trained and measured; all in tokens of one row after the other, packed."""

    num_steps: int = 30
    batch_size: int = 4
    length: int = 64
    num_held_out: int = 20  # rows of each held-out text
    num_new_tokens: int = 20

    @property
    def num_rows(self) -> int:
        """Rows that are trained on; each is seen once."""
        return self.num_steps * self.batch_size


@dataclass(frozen=True)
class Cell:
    """One run. `vocabulary` is None where nothing is shrunk: the base, and full fine-tuning."""

    mode: str
    vocabulary: str | None = None
    learning_rate: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Its file's name, without the suffix."""
        rate = None if self.learning_rate is None else f"{self.learning_rate:.0e}"
        return "--".join(part for part in (self.mode, self.vocabulary, rate, f"seed{self.seed}") if part)


def cells(learning_rates: Sequence[float], seeds: Sequence[int]) -> Iterator[Cell]:
    """Every mode, learning rate and vocabulary with the first seed; then the first learning rate with the other seeds."""
    first, *others = seeds
    yield Cell("base", seed=first)
    for rate in learning_rates:
        for vocabulary in VOCABULARIES:
            yield from _modes(vocabulary, rate, first)
    for seed in others:
        yield Cell("base", seed=seed)
        yield from _modes(VOCABULARIES[0], learning_rates[0], seed)


def _modes(vocabulary: str, rate: float, seed: int) -> Iterator[Cell]:
    for mode in MODES:
        if mode != "full":
            yield Cell(mode, vocabulary, rate, seed)
        elif vocabulary == VOCABULARIES[0]:  # a full run has no vocabulary: it is measured against each
            yield Cell(mode, None, rate, seed)
