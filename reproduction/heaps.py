"""Figure 2: unique against total tokens of the GLUE data sets with GPT-2's vocabulary, and Heaps' law fitted to them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from leanvocab.errors import DataError
from leanvocab.extras import require
from leanvocab.vocabulary.counts import TokenCounts, count_tokens
from reproduction.counting import token_ids
from reproduction.grid import Entry, Grid, Result
from reproduction.paper import GPT2, TASKS, Task
from reproduction.sources import Sources

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROWS_A_POINT = 100  # rows read between two points of a growth curve
_FEWEST_POINTS = 3
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#6E6E6E"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "leanvocab",  # the same figure gives the same file
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class HeapsFit:
    """V = K · N^β, V unique of N tokens, by least squares on the logarithms."""

    k: float
    beta: float
    beta_error: float
    r_squared: float
    num_points: int

    def unique(self, totals: Any) -> Any:
        """Unique tokens that the law expects of so many tokens."""
        return self.k * np.asarray(totals, dtype=float) ** self.beta


def fit_heaps(totals: Sequence[int], uniques: Sequence[int]) -> HeapsFit:
    """Fit Heaps' law (Heaps, 1978).

    Raises:
        DataError: there are fewer than three points.
    """
    if len(totals) < _FEWEST_POINTS:
        raise DataError(f"a Heaps curve needs {_FEWEST_POINTS} complete data sets or more, got {len(totals)}")
    x, y = np.log(np.asarray(totals, dtype=float)), np.log(np.asarray(uniques, dtype=float))
    spread = float(((x - x.mean()) ** 2).sum())
    beta = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    intercept = float(y.mean() - beta * x.mean())
    residual = float(((y - intercept - beta * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    error = math.sqrt(residual / (len(x) - 2) / spread)
    return HeapsFit(math.exp(intercept), beta, error, 1 - residual / total if total else 1.0, len(x))


@dataclass(frozen=True)
class Growth:
    """Unique and total tokens of a data set as it is read; the last pair is all of it."""

    label: str
    is_complete: bool
    totals: tuple[int, ...]
    uniques: tuple[int, ...]


def figure2(sources: Sources, folder: Path, tasks: Sequence[Task] = TASKS, progress: bool | None = None) -> Result:
    """Count, fit and draw; writes figure2.png and figure2.svg into the folder."""
    tokenizer = sources.tokenizer(GPT2)
    held = [task for task in tasks if sources.glue(task).splits]
    total = sum(sources.glue(task).num_rows for task in held)
    disable = None if progress is None else not progress
    with tqdm(total=total, unit=" rows", unit_scale=True, desc="figure 2", disable=disable) as bar:
        grown = [_grow(sources, task, tokenizer, bar) for task in held]
    complete = [growth for growth in grown if growth.is_complete]
    fit = fit_heaps([growth.totals[-1] for growth in complete], [growth.uniques[-1] for growth in complete])
    names = tuple(_draw(grown, fit, len(tokenizer), folder / f"figure2.{suffix}") for suffix in ("png", "svg"))
    notes = (*_notes(fit, tasks, grown), *_wnli_note(grown, len(tokenizer)))
    records = {"figure2_points": _points(grown, len(tokenizer)), "figure2_heaps_fit": [asdict(fit)]}
    title = "Figure 2: unique and total tokens of the GLUE data sets, GPT-2's vocabulary"
    return Result("figure2", title, (_grid(grown, len(tokenizer)),), (), notes, records, names)


def _grow(sources: Sources, task: Task, tokenizer: Any, bar: Any) -> Growth:
    data = sources.glue(task)
    counts = TokenCounts(np.zeros(len(tokenizer), dtype=np.int64))
    totals, uniques = [], []
    for batch in token_ids(data, tokenizer, bar, _ROWS_A_POINT):
        counts = counts + count_tokens(batch, progress=False)
        totals.append(counts.num_tokens)
        uniques.append(len(counts.token_ids))
    return Growth(task.label, data.is_complete, tuple(totals), tuple(uniques))


def _points(grown: Sequence[Growth], full_size: int) -> list[dict[str, Any]]:
    return [
        {
            "task": growth.label,
            "complete": growth.is_complete,
            "total_tokens": growth.totals[-1],
            "unique_tokens": growth.uniques[-1],
            "used_percent": 100 * growth.uniques[-1] / full_size,
        }
        for growth in grown
    ]


def _grid(grown: Sequence[Growth], full_size: int) -> Grid:
    rows = []
    for point in _points(grown, full_size):
        look: Any = "plain" if point["complete"] else "undecided"
        at_least = "" if point["complete"] else "≥ "
        texts = (
            f"{at_least}{point['total_tokens']:,}",
            f"{at_least}{point['unique_tokens']:,}",
            f"{at_least}{point['used_percent']:.2f} %",
        )
        rows.append((point["task"], tuple(Entry(text, look) for text in texts)))
    headings = ("Dataset", "total tokens", "unique tokens", f"of {full_size:,}")
    return Grid("Tokens of GPT-2; ≥: only a part of the data set is at hand", headings, tuple(rows))


def _notes(fit: HeapsFit, tasks: Sequence[Task], grown: Sequence[Growth]) -> tuple[str, ...]:
    law = (
        f"Heaps' law V = K · N^β, fitted to the {fit.num_points} complete data sets: K = {fit.k:.2f}, "
        f"β = {fit.beta:.3f} ± {fit.beta_error:.3f} (standard error), R² = {fit.r_squared:.3f} on log axes."
    )
    absent = [task.label for task in tasks if task.label not in {growth.label for growth in grown}]
    return (law, *([f"Not at hand: {', '.join(absent)}."] if absent else []))


def _wnli_note(grown: Sequence[Growth], full_size: int) -> list[str]:
    """Section 3 names a number for one data set."""
    found = [growth for growth in grown if growth.label == "WNLI" and growth.is_complete]
    return [
        f"The paper's text says that WNLI uses less than 4 % of the vocabulary: {100 * growth.uniques[-1] / full_size:.2f} %."
        for growth in found
    ]


# ------------------------------------------------------------------------------------------------------- drawing

# Where a label stands beside its point, in points right and up.
_LABEL_PLACES = {
    "CoLA": (-7, 4), "MRPC": (7, -10), "QNLI": (-6, 6), "QQP": (7, -10), "SST-2": (7, -11), "MNLI": (7, -10),
}  # fmt: skip


def _draw(grown: Sequence[Growth], fit: HeapsFit, full_size: int, path: Path) -> str:
    """Draw into a file of either kind, without pyplot; returns the file's name."""
    matplotlib = require("matplotlib", extra="plot")
    figures = require("matplotlib.figure", extra="plot")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = figures.Figure(figsize=(5.6, 3.8), layout="constrained", dpi=200, facecolor="white")
        axes = figure.subplots()
        _draw_law(axes, grown, fit, full_size)
        for growth in grown:
            _draw_growth(axes, growth)
        _dress(axes, grown, full_size)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=metadata)
    return path.name


def _draw_law(axes: "Axes", grown: Sequence[Growth], fit: HeapsFit, full_size: int) -> None:
    ends = [growth.totals[-1] for growth in grown]
    totals = np.geomspace(min(ends) / 2, max(ends) * 2, 100)
    label = f"Heaps' law: $V = {fit.k:.1f}\\,N^{{{fit.beta:.2f}}}$"
    below = fit.unique(totals) <= full_size  # the law knows no end, the vocabulary does
    axes.plot(totals[below], fit.unique(totals[below]), color=_ORANGE, linewidth=1.4, zorder=1, label=label)
    axes.axhline(full_size, color=_GREY, linewidth=1.0, linestyle="--", zorder=1)
    coordinates = ("axes fraction", "data")
    axes.annotate(
        f"whole vocabulary, {full_size:,}", (0.0, full_size), xycoords=coordinates, xytext=(4, -3),
        textcoords="offset points", color=_GREY, va="top", fontsize=8,
    )  # fmt: skip


def _draw_growth(axes: "Axes", growth: Growth) -> None:
    axes.plot(growth.totals, growth.uniques, color=_BLUE, linewidth=0.8, alpha=0.45, zorder=2)
    fill = _BLUE if growth.is_complete else "white"
    axes.plot(
        growth.totals[-1], growth.uniques[-1], "o", markersize=6, color=_BLUE, markerfacecolor=fill, zorder=3,
    )  # fmt: skip
    right, up = _LABEL_PLACES.get(growth.label, (8, -4))
    halo = require("matplotlib.patheffects", extra="plot").withStroke(linewidth=2.5, foreground="white")
    axes.annotate(
        growth.label, (growth.totals[-1], growth.uniques[-1]), xytext=(right, up), textcoords="offset points",
        ha="left" if right > 0 else "right", path_effects=[halo], zorder=4,
    )  # fmt: skip


def _dress(axes: "Axes", grown: Sequence[Growth], full_size: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=_BLUE, label="data set, all splits")]
    if not all(growth.is_complete for growth in grown):
        label = "only a part at hand (not fitted)"
        handles.append(Line2D([], [], marker="o", linestyle="", color=_BLUE, markerfacecolor="white", label=label))
    handles.append(Line2D([], [], color=_BLUE, linewidth=0.8, alpha=0.45, label="as it is read"))
    handles += [line for line in axes.get_lines() if str(line.get_label()).startswith("Heaps")]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=8)
    ends = [growth.totals[-1] for growth in grown]
    bottoms = [growth.uniques[-1] for growth in grown]
    axes.set(
        xscale="log", yscale="log", xlabel="total tokens", ylabel="unique tokens",
        xlim=(min(ends) / 2, max(ends) * 2), ylim=(min(bottoms) / 2, full_size * 1.35),
    )  # fmt: skip
    axes.grid(which="major", color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
