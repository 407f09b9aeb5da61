"""Cells → a table in the paper's layout, for a terminal (rich) and for Markdown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from reproduction.cells import Cell, tally, to_record

if TYPE_CHECKING:
    from rich.table import Table

Look = Literal["plain", "same", "near", "differs", "undecided"]

LEGEND = (
    "a plain number has the published digits; 80.2 ≈ 80.1: within the tolerance of the published 80.1, with another last "
    "digit; 77.7 ≠ 80.1: differs from it; – (14.8): undecided, 14.8 is published; ≤ 20.3 (14.8): undecided, but what "
    "is at hand shows that the reduction is no larger"
)

_RICH_STYLES: Mapping[Look, str] = {
    "plain": "", "same": "green", "near": "bold yellow", "differs": "bold white on red", "undecided": "dim",
}  # fmt: skip
_MARKDOWN: Mapping[Look, str] = {
    "plain": "{}", "same": "{}", "near": "*{}*", "differs": "**{}**", "undecided": "<sub>{}</sub>",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One cell of a grid."""

    text: str
    look: Look = "plain"


@dataclass(frozen=True)
class Grid:
    """A table to be shown. `sections`: rows after which a line is drawn."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]
    sections: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Result:
    """Result of a command: cells to compare, tables to show, further records and figures to write."""

    name: str
    title: str
    grids: tuple[Grid, ...] = ()
    cells: tuple[Cell, ...] = ()
    notes: tuple[str, ...] = ()
    records: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "tally": tally(self.cells),
            "notes": list(self.notes),
            "cells": [to_record(cell) for cell in self.cells],
            **self.records,
        }


def entry(cell: Cell, value: float | None) -> Entry:
    """A measured value beside the published one, in as few signs as say it."""
    if cell.published is None:
        return Entry("" if value is None else cell.format(value))
    published = cell.format(cell.published)
    if value is None:
        bound = f"≤ {cell.format(cell.at_most)}" if cell.at_most is not None else "–"
        return Entry(f"{bound} ({published})", "undecided")
    if cell.format(value) == published:
        return Entry(published, "same")
    sign, look = ("≈", "near") if cell.status == "matched" else ("≠", "differs")
    return Entry(f"{cell.format(value)} {sign} {published}", look)  # type: ignore[arg-type]


def cell_grid(
    title: str,
    first_heading: str,
    cells: Sequence[Cell],
    labels: Mapping[str, str],
    value: Callable[[Cell], float | None] = lambda cell: cell.measured,
) -> Grid:
    """Cells by row and column, in their own order. `labels`: what stands over a column."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    rows: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        label = f"{cell.row} ({cell.variant})" if cell.variant else cell.row
        rows.setdefault(label, {})[cell.column] = cell
    shown = tuple(
        (label, tuple(entry(found[name], value(found[name])) if name in found else Entry("") for name in columns))
        for label, found in rows.items()
    )
    last_counted = max((number for number, found in enumerate(rows.values()) if not _is_variant(found)), default=-1)
    headings = (first_heading, *(labels.get(name, name) for name in columns))
    sections = frozenset({last_counted} if last_counted + 1 < len(rows) else ())
    return Grid(title, headings, shown, sections)


def _is_variant(found: Mapping[str, Cell]) -> bool:
    return any(cell.variant for cell in found.values())


def to_rich(grid: Grid) -> "Table":
    """For a terminal: what differs stands out."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(title=escape(grid.title), title_justify="left")
    for number, heading in enumerate(grid.headings):
        table.add_column(escape(heading), justify="right" if number else "left", overflow="fold")
    for number, (label, entries) in enumerate(grid.rows):
        texts = [Text(each.text, style=_RICH_STYLES[each.look]) for each in entries]
        table.add_row(escape(label), *texts, end_section=number in grid.sections)
    return table


def to_markdown(grid: Grid, with_title: bool = True) -> str:
    """For a report: what differs is bold."""
    lines = [f"**{grid.title}**", ""] if with_title else []
    lines += [_line(grid.headings), _line(["---", *["---:"] * (len(grid.headings) - 1)])]
    for label, entries in grid.rows:
        lines.append(_line([label, *(_MARKDOWN[each.look].format(each.text) if each.text else "" for each in entries)]))
    return "\n".join(lines)


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"
