"""The tables of docs/output.md, from the runs: nobody copies a figure by hand."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from studies.output_modes.files import Results, Run, generation_rows, held_out_rows, run_rows

Row = dict[str, Any]
_ORDER = ("base", "full", "frozen", "restricted")
_NAMES = {"base": "before training"}


def tables(results: Results) -> dict[str, str]:
    """Markdown by the name of the marker that it replaces."""
    runs = results.runs()
    seed = runs[0]["seed"]
    first = [run for run in runs if run["seed"] == seed]
    held_out = list(held_out_rows(first))
    made = {"machine": _machine(results.about), "seeds": _seeds(runs), "moved": _moved(first), "cost": _cost(runs)}
    for vocabulary in runs[0]["vocabulary_rows"]:
        here = [row for row in held_out if row["vocabulary"] == vocabulary]
        made[f"perplexity-{vocabulary}"] = _perplexity(here)
        made[f"masked-{vocabulary}"] = _by_text(here, lambda row: _number(row["restricted_perplexity"]))
        made[f"outside-{vocabulary}"] = _outside(here)
        made[f"generations-{vocabulary}"] = _generations(first, vocabulary)
    return made


def fill(page: Path, results: Results) -> None:
    """Writes the tables into a page, each between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    made = tables(results)

    def between(found: re.Match[str]) -> str:
        return f"<!-- begin {found[1]} -->\n{made[found[1]]}\n<!-- end {found[1]} -->"

    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"<!-- begin ([\w-]+) -->\n.*?<!-- end \1 -->", re.DOTALL)
    page.write_text(pattern.sub(between, text), encoding="utf-8")


def _perplexity(rows: Sequence[Row]) -> str:
    """Perplexity over all labels; in brackets over those inside the vocabulary and those outside it."""

    def cell(row: Row) -> str:
        outside = row["outside_perplexity"]
        parts = (
            f"{_number(row['inside_perplexity'])}; {_number(outside)}" if outside is not None else "no label outside"
        )
        return (
            f"**{_number(row['perplexity'])}** ({parts})"
            if outside is not None
            else f"**{_number(row['perplexity'])}**"
        )

    return _by_text(rows, cell)


def _outside(rows: Sequence[Row]) -> str:
    """Mean probability outside; in brackets where the label is inside, and how often the most probable token is outside."""

    def cell(row: Row) -> str:
        return f"**{row['outside_mass']:.1%}** ({row['outside_mass_where_kept']:.1%}; {row['outside_top_ratio']:.1%})"

    lines = _by_text(rows, cell)
    texts = list(dict.fromkeys(row["text"] for row in rows))
    of_text = {row["text"]: row["outside_label_ratio"] for row in rows}
    return "\n".join([lines, _line(["*labels outside*", "", *(f"*{of_text[text]:.1%}*" for text in texts)])])


def _by_text(rows: Sequence[Row], cell: Any) -> str:
    texts = list(dict.fromkeys(row["text"] for row in rows))
    keys = sorted({(row["learning_rate"] or 0.0, _ORDER.index(row["mode"])) for row in rows})
    found = {(row["learning_rate"] or 0.0, row["mode"], row["text"]): row for row in rows}
    lines = [_line(["learning rate", "mode", *texts]), _line(["---"] * (2 + len(texts)))]
    for rate, position in keys:
        mode = _ORDER[position]
        cells = [cell(found[rate, mode, text]) for text in texts]
        lines.append(_line([_rate(rate), _NAMES.get(mode, mode), *cells]))
    return "\n".join(lines)


def _moved(runs: Sequence[Run]) -> str:
    """Distances that the weights moved."""
    lines = [
        _line(
            [
                "vocabulary",
                "learning rate",
                "mode",
                "kept rows",
                "other rows",
                "all other weights",
                "kept rows' norm",
            ]
        ),
        _line(["---"] * 7),
    ]
    rows = [row for row in run_rows(runs) if row["mode"] != "base"]
    for row in sorted(rows, key=lambda row: (row["kept_rows"], row["learning_rate"], _ORDER.index(row["mode"]))):
        moved = [f"{row[name]:.2%}" for name in ("kept_drift_ratio", "outside_drift_ratio", "body_drift_ratio")]
        norm = f"× {row['mean_kept_norm_ratio']:.4f}"
        lines.append(_line([f"{row['kept_rows']:,}", _rate(row["learning_rate"]), row["mode"], *moved, norm]))
    return "\n".join(lines)


def _seeds(runs: Sequence[Run]) -> str:
    """The cell that was run with several seeds: perplexity over that of the same seed's base, and probability outside."""
    rows = [row for row in held_out_rows(runs) if row["vocabulary"] == "trained"]
    base = {(row["seed"], row["text"]): row["perplexity"] for row in rows if row["mode"] == "base"}
    first = runs[0]["seed"]
    repeated = {row["learning_rate"] for row in rows if row["seed"] != first}
    found = {
        (row["seed"], row["mode"], row["text"]): f"× {row['perplexity'] / base[row['seed'], row['text']]:.3f}; "
        f"{row['outside_mass']:.1%}"
        for row in rows
        if row["learning_rate"] in repeated and (row["seed"], row["text"]) in base
    }
    texts = list(dict.fromkeys(row["text"] for row in rows))
    lines = [_line(["seed", "mode", *texts]), _line(["---"] * (2 + len(texts)))]
    for seed, mode in sorted({key[:2] for key in found}, key=lambda key: (key[0], _ORDER.index(key[1]))):
        lines.append(_line([str(seed), _NAMES.get(mode, mode), *(found[seed, mode, text] for text in texts)]))
    return "\n".join(lines)


def _cost(runs: Sequence[Run]) -> str:
    """Medians over the runs of a mode: seconds of the processor for a step."""
    lines = [
        _line(["mode", "rows kept", "runs", "processor seconds a step"]),
        _line(["---"] * 4),
    ]
    for mode, kept_rows, group in _grouped(runs):
        seconds = [run["training"]["median_step_cpu_seconds"] for run in group]
        lines.append(_line([mode, kept_rows, str(len(group)), f"{_median(seconds):.2f}"]))
    return "\n".join(lines)


def _grouped(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[Run]]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run["mode"] != "base":
            groups.setdefault((run["mode"], run["vocabulary"] or ""), []).append(run)
    for (mode, vocabulary), group in groups.items():
        sizes = sorted({run["vocabulary_rows"].get(vocabulary, run["full_rows"]) for run in group})
        yield mode, " to ".join(dict.fromkeys(f"{size:,}" for size in (sizes[0], sizes[-1]))), group


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _generations(runs: Sequence[Run], vocabulary: str) -> str:
    """Texts that the model writes, one list for each prompt."""
    rows = [row for row in generation_rows(runs) if row["vocabulary"] == vocabulary]
    parts = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        lines = [_line(["learning rate", "mode", f"*{prompt}* …", "tokens outside"]), _line(["---"] * 4)]
        here = [row for row in rows if row["prompt"] == prompt]
        for row in sorted(here, key=lambda row: (row["learning_rate"] or 0.0, _ORDER.index(row["mode"]))):
            mode = _NAMES.get(row["mode"], row["mode"])
            outside = f"{row['num_outside']} of {row['num_tokens']}"
            lines.append(_line([_rate(row["learning_rate"] or 0.0), mode, _quoted(row["text"]), outside]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """Text in one cell of a table."""
    plain = text.replace("\n", " ⏎ ").strip()
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", plain)


def _machine(about: Row) -> str:
    machine, settings = about["machine"], about["settings"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("leanvocab", "torch", "transformers", "python"))
    return (
        f"Model {about['model']}; {settings['num_steps']} steps of {settings['batch_size']} × {settings['length']} tokens; "
        f"{settings['num_held_out']} × {settings['length']} tokens of each held-out text; "
        f"{machine['processor']}, one thread; {versions}."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rate(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-") if rate else "–"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
