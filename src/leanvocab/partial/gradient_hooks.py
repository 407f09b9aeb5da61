"""Hooks on the gradient of a partial weight, in torch's own registers: they get all rows, or are refused by name.

A hook of `register_hook` gets the gradient [full_size, dim] as a hook on the full weight does; what it writes and returns is read
back. One of `register_post_accumulate_grad_hook` gets the weight itself, since optimizers that step within the backward do; if
it addresses rows by id, that is an error (docs/decisions/hooks-on-gradients.md).
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.overrides import TorchFunctionMode

from leanvocab.errors import BypassError
from leanvocab.files.row_store import put_rows, take_rows, zero_pages
from leanvocab.partial.partial_table import PartialTable

Hook = Callable[[Tensor], Any]
_REGISTERS = ("_backward_hooks", "_post_accumulate_grad_hooks")  # by these names torch keeps hooks on a tensor
_BY_DIMENSION = {
    "gather", "index_add", "index_copy", "index_fill", "index_select", "narrow", "scatter", "scatter_add", "select",
}  # fmt: skip


def serve_hooks(partial: Tensor, table: PartialTable, full: Tensor | None = None) -> None:
    """Makes hooks on `partial` hooks of all rows: those that are on `full`, and those that come."""
    for register, kind in zip(_REGISTERS, (_OnGradient, _AfterAccumulation), strict=True):
        if not isinstance(getattr(partial, register), _Register):
            setattr(partial, register, _Register(table, kind, getattr(full, register, None)))


def give_hooks_back(partial: Tensor, full: Tensor) -> None:
    """Puts the hooks of a partial weight on the full one that takes its place, in torch's ordinary registers."""
    for register in _REGISTERS:
        hooks = getattr(partial, register)
        setattr(full, register, hooks.of_full() if isinstance(hooks, _Register) else hooks)


class _Register(OrderedDict[int, Hook]):
    """What torch keeps hooks in, by ids of its own: each that is put in is wrapped. Those before shrinking stay in theirs.

    So a handle that was given before removes its hook at any time, and nothing of this is on a merged model.
    """

    def __init__(self, table: PartialTable, kind: "type[_OfAllRows]", before: MutableMapping[int, Hook] | None):
        super().__init__()
        self.table, self.kind, self.before = table, kind, before
        for key in before or ():
            self[key] = _StillThere(before or {}, key)

    def __setitem__(self, key: int, hook: Hook) -> None:
        super().__setitem__(key, self.kind(self.table, hook))

    def of_full(self) -> MutableMapping[int, Hook] | None:
        """The register of before, with the hooks that have come since; None where there are none."""
        since = {key: wrapped.hook for key, wrapped in self.items() if isinstance(wrapped, _OfAllRows)}
        since = {key: hook for key, hook in since.items() if not isinstance(hook, _StillThere)}
        register = OrderedDict[int, Hook]() if self.before is None and since else self.before
        if register is not None:
            register.update(since)
        return register


class _StillThere:
    """A hook in another register, for as long as it is there."""

    def __init__(self, register: MutableMapping[int, Hook], key: int):
        self.register, self.key = register, key

    def __call__(self, tensor: Tensor) -> Any:
        hook = self.register.get(self.key)
        return None if hook is None else hook(tensor)


class _OfAllRows:
    """A hook that was written for the full weight, on a partial one."""

    def __init__(self, table: PartialTable, hook: Hook):
        self.table, self.hook = table, hook

    def __call__(self, tensor: Tensor) -> Any:
        raise NotImplementedError


# --- register_hook ----------------------------------------------------------------------------------------------------


class _OnGradient(_OfAllRows):
    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # it waits for the end of the pass, since rows have come
            return None
        full = _in_full(gradient, self.table)
        try:
            returned = self.hook(full)
        except (IndexError, RuntimeError) as error:
            error.add_note(_gets_all_rows(self.table))
            raise
        given = full if returned is None else returned
        if given.shape != full.shape:
            raise BypassError(
                f"{self.table.name}: a hook on the gradient of the weight gave a gradient of shape {tuple(given.shape)}, "
                f"expected {tuple(full.shape)}: a hook gets and gives the gradient of all rows, as on the full weight"
            )
        return self._kept_rows(given)

    def _kept_rows(self, full: Tensor) -> Tensor:
        token_ids = self.table.token_ids.to(full.device)
        if full.is_sparse:
            ids, values = full._indices()[0], full._values()
            partial_ids = torch.searchsorted(token_ids, ids).clamp_(max=len(token_ids) - 1)
            outside = ids[token_ids[partial_ids] != ids]
            rows = torch.sparse_coo_tensor(
                partial_ids[None], values, (len(token_ids), full.shape[1]), device=full.device, check_invariants=False
            )
        else:
            rows = take_rows(full, token_ids)
            if torch.count_nonzero(full) == torch.count_nonzero(rows):
                return rows
            outside = full.any(1).index_fill_(0, token_ids, False).nonzero()[:, 0]
        if len(outside):
            raise BypassError(_gave_to_others(self.table, outside))
        return rows


def _gets_all_rows(table: PartialTable) -> str:
    return (
        f"a hook on the gradient of {table.name} gets that of all {table.full_size:,} rows, while the weight itself holds "
        f"{table.num_rows:,} of them until merge_(model); what the hook needs of all rows, take from model.state_dict()"
    )


def _gave_to_others(table: PartialTable, outside: Tensor) -> str:
    return (
        f"{table.name}: a hook on the gradient of the weight gave gradients to {len(outside):,} rows outside the partial "
        f"vocabulary, the first of them {table.vocabulary.describe(int(outside[0]))}: ordinary training would move those rows, "
        "and here they are not there. Keep them with PartialVocabulary.from_counts(…, always_keep=[…]), or let the hook leave "
        "rows alone that have no gradient"
    )


def _in_full(gradient: Tensor, table: PartialTable) -> Tensor:
    """The gradient of all rows, with zeros for those that are not kept."""
    shape = table.full_size, gradient.shape[1]
    if gradient.is_sparse:
        ids = table.token_ids.to(gradient.device)[gradient._indices()]
        return torch.sparse_coo_tensor(ids, gradient._values(), shape, device=gradient.device, check_invariants=False)
    full = zero_pages(shape, gradient.dtype) if gradient.device.type == "cpu" else gradient.new_zeros(shape)
    put_rows(full, table.token_ids, gradient)
    return full


# --- register_post_accumulate_grad_hook -------------------------------------------------------------------------------


class _AfterAccumulation(_OfAllRows):
    def __call__(self, weight: Tensor) -> Any:
        if self.table.arrivals is not None and self.table.arrivals.is_waiting:
            return None
        try:
            with _RowWatch(weight, self.table):
                return self.hook(weight)
        except (IndexError, RuntimeError) as error:
            error.add_note(_wrong_hook(self.table))
            raise


class _RowWatch(TorchFunctionMode):
    """Refuses what addresses rows of a partial weight or its gradient by id, an optimizer aside."""

    def __init__(self, weight: Tensor, table: PartialTable):
        super().__init__()
        tensors = [each for each in (weight, weight.grad) if each is not None and each.layout is torch.strided]
        self.table, self.starts = table, {each.data_ptr() for each in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and _addresses_rows(func.__name__, args[1:], kwargs):
            tensor = args[0]
            is_ours = tensor.shape[:1] == (self.table.num_rows,) and tensor.layout is torch.strided
            if is_ours and tensor.data_ptr() in self.starts and not _is_in_optimizer(sys._getframe(1)):
                raise BypassError(f"{self.table.name}: {func.__name__} addresses rows by id. {_wrong_hook(self.table)}")
        return func(*args, **kwargs)


def _addresses_rows(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in ("__getitem__", "__setitem__"):
        first = args[0][0] if isinstance(args[0], tuple) and args[0] else args[0]
        is_mask = isinstance(first, Tensor) and first.dtype == torch.bool
        return not (is_mask or first is None or first is Ellipsis or first == slice(None))
    return name.removesuffix("_") in _BY_DIMENSION and kwargs.get("dim", args[0] if args else None) == 0


def _is_in_optimizer(frame: FrameType | None) -> bool:
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Optimizer):
            return True
        frame = frame.f_back
    return False


def _wrong_hook(table: PartialTable) -> str:
    return (
        f"register_post_accumulate_grad_hook gives the weight of {table.name} itself, which holds {table.num_rows:,} of "
        f"{table.full_size:,} rows while the model is shrunk; weight.register_hook gives the gradient of all rows"
    )
