"""Rows that come while a graph is alive: the gradient of what was computed before, in the rows of now.

Torch checks a gradient against the shape that a parameter had in its forward, and adds the gradients of one backward pass in the
order in which they come. So each read of a matrix that may grow remembers which rows there were. Where others have come since,
the gradients of a pass are added here, in the same order, and reach the parameter at its end
(docs/decisions/rows-that-come-while-training.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from leanvocab.errors import ModelError
from leanvocab.partial.devices import brought
from leanvocab.partial.missing import running_model
from leanvocab.partial.partial_table import PartialTable
from leanvocab.partial.sharded import is_sharded, is_sharding

# (weight, partial ids [...], that of the padding) → their rows [..., dim]
Lookup: TypeAlias = Callable[[Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True)
class Read:
    """A read of a matrix's rows, as they were then."""

    table: PartialTable
    weight: nn.Parameter
    token_ids: Tensor  # of the rows that there were, int64 on the CPU

    def deliver(self, gradient: Tensor) -> Tensor | None:
        """What the read gives back as the gradient of its rows: None where that waits for the end of the pass."""
        table = self.table
        if self.token_ids is table.token_ids and not table.arrivals.since_step:
            return gradient
        table.arrivals.add(self, gradient)
        return None


def rows_of(weight: nn.Parameter, table: PartialTable) -> Tensor:
    """The rows [len(vocabulary), dim] themselves, with a gradient that survives when others come."""
    rows: Tensor = _Rows.apply(weight, Read(table, weight, table.token_ids))
    return rows


def looked_up(
    weight: nn.Parameter,
    table: PartialTable,
    ids: Tensor,
    partial_ids: Callable[[Tensor], Tensor],
    lookup: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Rows of full ids, with a gradient that survives when others come; `partial_ids` maps ids as long as this lives.

    Full ids are what is kept for the backward: a forward that is computed again (torch.utils.checkpoint) would find other
    partial ones.
    """
    rows: Tensor = _Looked.apply(weight, ids, Read(table, weight, table.token_ids), partial_ids, lookup)
    return rows


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, read: Read) -> Tensor:
        ctx.read = read
        return weight.detach()  # the memory of now, which the graph keeps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.read.deliver(gradient), None


class _Looked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        read: Read,
        partial_ids: Callable[[Tensor], Tensor],
        lookup: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.read, ctx.partial_ids, ctx.lookup, ctx.like = read, partial_ids, lookup, weight.new_empty(1)
        ctx.shape = weight.shape
        return lookup(weight, partial_ids(ids))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        with torch.enable_grad():  # a lookup's gradient does not depend on what the rows hold
            stand_in = ctx.like.expand(ctx.shape).requires_grad_()
            rows = ctx.lookup(stand_in, ctx.partial_ids(ids))
        (of_rows,) = torch.autograd.grad(rows, stand_in, gradient, create_graph=torch.is_grad_enabled())
        return ctx.read.deliver(of_rows), None, None, None, None


def refuse_where_rows_cannot_come(table: PartialTable, weight: Tensor) -> None:
    """Raises `ModelError` where something was made of the rows that there are, and would not see others."""
    held_by = None
    if is_sharded(weight) or type(weight) is not nn.Parameter or is_sharding(running_model()):
        held_by = "its rows are sharded over processes (FSDP2, FSDP, tensor parallelism)"
    elif hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping"):
        held_by = "DeepSpeed holds copies of its rows"
    elif getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None or _num_processes() > 1:
        held_by = (
            "each of several processes would get other rows, and DistributedDataParallel adds up those of the start"
        )
    if torch.compiler.is_compiling():
        _refuse(table.name, "a compiled forward looks at no ids")
    if held_by is not None:
        _refuse(table.name, held_by)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse(name: str, held_by: str) -> None:
    raise ModelError(
        f"{name}: no rows can come here while the model trains: {held_by}. Count the data first (count_tokens), and shrink "
        'with that vocabulary and without on_missing="extend"'
    )


def _num_processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class Arrivals:
    """What a table that may grow holds: `extend`, which gives it rows for further ids; whether rows have come since the last step
    on it; and gradients that wait for the end of a backward pass."""

    def __init__(self, extend: Callable[[PartialTable, Sequence[int]], None]) -> None:
        self.extend = extend
        self.since_step = False
        self.num_unasked = 0  # rows that came beside those that an id asked for
        self.is_seen_ahead = False  # batches are seen on the host before they come to a forward
        self._ends_with_step = False  # … until the next step
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}  # of a pass: (gradient, token ids of its rows)

    @property
    def is_waiting(self) -> bool:
        """True where gradients of the pass that runs have yet to reach the parameter."""
        return torch._C._current_graph_task_id() in self._waiting

    def forget(self) -> None:
        """Begins anew: a step is taken, and no graph of before is of use any more."""
        self.since_step = False
        self._waiting.clear()
        self.is_seen_ahead &= not self._ends_with_step

    def see_ahead(self, sees: bool) -> None:
        """Notes that batches are seen on the host from now on, or no longer; the last one's forward is still to come then."""
        self.is_seen_ahead, self._ends_with_step = True, not sees

    def add(self, read: Read, gradient: Tensor) -> None:
        """Adds a gradient to those of the pass that runs."""
        number, token_ids = torch._C._current_graph_task_id(), read.table.token_ids
        before = self._waiting.get(number)
        here = in_rows_of(token_ids, gradient, read.token_ids)
        if before is None:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._hand_over, number, read))
            self._waiting[number] = here, token_ids
        else:
            there = in_rows_of(token_ids, *before)
            self._waiting[number] = (here + there if there.is_sparse else there + here), token_ids

    def _hand_over(self, number: int, read: Read) -> None:
        """At the end of a pass: the parameter takes what waited, hooks included, as it takes any gradient."""
        gradient = in_rows_of(read.table.token_ids, *self._waiting.pop(number))
        torch.autograd.backward([read.weight], [gradient], create_graph=gradient.requires_grad)

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrivals, (self.extend,), {"num_unasked": self.num_unasked}


def in_rows_of(token_ids: Tensor, values: Tensor, token_ids_then: Tensor) -> Tensor:
    """Values [len(token_ids_then), …] of some rows among those of `token_ids`, with zeros for the others."""
    if token_ids is token_ids_then:
        return values
    positions = brought(torch.searchsorted(token_ids, token_ids_then), values.device)
    shape = len(token_ids), *values.shape[1:]
    if values.is_sparse:
        at = positions[values._indices()]
        return torch.sparse_coo_tensor(at, values._values(), shape, device=values.device, check_invariants=False)
    return values.new_zeros(shape).index_copy(0, positions, values)


def ids_since(token_ids: Tensor, token_ids_then: Tensor) -> Tensor:
    """The ids of rows that have come since, in order."""
    return token_ids[~torch.isin(token_ids, token_ids_then)]


def with_rows_since(token_ids: Tensor, values: Tensor, token_ids_then: Tensor, new: Tensor) -> Tensor:
    """Values of the rows of then, and `new` ones for the rows that have come since, in the order of `token_ids`."""
    positions = torch.searchsorted(token_ids, ids_since(token_ids, token_ids_then))
    return in_rows_of(token_ids, values, token_ids_then).index_copy_(0, brought(positions, values.device), new)
