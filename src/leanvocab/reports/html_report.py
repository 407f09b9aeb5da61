"""A report as a page: one HTML file that asks for nothing else, for a screen, a phone, the dark, or paper.

What comes from data is escaped, and a policy in the page forbids scripts and requests. Each number is an element `data`, whose
value is the exact one. Figures are SVG; the same report gives the same bytes.
"""

import html
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from leanvocab.errors import SettingsError
from leanvocab.files.copying import write_whole
from leanvocab.files.presence import check_new_file, is_there
from leanvocab.reports.data_report import DataReport, RunReport, ScriptUse, TokenUse
from leanvocab.reports.memory_estimate import MemoryEstimate, format_bytes, format_ratio
from leanvocab.reports.plots import Axis, line_plot

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1c;--paper:#fff;--soft:#5c5c5c;--line:#dcdcdc;--shade:#ececec;
--blue:#0072b2;--orange:#d55e00}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#161616;--soft:#a6a6a6;--line:#3a3a3a;--shade:#2a2a2a;
--blue:#56b4e9;--orange:#f0a03c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.4rem 0;max-width:45rem}
p,summary,caption{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.6rem;margin:1rem 0}
dl div{border:1px solid var(--line);border-radius:.4rem;padding:.5rem .7rem}
dt,.soft,figcaption,summary{color:var(--soft);font-size:.85rem}
dd .soft{font-weight:400}summary{padding:.5rem 0;cursor:pointer}
dd{margin:0;font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
figure{margin:0 0 .8rem;min-width:0}
svg{width:100%;max-width:34rem;height:auto;display:block}
svg text{fill:var(--ink);font:11px system-ui,sans-serif}
.grid{stroke:var(--line)}.line{fill:none;stroke:var(--blue);stroke-width:1.8}.second{stroke:var(--orange)}
.dot{fill:var(--blue)}.dot.second{fill:var(--orange);stroke:none}.unused{fill:var(--shade)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:min(100%,26rem)}
th,td{padding:.2rem .7rem .2rem 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:400}
.words{text-align:left}
td{white-space:nowrap}
td.words{white-space:normal;overflow-wrap:anywhere;min-width:5.5rem}
tr.sum{font-weight:600}
bdi{font-family:ui-monospace,monospace}
.bar{display:flex;height:.9rem;background:var(--shade);print-color-adjust:exact;margin:.1rem 0 .5rem;max-width:45rem}
td .bar{width:6rem;margin:.3rem 0}
.bar i{background:var(--blue);width:var(--w)}.bar i+i{background:var(--soft)}
@media (max-width:30rem){td .bar{display:none}th,td{padding-right:.5rem}td.words{min-width:4.2rem}}
@media print{section{break-inside:avoid}body{font-size:12px}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def check_page(path: Path, overwrite: bool, *, beside: Path | None = None) -> None:
    """Checks, before long work, that a page can be written; in `beside`, a folder that will be made, it can.

    Raises:
        SettingsError: the name is none of a page.
        CheckpointError: it is there and not to be overwritten, or cannot be written.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"a report is a page for a browser: expected a name that ends in .html, got {str(path)!r}")
    if beside is None or is_there(beside) or os.path.abspath(path.parent) != os.path.abspath(beside):
        check_new_file(path, overwrite, "give --overwrite" if beside is None else "set overwrite")


def write_report(report: DataReport, path: str | os.PathLike[str]) -> Path:
    """Writes the page of a report; whole or not at all."""
    path = Path(path)
    write_whole(path, page(report).encode())
    return path


def page(report: DataReport) -> str:
    """Text of the page of a report."""
    title = _text(report.title)
    sections = [
        _coverage(report),
        _frequent(report),
        _scripts(report),
        _stretches(report),
        _splits(report),
        _memory(report.memory) if report.memory else "",
        _run(report.run) if report.run else "",
    ]
    notes = "".join(f'<p class="soft">{_text(note)}</p>' for note in report.notes)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}">\n<meta name="viewport" content="width=device-width,initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{_summary(report)}"
        f"{''.join(sections)}\n{notes}\n</main>\n</body>\n</html>\n"
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def _summary(report: DataReport) -> str:
    used = report.used_rows / report.full_rows
    facts = {
        "tokens counted": _number(report.num_tokens),
        "rows in the full vocabulary": _number(report.full_rows),
        "rows used": f'{_number(report.used_rows)} <span class="soft">{format_ratio(used)}</span>',
        "of these, once": _number(report.once_rows),
    }
    if report.kept_rows is not None:
        facts["rows kept, with special ids"] = _number(report.kept_rows)
    if report.outside_tokens:
        facts["tokens beyond the table, in no other number"] = _number(report.outside_tokens)
    return _facts(facts)


def _coverage(report: DataReport) -> str:
    needed = _table(
        (">share of tokens", ">rows that cover it", ">of all rows"),
        [
            (f'<data value="{percent:g}">{percent:g} %</data>', _number(rows), _ratio(rows, report.full_rows))
            for percent, rows in report.rows_to_cover.items()
        ],
    )
    points = _table(
        (">rank", ">occurrences", ">tokens up to it", ">of all"),
        [(*map(_number, point), _ratio(point[2], report.num_tokens)) for point in report.curve],
    )
    return _section(
        "Rows that cover the tokens",
        f'<div class="pair">{_curves(report)}</div>{needed}{_folded("The numbers of both curves", points)}',
    )


def _curves(report: DataReport) -> str:
    rows = Axis(1, max(report.full_rows, 2), is_log=True)
    covered = [(rank, 100 * tokens / report.num_tokens) for rank, _, tokens in report.curve]
    marks = [(num_rows, percent) for percent, num_rows in report.rows_to_cover.items() if num_rows and percent < 100]
    coverage = line_plot(
        rows,
        Axis(0, 100),
        ("rows, most frequent first", "tokens covered, in percent"),
        [covered],
        dots=marks,
        said=[f"{percent:g} % by {num_rows:,} rows" for num_rows, percent in marks],
        unused_from=report.used_rows,
    )
    most = max((count for _, count, _ in report.curve), default=1)
    frequency = line_plot(
        rows,
        Axis(1, max(most, 2), is_log=True),
        ("rank of the token", "occurrences"),
        [[(rank, count) for rank, count, _ in report.curve]],
        unused_from=report.used_rows,
    )
    about = "Tokens that the most frequent rows cover, in percent. Grey: rows that do not occur."
    return _figure(coverage, about) + _figure(frequency, "How often tokens occur, by rank; both axes by powers of ten.")


def _frequent(report: DataReport) -> str:
    most = max((use.count for use in report.most_frequent), default=0)
    rows = [
        (*_token(use), _number(use.count), _ratio(use.count, report.num_tokens), _bar([use.count], most))
        for use in report.most_frequent
    ]
    return _section("Most frequent tokens", _table((">id", "token", ">occurrences", ">of all", ""), rows))


def _scripts(report: DataReport) -> str:
    if not report.scripts:
        return ""
    most = max(use.num_tokens for use in report.scripts)
    headings = ("script of the token", ">tokens", ">of all", "", ">rows used", ">rows not used")

    def table(uses: Iterable[ScriptUse]) -> str:
        return _table(
            headings,
            [
                (
                    _text(use.script.replace("_", " ")),
                    _number(use.num_tokens),
                    _ratio(use.num_tokens, report.num_tokens),
                    _bar([use.num_tokens], most),
                    _number(use.used_rows),
                    _number(use.unused_rows),
                )
                for use in uses
            ],
        )

    used, unused = ([use for use in report.scripts if (use.used_rows > 0) is occurs] for occurs in (True, False))
    about = "<p class='soft'>Common: digits, punctuation, signs and spaces, which belong to no script.</p>"
    if unused:
        num_rows = sum(use.unused_rows for use in unused)
        about += _folded(f"{len(unused)} that do not occur, with {num_rows:,} rows", table(unused))
    return _section("Scripts", (table(used) if used else "") + about)


def _stretches(report: DataReport) -> str:
    rows = [
        (
            _number(stretch.first_id),
            _number(stretch.last_id),
            _number(stretch.num_rows),
            _name(stretch.first_token),
            _name(stretch.last_token),
        )
        for stretch in report.unused_stretches
    ]
    headings = (">first id", ">last id", ">rows", "first token", "last token")
    return _section("Longest stretches of unused ids", _table(headings, rows) if rows else "<p>Every id occurs.</p>")


def _splits(report: DataReport) -> str:
    training = _text(report.training_split)
    rows = []
    for name, split in report.splits.items():
        lacking = (
            ("", "", "")
            if name == report.training_split
            else (
                _number(split.unseen_rows),
                _number(split.unseen_tokens),
                _ratio(split.unseen_tokens, split.num_tokens),
            )
        )
        rows.append((_text(name), _number(split.num_tokens), _number(split.used_rows), *lacking))
    headings = ("split", ">tokens", ">rows used", f">rows that {training} lacks", ">their tokens", ">of the split")
    lists = "".join(
        f"<h3>{_text(name)}: the most frequent tokens that {training} lacks</h3>"
        + _table(
            (">id", "token", ">occurrences"),
            [(*_token(use), _number(use.count)) for use in split.most_frequent_unseen],
        )
        for name, split in report.splits.items()
        if split.most_frequent_unseen
    )
    about = (
        f"<p class='soft'>A model meets the tokens that {training} lacks without having learned from them.</p>"
        if lists
        else ""
    )
    return _section(
        "Splits",
        _table(headings if len(rows) > 1 else headings[:3], [row[: 6 if len(rows) > 1 else 3] for row in rows])
        + about
        + lists,
    )


def _memory(memory: MemoryEstimate) -> str:
    parts = {**memory.parts, "total": (memory.full.total_bytes, memory.partial.total_bytes)}
    parts["the vocabulary's part"] = (memory.full.vocabulary_bytes, memory.partial.vocabulary_bytes)
    if memory.partial.peak_bytes:
        parts["peak of a step"] = (memory.full.peak_bytes, memory.partial.peak_bytes)
    rows = [
        (label, *(_amount(value) if value else "" for value in both), _ratio(both[0] - both[1], both[0]))
        for label, both in parts.items()
    ]
    aside = ", activations aside" if memory.step is None else ""
    for size, fits in memory.cards.items():
        said = ({True: "yes", False: "no", None: ""}[fits.get(name)] for name in ("full", "partial"))
        rows.append((f"fits a card of {size} GB{aside}", *said, ""))
    bars = "".join(
        f"<p class='soft'>{label}: {format_bytes(its.total_bytes)}</p>"
        + _bar((its.vocabulary_bytes, its.total_bytes - its.vocabulary_bytes), memory.full.total_bytes)
        for label, its in (("full vocabulary", memory.full), ("partial vocabulary", memory.partial))
    )
    kept = ", ".join(f"{_number(table.partial_rows)} of {_number(table.full_rows)}" for table in memory.tables)
    about = (
        f"<p>{_text(memory.model)}: {kept} rows, {_text(memory.optimizer)}, {_text(memory.precision)}. Estimated.</p>"
    )
    notes = "".join(f"<p class='soft'>{_text(note)}</p>" for note in memory.notes)
    legend = "<p class='soft'>Blue: the vocabulary's part. Grey: all else.</p>"
    table = _table(("training holds", ">full", ">partial", ">saved"), rows)
    return _section("Memory of training", about + bars + legend + table + notes)


def _run(run: RunReport) -> str:
    facts = {"steps": _number(run.num_steps)}
    facts |= {f"{name}, seconds": _number(round(seconds, 2)) for name, seconds in run.seconds.items()}
    facts |= {name: _amount(value) for name, value in run.peak_bytes.items()}
    facts |= {f"{_text(name)}, of the result": _number(score) for name, score in run.scores.items()}
    validated = [(step, scores["loss"]) for step, scores in run.validations if "loss" in scores]
    points = [point for point in (*run.losses, *validated) if math.isfinite(point[1])]
    figure = ""
    if points:
        highest = max(loss for _, loss in points)
        figure = _figure(
            line_plot(
                Axis(0, max(run.num_steps, 1)),
                Axis(min(0, *(loss for _, loss in points)), highest or 1),
                ("step", "loss"),
                [list(run.losses), validated],
                dots=validated if len(validated) < 50 else [],
                dots_class="dot second",
            ),
            "Blue: loss in training, as logged. Orange: loss in validation.",
        )
    names = list(dict.fromkeys(name for _, scores in run.validations for name in scores))
    rows = [
        (_number(step), *(_number(scores[n]) if n in scores else "" for n in names)) for step, scores in run.validations
    ]
    validations = (
        f"<h3>Validations</h3>{_table(('>step', *(f'>{_text(name)}' for name in names)), rows)}" if rows else ""
    )
    losses = _table((">step", ">loss"), [(_number(step), _number(loss)) for step, loss in run.losses])
    return _section(
        "The run", _facts(facts) + figure + validations + (_folded("Logged losses", losses) if run.losses else "")
    )


# --- elements ---------------------------------------------------------------------------------------------------------


def _section(title: str, body: str) -> str:
    return f"\n<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _facts(facts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in facts.items())}</dl>\n"


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML; a heading that begins with > is one of numbers."""
    headings = tuple(headings)
    kinds = [' class="words"' if heading and not heading.startswith(">") else "" for heading in headings]
    head = "".join(
        f'<th scope="col"{kind}>{heading.removeprefix(">")}</th>' for kind, heading in zip(kinds, headings, strict=True)
    )
    body = "".join(
        f"<tr{' class=sum' if row[0] == 'total' else ''}>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _bar(parts: Iterable[int], whole: int) -> str:
    widths = "".join(f'<i style="--w:{100 * part / max(whole, 1):.2f}%"></i>' for part in parts)
    return f'<div class="bar">{widths}</div>'


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return f'<data value="{value}">{shown}</data>'


def _amount(value: int) -> str:
    return f'<data value="{value}">{format_bytes(value)}</data>'


def _ratio(part: float, whole: float) -> str:
    return format_ratio(part / whole) if whole else ""


def _token(use: TokenUse) -> tuple[str, str]:
    return _number(use.token_id), _name(use.token)


def _name(token: str | None) -> str:
    """A token for a reader: spaces are seen, and a mark that would stand on the sign before it has a circle of its own."""
    if not token:
        return "–" if token is None else "(empty)"
    circle = "◌" if unicodedata.category(token[0]).startswith("M") else ""
    return f"<bdi>{circle}{_text(token.replace(' ', '␣'))}</bdi>"


def _text(text: str) -> str:
    """Text as HTML; what cannot be seen (controls, directions, halves of characters) is written as Python writes it."""
    seen = (sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    return html.escape("".join(seen))


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
