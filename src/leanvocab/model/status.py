"""The state of a model: which of its tables are shrunk, to what, and what has happened to them."""

from dataclasses import dataclass

from torch import nn

from leanvocab.model.find import output_layers
from leanvocab.partial.module import PartialModule, partial_modules


@dataclass(frozen=True)
class TableStatus:
    """One shrunk table: where it is, how much of it is left, and what has happened to it."""

    paths: tuple[str, ...]
    num_rows: int
    full_size: int
    embedding_dim: int
    saved_bytes: int  # of the weight alone; gradients and optimizer states save as much again, each
    digest: str
    num_served: int  # positions outside the vocabulary whose rows came from the base
    ids: str
    on_missing: str | None
    decay_unused_rows: bool
    store: str  # the file that holds the full rows
    output: str | None = None  # "frozen" or "restricted", where an output layer holds the matrix


@dataclass(frozen=True)
class Status:
    """The answer of `status(model)`; false where the model is not shrunk."""

    tables: tuple[TableStatus, ...]
    output: str | None = None  # the mode of the output layer; None where the model has none, or is not shrunk

    def __bool__(self) -> bool:
        return bool(self.tables)

    @property
    def saved_bytes(self) -> int:
        return sum(table.saved_bytes for table in self.tables)


def status(model: nn.Module) -> Status:
    """The tables of a model that are shrunk, to what, and how often rows were served from the base."""
    holders: dict[int, list[tuple[str, PartialModule]]] = {}
    for path, module in partial_modules(model).items():
        holders.setdefault(id(module.weight), []).append((path, module))
    tables = tuple(_table_status(of_one) for of_one in holders.values())
    modes = {table.output for table in tables if table.output is not None}
    has_output = bool(tables) and bool(output_layers(model, ()))
    return Status(tables, next(iter(modes), "full" if has_output else None))


def _table_status(holders: list[tuple[str, PartialModule]]) -> TableStatus:
    module = holders[0][1]
    table, dim = module.table, module.weight.shape[1]
    return TableStatus(
        paths=tuple(path for path, _ in holders),
        num_rows=table.num_rows,
        full_size=table.full_size,
        embedding_dim=dim,
        saved_bytes=(table.full_size - table.num_rows) * dim * module.weight.element_size(),
        digest=table.vocabulary.digest,
        num_served=table.num_served,
        ids=table.ids,
        on_missing=table.on_missing,
        decay_unused_rows=table.decay is not None,
        store="a temporary file" if table.store.temporary else table.store.path,
        output=table.output,
    )
