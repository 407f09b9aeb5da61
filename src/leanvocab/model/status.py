"""The state of a model: which of its tables are shrunk, to what, what has happened to them, and whether that was asked for."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from leanvocab.errors import AlreadyShrunkError
from leanvocab.model.find import output_layers
from leanvocab.model.full_table import LOOKUPS
from leanvocab.model.input_tables import per_layer_modules, vocabulary_over
from leanvocab.partial.module import PartialModule, partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

Vocabularies = PartialVocabulary | Mapping[str, PartialVocabulary]


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
    filter_eps: float | str | None = None  # of frozen rows that are left out of a gradient: not exact


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

    def __str__(self) -> str:
        """A line for each table, for a person."""
        if not self.tables:
            return "not shrunk: every table is whole"
        rows = [("table", "rows kept", "of", "saved", "output", "served from the base")]
        for table in self.tables:
            numbers = (f"{table.num_rows:,}", f"{table.full_size:,}", f"{table.saved_bytes / 1e6:,.1f} MB")
            output = table.output or (
                "full" if self.output == "full" else "-"
            )  # of other modes only what holds an output
            rows.append((" = ".join(table.paths), *numbers, output, f"{table.num_served:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def status(model: nn.Module) -> Status:
    """The tables of a model that are shrunk, to what, and how often rows were served from the base.

    Raises nothing: of a model that is not shrunk the answer has no tables, and is false.

    Source: Tables 2 and 5 of the paper count rows and parameters in the same way.
    """
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
        filter_eps=table.filter_eps,
    )


def check_shrunk_as(model: nn.Module, vocabulary: Vocabularies | None, options: Mapping[str, Any]) -> None:
    """Raises `AlreadyShrunkError` where a shrunk model has other rows, or was shrunk with other options, than are asked for.

    `options` are those of `shrink_`; one that is left out, or None, asks for nothing, and so does no vocabulary.
    """
    now = status(model)
    differences = [*_other_options(now, partial_modules(model), options)]
    if vocabulary is not None:
        differences += _other_tables(model, now, vocabulary)
    if differences:
        raise AlreadyShrunkError(
            f"{type(model).__name__} is shrunk already, and in another way than was asked for: {'; '.join(differences)}. Call "
            "merge_(model) first, or ask for neither vocabulary nor options where it is to train as it is"
        )


def _other_options(now: Status, modules: Mapping[str, PartialModule], options: Mapping[str, Any]) -> Iterator[str]:
    tables = [module.table for module in modules.values()]
    has: dict[str, set[Any]] = {
        "output": {now.output or "full"},
        "frozen_rows": {table.frozen_rows_on for table in tables if table.output == "frozen"},
        "filter_eps": {table.filter_eps for table in tables if table.output == "frozen"},
        "on_missing": {table.on_missing for table in tables},
        "ids": {table.ids for table in tables},
        "decay_unused_rows": {table.decay is not None for table in tables if table.output != "frozen"},
        "store_dir": {table.store_dir for table in tables},
    }
    for name, asked in options.items():
        for value in () if asked is None else has.get(name, set()) - {asked}:
            yield f"it has {name}={value!r}, asked for {asked!r}"
    embedding = options.get("embedding")
    if embedding is not None:
        names = {embedding} if isinstance(embedding, str) else set(embedding)
        paths: dict[Any, list[str]] = {}
        for path, module in modules.items():
            if isinstance(module, LOOKUPS):
                paths.setdefault(module.table, []).append(path)
        named = [{name for name in names if any(_is_at(path, name) for path in held)} for held in paths.values()]
        if not all(named) or set().union(*named) != names:
            yield f"its tables are {', '.join(chain(*paths.values()))}, asked for {', '.join(sorted(names))}"


def _other_tables(model: nn.Module, shrunk: Status, vocabulary: Vocabularies) -> Iterator[str]:
    for table in shrunk.tables:
        wanted = list(_asked_for(model, table, vocabulary))
        if all(its.digest != table.digest for its in wanted):
            asked = ", ".join(f"{len(its):,} (digest {its.digest[:12]}…)" for its in wanted) or "all"
            yield f"{table.paths[0]} has {table.num_rows:,} rows (digest {table.digest[:12]}…), asked for {asked}"
    if isinstance(vocabulary, Mapping):
        paths = [path for table in shrunk.tables for path in table.paths]
        yield from (f"{asked} is whole" for asked in vocabulary if not any(_is_at(path, asked) for path in paths))


def _asked_for(model: nn.Module, table: TableStatus, vocabulary: Vocabularies) -> Iterator[PartialVocabulary]:
    """The vocabularies that `shrink_` could give a table, over its size; none where it would leave it whole."""
    if isinstance(vocabulary, PartialVocabulary) and model.get_submodule(table.paths[0]) in per_layer_modules(model):
        yield vocabulary_over(vocabulary, table.full_size)
        return
    given: Iterable[PartialVocabulary] = (vocabulary,) if isinstance(vocabulary, PartialVocabulary) else ()
    if isinstance(vocabulary, Mapping):
        named = [its for asked, its in vocabulary.items() if any(_is_at(path, asked) for path in table.paths)]
        given = named or (vocabulary.values() if table.output is not None else ())  # an output layer has its table's
    for its in given:
        fitted = its.fitted_to(table.full_size)
        is_cut = fitted.full_size > table.full_size and table.output is not None
        yield fitted.below(table.full_size) if is_cut else fitted


def _is_at(path: str, asked: str) -> bool:
    """True where a module is the one that was asked for, if need be below wrappers (an adapter's)."""
    return f".{path}".endswith(f".{asked}")
