"""Vocabulary tables and output layers of a model that is to be estimated, shrunk or not; refuses what `shrink_` does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from leanvocab.errors import ModelError, VocabularyError
from leanvocab.model.find import find_tables, output_layers
from leanvocab.output.frozen_rows import FrozenSizes
from leanvocab.output.loss import peak_bytes
from leanvocab.partial.module import PartialModule, partial_modules
from leanvocab.reports.footprint import plain_loss_bytes
from leanvocab.reports.memory_estimate import TableRows
from leanvocab.vocabulary.counts import TokenCounts
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

Precision: TypeAlias = Literal["fp32", "bf16", "mixed"]
Kept: TypeAlias = PartialVocabulary | TokenCounts | int


def trained_dtype(weight: Tensor, precision: Precision | None) -> torch.dtype:
    """The dtype that a parameter is trained in; quantized values stay as they are."""
    if precision is None or not weight.is_floating_point():
        return weight.dtype
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _computed_dtype(weight: Tensor, precision: Precision | None) -> torch.dtype:
    """The dtype that an output layer is multiplied in: autocast does that in bf16."""
    return torch.bfloat16 if precision == "mixed" else trained_dtype(weight, precision)


@dataclass(frozen=True)
class EstimatedTable:
    """A vocabulary matrix, and the modules that look its rows up or multiply by them."""

    rows: TableRows
    weight: Tensor
    num_inputs: int
    num_outputs: int
    output: str | None  # "frozen" or "restricted", where an output layer holds it
    frozen_rows_on: str
    stored: torch.dtype | None = None  # of the frozen rows of a model that is shrunk

    @property
    def remap_bytes(self) -> int:
        """Each input holds int64 [full_rows + 2], which remaps; each output its ids; each int64 [3], a missing id."""
        inputs = self.num_inputs * (self.rows.full_rows + 2 + 3)
        return 8 * (inputs + self.num_outputs * (self.rows.partial_rows + 3))

    def frozen_sizes(self, precision: Precision | None) -> FrozenSizes | None:
        """Sizes of the rows that do not train and are in the softmax; None where there are none."""
        if self.output != "frozen":
            return None
        computed, on_host = _computed_dtype(self.weight, precision), self.frozen_rows_on == "host"
        full_rows, kept_rows, dim = self.rows.full_rows, self.rows.partial_rows, self.weight.shape[1]
        return FrozenSizes(full_rows, kept_rows, dim, self.stored or computed, computed, on_host)


@dataclass(frozen=True)
class OutputLayer:
    """The matrix of an output layer, and the table that it is where it is made partial."""

    weight: Tensor
    table: EstimatedTable | None

    @property
    def mode(self) -> str:
        return "full" if self.table is None or self.table.output is None else self.table.output

    def loss_bytes(self, num_tokens: int, precision: Precision | None) -> tuple[int, int]:
        """Peaks of an ordinary loss, and of the one that training with a partial vocabulary has."""
        if self.table is None:
            return (plain_loss_bytes(num_tokens, self.weight.shape[0]),) * 2
        rows, computed = self.table.rows, _computed_dtype(self.weight, precision)
        frozen, dim = self.table.frozen_sizes(precision), self.weight.shape[1]
        lean = peak_bytes(num_tokens, rows.partial_rows, dim, computed, frozen)
        return plain_loss_bytes(num_tokens, rows.full_rows), lean


def estimated_outputs(module: nn.Module, tables: list[EstimatedTable]) -> list[OutputLayer]:
    """The output layers over the vocabulary."""
    weights = {id(table.weight) for table in tables}
    inputs = [each for each in module.modules() if isinstance(each, nn.Embedding) and id(each.weight) in weights]
    partial = {id(table.weight): table for table in tables if table.output is not None}
    layers = (layer.weight for layer in output_layers(module, inputs))
    matrices = [weight for weight in layers if isinstance(weight, Tensor) and weight.ndim == 2]
    return [OutputLayer(weight, partial.get(id(weight))) for weight in matrices]


def estimated_tables(
    module: nn.Module,
    vocabulary: "Kept | Mapping[str, Kept] | None",
    embedding: Any,
    output: Any,
    frozen_rows: str,
) -> list[EstimatedTable]:
    """The matrices that are shrunk, or that `shrink_` would shrink."""
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
    return [
        EstimatedTable(
            TableRows(table.name, table.vocabulary.full_size, len(table.vocabulary)),
            table.weight,
            *_count_holders(table.modules),
            table.output,
            frozen_rows,
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
        rows, counts = TableRows(table.name, table.full_size, partial_rows), _count_holders(modules)
        weight, stored = modules[0].weight, table.store.dtype
        tables.append(EstimatedTable(rows, weight, *counts, table.output, table.frozen_rows_on, stored))
    return tables


def _count_holders(modules: Any) -> tuple[int, int]:
    """(modules that look rows up, modules that multiply by them)."""
    num_inputs = sum(isinstance(module, nn.Embedding) for module in modules)
    return num_inputs, len(modules) - num_inputs


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
            )
        return kept
    if isinstance(kept, TokenCounts):
        return PartialVocabulary(kept.token_ids, full_rows)
    if not 1 <= kept <= full_rows:
        raise VocabularyError(f"{name}: expected 1 to {full_rows:,} rows kept, got {kept:,}")
    return PartialVocabulary(range(kept), full_rows)
