"""An estimate of what training holds in memory: bytes of parameters, gradients and states, by arithmetic, and how it is shown.

Imports no torch.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

FP32_BYTES = 4
BF16_BYTES = 2


@dataclass(frozen=True)
class Parameter:
    """Shape and kind of a parameter, on which its bytes depend."""

    shape: tuple[int, ...]
    value_bytes: int  # bytes of one value
    trains: bool
    in_embedding: bool  # held by an nn.Embedding, be it for tokens or for positions
    in_layer: bool  # held by a linear layer or a convolution, which autocast runs in bf16
    is_table: bool

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.value_bytes


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that training holds in parameters and what belongs to them."""

    num_parameters: int
    num_vocabulary_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    autocast_bytes: int
    buffers_bytes: int = 0
    remap_bytes: int = 0
    """The map from token ids to rows that each shrunk module holds on its device."""
    frozen_bytes: int = 0
    """Rows that do not train and are in the softmax, with their order."""
    loss_bytes: int = 0
    """What the loss holds at its peak; 0 where no number of tokens was given."""
    vocabulary_bytes: int
    """Of the weights, gradients, states and frozen rows above, those of the vocabulary matrices."""

    @property
    def total_bytes(self) -> int:
        """Everything above, of which the vocabulary's bytes are a part."""
        return sum(getattr(self, part) for part in _LABELS)

    def to_dict(self) -> dict[str, int]:
        """Every part and their sum, as plain values."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def make_footprint(
    parameters: list[Parameter], states: Mapping[Parameter, int], mixed: bool, shared_bytes: int, **others: int
) -> Footprint:
    """Adds up what training a model with these parameters holds; `mixed` is autocast over fp32 weights.

    `states` are the optimizer's bytes for each parameter that trains, beside those that all share; `others` belong to none.
    """
    trained = [parameter for parameter in parameters if parameter.trains]
    tables = [parameter for parameter in parameters if parameter.is_table]
    trained_tables = [parameter for parameter in tables if parameter.trains]
    in_layers = sum(parameter.num_values for parameter in parameters if parameter.in_layer)
    vocabulary_bytes = _bytes_of(tables) + _bytes_of(trained_tables) + sum(states[table] for table in trained_tables)
    return Footprint(
        num_parameters=sum(parameter.num_values for parameter in parameters),
        num_vocabulary_parameters=sum(parameter.num_values for parameter in tables),
        weights_bytes=_bytes_of(parameters),
        gradients_bytes=_bytes_of(trained),
        optimizer_bytes=sum(states[parameter] for parameter in trained) + shared_bytes,
        autocast_bytes=in_layers * BF16_BYTES if mixed else 0,
        vocabulary_bytes=vocabulary_bytes + others.get("frozen_bytes", 0),
        **others,
    )


def _bytes_of(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.num_bytes for parameter in parameters)


def plain_loss_bytes(num_tokens: int, full_rows: int) -> int:
    """The peak of an ordinary cross-entropy, in its backward: log-probabilities, their gradient and that of the logits, in
    fp32 whatever the model's dtype. The logits themselves are gone by then, unless somebody holds on to them."""
    return 3 * num_tokens * full_rows * FP32_BYTES


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
        return asdict(self) | {
            "tables": [asdict(table) for table in self.tables],
            "full": self.full.to_dict(),
            "partial": self.partial.to_dict(),
            "saved_bytes": self.saved_bytes,
            "saved_ratio": self.saved_ratio,
            "vocabulary_ratio": self.vocabulary_ratio,
        }

    def __rich__(self) -> "Table":
        from rich.table import Table

        kept = ", ".join(f"{table.partial_rows:,} of {table.full_rows:,}" for table in self.tables)
        output = "" if self.output is None else f", output {self.output}"
        printed = Table(title=f"{self.model}: {kept} rows, {self.optimizer}, {self.precision}{output}")
        printed.add_column("training holds")
        for heading in ("full", "partial", "saved"):
            printed.add_column(heading, justify="right")
        full, partial = self.full, self.partial
        counts = (full.num_parameters, partial.num_parameters)
        printed.add_row("parameters", *(f"{count / 1e6:.1f} M" for count in counts), _saved(*counts), end_section=True)
        for field, label in _LABELS.items():
            if getattr(full, field) or getattr(partial, field):
                printed.add_row(*_bytes_row(label, getattr(full, field), getattr(partial, field)))
        printed.add_section()
        printed.add_row(*_bytes_row("total", full.total_bytes, partial.total_bytes), style="bold", end_section=True)
        printed.add_row(*_bytes_row("vocabulary's part", full.vocabulary_bytes, partial.vocabulary_bytes))
        return printed

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
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


def _bytes_row(label: str, full: int, partial: int) -> tuple[str, ...]:
    return label, format_bytes(full), format_bytes(partial), _saved(full, partial)


def _saved(full: int, partial: int) -> str:
    return format_ratio((full - partial) / full) if full else ""


def format_bytes(num_bytes: float) -> str:
    """A number of bytes for a reader, in powers of 1,000 and three digits: '1.11 GB'."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            break
        value /= 1000
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"


def format_ratio(ratio: float) -> str:
    """A ratio for a reader: '12.3 %'."""
    return f"{100 * ratio:.1f} %"
