"""Numbers on what data use of a vocabulary."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from leanvocab.errors import RESIZE_FIRST, VocabularyError
from leanvocab.reports.memory_estimate import format_ratio
from leanvocab.vocabulary.counts import TokenCounts
from leanvocab.vocabulary.coverage import counts_by_rank, rows_to_cover

if TYPE_CHECKING:
    from rich.table import Table

_COVERED_PERCENTS = (50, 90, 99)
_NUM_FREQUENT = 5


@dataclass(frozen=True)
class VocabularyUse:
    """Numbers on how much of a vocabulary some data use. rich shows them as a table.

    `coverage_rows[ratio]`: the fewest rows whose tokens make up that share of all tokens (0–1).
    `most_frequent`: tokens (or their ids, without a tokenizer) and their counts.
    """

    num_tokens: int
    used_rows: int
    once_rows: int
    full_rows: int
    coverage_rows: dict[float, int]
    most_frequent: tuple[tuple[str, int], ...]

    @property
    def used_ratio(self) -> float:
        """Used rows over all rows, 0–1."""
        return self.used_rows / self.full_rows

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain values, ready for JSON."""
        return {
            **asdict(self),
            "used_ratio": self.used_ratio,
            "coverage_rows": {str(ratio): rows for ratio, rows in self.coverage_rows.items()},
            "most_frequent": [list(pair) for pair in self.most_frequent],
        }

    def __rich__(self) -> "Table":
        from rich.markup import escape
        from rich.table import Table

        printed = Table(title="Vocabulary use", show_header=False)
        printed.add_column()
        printed.add_column(justify="right")
        printed.add_column(justify="right")
        printed.add_row("tokens counted", f"{self.num_tokens:,}", "")
        printed.add_row("rows in the full vocabulary", f"{self.full_rows:,}", "100.0 %")
        printed.add_row("rows used", f"{self.used_rows:,}", format_ratio(self.used_ratio), style="bold")
        printed.add_row(
            "of these, once", f"{self.once_rows:,}", format_ratio(self.once_rows / self.full_rows), end_section=True
        )
        for ratio, rows in self.coverage_rows.items():
            printed.add_row(
                f"rows that cover {ratio:.0%} of the tokens", f"{rows:,}", format_ratio(rows / self.full_rows)
            )
        printed.add_section()
        for token, count in self.most_frequent:
            printed.add_row(f"most frequent: {escape(token)}", f"{count:,}", "")
        return printed


def vocabulary_use(counts: TokenCounts, *, full_size: int | None = None, tokenizer: Any = None) -> VocabularyUse:
    """Measures how much of the vocabulary the counted data use (paper, Section 3).

    Raises `VocabularyError` where the full size is given neither here nor by the counts, or is below a counted id.
    """
    full_rows = _full_rows(counts, full_size)
    by_rank = counts_by_rank(counts.counts)
    covered = {percent / 100: rows for percent, rows in rows_to_cover(counts.counts, _COVERED_PERCENTS).items()}
    frequent = np.argsort(-counts.counts, kind="stable")[: min(_NUM_FREQUENT, len(by_rank))].tolist()
    return VocabularyUse(
        num_tokens=counts.num_tokens,
        used_rows=len(by_rank),
        once_rows=int((by_rank == 1).sum()),
        full_rows=full_rows,
        coverage_rows=covered,
        most_frequent=tuple((_name(token_id, tokenizer), int(counts.counts[token_id])) for token_id in frequent),
    )


def _full_rows(counts: TokenCounts, full_size: int | None) -> int:
    full_rows = full_size if full_size is not None else counts.full_size
    if full_rows is None:
        raise VocabularyError("the full size of the vocabulary is unknown: give full_size=")
    if len(counts.token_ids) and counts.token_ids[-1] >= full_rows:
        raise VocabularyError(
            f"token id {counts.token_ids[-1]:,} was counted, the full size is {full_rows:,}; {RESIZE_FIRST}"
        )
    return full_rows


def _name(token_id: int, tokenizer: Any) -> str:
    return f"id {token_id}" if tokenizer is None else str(tokenizer.convert_ids_to_tokens(token_id))
