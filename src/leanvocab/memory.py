"""Bytes that training holds in parameters, full beside partial, before any weight is loaded.

Counted, for each parameter of the model:

- weights: the parameter as it is stored;
- gradients: as large as the weight, for what trains;
- optimizer states: what the optimizer allocates at its first step, for what trains (`OPTIMIZERS`);
- autocast copies: in `"mixed"` precision only, the bf16 copies of the layers' weights that live while a batch runs;
- buffers: what the modules register beside parameters;
- the map with which a partial table finds its rows.

Not counted: activations and logits, temporary tensors of a step, what the allocator and the libraries hold besides.

Nothing here imports torch before it is needed.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from leanvocab.counts import TokenCounts
from leanvocab.errors import ModelError, SettingsError, VocabularyError
from leanvocab.vocabulary import PartialVocabulary

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn

    from leanvocab.partial_module import PartialModule

Precision: TypeAlias = Literal["fp32", "bf16", "mixed"]
Kept: TypeAlias = "PartialVocabulary | TokenCounts | int"


@dataclass(frozen=True)
class _Parameter:
    """What a parameter's bytes depend on."""

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


_FP32_BYTES = 4
_BF16_BYTES = 2
_STEP_BYTES = 4  # one fp32 number a parameter, which counts the steps
_INT8_BLOCK = 256  # values that share one fp32 scale in bitsandbytes' block-wise states
_INT8_MIN_VALUES = 4096  # smaller parameters keep fp32 states
_INT8_MAPS_BYTES = 2 * 256 * _FP32_BYTES  # the two code books, shared by all parameters


def _adamw_bytes(parameter: _Parameter) -> int:
    return 2 * parameter.num_bytes + _STEP_BYTES


def _factored_values(shape: tuple[int, ...]) -> int:
    """Values that Adafactor keeps of the second moment: a row and a column of sums, or all of a vector."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


def _adafactor_bytes(parameter: _Parameter) -> int:
    """transformers' Adafactor keeps fp32 states whatever the weights are, and one fp32 norm a parameter."""
    return _factored_values(parameter.shape) * _FP32_BYTES + _FP32_BYTES


def _torch_adafactor_bytes(parameter: _Parameter) -> int:
    return _factored_values(parameter.shape) * parameter.value_bytes + _STEP_BYTES


def _adamw_8bit_bytes(parameter: _Parameter) -> int:
    """bitsandbytes under the Trainer, which has every nn.Embedding keep 32-bit states."""
    if _keeps_32_bit_states(parameter):
        return 2 * parameter.num_values * _FP32_BYTES
    return 2 * (parameter.num_values + math.ceil(parameter.num_values / _INT8_BLOCK) * _FP32_BYTES)


def _keeps_32_bit_states(parameter: _Parameter) -> bool:
    return parameter.in_embedding or parameter.num_values < _INT8_MIN_VALUES


OPTIMIZERS: Mapping[str, Callable[[_Parameter], int]] = {
    "adamw": _adamw_bytes,  # torch.optim.AdamW and Adam: two moments
    "sgd": lambda _: 0,  # torch.optim.SGD
    "sgd_momentum": lambda parameter: parameter.num_bytes,  # torch.optim.SGD(momentum=…)
    "adafactor": _adafactor_bytes,  # transformers.Adafactor, which the Trainer uses; without a first moment
    "torch_adafactor": _torch_adafactor_bytes,  # torch.optim.Adafactor
    "adamw_8bit": _adamw_8bit_bytes,  # bitsandbytes
}
"""Bytes of states of one trained parameter, by the name of the optimizer."""


@dataclass(frozen=True)
class Footprint:
    """What training holds in parameters and what belongs to them, in bytes."""

    num_parameters: int
    num_vocabulary_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    autocast_bytes: int
    buffers_bytes: int
    remap_bytes: int
    """The map from token ids to rows that each shrunk module holds on its device."""
    vocabulary_bytes: int
    """Of the weights, gradients and states above, those of the vocabulary tables."""

    @property
    def total_bytes(self) -> int:
        """Weights, gradients, optimizer states, autocast copies, buffers and the map."""
        trained_bytes = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return trained_bytes + self.autocast_bytes + self.buffers_bytes + self.remap_bytes


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
            "tables": [asdict(table) for table in self.tables],
            "full": _footprint_dict(self.full),
            "partial": _footprint_dict(self.partial),
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

    Raises:
        VocabularyError: the vocabulary is not of the table's size.
        SettingsError: an unknown optimizer or precision.
        ModelError: an unknown class; or what `shrink_` refuses, `TiedOutputError` among them.

    Source: Tables 2 and 5 of the paper count parameters in the same way.
    """
    if optimizer not in OPTIMIZERS:
        raise SettingsError(f"unknown optimizer {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    if precision not in (None, "fp32", "bf16", "mixed"):
        raise SettingsError(f"unknown precision {precision!r}: expected fp32, bf16, mixed or None (as the model is)")
    module, label = _as_module(model, auto_class)
    tables = _find_tables(module, vocabulary, embedding)
    full, partial = (_parameters(module, tables, kept, precision) for kept in (False, True))
    buffers_bytes = sum(buffer.nbytes for buffer in module.buffers())
    return MemoryEstimate(
        model=label,
        optimizer=optimizer,
        precision=precision or _dtype_names(module),
        tables=tuple(table.rows for table in tables),
        full=_footprint(full, optimizer, precision, buffers_bytes, 0),
        partial=_footprint(partial, optimizer, precision, buffers_bytes, _remap_bytes(tables)),
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
    """A vocabulary table and the modules that look its rows up."""

    rows: TableRows
    weight: "torch.Tensor"
    num_holders: int


def _find_tables(module: "nn.Module", vocabulary: Any, embedding: Any) -> list[_Table]:
    """The tables that are shrunk, or that `shrink_` would shrink; it refuses the same models."""
    from leanvocab.discovery import find_matrices
    from leanvocab.partial_module import PartialModule

    shrunk = [each for each in module.modules() if isinstance(each, PartialModule)]
    if shrunk:
        return _shrunk_tables(shrunk, vocabulary)
    if vocabulary is None:
        raise VocabularyError(
            f"{type(module).__name__} is not shrunk: give its vocabulary, or the number of rows to keep"
        )
    kept: Any
    if isinstance(vocabulary, Mapping):
        kept = {path: _as_vocabulary(each, module, path) for path, each in vocabulary.items()}
    else:
        kept = _as_vocabulary(vocabulary, module, embedding)
    return [
        _Table(
            TableRows(found.name, found.vocabulary.full_size, len(found.vocabulary)), found.weight, len(found.modules)
        )
        for found in find_matrices(module, kept, embedding)
    ]


def _shrunk_tables(shrunk: "list[PartialModule]", vocabulary: Any) -> list[_Table]:
    tables = []
    for weight in {id(each.weight): each.weight for each in shrunk}.values():
        holders = [each for each in shrunk if each.weight is weight]
        table = holders[0].table
        kept = vocabulary.get(table.name) if isinstance(vocabulary, Mapping) else vocabulary
        partial_rows = table.num_rows if kept is None else len(_of_size(kept, table.full_size, table.name))
        tables.append(_Table(TableRows(table.name, table.full_size, partial_rows), weight, len(holders)))
    return tables


def _as_vocabulary(kept: "Kept", module: "nn.Module", path: Any) -> PartialVocabulary:
    """What is kept, as a vocabulary of the size of the table at `path`, or of the model's input embeddings."""
    if isinstance(kept, PartialVocabulary):
        return kept  # knows its size, which is checked where the tables are found
    getter = getattr(module, "get_input_embeddings", lambda: None)
    table = dict(module.named_modules()).get(path) if isinstance(path, str) else getter()
    full_rows = getattr(table, "num_embeddings", None)
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


def _parameters(module: "nn.Module", tables: list[_Table], kept: bool, precision: Precision | None) -> list[_Parameter]:
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
            _Parameter(
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
    return _BF16_BYTES if precision == "bf16" else _FP32_BYTES


def _dtype_names(module: "nn.Module") -> str:
    return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}))


def _remap_bytes(tables: list[_Table]) -> int:
    """Each module that looks partial rows up holds int64 [full_size + 2], which remaps, and int64 [3], a missing id."""
    return sum(table.num_holders * 8 * (table.rows.full_rows + 2 + 3) for table in tables)


def _footprint(
    parameters: list[_Parameter], optimizer: str, precision: Precision | None, buffers_bytes: int, remap_bytes: int
) -> Footprint:
    trained = [parameter for parameter in parameters if parameter.trains]
    layers = [parameter for parameter in parameters if parameter.in_layer and precision == "mixed"]
    states_bytes = OPTIMIZERS[optimizer]
    maps = optimizer == "adamw_8bit" and not all(_keeps_32_bit_states(parameter) for parameter in trained)

    def held_bytes(parameter: _Parameter) -> int:
        return parameter.num_bytes + (parameter.num_bytes + states_bytes(parameter) if parameter.trains else 0)

    tables = [parameter for parameter in parameters if parameter.is_table]
    return Footprint(
        num_parameters=sum(parameter.num_values for parameter in parameters),
        num_vocabulary_parameters=sum(parameter.num_values for parameter in tables),
        weights_bytes=sum(parameter.num_bytes for parameter in parameters),
        gradients_bytes=sum(parameter.num_bytes for parameter in trained),
        optimizer_bytes=sum(map(states_bytes, trained)) + (_INT8_MAPS_BYTES if maps else 0),
        autocast_bytes=sum(parameter.num_values * _BF16_BYTES for parameter in layers),
        buffers_bytes=buffers_bytes,
        remap_bytes=remap_bytes,
        vocabulary_bytes=sum(map(held_bytes, tables)),
    )


def _footprint_dict(footprint: Footprint) -> dict[str, int]:
    return {**asdict(footprint), "total_bytes": footprint.total_bytes}


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
    "total": "total_bytes",
    "vocabulary's part": "vocabulary_bytes",
}


def _table(estimate: MemoryEstimate) -> "Table":
    from rich.table import Table

    kept = ", ".join(f"{table.partial_rows:,} of {table.full_rows:,}" for table in estimate.tables)
    table = Table(title=f"{estimate.model}: {kept} rows, {estimate.optimizer}, {estimate.precision}")
    table.add_column("training holds")
    for heading in ("full", "partial", "saved"):
        table.add_column(heading, justify="right")
    parameters = (estimate.full.num_parameters, estimate.partial.num_parameters)
    table.add_row(
        "parameters", *(f"{count / 1e6:.1f} M" for count in parameters), _percent(*parameters), end_section=True
    )
    for label, field in _ROWS.items():
        full, partial = (getattr(footprint, field) for footprint in (estimate.full, estimate.partial))
        if full or partial:
            style = "bold" if label == "total" else None
            sections = label in ("id map", "total")
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
