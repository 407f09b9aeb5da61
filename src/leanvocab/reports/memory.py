"""Bytes that training holds in parameters, full beside partial, before any weight is loaded.

Counted, for each parameter of the model:

- weights: the parameter as it is stored;
- gradients: as large as the weight, for what trains;
- optimizer states: what the optimizer allocates at its first step, for what trains (`OPTIMIZERS`);
- autocast copies: in `"mixed"` precision only, the bf16 copies of the layers' weights that live while a batch runs;
- buffers: what the modules register beside parameters;
- the map with which a partial table finds its rows;
- frozen rows: those of a `"frozen"` output layer, without gradients and states, in the dtype in which they are multiplied or
  that of the checkpoint, whichever is narrower. On a CPU they are a mapped file, whose pages the kernel can drop; they are
  counted all the same;
- the loss of a language model at its peak, where a number of tokens is given: of logits that are scores alone, without the
  copies that soft-capping keeps for its gradient, and of a chunk as large as on a GPU.

Not counted: activations, temporary tensors of a step, what the allocator and the libraries hold besides.

Nothing here imports torch before it is needed.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from leanvocab.errors import ModelError, SettingsError, VocabularyError
from leanvocab.reports.footprint import (
    BF16_BYTES,
    FP32_BYTES,
    OPTIMIZERS,
    Footprint,
    Parameter,
    chunked_loss_bytes,
    footprint_dict,
    make_footprint,
    plain_loss_bytes,
)
from leanvocab.vocabulary.counts import TokenCounts
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn

    from leanvocab.choices import FrozenRowsOn, OutputMode
    from leanvocab.partial.module import PartialModule

Precision: TypeAlias = Literal["fp32", "bf16", "mixed"]
Kept: TypeAlias = "PartialVocabulary | TokenCounts | int"


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
            "full": footprint_dict(self.full),
            "partial": footprint_dict(self.partial),
            "saved_bytes": self.saved_bytes,
            "saved_ratio": self.saved_ratio,
            "vocabulary_ratio": self.vocabulary_ratio,
        }

    def __rich__(self) -> "Table":
        return _table(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(_table(self))
        return capture.get().rstrip()


def estimate_memory(
    model: "str | nn.Module | Any",
    vocabulary: "Kept | Mapping[str, Kept] | None" = None,
    *,
    optimizer: str = "adamw",
    precision: Precision | None = None,
    auto_class: Any = None,
    embedding: str | Iterable[str] | None = None,
    output: "OutputMode | None" = None,
    frozen_rows: "FrozenRowsOn" = "device",
    num_tokens: int | None = None,
) -> MemoryEstimate:
    """Bytes of weights, gradients and optimizer states, full beside partial, without loading a weight.

    Args:
        model: a hub name or a folder, a transformers config, or an `nn.Module` on any device ("meta" included), shrunk
            or not. Of a module, parameters that do not require a gradient have no gradients and no states.
        vocabulary: what is kept of the input embeddings: a `PartialVocabulary`, `TokenCounts` (their used ids), or a
            number of rows; for several tables `{path: kept}`. None: what a shrunk model holds now.
        optimizer: one of `OPTIMIZERS`. `"adamw_8bit"` is bitsandbytes as the Trainer sets it up: embeddings keep
            32-bit states.
        precision: `"fp32"`; `"bf16"` (weights, gradients and states); `"mixed"` (all of these in fp32, and autocast's
            bf16 copies of the layers' weights; the tables are looked up in fp32 and never copied). None: the dtypes
            that a module's parameters have, or that a config names (fp32 where it names none).
        auto_class: the transformers auto class, or its name, that a name or config becomes. None:
            `AutoModelForSequenceClassification`, as in the paper.
        embedding: path or paths of the tables in a module that does not name its own, as for `shrink_`.
        output: what becomes of the output layer, as for `shrink_`: by default "full", or "frozen" where it is tied.
        frozen_rows: where the frozen rows are. With "host" none are counted: they lie in host memory, or a mapped file.
        num_tokens: tokens in a batch (sequences × length), for the loss of a language model. None: the loss is not counted.

    Raises:
        VocabularyError: the vocabulary is not of the table's size.
        SettingsError: an unknown optimizer or precision, or no number of tokens.
        ModelError: an unknown class; or what `shrink_` refuses, `TiedOutputError` among them.

    Source: Tables 2 and 5 of the paper count parameters in the same way.
    """
    _check_settings(optimizer, precision, num_tokens)
    module, label = _as_module(model, auto_class)
    tables = _find_tables(module, vocabulary, embedding, output, frozen_rows)
    scorers = _find_scorers(module, tables, precision)
    full, partial = (_parameters(module, tables, kept, precision) for kept in (False, True))
    buffers_bytes = sum(buffer.nbytes for buffer in module.buffers())
    losses = [scorer.loss_bytes(num_tokens) for scorer in scorers if num_tokens is not None]  # one after the other
    mixed = precision == "mixed"
    return MemoryEstimate(
        model=label,
        optimizer=optimizer,
        precision=precision or _dtype_names(module),
        output=next((scorer.mode for scorer in scorers), None),
        tables=tuple(table.rows for table in tables),
        full=make_footprint(
            full,
            optimizer,
            mixed,
            buffers_bytes=buffers_bytes,
            loss_bytes=max((full_loss for full_loss, _ in losses), default=0),
        ),
        partial=make_footprint(
            partial,
            optimizer,
            mixed,
            buffers_bytes=buffers_bytes,
            remap_bytes=sum(table.remap_bytes for table in tables),
            frozen_bytes=sum(table.frozen_bytes(precision) for table in tables),
            loss_bytes=max((partial_loss for _, partial_loss in losses), default=0),
        ),
    )


def _check_settings(optimizer: str, precision: str | None, num_tokens: int | None) -> None:
    if optimizer not in OPTIMIZERS:
        raise SettingsError(f"unknown optimizer {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    if precision not in (None, "fp32", "bf16", "mixed"):
        raise SettingsError(f"unknown precision {precision!r}: expected fp32, bf16, mixed or None (as the model is)")
    if num_tokens is not None and num_tokens < 1:
        raise SettingsError(
            f"num_tokens={num_tokens}: expected 1 or more tokens in a batch, or None (leave the loss out)"
        )


def _as_module(model: Any, auto_class: Any) -> "tuple[nn.Module, str]":
    """A module to measure (on the meta device where it has to be built), and what to call it."""
    from torch import nn

    if isinstance(model, nn.Module):
        return model, type(model).__name__
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(model) if isinstance(model, str | os.PathLike) else model
    if not isinstance(config, transformers.PretrainedConfig):
        raise ModelError(
            f"expected a name, a folder, a transformers config or an nn.Module, got {type(model).__name__}"
        )
    chosen = auto_class or "AutoModelForSequenceClassification"
    factory = getattr(transformers, chosen, None) if isinstance(chosen, str) else chosen
    if factory is None:
        raise ModelError(f"transformers has no class {chosen!r}: name one such as 'AutoModelForSeq2SeqLM'")
    try:
        with torch.device("meta"):  # shapes and dtypes without memory
            module = factory.from_config(config)
    except (
        ValueError
    ) as error:  # transformers has no class of this kind for the architecture, and lists all that it has
        raise ModelError(
            f"{factory.__name__} does not take {config.model_type!r} models: give auto_class=, or the model itself"
        ) from error
    return module, type(module).__name__ if config is model else Path(model).name if Path(model).is_dir() else str(
        model
    )


@dataclass(frozen=True)
class _Table:
    """A vocabulary matrix, and the modules that look its rows up or multiply by them."""

    rows: TableRows
    weight: "torch.Tensor"
    num_inputs: int
    num_outputs: int
    mode: str | None  # "frozen" or "restricted", where an output layer holds it
    place: str
    stored: "torch.dtype | None" = None  # of the frozen rows of a model that is shrunk

    @property
    def has_frozen_rows(self) -> bool:
        """Whether rows that do not train lie on the device."""
        return self.mode == "frozen" and self.place == "device"

    @property
    def remap_bytes(self) -> int:
        """Each input holds int64 [full_rows + 2], which remaps; each output its ids; each int64 [3], a missing id."""
        inputs = self.num_inputs * (self.rows.full_rows + 2 + 3)
        return 8 * (inputs + self.num_outputs * (self.rows.partial_rows + 3))

    def frozen_bytes(self, precision: Precision | None) -> int:
        """The rows themselves, and two orders int64 [full_rows]: of the columns, and back."""
        if not self.has_frozen_rows:
            return 0
        num_values = (self.rows.full_rows - self.rows.partial_rows) * self.weight.shape[1]
        value_bytes = self.held_value_bytes(_computed_bytes(self.weight, precision))
        return num_values * value_bytes + 2 * 8 * self.rows.full_rows

    def held_value_bytes(self, computed_bytes: int) -> int:
        """Of a value of a frozen row: rows that were cast to a wider dtype are held as they were."""
        return computed_bytes if self.stored is None else min(computed_bytes, self.stored.itemsize)


@dataclass(frozen=True)
class _Scorer:
    """The output layer: how many rows it scores with, and what becomes of them."""

    full_rows: int
    dim: int
    value_bytes: int
    mode: str
    table: _Table | None  # where it is made partial

    def loss_bytes(self, num_tokens: int) -> tuple[int, int]:
        """Of an ordinary loss, and of the one that training with a partial vocabulary has."""
        from leanvocab.output.loss import CHUNK_BYTES
        from leanvocab.output.projection import STREAMED_BYTES

        plain = plain_loss_bytes(num_tokens, self.full_rows)
        if self.table is None:
            return plain, plain
        kept_rows, blocks_bytes = self.table.rows.partial_rows, 0
        num_columns = self.full_rows if self.mode == "frozen" else kept_rows
        if self.mode == "frozen":
            in_a_block = max(1, min(num_columns, STREAMED_BYTES // (self.dim * self.value_bytes)))
            held_bytes = self.table.held_value_bytes(self.value_bytes)
            if self.table.place == "host":  # one block, the next one, and that as it comes where it is cast
                value_bytes = 2 * self.value_bytes + (held_bytes if held_bytes < self.value_bytes else 0)
                num_columns = in_a_block
            else:  # rows that are held in a narrower dtype are cast a block at a time
                value_bytes = self.value_bytes if held_bytes < self.value_bytes else 0
            blocks_bytes = in_a_block * self.dim * value_bytes
        again = min(kept_rows, num_columns) if self.mode == "frozen" else 0
        lean = chunked_loss_bytes(
            num_tokens, num_columns, again, kept_rows, self.dim, self.value_bytes, CHUNK_BYTES["cuda"]
        )
        return plain, lean + blocks_bytes


def _find_scorers(module: "nn.Module", tables: list[_Table], precision: Precision | None) -> list[_Scorer]:
    from torch import Tensor, nn

    from leanvocab.model.find import output_layers

    weights = {id(table.weight) for table in tables}
    inputs = [each for each in module.modules() if isinstance(each, nn.Embedding) and id(each.weight) in weights]
    scorers = []
    for weight in (each.weight for each in output_layers(module, inputs)):
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        table = next((each for each in tables if each.weight is weight and each.mode is not None), None)
        full_rows = weight.shape[0] if table is None else table.rows.full_rows
        mode = "full" if table is None or table.mode is None else table.mode
        scorers.append(_Scorer(full_rows, weight.shape[-1], _computed_bytes(weight, precision), mode, table))
    return scorers


def _find_tables(module: "nn.Module", vocabulary: Any, embedding: Any, output: Any, frozen_rows: str) -> list[_Table]:
    """The matrices that are shrunk, or that `shrink_` would shrink; it refuses the same models."""
    from torch import nn

    from leanvocab.model.find import find_tables
    from leanvocab.partial.module import partial_modules

    shrunk = list(partial_modules(module).values())
    if shrunk:
        return _shrunk_tables(shrunk, vocabulary, output)
    if vocabulary is None:
        raise VocabularyError(
            f"{type(module).__name__} is not shrunk: give its vocabulary, or the number of rows to keep"
        )
    kept: Any
    if isinstance(vocabulary, Mapping):
        kept = {path: _as_vocabulary(each, module, path) for path, each in vocabulary.items()}
    else:
        kept = _as_vocabulary(vocabulary, module, embedding)
    tables = []
    for found in find_tables(module, kept, embedding, output):
        rows = TableRows(found.name, found.vocabulary.full_size, len(found.vocabulary))
        num_inputs = sum(isinstance(each, nn.Embedding) for each in found.modules)
        num_outputs = len(found.modules) - num_inputs
        tables.append(_Table(rows, found.weight, num_inputs, num_outputs, found.output, frozen_rows))
    return tables


def _shrunk_tables(shrunk: "list[PartialModule]", vocabulary: Any, output: str | None) -> list[_Table]:
    from torch import nn

    tables = []
    for weight in {id(each.weight): each.weight for each in shrunk}.values():
        holders = [each for each in shrunk if each.weight is weight]
        table = holders[0].table
        kept = vocabulary.get(table.name) if isinstance(vocabulary, Mapping) else vocabulary
        partial_rows = table.num_rows if kept is None else len(_of_size(kept, table.full_size, table.name))
        if output not in (None, table.output or "full"):
            raise ModelError(
                f'{table.name} is shrunk with output="{table.output or "full"}", and was to be estimated with '
                f'output="{output}"; merge_(model) first, or leave output out'
            )
        num_inputs = sum(isinstance(each, nn.Embedding) for each in holders)
        rows, place = TableRows(table.name, table.full_size, partial_rows), table.frozen_rows_on
        num_outputs = len(holders) - num_inputs
        tables.append(_Table(rows, weight, num_inputs, num_outputs, table.output, place, table.store.dtype))
    return tables


def _as_vocabulary(kept: "Kept", module: "nn.Module", path: Any) -> PartialVocabulary:
    """What is kept, as a vocabulary of the size of the table at `path`, or of the model's input embeddings."""
    if isinstance(kept, PartialVocabulary):
        return kept  # knows its size, which is checked where the tables are found
    getter = getattr(module, "get_input_embeddings", lambda: None)
    table = dict(module.named_modules()).get(path) if isinstance(path, str) else getter()
    full_rows = getattr(table, "num_embeddings", getattr(table, "out_features", None))
    if full_rows is None:
        name = type(module).__name__
        raise ModelError(f"{name}: found no table to take {kept!r} rows of; give its path, embedding='path.to.module'")
    return _of_size(kept, full_rows, path or type(module).__name__)


def _of_size(kept: "Kept", full_rows: int, name: str) -> PartialVocabulary:
    if isinstance(kept, PartialVocabulary):
        kept = kept.fitted_to(full_rows)
        if kept.full_size != full_rows:
            raise VocabularyError(
                f"{name}: the vocabulary's full size is {kept.full_size:,}, the table has {full_rows:,}"
            )
        return kept
    if isinstance(kept, TokenCounts):
        return PartialVocabulary(kept.token_ids, full_rows)
    if not 1 <= kept <= full_rows:
        raise VocabularyError(f"{name}: expected 1 to {full_rows:,} rows kept, got {kept:,}")
    return PartialVocabulary(range(kept), full_rows)


def _parameters(module: "nn.Module", tables: list[_Table], kept: bool, precision: Precision | None) -> list[Parameter]:
    """Every parameter once, its vocabulary tables with full rows, or with the kept ones."""
    from torch import nn

    held_by: dict[int, list[nn.Module]] = {}
    for holder in module.modules():
        for parameter in holder.parameters(recurse=False):
            held_by.setdefault(id(parameter), []).append(holder)
    rows_of = {id(table.weight): table.rows for table in tables}
    result = []
    for parameter in module.parameters():
        holders = held_by[id(parameter)]
        shape = tuple(parameter.shape)
        rows = rows_of.get(id(parameter))
        if rows is not None:
            shape = (rows.partial_rows if kept else rows.full_rows, *shape[1:])
        result.append(
            Parameter(
                shape=shape,
                value_bytes=_value_bytes(parameter, precision),
                trains=parameter.requires_grad,
                in_embedding=any(isinstance(holder, nn.Embedding) for holder in holders),
                in_layer=any(_is_layer(holder) for holder in holders),
                is_table=rows is not None,
            )
        )
    return result


def _is_layer(module: "nn.Module") -> bool:
    """Whether autocast runs this module in bf16: it multiplies by a matrix, and is no lookup."""
    from torch import nn

    weight = getattr(module, "weight", None)
    return getattr(weight, "ndim", 0) >= 2 and not isinstance(module, nn.Embedding)


def _value_bytes(parameter: "torch.Tensor", precision: Precision | None) -> int:
    if precision is None or not parameter.is_floating_point():  # quantised values stay as they are
        return parameter.element_size()
    return BF16_BYTES if precision == "bf16" else FP32_BYTES


def _dtype_names(module: "nn.Module") -> str:
    return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}))


def _computed_bytes(weight: "torch.Tensor", precision: Precision | None) -> int:
    """Bytes of one value of an output layer as it is multiplied: autocast does that in bf16."""
    return BF16_BYTES if precision == "mixed" else _value_bytes(weight, precision)


def format_bytes(num_bytes: float) -> str:
    """A number of bytes for a reader, in powers of 1,000 and three digits: '1.11 GB'."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            break
        value /= 1000
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"


_ROWS = {
    "weights": "weights_bytes",
    "gradients": "gradients_bytes",
    "optimizer states": "optimizer_bytes",
    "autocast copies": "autocast_bytes",
    "buffers": "buffers_bytes",
    "id map": "remap_bytes",
    "frozen rows": "frozen_bytes",
    "loss": "loss_bytes",
    "total": "total_bytes",
    "vocabulary's part": "vocabulary_bytes",
}


def _table(estimate: MemoryEstimate) -> "Table":
    from rich.table import Table

    kept = ", ".join(f"{table.partial_rows:,} of {table.full_rows:,}" for table in estimate.tables)
    output = "" if estimate.output is None else f", output {estimate.output}"
    table = Table(title=f"{estimate.model}: {kept} rows, {estimate.optimizer}, {estimate.precision}{output}")
    table.add_column("training holds")
    for heading in ("full", "partial", "saved"):
        table.add_column(heading, justify="right")
    parameters = (estimate.full.num_parameters, estimate.partial.num_parameters)
    table.add_row(
        "parameters", *(f"{count / 1e6:.1f} M" for count in parameters), _percent(*parameters), end_section=True
    )
    shown = [field for field in _ROWS.values() if getattr(estimate.full, field) or getattr(estimate.partial, field)]
    last = shown[-3]  # above the total
    for label, field in _ROWS.items():
        full, partial = (getattr(footprint, field) for footprint in (estimate.full, estimate.partial))
        if full or partial:
            style = "bold" if label == "total" else None
            sections = label == "total" or field == last
            table.add_row(
                label,
                format_bytes(full),
                format_bytes(partial),
                _percent(full, partial),
                style=style,
                end_section=sections,
            )
    return table


def _percent(full: int, partial: int) -> str:
    return f"{100 * (full - partial) / full:.1f} %" if full else ""
