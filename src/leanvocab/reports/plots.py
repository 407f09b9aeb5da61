"""Plots of what data use of a vocabulary, and of what training holds in memory.

They need matplotlib (`pip install 'leanvocab[plot]'`); the format follows the path's suffix: .png, .svg or .pdf.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leanvocab.extras import require
from leanvocab.reports.memory_estimate import MemoryEstimate, format_ratio
from leanvocab.reports.vocabulary_use import VocabularyUse, vocabulary_use
from leanvocab.vocabulary.counts import TokenCounts
from leanvocab.vocabulary.coverage import SHOWN_PERCENTS, counts_by_rank, rows_to_cover

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def plot_vocabulary_use(
    counts: TokenCounts, path: str | os.PathLike[str], *, full_size: int | None = None, title: str | None = None
) -> Path:
    """Draw how often tokens occur by rank, and how much of the text the most frequent rows cover, into a file."""
    use = vocabulary_use(counts, full_size=full_size)
    by_rank = counts_by_rank(counts.counts)
    with _figure(path, 7.2, 3.0) as figure:
        frequency, coverage = figure.subplots(1, 2)
        _draw_frequency(frequency, by_rank, use)
        _draw_coverage(coverage, by_rank, use)
        _mark_coverage(coverage, rows_to_cover(counts.counts, SHOWN_PERCENTS[:-1]))
        figure.suptitle(
            title or f"{use.num_tokens:,} tokens use {use.used_rows:,} of {use.full_rows:,} rows", fontsize=10
        )
    return Path(path)


def plot_memory(estimates: MemoryEstimate | Mapping[str, MemoryEstimate], path: str | os.PathLike[str]) -> Path:
    """Draw what training holds, full beside partial, the vocabulary's part apart, into a file.

    Several models are given by label.
    """
    by_label = {estimates.model: estimates} if isinstance(estimates, MemoryEstimate) else dict(estimates)
    with _figure(path, 7.2, 0.75 + 0.65 * len(by_label)) as figure:
        axes = figure.subplots()
        unit = _unit(list(by_label.values()))
        for position, (label, estimate) in enumerate(by_label.items()):
            _write_left(axes, position, label, points=-48)
            _draw_bars(axes, position, estimate, unit)
        _dress_bars(axes, list(by_label.values()), unit)
    return Path(path)


@contextmanager
def _figure(path: str | os.PathLike[str], width_inches: float, height_inches: float) -> "Iterator[Figure]":
    """A figure that is written after the block; outside pyplot, so that neither windows nor the caller's settings are touched."""
    matplotlib = require("matplotlib", extra="plot")
    figures = require("matplotlib.figure", extra="plot")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        size = (width_inches, height_inches)
        figure = figures.Figure(figsize=size, layout="constrained", dpi=200, facecolor="white")
        yield figure
        # no dates in what is written: the same figure gives the same file
        dated = {".svg": "Date", ".pdf": "CreationDate"}.get(Path(path).suffix)
        figure.savefig(path, metadata={dated: None} if dated else None)


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
        f"{use.used_rows:,} used ({format_ratio(use.used_ratio)})",
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


def _mark_coverage(axes: "Axes", rows: Mapping[float, int]) -> None:
    """A dot where each share is covered, and its number of rows in words below."""
    axes.scatter(list(rows.values()), list(rows), s=10, color=_BLUE, zorder=3)
    said = "\n".join(f"{percent:g} % by {num_rows:,}" for percent, num_rows in rows.items())
    axes.annotate(said, (0.98, 0.04), xycoords="axes fraction", ha="right", va="bottom", color=_BLUE, fontsize=8)


_BAR_HEIGHT = 0.36


def _unit(estimates: list[MemoryEstimate]) -> tuple[str, float]:
    """The largest unit that leaves the largest bar above one."""
    largest = max(estimate.full.total_bytes for estimate in estimates)
    return next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if largest >= unit[1]), ("kB", 1e3))


def _draw_bars(axes: "Axes", position: int, estimate: MemoryEstimate, unit: tuple[str, float]) -> None:
    for offset, label, footprint in ((-0.2, "full", estimate.full), (0.2, "partial", estimate.partial)):
        height = position + offset
        vocabulary_bytes = footprint.vocabulary_bytes + footprint.remap_bytes
        layers_bytes = footprint.total_bytes - vocabulary_bytes - footprint.loss_bytes
        parts = {_GREY: layers_bytes, _BLUE: vocabulary_bytes, _ORANGE: footprint.loss_bytes}
        total = footprint.total_bytes / unit[1]
        end = 0.0
        for color, num_bytes in parts.items():
            if num_bytes:
                axes.barh(height, num_bytes / unit[1], _BAR_HEIGHT, left=end, color=color)
            end += num_bytes / unit[1]
        saved = f"  (−{format_ratio(estimate.saved_ratio)})" if footprint is estimate.partial else ""
        axes.annotate(
            f"{total:.2f}{saved}",
            (total, height),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        _write_left(axes, height, label, points=-4, fontsize=8)


def _write_left(axes: "Axes", height: float, text: str, *, points: float, **style: Any) -> None:
    """Text that ends so many points left of the axis."""
    axes.annotate(
        text,
        (0, height),
        xycoords=("axes fraction", "data"),
        xytext=(points, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        **style,
    )


def _dress_bars(axes: "Axes", estimates: list[MemoryEstimate], unit: tuple[str, float]) -> None:
    from matplotlib.patches import Patch

    setups = sorted({f"{estimate.optimizer}, {estimate.precision}" for estimate in estimates})
    has_loss = any(estimate.full.loss_bytes or estimate.partial.loss_bytes for estimate in estimates)
    loss = [Patch(color=_ORANGE, label="loss of a step")] if has_loss else []
    what = "weights, gradients, optimizer states and loss" if has_loss else "weights, gradients and optimizer states"
    axes.set(
        xlabel=f"{what} ({unit[0]}; {'; '.join(setups)})",
        ylim=(len(estimates) - 0.45, -0.55),
        xlim=(0, 1.2 * max(estimate.full.total_bytes for estimate in estimates) / unit[1]),
        yticks=[],
    )
    axes.legend(
        handles=[Patch(color=_GREY, label="layers"), Patch(color=_BLUE, label="vocabulary"), *loss],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2 + len(loss),
        frameon=False,
    )
