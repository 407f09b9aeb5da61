"""An estimate of what training holds in memory: bytes of parameters, gradients and states, by arithmetic, and how it is shown.

Imports no torch.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

FP32_BYTES = 4
BF16_BYTES = 2

CARDS = (8, 12, 16, 24)  # GiB
# Of a card's memory: the driver's context, workspaces of kernels, and the allocator's rounding. An estimate.
TAKEN_BYTES = 3 << 28
LITTLE = 0.05  # of all bytes: less than that saved is said to be next to nothing
SAVES_LITTLE = (
    "The output layer is tied: rows that are not kept stay in memory, frozen, for the softmax. Where the vocabulary does not "
    "train (LoRA), a partial vocabulary saves next to nothing of weights, gradients and states; what it saves is the loss."
)


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """A batch, and the way in which it is computed.

    `on_cpu`: with a CPU's kernels. Elsewhere attention with dropout is fused, and the masks of dropout are bytes.
    """

    batch_size: int
    length: int
    target_length: int | None = None  # of an encoder-decoder; None: as long as the input
    gradient_checkpointing: bool = False
    on_cpu: bool = False

    def __str__(self) -> str:
        checkpointing = ", gradient checkpointing" if self.gradient_checkpointing else ""
        return f"batch {self.batch_size} × {self.length}{checkpointing}, on a {'CPU' if self.on_cpu else 'GPU'}"


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
    peak_bytes: int = 0
    """What is there at once at the peak of a step, activations included; 0 where no step was given, or it is not known."""
    vocabulary_bytes: int
    """Of the weights, gradients, states and frozen rows above, those of the vocabulary matrices."""

    @property
    def total_bytes(self) -> int:
        """Everything above, of which the vocabulary's bytes are a part."""
        return sum(getattr(self, part) for part in LABELS)

    def with_peak(self, above_weights: int, *, on_cpu: bool) -> "Footprint":
        """The same with a peak: `above_weights` are activations and gradients. Frozen rows on a CPU are a mapped file."""
        held = self.weights_bytes + self.optimizer_bytes + self.buffers_bytes + self.remap_bytes
        return replace(self, peak_bytes=held + (0 if on_cpu else self.frozen_bytes) + above_weights)

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


def remap_bytes(full_rows: int, kept_rows: int, num_inputs: int, num_outputs: int) -> int:
    """Bytes of a table's maps: each input holds int64 [full_rows + 2]; each output its ids; each int64 [3], a missing id."""
    return 8 * (num_inputs * (full_rows + 2 + 3) + num_outputs * (kept_rows + 3))


def frozen_bytes(full_rows: int, kept_rows: int, dim: int, value_bytes: int) -> int:
    """Bytes of the rows of a table that do not train, on a device, and of two int64 [full_rows], their order."""
    return (full_rows - kept_rows) * dim * value_bytes + 2 * 8 * full_rows


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
    step: TrainingStep | None = None
    """The step whose peak was asked for."""
    no_peak: str | None = None
    """Reason why the peak of that step is not known."""

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

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Bytes, full and partial, of all that is held, by the words for it."""
        held = {label: (getattr(self.full, part), getattr(self.partial, part)) for part, label in LABELS.items()}
        return {label: both for label, both in held.items() if any(both)}

    @property
    def saves_little(self) -> bool:
        """True where rows that are not kept stay for the softmax, and next to nothing is saved beside the loss."""
        return self.partial.frozen_bytes > 0 and self.saved_ratio < LITTLE

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that belong below the figures."""
        notes = [SAVES_LITTLE] if self.saves_little else []
        if self.step is not None:
            notes.append(f"The step: {self.step}.")
        if self.no_peak is not None:
            notes.append(f"Its peak is missing: the model cannot be run without values ({self.no_peak}).")
        if self.cards:
            notes.append(f"Cards: an estimate, with {format_bytes(TAKEN_BYTES)} of each for the driver and its like.")
            if self.output in ("frozen", "restricted"):
                notes.append(
                    "Scores count in chunks of 512 MiB; cards of 8 and 12 GB hold 256 MiB at once, which is less."
                )
        return tuple(notes)

    @property
    def cards(self) -> dict[int, dict[str, bool]]:
        """GiB of a card → does the step fit, full and partial; where no step was asked for, does all but its activations.

        An estimate. Empty where the step is a CPU's, or its peak is not known; without full where that peak was not asked for.
        """
        if self.no_peak is not None or (self.step is not None and self.step.on_cpu):
            return {}
        held = {
            name: footprint.total_bytes if self.step is None else footprint.peak_bytes
            for name, footprint in (("full", self.full), ("partial", self.partial))
        }
        return {size: {name: its <= (size << 30) - TAKEN_BYTES for name, its in held.items() if its} for size in CARDS}

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain values, ready for JSON."""
        return asdict(self) | {
            "cards": self.cards,
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
        saved = "" if self.saves_little else _saved(*counts)
        printed.add_row("parameters", *(f"{count / 1e6:.1f} M" for count in counts), saved, end_section=True)
        for label, both in self.parts.items():
            printed.add_row(*_bytes_row(label, *both))
        printed.add_section()
        printed.add_row(*_bytes_row("total", full.total_bytes, partial.total_bytes), style="bold", end_section=True)
        printed.add_row(*_bytes_row("vocabulary's part", full.vocabulary_bytes, partial.vocabulary_bytes))
        if self.step is not None:
            printed.add_section()
            peaks = _bytes_row("peak of a step", full.peak_bytes, partial.peak_bytes)
            alone = ("peak of a step", "", peaks[2], "")  # without a peak of the full model, which was not asked for
            missing = ("peak of a step", "missing", "missing", "")
            printed.add_row(*(peaks if full.peak_bytes else missing if self.no_peak is not None else alone))
        aside = ", activations aside" if self.step is None else ""
        for size, fits in self.cards.items():
            printed.add_row(f"a card of {size} GB{aside}", *(_YES[fits.get(name)] for name in ("full", "partial")), "")
        return printed

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self, *self.notes, sep="\n", soft_wrap=True)
        return capture.get().rstrip()


_YES = {True: "yes", False: "no", None: ""}
LABELS = {
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
