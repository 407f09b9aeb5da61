"""shrink_ ↔ merge_: a model's vocabulary matrices to the rows of a partial vocabulary, and back (paper, Section 4).

`shrink_` plans and checks first, writes what has to be written, and only then changes the model, which no failure can
leave half shrunk.
"""

import contextlib
import traceback
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanvocab.choices import FilterEps, FrozenRowsOn, Ids, OnMissing, OutputMode
from leanvocab.errors import LeanVocabWarning, ModelError, NotShrunkError, VocabularyError
from leanvocab.files.row_store import RowStore
from leanvocab.model import stand_ins
from leanvocab.model.checks import (
    check_filter,
    check_gradient,
    check_modes,
    check_options,
    check_whole,
)
from leanvocab.model.find import find_tables
from leanvocab.model.full_table import FullTable, full_rows_of, full_weight, partial_weight, weight_of
from leanvocab.model.growing import extend_table, serve_batches
from leanvocab.model.guard import Guard
from leanvocab.model.input_tables import table_at
from leanvocab.model.live_optimizer_states import (
    full_states_of,
    hand_over,
    out_of_the_way,
    partial_states,
    state_devices,
    states_on,
)
from leanvocab.model.optimizer_steps import StepHook, step_hook
from leanvocab.output import trl_losses
from leanvocab.output.frozen_rows import FrozenLookup
from leanvocab.output.layer import RemapLinear
from leanvocab.partial.attachments import put_attributes, take_off
from leanvocab.partial.decay import DecayReplay
from leanvocab.partial.embedding import RemapEmbedding
from leanvocab.partial.embedding_bag import RemapEmbeddingBag
from leanvocab.partial.growth import Arrivals
from leanvocab.partial.module import PartialModule, partial_modules, restore_class, switch_class
from leanvocab.partial.optimizers import unwrapped_optimizer
from leanvocab.partial.partial_table import PartialTable
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import model_full_size

M = TypeVar("M", bound=nn.Module)
_KINDS = {nn.Embedding: RemapEmbedding, nn.EmbeddingBag: RemapEmbeddingBag, nn.Linear: RemapLinear}


def shrink_(
    model: M,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary] | None = None,
    *,
    tokenizer: Any = None,
    output: OutputMode | None = None,
    frozen_rows: FrozenRowsOn = "device",
    filter_eps: FilterEps | None = None,
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
        vocabulary: the rows to keep, of every input table that the model looks the same ids up in, those for each layer
            (Gemma 3n, Gemma 4) too; or a mapping {module path: vocabulary} for what is particular. With on_missing="extend" it
            may be left out: then the model begins with the ids that it, and `tokenizer`, insert.
        tokenizer: where there is no vocabulary, whose special and added tokens are kept.
        output: what becomes of the output layer. "full": it stays whole and trains, which is the paper's method and the
            default where it is not tied to an input table. "frozen": kept rows train, the others stay in the softmax; the
            default where it is tied. "restricted": the softmax is over the kept rows alone, which is another objective.
        frozen_rows: where the frozen rows are: on the model's "device", or in "host" memory, streamed in blocks.
        filter_eps: not exact where it is given. Frozen rows are left out of the gradient of the hidden states, a chunk of tokens
            at a time, where the gradient of their scores is below it for every token: a number, or "auto", which is below the
            precision of the dtype, as in CCE. Neither the loss nor the gradient of the kept rows in it changes (docs/output.md).
        embedding: path or paths of the tables, where the model does not say itself (any nn.Module).
        ids: "full" (remapped in the lookup), or "partial" for data that `vocabulary.remap_dataset` made (the paper's D').
        on_missing: for ids outside the vocabulary: "error"; "base" (rows from the base); "frozen" (the same rows, on the model's
            device, to train rows of new tokens alone); or "extend" (in training the id gets its row before the lookup, and is the
            base's in evaluation). By default an error in training mode, and the base in evaluation.
        optimizer: one that exists already; its parameters and states are replaced too.
        decay_unused_rows: also decay the rows that are not there, as ordinary training does, when full rows are needed; not
            those of a matrix whose other rows are frozen.
        store_dir: folder for the full rows, where they do not come from a file that is mapped; the temporary folder by default.

    Raises:
        ModelError: the model cannot be shrunk in this way (`TiedOutputError`, `AlreadyShrunkError`, `BypassError`).
        VocabularyError: the vocabulary does not fit the table.
        OptimizerError: the optimizer's states would be lost.
    Source: paper, Section 4: E' in place of E; output layers are its future work.
    """
    check_options(output, frozen_rows, ids, on_missing, decay_unused_rows)
    check_filter(filter_eps, frozen_rows)
    if vocabulary is None:
        vocabulary = _inserted_ids(model, tokenizer, embedding, on_missing)
    tables = find_tables(model, vocabulary, embedding, output)
    check_modes(model, tables, ids, on_missing, filter_eps)
    options = {"on_missing": on_missing, "ids": ids, "frozen_rows_on": frozen_rows, "filter_eps": filter_eps}
    partial = [_make_table(table, decay_unused_rows, store_dir, **options) for table in tables]
    _let_outputs_follow(tables, partial)
    _announce(model, tables, on_missing)
    _put_in_place(model, tables, partial, unwrapped_optimizer(optimizer))
    return model


def merge_(model: M, *, optimizer: Optimizer | None = None) -> M:
    """Gives the model its full tables back, with the trained rows in them, in place: the inverse of `shrink_`.

    `optimizer` is one to go on training with; its parameters and states become full too.

    Raises:
        NotShrunkError: the model is not shrunk.
        ModelError: its shards lie in several processes.

    Source: paper, Section 4 ("after fine-tuning"): E[f⁻¹(i)] = E'[i].
    """
    modules = list(partial_modules(model).values())
    if not modules:
        raise NotShrunkError(f"{type(model).__name__} is not shrunk: there is nothing to merge; call shrink_ first")
    for module in modules:
        check_whole(module)
        module.check_length()
    optimizer, hook = unwrapped_optimizer(optimizer), step_hook()
    holders = {weight_of(module): module for module in modules}  # one of each that are tied
    rows = {weight: full_rows_of(module) for weight, module in holders.items()}
    states = {weight: full_states_of(optimizer, module.table, weight) for weight, module in holders.items()}
    full = _on_their_devices(modules, optimizer, rows, states)
    _restore(model, {weight: parameter for weight, (parameter, _) in full.items()})
    for weight, (parameter, its_states) in full.items():
        hook.retire(weight, "the model was merged")
        hand_over(optimizer, weight, parameter, its_states)
    return model


@contextlib.contextmanager
def shrunk(
    model: M,
    vocabulary: PartialVocabulary | Mapping[str, PartialVocabulary] | None = None,
    *,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Iterator[M]:
    """A model that is shrunk within the block and full again after it, even where the block raises; see `shrink_`.

    Raises:
        ModelError, VocabularyError, OptimizerError: as `shrink_` does.

    Source: paper, Section 4, both ways.
    """
    shrink_(model, vocabulary, optimizer=optimizer, **options)
    try:
        yield model
    finally:
        merge_(model, optimizer=optimizer)


@contextlib.contextmanager
def partial_state_dicts(model: M) -> Iterator[M]:
    """Within the block state dicts hold the partial rows as they are (for FSDP, deltas); they carry the vocabulary's digest.

    Raises:
        NotShrunkError: the model is not shrunk.

    Source: docs/saving.md.
    """
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


def _inserted_ids(
    model: nn.Module, tokenizer: Any, embedding: str | Iterable[str] | None, on_missing: OnMissing | None
) -> PartialVocabulary:
    """The vocabulary that a model begins with before any data is seen."""
    if on_missing != "extend":
        raise VocabularyError(
            "shrink_ was given no vocabulary: count the data, PartialVocabulary.from_counts(count_tokens(dataset), "
            'tokenizer=tokenizer, model=model), or let the model get rows as ids come: shrink_(model, on_missing="extend")'
        )
    names = [embedding] if isinstance(embedding, str) else list(embedding or ())
    size = max(table_at(model, name).num_embeddings for name in names) if names else model_full_size(model)
    if size is None:
        raise ModelError(
            f"{type(model).__name__} does not say how many rows its vocabulary has; name its table: embedding="
        )
    none_counted = np.zeros(size, np.int64)
    vocabulary = PartialVocabulary.from_counts(none_counted, full_size=size, tokenizer=tokenizer, model=model)
    return vocabulary if len(vocabulary) else PartialVocabulary([0], size)  # a matrix has a row at least


def _make_table(table: FullTable, decay_unused_rows: bool, store_dir: str | None, **options: Any) -> PartialTable:
    check_gradient(table)
    made = PartialTable(
        table.name,
        table.vocabulary,
        RowStore.of(table.weight.detach(), torch.tensor(table.vocabulary.token_ids, device="cpu"), store_dir),
        store_dir=store_dir,
        decay=DecayReplay() if decay_unused_rows and table.output != "frozen" else None,
        output=table.output,
        **options,
    )
    if made.on_missing == "extend":
        made.arrivals = Arrivals(extend_table)
    if made.on_missing == "frozen":
        made.look_up_frozen = FrozenLookup()
    return made


def _let_outputs_follow(tables: list[FullTable], partial: list[PartialTable]) -> None:
    """An output layer with a matrix of its own gets the rows that come to an input table: to its own where there are as many."""
    is_input = [any(isinstance(module, nn.Embedding) for module in table.modules) for table in tables]
    inputs = [its for its, looks_up in zip(partial, is_input, strict=True) if looks_up]
    layers = [its for its, looks_up in zip(partial, is_input, strict=True) if not looks_up]
    for number, layer in enumerate(layer for layer in layers if layer.arrivals is not None):
        for table in inputs[number : number + 1] if len(inputs) == len(layers) else inputs:
            table.followers.append(layer)


def _announce(model: nn.Module, tables: list[FullTable], on_missing: OnMissing | None) -> None:
    for table in tables:
        if table.output == "frozen" and on_missing == "extend":
            warnings.warn(
                f"{type(model).__name__}: a row of {table.paths[-1]} trains from the forward on in which its token first comes, "
                "and is frozen in the softmax until then, so that a run differs from one whose data was counted beforehand "
                "(docs/growing.md)",
                LeanVocabWarning,
                stacklevel=3,
            )
        if table.output == "restricted":
            warnings.warn(
                f'{type(model).__name__}: output="restricted" trains a softmax over {len(table.vocabulary):,} of '
                f"{table.vocabulary.full_size:,} tokens ({table.paths[-1]}), which is another objective than the full "
                "model's: losses are smaller, and probabilities of the merged model are not those that were trained "
                '(docs/output.md). output="frozen" trains the full model\'s objective',
                LeanVocabWarning,
                stacklevel=3,
            )


def _put_in_place(
    model: nn.Module, tables: list[FullTable], partial: list[PartialTable], optimizer: Optimizer | None
) -> None:
    """Makes everything that may fail first, and undoes what was done to the modules where that fails after all."""
    full = {partial_weight(table.weight, its): table.weight for table, its in zip(tables, partial, strict=True)}
    states = [partial_states(optimizer, its, table.weight) for table, its in zip(tables, partial, strict=True)]
    try:
        for table, its, weight in zip(tables, partial, full, strict=True):
            for module in table.modules:
                kind = next(kind for plain, kind in _KINDS.items() if isinstance(module, plain))
                switched = switch_class(module, kind, its, weight)
                _rebind_forward(switched, type(switched))
        hook = _watch(model)
    except BaseException:
        _restore(model, full)
        raise
    for weight, its_states in zip(full, states, strict=True):
        hook.retire(full[weight], "the model was shrunk")
        hand_over(optimizer, full[weight], weight, its_states)


def _on_their_devices(
    modules: list[PartialModule],
    optimizer: Optimizer | None,
    rows: dict[nn.Parameter, tuple[Tensor, Tensor | None]],
    states: dict[nn.Parameter, dict[str, Any] | None],
) -> dict[nn.Parameter, tuple[nn.Parameter, dict[str, Any] | None]]:
    """Full parameters and their states, from what is full on the CPU: each on the device of the partial one, which makes room
    for it first. Nothing has happened where there is no room: frozen rows are brought again when they are needed."""
    devices = {weight: (weight.device, state_devices(optimizer, weight)) for weight in rows}
    for module in modules:
        module.drop_caches()
    full: dict[nn.Parameter, tuple[nn.Parameter, dict[str, Any] | None]] = {}
    with contextlib.ExitStack() as back:
        for weight in rows:
            back.enter_context(out_of_the_way(optimizer, weight))
        try:
            for weight, (device, of_states) in devices.items():
                full[weight] = (
                    full_weight(weight, *rows.pop(weight), device),
                    states_on(of_states, states.pop(weight)),
                )
        except BaseException as error:  # nothing that is full stays, so that what was there has its room again
            full.clear()
            traceback.clear_frames(error.__traceback__)
            raise
    return full


def _rebind_forward(module: nn.Module, partial: type[nn.Module]) -> None:
    """Binds a forward on the instance (accelerate's hooks keep the old one there) to the class of now, where it is of a class
    that the partial one inherits; one of another is its user's."""
    forwards = [vars(each).get("forward") for each in partial.__mro__]
    for name in ("_old_forward", "forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__self__ is module and bound.__func__ in forwards:
            module.__dict__[name] = types.MethodType(type(module).forward, module)


def _watch(model: nn.Module) -> StepHook:
    modules, hook = partial_modules(model), step_hook()
    Guard(model, modules)
    if any(module.table.arrivals is not None for module in modules.values()):
        serve_batches(model, modules)
    stand_ins.put_on(model)
    trl_losses.serve(model)
    for module in modules.values():
        put_attributes(module, {"leanvocab_step_hook": hook})
    return hook


def _restore(model: nn.Module, full: dict[nn.Parameter, nn.Parameter]) -> None:
    """Gives every module its full parameter back in the place of the partial one, and takes off what was put on."""
    for module in partial_modules(model).values():
        partial = type(module)
        restore_class(module, full[weight_of(module)])
        _rebind_forward(module, partial)
    take_off(model)
