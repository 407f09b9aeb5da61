"""Bytes that training holds in parameters, full beside partial, before any weight is loaded.

Counted (docs/decisions/what-an-estimate-counts.md), for each parameter of the model:

- weights: the parameter as it is stored;
- gradients: as large as the weight, for what trains;
- optimizer states: what the optimizer allocates at its first step, for what trains;
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvocab.errors import ModelError, SettingsError
from leanvocab.reports.footprint import Footprint, Parameter, make_footprint
from leanvocab.reports.memory_estimate import MemoryEstimate
from leanvocab.reports.state_bytes import AnyOptimizer, check_optimizer, optimizer_name, shared_bytes, state_bytes

if TYPE_CHECKING:
    from torch import nn

    from leanvocab.choices import FrozenRowsOn, OutputMode
    from leanvocab.reports.estimated_tables import EstimatedTable, Kept, Precision


def estimate_memory(
    model: "str | nn.Module | Any",
    vocabulary: "Kept | Mapping[str, Kept] | None" = None,
    *,
    optimizer: AnyOptimizer = "adamw",
    precision: "Precision | None" = None,
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

    Raises:
        VocabularyError: the vocabulary is not of the table's size.
        SettingsError: an unknown optimizer or precision, or no number of tokens.
        ModelError: an unknown class; or what `shrink_` refuses, `TiedOutputError` among them.

    Source: Tables 2 and 5 of the paper count parameters in the same way.
    """
    _check_settings(optimizer, precision, num_tokens)
    module, name = _as_module(model, auto_class)
    from leanvocab.reports.estimated_tables import estimated_tables

    tables = estimated_tables(module, vocabulary, embedding, output, frozen_rows)
    return _estimate(module, name, tables, optimizer, precision, num_tokens)


def _check_settings(optimizer: AnyOptimizer, precision: str | None, num_tokens: int | None) -> None:
    check_optimizer(optimizer)
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
    # transformers has no class of this kind for the architecture, and lists all that it has
    except ValueError as error:
        raise ModelError(
            f"{factory.__name__} does not take {config.model_type!r} models: give auto_class=, or the model itself"
        ) from error
    if config is model:
        return module, type(module).__name__
    return module, Path(model).name if Path(model).is_dir() else str(model)


def _estimate(
    module: "nn.Module",
    name: str,
    tables: "list[EstimatedTable]",
    optimizer: AnyOptimizer,
    precision: "Precision | None",
    num_tokens: int | None,
) -> MemoryEstimate:
    from leanvocab.reports.estimated_tables import estimated_outputs

    full, partial = (_parameters(module, tables, kept, precision) for kept in (False, True))
    states = state_bytes(optimizer, (parameter for parameter in (*full, *partial) if parameter.trains))
    outputs = estimated_outputs(module, tables)
    # One loss comes after the other.
    losses = [] if num_tokens is None else [layer.loss_bytes(num_tokens, precision) for layer in outputs]
    full_loss, partial_loss = (max(peaks) for peaks in zip(*losses, strict=True)) if losses else (0, 0)

    buffers_bytes = sum(buffer.nbytes for buffer in module.buffers())

    def footprint(parameters: list[Parameter], **others: int) -> Footprint:
        shared = shared_bytes(optimizer, parameters)
        return make_footprint(parameters, states, precision == "mixed", shared, buffers_bytes=buffers_bytes, **others)

    return MemoryEstimate(
        model=name,
        optimizer=optimizer_name(optimizer),
        precision=precision or _dtype_names(module),
        output=next((layer.mode for layer in outputs), None),
        tables=tuple(table.rows for table in tables),
        full=footprint(full, loss_bytes=full_loss),
        partial=footprint(
            partial,
            remap_bytes=sum(table.remap_bytes for table in tables),
            frozen_bytes=sum(sizes.held_bytes for table in tables if (sizes := table.frozen_sizes(precision))),
            loss_bytes=partial_loss,
        ),
    )


def _parameters(
    module: "nn.Module", tables: "list[EstimatedTable]", kept: bool, precision: "Precision | None"
) -> list[Parameter]:
    """Every parameter once, its vocabulary tables with full rows, or with the kept ones."""
    from torch import nn

    from leanvocab.reports.estimated_tables import trained_dtype

    holders: dict[int, list[nn.Module]] = {}
    for holder in module.modules():
        for parameter in holder.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(holder)
    rows_of = {id(table.weight): table.rows for table in tables}
    result = []
    for parameter in module.parameters():
        shape, rows = tuple(parameter.shape), rows_of.get(id(parameter))
        if rows is not None:
            shape = (rows.partial_rows if kept else rows.full_rows, *shape[1:])
        result.append(
            Parameter(
                shape=shape,
                value_bytes=trained_dtype(parameter, precision).itemsize,
                trains=parameter.requires_grad,
                in_embedding=any(isinstance(holder, nn.Embedding) for holder in holders[id(parameter)]),
                in_layer=any(_is_layer(holder) for holder in holders[id(parameter)]),
                is_table=rows is not None,
            )
        )
    return result


def _is_layer(module: "nn.Module") -> bool:
    """True for what autocast runs in bf16: it multiplies by a matrix, and is no lookup."""
    from torch import nn

    weight = getattr(module, "weight", None)
    return getattr(weight, "ndim", 0) >= 2 and not isinstance(module, nn.Embedding)


def _dtype_names(module: "nn.Module") -> str:
    return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}))
