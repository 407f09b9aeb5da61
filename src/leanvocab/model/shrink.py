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

import torch
from torch import nn
from torch.optim import Optimizer

from leanvocab.choices import FrozenRowsOn, Ids, OnMissing, OutputMode
from leanvocab.errors import LeanVocabWarning, NotShrunkError
from leanvocab.files.row_store import RowStore
from leanvocab.model import stand_ins
from leanvocab.model.checks import (
    check_gradient,
    check_inserted_ids_stay,
    check_modes,
    check_options,
    check_whole,
)
from leanvocab.model.find import find_tables
from leanvocab.model.full_table import FullTable, full_weight, partial_weight, weight_of
from leanvocab.model.guard import Guard
from leanvocab.model.live_optimizer_states import check_states, full_states_of, hand_over, sliced_states
from leanvocab.model.optimizer_steps import step_hook
from leanvocab.output import trl_losses
from leanvocab.output.layer import RemapLinear
from leanvocab.partial.attachments import put_attribute, take_off
from leanvocab.partial.decay import DecayReplay
from leanvocab.partial.embedding import RemapEmbedding
from leanvocab.partial.module import PartialModule, partial_modules, restore_class, switch_class
from leanvocab.partial.optimizers import unwrapped_optimizer
from leanvocab.partial.partial_table import PartialTable
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
    check_options(output, frozen_rows, ids, on_missing)
    tables = find_tables(model, vocabulary, embedding, output)
    check_modes(tables, ids)
    if ids == "partial":
        check_inserted_ids_stay(model, tables)
    optimizer = unwrapped_optimizer(optimizer)
    made = [_make_table(table, frozen_rows, ids, on_missing, decay_unused_rows, store_dir) for table in tables]
    swaps = [_plan(table, partial, optimizer) for table, partial in zip(tables, made, strict=True)]
    _announce(model, tables)
    try:
        for swap in swaps:
            swap.carry_out()
        _watch(model)
    except BaseException:
        for swap in swaps:
            swap.undo()
        take_off(model)
        raise
    for swap in swaps:
        _replace(optimizer, swap.full, swap.partial, swap.states, "the model was shrunk")
    return model


def merge_(model: M, *, optimizer: Optimizer | None = None) -> M:
    """Gives the model its full tables back, with the trained rows in them, in place: the inverse of `shrink_`.

    `optimizer` is one to go on training with; its parameters and states become full too. Raises `NotShrunkError`.
    """
    modules = list(partial_modules(model).values())
    if not modules:
        raise NotShrunkError(f"{type(model).__name__} is not shrunk: there is nothing to merge; call shrink_ first")
    for module in modules:
        check_whole(module)
        module.check_length()
    optimizer = unwrapped_optimizer(optimizer)
    holders = {weight_of(module): module for module in modules}  # one of each that are tied
    weights = {partial: full_weight(module) for partial, module in holders.items()}
    states = {partial: full_states_of(optimizer, module.table, partial) for partial, module in holders.items()}
    for module in modules:
        restore_class(module, weights[weight_of(module)])
        _rebind_forward(module)
    take_off(model)
    for partial, full in weights.items():
        _replace(optimizer, partial, full, states[partial], "the model was merged")
    return model


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
    tables = [module.table for module in partial_modules(model).values()]
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


# --- plan -------------------------------------------------------------------------------------------------------------


@dataclass
class _Swap:
    """A full parameter that a partial one is to replace, in the modules that hold it, and its states in an optimizer."""

    modules: tuple[nn.Embedding | nn.Linear, ...]
    full: nn.Parameter
    partial: nn.Parameter
    table: PartialTable
    states: dict[str, Any] | None

    def carry_out(self) -> None:
        for module in self.modules:
            kind = RemapEmbedding if isinstance(module, nn.Embedding) else RemapLinear
            switch_class(module, kind, self.table, self.partial)
            _rebind_forward(module)

    def undo(self) -> None:
        for module in self.modules:
            if isinstance(module, PartialModule):
                restore_class(module, self.full)
                _rebind_forward(module)


def _plan(table: FullTable, partial: PartialTable, optimizer: Optimizer | None) -> _Swap:
    full, states = table.weight, None
    if optimizer is not None and full in optimizer.state:
        check_states(optimizer, partial, full)
        states = {**optimizer.state[full], **sliced_states(optimizer, partial, full)}
    return _Swap(table.modules, full, partial_weight(full, partial), partial, states)


def _make_table(
    table: FullTable,
    frozen_rows: FrozenRowsOn,
    ids: Ids,
    on_missing: OnMissing | None,
    decay_unused_rows: bool,
    store_dir: str | None,
) -> PartialTable:
    check_gradient(table)
    return PartialTable(
        table.name,
        table.vocabulary,
        RowStore.of(table.weight.detach(), torch.tensor(table.vocabulary.token_ids), store_dir),
        on_missing=on_missing,
        ids=ids,
        store_dir=store_dir,
        decay=DecayReplay() if decay_unused_rows and table.output != "frozen" else None,
        output=table.output,
        frozen_rows_on=frozen_rows,
    )


def _announce(model: nn.Module, tables: list[FullTable]) -> None:
    for table in tables:
        if table.output == "restricted":
            warnings.warn(
                f'{type(model).__name__}: output="restricted" trains a softmax over {len(table.vocabulary):,} of '
                f"{table.vocabulary.full_size:,} tokens ({table.paths[-1]}), which is another objective than the full "
                "model's: losses are smaller, and probabilities of the merged model are not those that were trained "
                '(docs/output.md). output="frozen" trains the full model\'s objective',
                LeanVocabWarning,
                stacklevel=3,
            )


# --- carry out --------------------------------------------------------------------------------------------------------


def _rebind_forward(module: nn.Module) -> None:
    """Binds a forward on the instance (accelerate's hooks keep the old one there) to the class of now."""
    for name in ("_old_forward", "forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__self__ is module:
            module.__dict__[name] = types.MethodType(type(module).forward, module)


def _watch(model: nn.Module) -> None:
    modules = partial_modules(model)
    Guard(model, modules)
    stand_ins.put_on(model)
    trl_losses.serve(model)
    for module in modules.values():
        put_attribute(module, "leanvocab_step_hook", step_hook())


def _replace(
    optimizer: Optimizer | None, old: nn.Parameter, new: nn.Parameter, states: dict[str, Any] | None, reason: str
) -> None:
    step_hook().retire(old, reason)
    if optimizer is not None:
        hand_over(optimizer, old, new, states)
