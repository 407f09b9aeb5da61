"""Figures: perplexity and the probability of rows outside the vocabulary, by learning rate, text and vocabulary."""

from pathlib import Path
from typing import Any

from leanvocab.extras import require
from studies.output_modes.files import Results, held_out_rows

Row = dict[str, Any]

# Two colours of the Okabe-Ito palette, which colour-blind readers tell apart, and grey.
_COLORS = {"full": "#8C8C8C", "frozen": "#0072B2", "restricted": "#D55E00"}
_MARKERS = {"full": "s", "frozen": "o", "restricted": "^"}
_TICKS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "leanvocab",  # the same figure gives the same file
    "svg.fonttype": "path",
}


def draw(results: Results) -> list[Path]:
    """Draws perplexity.png/.svg and outside_mass.png/.svg into the results folder, from the runs with the first seed."""
    runs = results.runs()
    rows = list(held_out_rows([run for run in runs if run["seed"] == runs[0]["seed"]]))
    return [
        path
        for name, label, factor in (
            ("perplexity", "perplexity of the merged model", 1),
            ("outside_mass", "probability outside the vocabulary (%)", 100),
        )
        for path in _draw_grid(results.folder, name, label, factor, rows)
    ]


def _draw_grid(folder: Path, measure: str, label: str, factor: float, rows: list[Row]) -> list[Path]:
    """A row of panels for each vocabulary, a column for each text."""
    matplotlib, figures = require("matplotlib", extra="plot"), require("matplotlib.figure", extra="plot")
    vocabularies = sorted({(row["kept_rows"], row["vocabulary"]) for row in rows})
    texts = list(dict.fromkeys(row["text"] for row in rows))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        size = (2.5 * len(texts), 2.1 * len(vocabularies) + 0.4)
        figure = figures.Figure(figsize=size, layout="constrained", dpi=130, facecolor="white")
        panels = figure.subplots(len(vocabularies), len(texts), squeeze=False, sharey="col")
        for line, (kept_rows, vocabulary) in zip(panels, vocabularies, strict=True):
            for axes, text in zip(line, texts, strict=True):
                here = [row for row in rows if row["vocabulary"] == vocabulary and row["text"] == text]
                _draw_panel(axes, measure, factor, here)
                axes.set_title(f"{text}, {kept_rows:,} rows kept")
        figure.supxlabel("learning rate", fontsize=8)
        figure.supylabel(label, fontsize=8)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
        paths = [folder / f"{measure}.png", folder / f"{measure}.svg"]
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    return paths


def _draw_panel(axes: Any, measure: str, factor: float, rows: list[Row]) -> None:
    rates = sorted({row["learning_rate"] for row in rows if row["learning_rate"] is not None})
    for mode, color in _COLORS.items():
        of_mode = {row["learning_rate"]: factor * row[measure] for row in rows if row["mode"] == mode}
        at = [position for position, rate in enumerate(rates) if rate in of_mode]
        values = [of_mode[rates[position]] for position in at]
        axes.plot(
            at, values, color=color, marker=_MARKERS[mode], markersize=4, linewidth=1.2, clip_on=False, label=mode
        )
    base = next((row for row in rows if row["mode"] == "base"), None)
    if base is not None:
        axes.axhline(factor * base[measure], color="black", linewidth=0.9, linestyle="--", label="before training")
        if measure == "outside_mass":
            asked = factor * base["outside_label_ratio"]
            axes.axhline(asked, color="black", linewidth=0.9, linestyle=":", label="labels outside")
    axes.set_xticks(range(len(rates)), [f"{rate:.0e}".replace("e-0", "e-") for rate in rates])
    if measure == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(require("matplotlib.ticker", extra="plot").LogLocator(subs=_TICKS))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=0)
