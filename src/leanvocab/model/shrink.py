"""shrink_ ↔ merge_: a model's vocabulary matrices to the rows of a partial vocabulary, and back (paper, Section 4).

`shrink_` plans and checks first, writes what has to be written, and only then changes the model, which no failure can
leave half shrunk.
"""

import contextlib
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanvocab.choices import FROZEN_ROWS_ON, OUTPUT_MODES, FrozenRowsOn, Ids, OnMissing, OutputMode
from leanvocab.errors import (
    LeanVocabWarning,
    ModelError,
    NotShrunkError,
    OptimizerError,
    VocabularyError,
)
from leanvocab.files.row_store import RowStore, put_rows, take_rows, zero_pages
from leanvocab.model import optimizer_steps, stand_ins
from leanvocab.model.find import FullTable, find_tables, output_layers, weight_of
from leanvocab.model.guard import Guard, refuse_merging_adapters
from leanvocab.output import trl_losses
from leanvocab.output.layer import RemapLinear
from leanvocab.partial.decay import DecayReplay
from leanvocab.partial.embedding import RemapEmbedding
from leanvocab.partial.module import PartialModule, restore_class, switch_class
from leanvocab.partial.partial_table import PartialTable
from leanvocab.partial.sharded import is_sharded
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

M = TypeVar("M", bound=nn.Module)


def shrink_(
    model: M,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary],
    *,
    output: OutputMode | None = None,
    frozen_rows: FrozenRowsOn = "device",
    embedding: str | Iterable[str] | None = None,
    ids: Ids = "full",
    on_missing: OnMissing | None = None,
    optimizer: Optimizer | None = None,
    decay_unused_rows: bool = False,
    store_dir: str | None = None,
) -> M:
    """Keeps only the rows of `vocabulary` in the model's vocabulary matrices, in place, and returns the model.

    Everything else stays: token ids, tokenizer, data, config, and what `state_dict()` and `save_pretrained` give, which is
    the full vocabulary. Call it before the optimizer is built, or hand the optimizer over.

    Args:
        vocabulary: the rows to keep, or a mapping {module path: vocabulary} for several tables.
        output: what becomes of the output layer. "full": it stays whole and trains, which is the paper's method and the
            default where it is not tied to an input table. "frozen": kept rows train, the others stay in the softmax; the
            default where it is tied. "restricted": the softmax is over the kept rows alone, which is another objective.
        frozen_rows: where the frozen rows are: on the model's "device", or in "host" memory, streamed in blocks.
        embedding: path or paths of the tables, where the model does not say itself (any nn.Module).
        ids: "full" (remapped in the lookup), or "partial" for data that `vocabulary.remap_dataset` made (the paper's D').
        on_missing: "error" or "base" (rows from the base) for ids outside the vocabulary; by default an error in training
            mode, and the base in evaluation mode.
        optimizer: one that exists already; its parameters and states are replaced too.
        decay_unused_rows: also decay the rows that are not there, as ordinary training does, when full rows are needed; not
            those of a matrix whose other rows are frozen.
        store_dir: folder for the full rows, where they do not come from a file that is mapped; the temporary folder by default.

    Raises:
        ModelError: the model cannot be shrunk in this way (`TiedOutputError`, `AlreadyShrunkError`, `BypassError`).
        VocabularyError: the vocabulary does not fit the table.
        OptimizerError: the optimizer's states would be lost.
    """
    _check_options(output, frozen_rows, ids, on_missing)
    tables = find_tables(model, vocabulary, embedding, output)
    _check_modes(tables, ids)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if ids == "partial":
        _check_inserted_ids_stay(model, tables)
    made = [_make_table(each, frozen_rows, ids, on_missing, decay_unused_rows, store_dir) for each in tables]
    weights = [_partial_weight(each, table) for each, table in zip(tables, made, strict=True)]
    for each, table in zip(tables, made, strict=True):
        if optimizer is not None:
            optimizer_steps.check_states(optimizer, table, each.weight)
    for each, table, weight in zip(tables, made, weights, strict=True):
        _put_in_place(each, table, weight, optimizer)
    _watch(model, tables)
    optimizer_steps.install()
    _announce(model, tables)
    return model


def merge_(model: M, *, optimizer: Optimizer | None = None) -> M:
    """Gives the model its full tables back, with the trained rows in them, in place: the inverse of `shrink_`.

    `optimizer` is one to go on training with; its parameters and states become full too. Raises `NotShrunkError`.
    """
    shrunk = [module for module in model.modules() if isinstance(module, PartialModule)]
    if not shrunk:
        raise NotShrunkError(f"{type(model).__name__} is not shrunk: there is nothing to merge; call shrink_ first")
    for module in shrunk:
        _check_whole(module)
        module.check_length()
    optimizer = getattr(optimizer, "optimizer", optimizer)
    full = {id(module.weight): _full_weight(module) for module in shrunk}
    for module in shrunk:
        partial, weight = weight_of(module), full[id(module.weight)]
        if optimizer is not None and partial in optimizer.state:
            state = optimizer.state[partial]
            whole = optimizer_steps.full_states(optimizer, module.table, partial, state)
            optimizer.state[partial] = {k: _like(v, state[k]) for k, v in whole.items()}
        if optimizer is not None:
            optimizer_steps.hand_over(optimizer, partial, weight)
        optimizer_steps.retire(partial, "the model was merged")
        restore_class(module, weight)
        _rebind_forward(module, type(module))
    _unwatch(model)
    return model


def _check_whole(module: PartialModule) -> None:
    if is_sharded(module.weight):
        raise ModelError(
            f"{module.table.name}: its rows are sharded over processes, and what shards them keeps the sizes that they had; save "
            "the full state dict, which needs no merging (get_model_state_dict with StateDictOptions(full_state_dict=True))"
        )


@contextlib.contextmanager
def shrunk(
    model: M,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary],
    *,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Iterator[M]:
    """A model that is shrunk within the block and full again after it, even where the block raises; see `shrink_`."""
    shrink_(model, vocabulary, optimizer=optimizer, **options)
    try:
        yield model
    finally:
        merge_(model, optimizer=optimizer)


@contextlib.contextmanager
def partial_state_dicts(model: M) -> Iterator[M]:
    """Within the block state dicts hold the partial rows as they are (for FSDP, deltas); they carry the vocabulary's digest."""
    tables = [module.table for module in model.modules() if isinstance(module, PartialModule)]
    if not tables:
        raise NotShrunkError(f"{type(model).__name__} is not shrunk: its state dict is full in any case")
    before = [table.gives_partial_state_dicts for table in tables]
    for table in tables:
        table.gives_partial_state_dicts = True
    try:
        yield model
    finally:
        for table, value in zip(tables, before, strict=True):
            table.gives_partial_state_dicts = value


# --- status -----------------------------------------------------------------------------------------------------------


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
    """What `status(model)` found; false where the model is not shrunk."""

    tables: tuple[TableStatus, ...]
    output: str | None = None  # the mode of the output layer; None where the model has none, or is not shrunk

    def __bool__(self) -> bool:
        return bool(self.tables)

    @property
    def saved_bytes(self) -> int:
        return sum(table.saved_bytes for table in self.tables)


def status(model: nn.Module) -> Status:
    """Which tables of a model are shrunk, to what, and how often rows were served from the base."""
    found: dict[int, list[tuple[str, PartialModule]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PartialModule):
            found.setdefault(id(module.weight), []).append((path, module))
    tables = tuple(_table_status(holders) for holders in found.values())
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


# --- plan -------------------------------------------------------------------------------------------------------------


def _check_options(output: str | None, frozen_rows: str, ids: str, on_missing: str | None) -> None:
    for name, value, allowed in (
        ("output", output, (None, *OUTPUT_MODES)),
        ("frozen_rows", frozen_rows, FROZEN_ROWS_ON),
        ("ids", ids, ("full", "partial")),
        ("on_missing", on_missing, (None, "error", "base")),
    ):
        if value not in allowed:
            *others, last = map(repr, allowed)
            raise ModelError(f"{name}={value!r}: expected {', '.join(others)} or {last}")
    if ids == "partial" and on_missing == "base":
        raise ModelError("on_missing='base' needs full ids: a partial id outside the vocabulary names no row")


def _check_modes(matrices: list[FullTable], ids: str) -> None:
    for matrix in matrices:
        if matrix.output is not None and ids == "partial":
            raise ModelError(
                f'{matrix.name}: output="{matrix.output}" takes labels and gives logits in full ids, and ids="partial" would '
                'have partial ones; leave ids="full", which needs no rewritten data'
            )


def _announce(model: nn.Module, matrices: list[FullTable]) -> None:
    for matrix in matrices:
        if matrix.output == "restricted":
            warnings.warn(
                f'{type(model).__name__}: output="restricted" trains a softmax over {len(matrix.vocabulary):,} of '
                f"{matrix.vocabulary.full_size:,} tokens ({matrix.paths[-1]}), which is another objective than the full "
                "model's: losses are smaller, and probabilities of the merged model are not those that were trained "
                '(docs/output.md). output="frozen" trains the full model\'s objective',
                LeanVocabWarning,
                stacklevel=3,
            )


def _check_inserted_ids_stay(model: nn.Module, tables: list[FullTable]) -> None:
    """With partial ids, a model that compares ids (padding, pooling at a token) is right only if those ids keep their places."""
    for table in tables:
        size, places = table.vocabulary.full_size, {int(i): place for place, i in enumerate(table.vocabulary.token_ids)}
        compared = PartialVocabulary.from_counts(np.zeros(size, np.int64), full_size=size, model=model)
        for token_id in compared.token_ids.tolist():
            if places.get(token_id, token_id) != token_id or (token_id not in places and token_id < len(places)):
                raise VocabularyError(
                    f'{table.name}: with ids="partial" the id {token_id}, which the model compares with or inserts '
                    "(padding, end of sequence, …), must keep its place, and does not; build the vocabulary with "
                    f'always_keep=range({token_id + 1}), or leave ids="full", which needs no rewritten data'
                )


def _make_table(
    found: FullTable,
    frozen_rows: FrozenRowsOn,
    ids: Ids,
    on_missing: OnMissing | None,
    decay_unused_rows: bool,
    store_dir: str | None,
) -> PartialTable:
    if found.weight.grad is not None:
        _check_gradient(found)
    return PartialTable(
        found.name,
        found.vocabulary,
        _store(found, store_dir),
        on_missing=on_missing,
        ids=ids,
        store_dir=store_dir,
        decay=DecayReplay() if decay_unused_rows and found.output != "frozen" else None,
        output=found.output,
        frozen_rows_on=frozen_rows,
    )


def _store(found: FullTable, store_dir: str | None) -> RowStore:
    return RowStore.of(found.weight.detach(), torch.tensor(found.vocabulary.token_ids), store_dir)


def _check_gradient(found: FullTable) -> None:
    gradient = found.weight.grad
    assert gradient is not None
    touched = gradient.coalesce().indices()[0] if gradient.is_sparse else gradient.abs().sum(1).nonzero()[:, 0]
    outside = sorted(set(touched.tolist()) - set(found.vocabulary))
    if outside:
        raise OptimizerError(
            f"{found.name}.weight has gradients for {len(outside):,} rows outside the vocabulary, the first of them "
            f"{found.vocabulary.describe(outside[0])}, which would be lost; step or zero_grad() before shrinking"
        )


def _partial_weight(found: FullTable, table: PartialTable) -> nn.Parameter:
    full = found.weight
    partial = nn.Parameter(take_rows(full.detach(), table.token_ids), requires_grad=full.requires_grad)
    if full.grad is not None:
        dense = full.grad.to_dense() if full.grad.is_sparse else full.grad
        partial.grad = take_rows(dense, table.token_ids)
    _carry_over(full, partial)
    partial.__dict__["ds_shape"] = full.shape  # by this name peft asks for the whole shape of what is held in part
    return partial


def _full_weight(module: PartialModule) -> nn.Parameter:
    partial, table = weight_of(module), module.table
    full = nn.Parameter(table.full_rows(partial).to(partial.device), requires_grad=partial.requires_grad)
    if partial.grad is not None:
        gradient = zero_pages((table.full_size, partial.shape[1]), partial.dtype)
        put_rows(gradient, table.token_ids, partial.grad.to_dense() if partial.grad.is_sparse else partial.grad)
        full.grad = gradient.to(partial.device)
    _carry_over(partial, full)
    full.__dict__.pop("ds_shape", None)
    return full


def _carry_over(old: nn.Parameter, new: nn.Parameter) -> None:
    """Attributes that libraries put on parameters, and hooks on their gradients."""
    new.__dict__.update(old.__dict__)
    if new.requires_grad:
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(hook)
        for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
            new.register_post_accumulate_grad_hook(hook)


def _like(value: Any, other: Any) -> Any:
    return value.to(other.device) if isinstance(value, Tensor) and isinstance(other, Tensor) else value


# --- carry out --------------------------------------------------------------------------------------------------------


def _put_in_place(found: FullTable, table: PartialTable, weight: nn.Parameter, optimizer: Optimizer | None) -> None:
    full = found.weight
    for module in found.modules:
        kind = RemapEmbedding if isinstance(module, nn.Embedding) else RemapLinear
        switch_class(module, kind, table, weight)
        _rebind_forward(module, type(module))
    optimizer_steps.retire(full, "the model was shrunk")
    if optimizer is not None:
        optimizer_steps.hand_over(optimizer, full, weight)
        if weight in optimizer.state:
            optimizer_steps.slice_states(optimizer, table, weight)


def _rebind_forward(module: nn.Module, cls: type[nn.Module]) -> None:
    """A forward bound on the instance (accelerate's hooks keep the old one there) is bound to the class of now."""
    for name in ("_old_forward", "forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__self__ is module:
            module.__dict__[name] = types.MethodType(cls.forward, module)


def _watch(model: nn.Module, tables: list[FullTable]) -> None:
    paths = [path for table in tables for path in table.paths]
    modules = [module for table in tables for module in table.modules]
    Guard(model, modules, paths)  # type: ignore[arg-type]
    stand_ins.put_on(model)
    for module in model.modules():
        refuse_merging_adapters(module)
    trl_losses.serve(model)


def _unwatch(model: nn.Module) -> None:
    trl_losses.stop_serving(model)
    stand_ins.take_off(model)
    for module in model.modules():
        if type(module.__dict__.get("merge")).__module__.startswith("leanvocab."):
            del module.__dict__["merge"]
        for hook in list(module._forward_pre_hooks.values()):
            guard = getattr(hook, "__self__", None)
            if isinstance(guard, Guard):
                guard.remove()
