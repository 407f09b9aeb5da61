"""extend_: further rows for a shrunk model, between two steps or in the middle of one, as ordinary training holds them then.

The parameter stays the object that it is. What its graphs of before need is in `partial.growth`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from leanvocab.errors import ModelError, NotShrunkError
from leanvocab.model.checks import check_can_grow
from leanvocab.model.full_table import weight_of
from leanvocab.model.input_tables import vocabulary_over
from leanvocab.model.live_optimizer_states import catch_up
from leanvocab.partial.growth import in_rows_of
from leanvocab.partial.module import PartialModule, partial_modules, shrunk_modules
from leanvocab.partial.optimizers import unwrapped_optimizer
from leanvocab.partial.partial_table import PartialTable
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

M = TypeVar("M", bound=nn.Module)
SMALLEST_BLOCK = 256  # rows that come at once at least, so that matrices are seldom written anew
_BLOCK = 8  # … or an eighth of those that are there


def extend_(model: M, ids: Iterable[int] | Mapping[str, Iterable[int]], *, optimizer: Optimizer | None = None) -> M:
    """Gives a shrunk model rows for further token ids, in place, between two steps, and returns the model.

    A new row is what ordinary training would hold now (casts and decay included), its gradient zero and its states those
    of a row that never had a gradient. Parameters stay the objects that they are.

    Args:
        ids: token ids to keep from now on, those that are there already among them; or {module path: ids} for some tables.
        optimizer: one whose states are to get their rows at once; otherwise they do before its next step.

    Raises:
        NotShrunkError: the model is not shrunk.
        VocabularyError: an id is no token id of the model.
        ModelError: a table is given partial ids, or is held in several processes.
    """
    modules = partial_modules(model)
    if not modules:
        raise NotShrunkError(f"{type(model).__name__} is not shrunk: it has all rows; call shrink_ first")
    wider = _wider_vocabularies(modules, ids)
    optimizer = unwrapped_optimizer(optimizer)
    for module in modules.values():
        check_can_grow(module, model)
    holders: dict[nn.Parameter, list[PartialModule]] = {}
    for module in modules.values():
        holders.setdefault(weight_of(module), []).append(module)
    for weight, its_modules in holders.items():
        table = its_modules[0].table
        if wider[id(table)] != table.vocabulary:
            _grow(weight, its_modules, wider[id(table)])
        if optimizer is not None:
            catch_up(optimizer, table, weight)
    return model


def _wider_vocabularies(
    modules: dict[str, PartialModule], ids: Iterable[int] | Mapping[str, Iterable[int]]
) -> dict[int, PartialVocabulary]:
    """The vocabulary of each table, by the table's id, with further ids; of those that a smaller table has no row for, none."""
    if isinstance(ids, Mapping):
        unknown = [path for path in ids if path not in modules]
        if unknown:
            raise ModelError(f"{unknown[0]} is no shrunk table; those are {', '.join(modules)}")
        given = {id(modules[path].table): tuple(its) for path, its in ids.items()}
    else:
        every = tuple(ids)
        given = {id(module.table): every for module in modules.values()}
    largest = max(module.table.full_size for module in modules.values())
    wider = {}
    for module in modules.values():
        table = module.table
        size = table.full_size if isinstance(ids, Mapping) else largest
        further = vocabulary_over(PartialVocabulary(sorted(set(given.get(id(table), ()))), size), table.full_size)
        wider[id(table)] = table.vocabulary | further
    return wider


def extend_table(table: PartialTable, token_ids: Sequence[int]) -> None:
    """Gives a table rows for further token ids while the model trains, and a block of others with them.

    Others have no gradient and no effect. In an output layer that keeps frozen rows in its softmax each row that is there
    trains, so that none but those that were asked for come.
    """
    modules = [module for module in shrunk_modules() if module.table is table]
    weight = weight_of(modules[0])
    ids = set(token_ids)
    if table.output is None:
        is_absent = np.ones(table.full_size, bool)
        is_absent[[*table.vocabulary, *ids]] = False
        size = max(SMALLEST_BLOCK, table.num_rows // _BLOCK) - len(ids)
        # The first ones: tokenizers number frequent tokens first.
        ids.update(np.flatnonzero(is_absent)[: max(0, size)].tolist())
    vocabulary = table.vocabulary | PartialVocabulary(sorted(ids), table.full_size)
    with torch.inference_mode(False):
        _grow(weight, modules, vocabulary)


def _grow(weight: nn.Parameter, modules: list[PartialModule], vocabulary: PartialVocabulary) -> None:
    """Gives one matrix the rows of a wider vocabulary; nothing has changed where that fails.

    Optimizers' states get theirs when they are next needed (`catch_up`), since no matrix knows who holds it.
    """
    table = modules[0].table
    table.settle()
    wider = torch.tensor(vocabulary.token_ids, dtype=torch.int64, device="cpu")
    new_ids = wider[~torch.isin(wider, table.token_ids)]
    new_rows = table.base_rows(new_ids).to(weight.device, weight.dtype)
    grown = in_rows_of(wider, weight.detach(), table.token_ids)
    grown[torch.searchsorted(wider, new_ids).to(weight.device)] = new_rows
    gradient = None if weight.grad is None else in_rows_of(wider, weight.grad, table.token_ids)
    table.keep(vocabulary)
    weight.grad = None
    # A graph that is alive keeps the node that takes its gradient, for the rows that there were. Torch makes another one for the
    # next forward where the dtype has changed in between.
    another = torch.float16 if weight.dtype == torch.float32 else torch.float32
    weight.data = torch.empty(0, dtype=another, device=weight.device)
    weight.data = grown
    weight.grad = gradient
    if table.arrivals is not None:
        table.arrivals.since_step = True
    for module in modules:
        module.rows_changed()
