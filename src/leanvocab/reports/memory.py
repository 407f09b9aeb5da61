"""Bytes that training holds in parameters, full beside partial, before any weight is loaded.

Counted (docs/decisions/what-an-estimate-counts.md), for each parameter of the model:

- weights: the parameter as it is stored;
- gradients: as large as the weight, for what trains;
- optimizer states: what the optimizer allocates at its first step, for what trains;
- autocast copies: in `"mixed"` precision only, the bf16 copies of the layers' weights that live while a batch runs;
- buffers: what the modules register beside parameters and save; what they make anew (positions, masks) is in the peak alone;
- the map with which a partial table finds its rows;
- frozen rows: those of a `"frozen"` output layer, without gradients and states, in the dtype in which they are multiplied or
  that of the checkpoint, whichever is narrower. On a CPU they are a mapped file, whose pages the kernel can drop; they are
  counted all the same;
- the loss of a language model at its peak, where a number of tokens is given: of logits that are scores alone, without the
  copies that soft-capping keeps for its gradient, and of a chunk as large as on a GPU.

Beside these, where a step is given, its peak: what is there at once, activations included (`step_peak`). What the allocator and
the libraries hold besides is not counted.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from leanvocab.choices import FrozenRowsOn, OutputMode
from leanvocab.errors import RESIZE_FIRST, ModelError, SettingsError, VocabularyError
from leanvocab.files.presence import is_folder
from leanvocab.model.find import find_tables, output_layers
from leanvocab.model.full_table import LOOKUPS, Lookup
from leanvocab.output.frozen_rows import FrozenSizes
from leanvocab.output.loss import chunk_bytes, peak_bytes
from leanvocab.output.scores import PIECES, tokens_in_a_piece
from leanvocab.partial.module import PartialModule, partial_modules
from leanvocab.reports.memory_estimate import (
    FP32_BYTES,
    Footprint,
    MemoryEstimate,
    Parameter,
    TableRows,
    TrainingStep,
    make_footprint,
    plain_loss_bytes,
    remap_bytes,
)
from leanvocab.reports.state_bytes import AnyOptimizer, check_optimizer, optimizer_name, shared_bytes, state_bytes
from leanvocab.reports.step_peak import PartialOutput, peak_above_weights
from leanvocab.vocabulary.counts import TokenCounts
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

Precision: TypeAlias = Literal["fp32", "bf16", "mixed"]
Kept: TypeAlias = PartialVocabulary | TokenCounts | int


def estimate_memory(
    model: str | nn.Module | Any,
    vocabulary: Kept | Mapping[str, Kept] | None = None,
    *,
    optimizer: AnyOptimizer = "adamw",
    precision: Precision | None = None,
    auto_class: Any = None,
    embedding: str | Iterable[str] | None = None,
    output: OutputMode | None = None,
    frozen_rows: FrozenRowsOn = "device",
    num_tokens: int | None = None,
    step: TrainingStep | None = None,
    full_peak: bool = True,
    adapt: Callable[[nn.Module], Any] | None = None,
) -> MemoryEstimate:
    """Bytes of weights, gradients and optimizer states, full beside partial, without loading a weight.

    Args:
        model: a hub name or a folder, a transformers config, or an `nn.Module` on any device ("meta" included), shrunk
            or not. Of a module, parameters that do not require a gradient have no gradients and no states.
        vocabulary: what is kept of the input embeddings: a `PartialVocabulary`, `TokenCounts` (their used ids), or a
            number of rows; for several tables `{path: kept}`. None: what a shrunk model holds now.
        optimizer: `"adamw"`, `"sgd"`, `"sgd_momentum"`, `"adafactor"` (transformers'), `"torch_adafactor"`, `"adamw_8bit"`
            (bitsandbytes as the Trainer sets it up: embeddings keep 32-bit states), the name of a class of torch.optim, or
            what makes an optimizer of a list of parameters.
        precision: `"fp32"`; `"bf16"` (weights, gradients and states); `"mixed"` (all of these in fp32, and autocast's
            bf16 copies of the layers' weights; the tables are looked up in fp32 and never copied). None: the dtypes
            that a module's parameters have, or that a config names (fp32 where it names none).
        auto_class: the transformers auto class, or its name, that a name or config becomes. None:
            `AutoModelForSequenceClassification`, as in the paper.
        embedding: path or paths of the tables in a module that does not name its own, as for `shrink_`.
        output: what becomes of the output layer, as for `shrink_`: by default "full", or "frozen" where it is tied.
        frozen_rows: where the frozen rows are. With "host" none are counted: they lie in host memory, or a mapped file.
        num_tokens: tokens in a batch (sequences × length), for the loss of a language model. None: the loss is not counted.
        step: a batch, and how it is computed, for the peak with activations. None: no peak.
        full_peak: also the peak with the full vocabulary, for which the step is taken a second time.
        adapt: what puts adapters into the model, in place, after its tables were found: LoRA.

    Raises:
        VocabularyError: the vocabulary is not of the table's size.
        SettingsError: an unknown optimizer or precision, or no number of tokens.
        ModelError: an unknown class; or what `shrink_` refuses, `TiedOutputError` among them.

    Source: paper, Tables 2 and 5 count parameters in the same way.
    """
    _check_settings(optimizer, precision, num_tokens)
    built = estimated_model(
        model,
        vocabulary,
        precision=precision,
        auto_class=auto_class,
        embedding=embedding,
        output=output,
        frozen_rows=frozen_rows,
        adapt=adapt,
    )
    estimate = _estimate(built, optimizer, num_tokens)
    return estimate if step is None else _with_peaks(estimate, built, step, full_peak)


def estimated_model(
    model: str | nn.Module | Any,
    vocabulary: Kept | Mapping[str, Kept] | None,
    *,
    precision: Precision | None = None,
    auto_class: Any = None,
    embedding: str | Iterable[str] | None = None,
    output: OutputMode | None = None,
    frozen_rows: FrozenRowsOn = "device",
    adapt: Callable[[nn.Module], Any] | None = None,
) -> "EstimatedModel":
    """The parameters and tables whose bytes `estimate_memory` adds up; the arguments are its."""
    module, name = _as_module(model, auto_class)
    tables = _estimated_tables(module, vocabulary, embedding, output, frozen_rows, precision)
    if adapt is not None:
        adapt(module)
    return EstimatedModel(module, name, precision, tuple(tables))


def _check_settings(optimizer: AnyOptimizer, precision: str | None, num_tokens: int | None) -> None:
    check_optimizer(optimizer)
    if precision not in (None, "fp32", "bf16", "mixed"):
        raise SettingsError(f"unknown precision {precision!r}: expected fp32, bf16, mixed or None (as the model is)")
    if num_tokens is not None and num_tokens < 1:
        raise SettingsError(
            f"num_tokens={num_tokens}: expected 1 or more tokens in a batch, or None (leave the loss out)"
        )


def _as_module(model: Any, auto_class: Any) -> tuple[nn.Module, str]:
    """A module to measure (on the meta device where it has to be built), and what to call it."""
    if isinstance(model, nn.Module):
        return model, type(model).__name__
    import transformers

    is_named = isinstance(model, str | os.PathLike)
    name = "" if not is_named else Path(model).name if is_folder(model) else str(model)
    config = transformers.AutoConfig.from_pretrained(model) if is_named else model
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
        module.tie_weights()  # transformers 5.0 leaves what has no memory untied
    # transformers has no class of this kind for the architecture, and lists all that it has
    except ValueError as error:
        raise ModelError(
            f"{factory.__name__} does not take {config.model_type!r} models: give auto_class=, or the model itself"
        ) from error
    return module, name or type(module).__name__


def _estimate(model: "EstimatedModel", optimizer: AnyOptimizer, num_tokens: int | None) -> MemoryEstimate:
    full, partial = (model.parameters(kept=kept) for kept in (False, True))
    states = state_bytes(optimizer, (parameter for parameter in (*full, *partial) if parameter.trains))
    outputs = model.outputs()
    # One loss comes after the other.
    losses = [] if num_tokens is None else [_loss_bytes(*layer, num_tokens, model.precision) for layer in outputs]
    full_loss, partial_loss = (max(peaks) for peaks in zip(*losses, strict=True)) if losses else (0, 0)

    def footprint(parameters: list[Parameter], **others: int) -> Footprint:
        shared, mixed = shared_bytes(optimizer, parameters), model.precision == "mixed"
        return make_footprint(parameters, states, mixed, shared, buffers_bytes=model.saved_buffers_bytes, **others)

    return MemoryEstimate(
        model=model.name,
        optimizer=optimizer_name(optimizer),
        precision=model.precision or _dtype_names(model.module),
        output=next(("full" if table is None else table.output for _, table in outputs), None),
        tables=tuple(table.rows for table in model.tables),
        full=footprint(full, loss_bytes=full_loss),
        partial=footprint(
            partial,
            remap_bytes=sum(table.remap_bytes for table in model.tables),
            frozen_bytes=sum(
                sizes.held_bytes for each in model.tables if (sizes := each.frozen_sizes(model.precision))
            ),
            loss_bytes=partial_loss,
        ),
    )


def _with_peaks(
    estimate: MemoryEstimate, model: "EstimatedModel", step: TrainingStep, full_peak: bool
) -> MemoryEstimate:
    """The estimate with the peaks of a step, or the reason why they are not known."""
    module, tables, precision = model.module, model.tables, model.precision
    if partial_modules(module):
        return replace(estimate, step=step, no_peak="the model is shrunk already; give its config")
    options: dict[str, Any] = {"mixed": precision == "mixed"}
    outputs = tuple(
        PartialOutput(layer, partial(table.loss_bytes, precision=precision, step=step))
        for table in tables
        if table.output is not None
        for layer in table.modules
        if not isinstance(layer, LOOKUPS)
    )
    rows = {table.weight: table.rows.partial_rows for table in tables}

    def dtype_of(weight: Tensor) -> torch.dtype:
        return _trained_dtype(weight, precision)

    made_anew = sum(buffer.nbytes for buffer in _buffers(module, saved=False))
    try:
        in_full = made_anew + peak_above_weights(module, step, dtype_of, **options) if full_peak else None
        in_part = made_anew + peak_above_weights(module, step, dtype_of, rows=rows, outputs=outputs, **options)
    except ModelError as error:
        return replace(estimate, step=step, no_peak=str(error))
    return replace(
        estimate,
        step=step,
        full=estimate.full if in_full is None else estimate.full.with_peak(in_full, on_cpu=step.on_cpu),
        partial=estimate.partial.with_peak(in_part, on_cpu=step.on_cpu),
    )


def _buffers(module: nn.Module, *, saved: bool) -> list[Tensor]:
    """Buffers that a checkpoint holds, or the others: positions, masks and frequencies, which a model makes anew."""
    named = [
        (buffer, name not in each._non_persistent_buffers_set)
        for each in module.modules()
        for name, buffer in each.named_buffers(recurse=False)
    ]
    return list({id(buffer): buffer for buffer, is_saved in named if is_saved is saved}.values())


def _is_layer(module: nn.Module) -> bool:
    """True for what autocast runs in bf16: it multiplies by a matrix, and is no lookup."""
    weight = getattr(module, "weight", None)
    return getattr(weight, "ndim", 0) >= 2 and not isinstance(module, LOOKUPS)


def _dtype_names(module: nn.Module) -> str:
    return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}))


# --- tables and output layers of a model that is to be estimated, shrunk or not; refuses what `shrink_` does ----------


def _trained_dtype(weight: Tensor, precision: Precision | None) -> torch.dtype:
    """The dtype that a parameter is trained in; quantized values stay as they are."""
    if precision is None or not weight.is_floating_point():
        return weight.dtype
    return torch.bfloat16 if precision == "bf16" else torch.float32


@dataclass(frozen=True)
class EstimatedModel:
    """A model that is to be estimated, in its place or on the meta device, and its vocabulary tables."""

    module: nn.Module
    name: str
    precision: Precision | None
    tables: "tuple[EstimatedTable, ...]"

    @property
    def saved_buffers_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in _buffers(self.module, saved=True))

    def parameters(self, *, kept: bool) -> list[Parameter]:
        """Every parameter once, its vocabulary tables with full rows, or with the kept ones."""
        holders: dict[int, list[nn.Module]] = {}
        for holder in self.module.modules():
            for parameter in holder.parameters(recurse=False):
                holders.setdefault(id(parameter), []).append(holder)
        rows_of = {id(table.weight): table.rows for table in self.tables}
        result = []
        for parameter in self.module.parameters():
            shape, rows = tuple(parameter.shape), rows_of.get(id(parameter))
            if rows is not None:
                shape = (rows.partial_rows if kept else rows.full_rows, *shape[1:])
            result.append(
                Parameter(
                    shape=shape,
                    value_bytes=_trained_dtype(parameter, self.precision).itemsize,
                    trains=parameter.requires_grad,
                    in_embedding=any(isinstance(holder, nn.Embedding) for holder in holders[id(parameter)]),
                    in_layer=any(_is_layer(holder) for holder in holders[id(parameter)]),
                    is_table=rows is not None,
                )
            )
        return result

    def outputs(self) -> "list[tuple[Tensor, EstimatedTable | None]]":
        """The matrix of each output layer over the vocabulary, and the table that it is where it is made partial."""
        weights = {id(table.weight) for table in self.tables}
        inputs = [each for each in self.module.modules() if isinstance(each, LOOKUPS) and id(each.weight) in weights]
        partial = {id(table.weight): table for table in self.tables if table.output is not None}
        layers = (layer.weight for layer in output_layers(self.module, inputs))
        matrices = [weight for weight in layers if isinstance(weight, Tensor) and weight.ndim == 2]
        return [(weight, partial.get(id(weight))) for weight in matrices]


@dataclass(frozen=True)
class EstimatedTable:
    """A vocabulary matrix, and the modules that look its rows up or multiply by them."""

    rows: TableRows
    modules: Sequence[PartialModule | Lookup | nn.Linear]
    output: str | None  # "frozen" or "restricted", where an output layer holds it
    frozen_rows_on: str
    stored: torch.dtype | None = None  # of the frozen rows, where it is known
    has_bias: bool = False  # which is added to a copy of its scores, piece by piece

    @property
    def weight(self) -> Tensor:
        return self.modules[0].weight

    @property
    def num_inputs(self) -> int:
        """Modules that look rows up; the others multiply by them."""
        return sum(isinstance(module, LOOKUPS) for module in self.modules)

    @property
    def remap_bytes(self) -> int:
        num_outputs = len(self.modules) - self.num_inputs
        return remap_bytes(self.rows.full_rows, self.rows.partial_rows, self.num_inputs, num_outputs)

    def computed(self, precision: Precision | None) -> torch.dtype:
        """The dtype that its rows are multiplied in: autocast does that in bf16."""
        return torch.bfloat16 if precision == "mixed" else _trained_dtype(self.weight, precision)

    def frozen_sizes(self, precision: Precision | None) -> FrozenSizes | None:
        """Sizes of the rows that do not train and are in the softmax; None where there are none."""
        if self.output != "frozen":
            return None
        computed, on_host = self.computed(precision), self.frozen_rows_on == "host"
        full_rows, kept_rows, dim = self.rows.full_rows, self.rows.partial_rows, self.weight.shape[1]
        return FrozenSizes(full_rows, kept_rows, dim, self.stored or computed, computed, on_host)

    def loss_bytes(self, num_tokens: int, precision: Precision | None, step: TrainingStep | None = None) -> int:
        """The peak of the loss over this table. On a CPU, frozen rows are mapped, and scores of kept ones are there twice."""
        rows, computed = self.rows.partial_rows, self.computed(precision)
        frozen = self.frozen_sizes(precision)
        twice = num_tokens * rows * computed.itemsize if frozen and step is not None and step.on_cpu else 0
        columns, biased = self.rows.full_rows if frozen else rows, 0
        if self.has_bias and step is not None and computed.itemsize == FP32_BYTES:
            biased = min(FP32_BYTES * tokens_in_a_piece(num_tokens, columns) * columns, chunk_bytes("cuda") // PIECES)
        return peak_bytes(num_tokens, rows, self.weight.shape[1], computed, frozen) + twice + biased


def _loss_bytes(
    weight: Tensor, table: EstimatedTable | None, num_tokens: int, precision: Precision | None
) -> tuple[int, int]:
    """Peaks of an ordinary loss, and of the one that training with a partial vocabulary has."""
    if table is None:
        return (plain_loss_bytes(num_tokens, weight.shape[0]),) * 2
    return plain_loss_bytes(num_tokens, table.rows.full_rows), table.loss_bytes(num_tokens, precision)


def _estimated_tables(
    module: nn.Module,
    vocabulary: Kept | Mapping[str, Kept] | None,
    embedding: Any,
    output: Any,
    frozen_rows: str,
    precision: Precision | None,
) -> list[EstimatedTable]:
    """The matrices that are shrunk, or that `shrink_` would shrink; what adapts the model later may cast them."""
    shrunk = list(partial_modules(module).values())
    if shrunk:
        return _shrunk_tables(shrunk, vocabulary, output)
    if vocabulary is None:
        raise VocabularyError(
            f"{type(module).__name__} is not shrunk: give its vocabulary, or the number of rows to keep"
        )
    kept: Any
    if isinstance(vocabulary, Mapping):
        kept = {path: _as_vocabulary(rows, module, path) for path, rows in vocabulary.items()}
    else:
        kept = _as_vocabulary(vocabulary, module, embedding)
    others = [*module.parameters(), *module.buffers()]
    return [
        EstimatedTable(
            TableRows(table.name, table.vocabulary.full_size, len(table.vocabulary)),
            table.modules,
            table.output,
            frozen_rows,
            table.weight.dtype if precision is None else None,
            has_bias=any(its.numel() == its.shape[-1] == table.vocabulary.full_size for its in others if its.ndim),
        )
        for table in find_tables(module, kept, embedding, output)
    ]


def _shrunk_tables(shrunk: list[PartialModule], vocabulary: Any, output: str | None) -> list[EstimatedTable]:
    holders: dict[int, list[PartialModule]] = {}
    for module in shrunk:
        holders.setdefault(id(module.weight), []).append(module)
    tables = []
    for modules in holders.values():
        table = modules[0].table
        kept = vocabulary.get(table.name) if isinstance(vocabulary, Mapping) else vocabulary
        partial_rows = table.num_rows if kept is None else len(_of_size(kept, table.full_size, table.name))
        if output not in (None, table.output or "full"):
            raise ModelError(
                f'{table.name} is shrunk with output="{table.output or "full"}", and was to be estimated with '
                f'output="{output}"; merge_(model) first, or leave output out'
            )
        rows = TableRows(table.name, table.full_size, partial_rows)
        tables.append(EstimatedTable(rows, modules, table.output, table.frozen_rows_on, table.store.dtype))
    return tables


def _as_vocabulary(kept: Kept, module: nn.Module, path: Any) -> PartialVocabulary:
    """The vocabulary of what is kept, of the size of the table at `path`, or of the model's input embeddings."""
    if isinstance(kept, PartialVocabulary):
        return kept  # knows its size, which is checked where the tables are found
    getter = getattr(module, "get_input_embeddings", lambda: None)
    table = dict(module.named_modules()).get(path) if isinstance(path, str) else getter()
    full_rows = getattr(table, "num_embeddings", getattr(table, "out_features", None))
    if full_rows is None:
        name = type(module).__name__
        raise ModelError(f"{name}: found no table to take {kept!r} rows of; give its path, embedding='path.to.module'")
    return _of_size(kept, full_rows, path or type(module).__name__)


def _of_size(kept: Kept, full_rows: int, name: str) -> PartialVocabulary:
    if isinstance(kept, PartialVocabulary):
        kept = kept.fitted_to(full_rows)
        if kept.full_size != full_rows:
            raise VocabularyError(
                f"{name}: the vocabulary's full size is {kept.full_size:,}, the table has {full_rows:,}"
                + (f"; {RESIZE_FIRST}" if kept.full_size > full_rows else "")
            )
        return kept
    if isinstance(kept, TokenCounts):
        return PartialVocabulary(kept.token_ids, full_rows)
    if not 1 <= kept <= full_rows:
        raise VocabularyError(f"{name}: expected 1 to {full_rows:,} rows kept, got {kept:,}")
    return PartialVocabulary(range(kept), full_rows)
