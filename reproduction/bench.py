"""Bench that all tables are made with: the paper, the sources, and what was counted and built before."""

from dataclasses import dataclass

from reproduction.counting import Counter
from reproduction.paper import Paper
from reproduction.sizes import Sizes
from reproduction.sources import Sources


@dataclass
class Bench:
    """Counts and models are made once, however many tables use them."""

    sources: Sources
    counter: Counter
    sizes: Sizes

    @classmethod
    def of(cls, sources: Sources, progress: bool | None = None) -> "Bench":
        return cls(sources, Counter(sources, progress), Sizes(sources))

    @property
    def paper(self) -> Paper:
        return self.sources.paper
