"""extend_: further rows for a shrunk model, between two steps or in the middle of one, as ordinary training holds them then.

The parameter stays the object that it is. What its graphs of before need is in `partial.growth`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from leanvocab.errors import ModelError, NotShrunkError
from leanvocab.model.checks import check_can_grow
from leanvocab.model.full_table import weight_of
from leanvocab.model.input_tables import vocabulary_over
from leanvocab.model.live_optimizer_states import catch_up
from leanvocab.partial.attachments import Weakly, keep_hooks
from leanvocab.partial.devices import brought
from leanvocab.partial.growth import ids_since, in_rows_of, refuse_where_rows_cannot_come, with_rows_since
from leanvocab.partial.missing import running_model
from leanvocab.partial.module import PartialModule, partial_modules, shrunk_modules
from leanvocab.partial.optimizers import unwrapped_optimizer
from leanvocab.partial.partial_table import PartialTable
from leanvocab.vocabulary.columns import ID_NAMES, LABEL_NAMES
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

M = TypeVar("M", bound=nn.Module)
# Rows that nobody has asked for, so that matrices are seldom written anew: a share of those that were asked for, or this many.
SMALLEST_BLOCK = 256
_SHARE = 8


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

    Source: docs/decisions/rows-that-come-while-training.md.
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
    """Gives a table rows for further token ids while the model trains, and at times a block of others with them.

    Others have no gradient and no effect, but bytes: all of them together are an eighth of those that ids asked for. In an output
    layer that keeps frozen rows in its softmax each row that is there trains, so that none but those that were asked for come.
    """
    modules = [module for module in shrunk_modules() if module.table is table]
    weight = weight_of(modules[0])
    ids = set(token_ids)
    if table.output is None and table.arrivals is not None:
        ids.update(_others(table, token_ids).tolist())
        table.arrivals.num_unasked += len(ids) - len(set(token_ids))
    vocabulary = table.vocabulary | PartialVocabulary(sorted(ids), table.full_size)
    with torch.inference_mode(False):
        _grow(weight, modules, vocabulary)
    for follower in table.followers:
        of_its_own = [each for each in token_ids if each < follower.full_size and each not in follower.vocabulary]
        if of_its_own:
            extend_table(follower, of_its_own)


def _others(table: PartialTable, token_ids: Sequence[int]) -> NDArray[np.int64]:
    """The ids of a block that comes with others: the first absent ones, since tokenizers number frequent tokens first."""
    assert table.arrivals is not None
    num_unasked = table.arrivals.num_unasked
    num_asked = table.num_rows - num_unasked + len(set(token_ids))
    num_others = max(SMALLEST_BLOCK, num_asked // _SHARE) - num_unasked
    # Not a few at a time: then they would be the rare ones, and the bound alone would be reached.
    if num_others < max(1, num_unasked // 2):
        return np.zeros(0, np.int64)
    is_absent = np.ones(table.full_size, bool)
    is_absent[table.vocabulary.token_ids] = is_absent[list(token_ids)] = False
    return np.flatnonzero(is_absent)[:num_others]


def _grow(weight: nn.Parameter, modules: list[PartialModule], vocabulary: PartialVocabulary) -> None:
    """Gives one matrix the rows of a wider vocabulary; nothing has changed where that fails.

    Optimizers' states get theirs when they are next needed (`catch_up`), since no matrix knows who holds it.
    """
    table = modules[0].table
    table.settle()
    wider = torch.tensor(vocabulary.token_ids, dtype=torch.int64, device="cpu")
    new_rows = brought(table.base_rows(ids_since(wider, table.token_ids)).to(weight.dtype), weight.device)
    grown = with_rows_since(wider, weight.detach(), table.token_ids, new_rows)
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


# --- batches ----------------------------------------------------------------------------------------------------------


def serve_batches(model: nn.Module, modules: Mapping[str, PartialModule]) -> None:
    """Lets the rows of a whole batch come before a forward of `model`, or of a part that holds tables, begins.

    On a CPU each lookup sees its ids by itself. On another device that would be a wait for each; this is one for all of them, and
    none for batches that were seen on the host.
    """
    above: dict[nn.Module, None] = {}
    for path in modules:
        parts = path.split(".")[:-1]
        above.update(dict.fromkeys(model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)))
    hook = partial(_before_a_batch, [Weakly(each) for each in modules.values() if isinstance(each, nn.Embedding)])
    for ancestor in above:
        keep_hooks(ancestor, ancestor.register_forward_pre_hook(hook, with_kwargs=True))


def _before_a_batch(
    lookups: Sequence[Weakly[PartialModule]], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if running_model() is not module or not module.training or torch.compiler.is_compiling():
        return
    held = (weakly() for weakly in lookups)
    modules = [each for each in held if isinstance(each, PartialModule) and each.training]
    tables = {id(each.table): each.table for each in modules if each.table.arrivals is not None}
    if not any(table.arrivals.is_seen_ahead for table in tables.values()):
        for each in modules:
            refuse_where_rows_cannot_come(each.table, each.weight)
        on_devices = [ids.flatten() for ids in _ids_in(module, args, kwargs) if ids.device.type not in ("cpu", "meta")]
        if on_devices:
            _bring(tables.values(), torch.cat(on_devices).cpu())


def _bring(tables: Iterable[PartialTable], ids: Tensor) -> None:
    """Gives each table the rows of those ids that are of its own; what is none is left to the lookup."""
    unique = ids.unique().numpy()
    for table in tables:
        own = unique[(unique >= 0) & (unique < table.full_size)]
        missing = own[~np.isin(own, table.vocabulary.token_ids)]
        if len(missing):
            extend_table(table, missing.tolist())


def _ids_in(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Token ids among the arguments of a forward: by their names, or the first that has none."""
    named = dict(kwargs)
    for value in args:
        named.update(value if isinstance(value, Mapping) else {} if named else {"input_ids": value})
    ids = {name: value for name, value in named.items() if name.endswith(("input_ids", *ID_NAMES))}
    shifts_labels = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if shifts_labels and named.get("decoder_input_ids") is None:
        ids |= {name: value for name, value in named.items() if name in LABEL_NAMES}
    return [value for value in ids.values() if isinstance(value, Tensor) and not value.is_floating_point()]


class _Seen:
    """A data loader whose batches are seen before they go to a device; for the rest it is the loader itself."""

    def __init__(self, loader: Any, model: nn.Module):
        self._loader, self._model = loader, model

    def __iter__(self) -> Iterator[Any]:
        modules = partial_modules(self._model).values()
        tables = list({id(each.table): each.table for each in modules if each.table.arrivals is not None}.values())
        for table in tables:
            table.arrivals.see_ahead(True)
        try:
            for batch in self._loader:
                ids = _ids_in(self._model, (batch,), {})
                if ids:
                    _bring(tables, torch.cat([each.flatten().cpu() for each in ids]))
                yield batch
        finally:
            for table in tables:
                table.arrivals.see_ahead(False)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)


def see_batches(loader: Any, model: nn.Module) -> None:
    """Lets rows come for batches of accelerate's data loader while they are on the host, so that no forward waits for a device.

    An id that a batch does not show (one that the model makes itself) is then an error before the step, and no wrong row.
    """
    if not isinstance(loader.base_dataloader, _Seen):
        loader.base_dataloader = _Seen(loader.base_dataloader, model)
