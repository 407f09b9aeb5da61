"""A published number beside a measured one, and what can be said about the two."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

Status = Literal["matched", "differs", "undecided"]
_FLOAT_SLACK = 1e-9  # 80.2 - 80.1 is a little more than 0.1


@dataclass(frozen=True)
class Cell:
    """One cell of a published table.

    `measured` is None where the data at hand cannot decide the cell; `reason` says why. `at_most` is what an incomplete
    data set says all the same: more data can only use more rows, so that the true reduction is no larger. `with_special`
    is measured with the library's default, which keeps every special token whether or not it occurs. `variant` names
    what was measured in place of what the cell was taken to mean; variants are shown, not counted.
    """

    table: str
    row: str
    column: str
    published: float | None
    measured: float | None
    status: Status
    reason: str = ""
    with_special: float | None = None
    at_most: float | None = None
    decimals: int = 1
    variant: str = ""

    @property
    def difference(self) -> float | None:
        """Measured minus published, in the unit of the table."""
        if self.measured is None or self.published is None:
            return None
        return self.measured - self.published

    @property
    def has_same_digits(self) -> bool:
        """True where the measured number, rounded as the paper rounds, is printed alike."""
        if self.measured is None or self.published is None:
            return False
        return self.format(self.measured) == self.format(self.published)

    def format(self, value: float) -> str:
        """A number as the paper's table prints it."""
        return f"{value:,.{self.decimals}f}"


def compare(published: float | None, measured: float | None, tolerance: float, decimals: int = 1) -> Status:
    """True where a measured number is the published one.

    Args:
        tolerance: how far apart the two may lie; 0: they are printed with the same digits.
    """
    if published is None or measured is None:
        return "undecided"
    if tolerance == 0:
        return "matched" if f"{measured:.{decimals}f}" == f"{published:.{decimals}f}" else "differs"
    return "matched" if abs(measured - published) <= tolerance + _FLOAT_SLACK else "differs"


def make_cell(
    table: str,
    row: str,
    column: str,
    published: float | None,
    measured: float | None,
    *,
    tolerance: float = 0.0,
    reason: str = "",
    **more: Any,
) -> Cell:
    """A cell with its status; `reason` says why there is nothing measured, or explains a difference."""
    status = compare(published, measured, tolerance, more.get("decimals", 1))
    return Cell(table, row, column, published, measured, status, reason, **more)


def tally(cells: Iterable[Cell]) -> dict[str, int]:
    """Numbers of cells that are matched, differ, are undecided, and agree in every digit. Variants do not count."""
    counted = [cell for cell in cells if not cell.variant]
    statuses = Counter(cell.status for cell in counted)
    return {
        "cells": len(counted),
        "matched": statuses["matched"],
        "same_digits": sum(cell.has_same_digits for cell in counted),
        "differs": statuses["differs"],
        "undecided": statuses["undecided"],
    }


def undecided_reasons(cells: Iterable[Cell]) -> dict[str, int]:
    """Reasons why cells are undecided, the most frequent reason first."""
    reasons = Counter(cell.reason for cell in cells if cell.status == "undecided" and not cell.variant)
    return dict(reasons.most_common())


def to_record(cell: Cell) -> dict[str, Any]:
    """A cell as plain values, ready for CSV and JSON."""
    record = {each.name: getattr(cell, each.name) for each in fields(cell) if each.name != "decimals"}
    record["difference"] = cell.difference
    record["same_digits"] = cell.has_same_digits
    return {name: record[name] for name in _COLUMNS}


_COLUMNS = (
    "table", "row", "column", "variant", "published", "measured", "difference", "same_digits", "status", "with_special",
    "at_most", "reason",
)  # fmt: skip


def write_cells(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """One CSV a table, named as the published one; returns the files."""
    paths = []
    for table in dict.fromkeys(cell.table for cell in cells):
        paths.append(folder / f"{table}.csv")
        write_records((to_record(cell) for cell in cells if cell.table == table), paths[-1])
    return paths


def write_records(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Records of the same fields as a CSV with a header; no file where there is no record."""
    rows = list(records)
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _plain(value) for name, value in row.items()})


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else value
