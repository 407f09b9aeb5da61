"""Tables and plots of what data use of a vocabulary, and of what training holds in memory.

Plots need matplotlib (`pip install 'leanvocab[plot]'`); the format follows the path's suffix: .png, .svg or .pdf.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leanvocab.errors import VocabularyError
from leanvocab.extras import require
from leanvocab.reports.footprint import Footprint
from leanvocab.reports.memory import MemoryEstimate
from leanvocab.vocabulary.counts import TokenCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

_COVERAGES = (0.5, 0.9, 0.99)
_NUM_FREQUENT = 5

# Two colours of the Okabe-Ito palette, which colour-blind readers tell apart, and greys.
_BLUE, _ORANGE, _GREY, _LIGHT = "#0072B2", "#D55E00", "#8C8C8C", "#C9C9C9"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.hashsalt": "leanvocab",  # the same figure gives the same file
}


@dataclass(frozen=True)
class VocabularyUse:
    """How much of a vocabulary some data use. rich shows it as a table.

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
        return _use_table(self)


def vocabulary_use(counts: TokenCounts, *, full_size: int | None = None, tokenizer: Any = None) -> VocabularyUse:
    """How much of the vocabulary the counted data use (paper, Section 3).

    Raises `VocabularyError` where the full size is given neither here nor by the counts, or is below a counted id.
    """
    full_rows = _full_rows(counts, full_size)
    by_rank = _counts_by_rank(counts)
    cumulative = np.cumsum(by_rank)
    total = int(cumulative[-1]) if len(cumulative) else 0
    covered = {ratio: int(np.searchsorted(cumulative, ratio * total)) + 1 if total else 0 for ratio in _COVERAGES}
    frequent = np.argsort(-counts.counts, kind="stable")[: min(_NUM_FREQUENT, len(by_rank))].tolist()
    return VocabularyUse(
        num_tokens=total,
        used_rows=len(by_rank),
        once_rows=int((by_rank == 1).sum()),
        full_rows=full_rows,
        coverage_rows=covered,
        most_frequent=tuple((_name(token_id, tokenizer), int(counts.counts[token_id])) for token_id in frequent),
    )


def plot_vocabulary_use(
    counts: TokenCounts, path: str | os.PathLike[str], *, full_size: int | None = None, title: str | None = None
) -> Path:
    """Draw how often tokens occur by rank, and how much of the text the most frequent rows cover, into a file."""
    use = vocabulary_use(counts, full_size=full_size)
    by_rank = _counts_by_rank(counts)
    with _figure(7.2, 3.0) as figure:
        frequency, coverage = figure.subplots(1, 2)
        _draw_frequency(frequency, by_rank, use)
        _draw_coverage(coverage, by_rank, use)
        figure.suptitle(
            title or f"{use.num_tokens:,} tokens use {use.used_rows:,} of {use.full_rows:,} rows", fontsize=10
        )
        figure.savefig(path, **_metadata(path))
    return Path(path)


def plot_memory(estimates: MemoryEstimate | Mapping[str, MemoryEstimate], path: str | os.PathLike[str]) -> Path:
    """Draw what training holds, full beside partial, the vocabulary's part apart, into a file.

    Several models are given by label.
    """
    by_label = {estimates.model: estimates} if isinstance(estimates, MemoryEstimate) else dict(estimates)
    with _figure(7.2, 0.75 + 0.65 * len(by_label)) as figure:
        axes = figure.subplots()
        unit = _unit(list(by_label.values()))
        for position, (label, estimate) in enumerate(by_label.items()):
            _write_left(axes, position, label, points=-48)
            _draw_bars(axes, position, estimate, unit)
        _dress_bars(axes, list(by_label.values()), unit)
        figure.savefig(path, **_metadata(path))
    return Path(path)


def _full_rows(counts: TokenCounts, full_size: int | None) -> int:
    full_rows = full_size if full_size is not None else counts.full_size
    if full_rows is None:
        raise VocabularyError("the full size of the vocabulary is unknown: give full_size=")
    if len(counts.token_ids) and counts.token_ids[-1] >= full_rows:
        raise VocabularyError(f"token id {counts.token_ids[-1]:,} was counted, the full size is {full_rows:,}")
    return full_rows


def _counts_by_rank(counts: TokenCounts) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Counts of the used ids, the most frequent first."""
    return np.sort(counts.counts[counts.token_ids])[::-1]


def _name(token_id: int, tokenizer: Any) -> str:
    return f"id {token_id}" if tokenizer is None else str(tokenizer.convert_ids_to_tokens(token_id))


def _use_table(use: VocabularyUse) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Vocabulary use", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_row("tokens counted", f"{use.num_tokens:,}", "")
    table.add_row("rows in the full vocabulary", f"{use.full_rows:,}", "100.0 %")
    table.add_row("rows used", f"{use.used_rows:,}", _percent(use.used_ratio), style="bold")
    table.add_row("of these, once", f"{use.once_rows:,}", _percent(use.once_rows / use.full_rows), end_section=True)
    for ratio, rows in use.coverage_rows.items():
        table.add_row(f"rows that cover {ratio:.0%} of the tokens", f"{rows:,}", _percent(rows / use.full_rows))
    table.add_section()
    for token, count in use.most_frequent:
        table.add_row(f"most frequent: {escape(token)}", f"{count:,}", "")
    return table


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


@contextmanager
def _figure(width_inches: float, height_inches: float) -> "Iterator[Figure]":
    """A figure of its own, outside pyplot, so that neither windows nor the caller's settings are touched."""
    matplotlib = require("matplotlib", extra="plot")
    figures = require("matplotlib.figure", extra="plot")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield figures.Figure(figsize=(width_inches, height_inches), layout="constrained", dpi=200, facecolor="white")


def _metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """No dates in what is written: the same figure gives the same file."""
    dated = {".svg": "Date", ".pdf": "CreationDate"}.get(Path(path).suffix)
    return {"metadata": {dated: None}} if dated else {}


def _draw_frequency(axes: "Axes", by_rank: Any, use: VocabularyUse) -> None:
    ranks = np.arange(1, len(by_rank) + 1)
    axes.loglog(ranks, by_rank, color=_BLUE, linewidth=1.5)
    axes.axvspan(max(use.used_rows, 1), use.full_rows, color=_LIGHT, alpha=0.5, linewidth=0, label="not used")
    axes.legend(loc="lower left", frameon=False)
    axes.set(xlabel="rank of the token", ylabel="occurrences", xlim=(1, use.full_rows), title="Occurrences by rank")


def _draw_coverage(axes: "Axes", by_rank: Any, use: VocabularyUse) -> None:
    percent = 100 * np.cumsum(by_rank) / max(use.num_tokens, 1)
    rows = np.arange(1, len(by_rank) + 1)
    axes.plot(np.append(rows, use.full_rows), np.append(percent, 100.0), color=_BLUE, linewidth=1.5)
    axes.axvspan(use.used_rows, use.full_rows, color=_LIGHT, alpha=0.5, linewidth=0)
    axes.axvline(use.used_rows, color=_ORANGE, linewidth=1.2, linestyle="--")
    left = use.used_ratio > 0.5
    axes.annotate(
        f"{use.used_rows:,} used ({_percent(use.used_ratio)})",
        (use.used_rows, 50),
        xytext=(-4 if left else 4, 0),
        textcoords="offset points",
        color=_ORANGE,
        ha="right" if left else "left",
        va="center",
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.set(
        xlabel="rows, most frequent first",
        ylabel="tokens covered (%)",
        xlim=(0, use.full_rows),
        ylim=(0, 103),
        title="Tokens that rows cover",
    )


_BAR_HEIGHT = 0.36


def _unit(estimates: list[MemoryEstimate]) -> tuple[str, float]:
    """The largest unit that leaves the largest bar above one."""
    largest = max(estimate.full.total_bytes for estimate in estimates)
    return next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if largest >= unit[1]), ("kB", 1e3))


def _draw_bars(axes: "Axes", position: int, estimate: MemoryEstimate, unit: tuple[str, float]) -> None:
    for offset, label, footprint in ((-0.2, "full", estimate.full), (0.2, "partial", estimate.partial)):
        place = position + offset
        rest, vocabulary = (num_bytes / unit[1] for num_bytes in _split_bytes(footprint))
        axes.barh(place, rest, _BAR_HEIGHT, color=_GREY)
        axes.barh(place, vocabulary, _BAR_HEIGHT, left=rest, color=_BLUE)
        saved = f"  (−{_percent(estimate.saved_ratio)})" if footprint is estimate.partial else ""
        axes.annotate(
            f"{rest + vocabulary:.2f}{saved}",
            (rest + vocabulary, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        _write_left(axes, place, label, points=-4, fontsize=8)


def _write_left(axes: "Axes", place: float, text: str, *, points: float, **style: Any) -> None:
    """Text that ends so many points left of the axis."""
    where = ("axes fraction", "data")
    axes.annotate(
        text,
        (0, place),
        xycoords=where,
        xytext=(points, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        **style,
    )


def _split_bytes(footprint: Footprint) -> tuple[int, int]:
    """Bytes of the layers, and of the vocabulary with its map."""
    vocabulary_bytes = footprint.vocabulary_bytes + footprint.remap_bytes
    return footprint.total_bytes - vocabulary_bytes, vocabulary_bytes


def _dress_bars(axes: "Axes", estimates: list[MemoryEstimate], unit: tuple[str, float]) -> None:
    from matplotlib.patches import Patch

    setups = sorted({f"{estimate.optimizer}, {estimate.precision}" for estimate in estimates})
    axes.set(
        xlabel=f"weights, gradients and optimizer states ({unit[0]}; {'; '.join(setups)})",
        ylim=(len(estimates) - 0.45, -0.55),
        xlim=(0, 1.2 * max(estimate.full.total_bytes for estimate in estimates) / unit[1]),
        yticks=[],
    )
    axes.legend(
        handles=[Patch(color=_GREY, label="layers"), Patch(color=_BLUE, label="vocabulary")],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
    )
