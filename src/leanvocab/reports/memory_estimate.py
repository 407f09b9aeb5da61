"""An estimate of what training holds in memory, and how it is shown."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from leanvocab.reports.footprint import Footprint
from leanvocab.reports.units import format_bytes, format_ratio

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TableRows:
    """One vocabulary table: its path in the model, and its rows in full and in part."""

    path: str
    full_rows: int
    partial_rows: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of training with the full and with the partial vocabulary. `print` and rich show it as a table."""

    model: str
    optimizer: str
    precision: str
    output: str | None
    """What becomes of the output layer; None where there is none."""
    tables: tuple[TableRows, ...]
    full: Footprint
    partial: Footprint

    @property
    def saved_bytes(self) -> int:
        """Bytes that the partial vocabulary saves."""
        return self.full.total_bytes - self.partial.total_bytes

    @property
    def saved_ratio(self) -> float:
        """Saved bytes over all bytes of the full model, 0–1."""
        return self.saved_bytes / self.full.total_bytes

    @property
    def vocabulary_ratio(self) -> float:
        """Share of the full model's bytes that the vocabulary tables hold, 0–1."""
        return self.full.vocabulary_bytes / self.full.total_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain values, ready for JSON."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "precision": self.precision,
            "output": self.output,
            "tables": [asdict(table) for table in self.tables],
            "full": self.full.to_dict(),
            "partial": self.partial.to_dict(),
            "saved_bytes": self.saved_bytes,
            "saved_ratio": self.saved_ratio,
            "vocabulary_ratio": self.vocabulary_ratio,
        }

    def __rich__(self) -> "Table":
        return _printed(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(_printed(self))
        return capture.get().rstrip()


_LABELS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer states",
    "autocast_bytes": "autocast copies",
    "buffers_bytes": "buffers",
    "remap_bytes": "id map",
    "frozen_bytes": "frozen rows",
    "loss_bytes": "loss",
}


def _printed(estimate: MemoryEstimate) -> "Table":
    from rich.table import Table

    kept = ", ".join(f"{table.partial_rows:,} of {table.full_rows:,}" for table in estimate.tables)
    output = "" if estimate.output is None else f", output {estimate.output}"
    printed = Table(title=f"{estimate.model}: {kept} rows, {estimate.optimizer}, {estimate.precision}{output}")
    printed.add_column("training holds")
    for heading in ("full", "partial", "saved"):
        printed.add_column(heading, justify="right")
    full, partial = estimate.full, estimate.partial
    counts = (full.num_parameters, partial.num_parameters)
    printed.add_row("parameters", *(f"{count / 1e6:.1f} M" for count in counts), _saved(*counts), end_section=True)
    for field, label in _LABELS.items():
        if getattr(full, field) or getattr(partial, field):
            printed.add_row(*_bytes_row(label, getattr(full, field), getattr(partial, field)))
    printed.add_section()
    printed.add_row(*_bytes_row("total", full.total_bytes, partial.total_bytes), style="bold", end_section=True)
    printed.add_row(*_bytes_row("vocabulary's part", full.vocabulary_bytes, partial.vocabulary_bytes))
    return printed


def _bytes_row(label: str, full: int, partial: int) -> tuple[str, ...]:
    return label, format_bytes(full), format_bytes(partial), _saved(full, partial)


def _saved(full: int, partial: int) -> str:
    return format_ratio((full - partial) / full) if full else ""
