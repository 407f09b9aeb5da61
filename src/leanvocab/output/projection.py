"""Hidden states → scores of tokens, over rows of which only some train, and back.

A projection covers a set of columns (token ids) in an order of its own. Kept rows are those that train; frozen rows are all
others. None of them ever makes one matrix of the two.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from leanvocab.partial.devices import has_streams
from leanvocab.partial.partial_table import PartialTable

STREAMED_BYTES = 64 << 20  # one block of frozen rows on its way to a device, or to another dtype


class Projection(Protocol):
    """Scores of some columns, and what flows back from them."""

    @property
    def kept(self) -> slice:
        """Which of the kept rows have columns here."""

    @property
    def num_columns(self) -> int:
        """How many columns there are."""

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Scores [n, columns] of hidden states [n, dim], in `out` if given; `weight` [len(vocabulary), dim] are all kept rows."""

    def backproject(self, gradient: Tensor, hidden: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of hidden states [n, dim] and of the kept rows here, of these where hidden states are given. Overwrites
        `gradient` [n, columns]."""

    def columns_of(self, token_ids: Tensor) -> Tensor:
        """The column of each token id; -1 where there is none."""

    def arrange(self, values: Tensor) -> Tensor:
        """Values of all ids [full_size] in the order of the columns."""

    def in_full_order(self, scores: Tensor) -> Tensor:
        """Scores [..., columns] as [..., full_size] in the order of ids."""


@dataclass(frozen=True)
class KeptRows:
    """The kept rows alone: the softmax of the restricted objective."""

    token_ids: Tensor
    full_size: int

    @property
    def kept(self) -> slice:
        return slice(0, len(self.token_ids))

    @property
    def num_columns(self) -> int:
        return len(self.token_ids)

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(hidden, weight.t(), out=out)

    def backproject(self, gradient: Tensor, hidden: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return gradient @ weight, _rows_gradient(gradient, hidden)

    def columns_of(self, token_ids: Tensor) -> Tensor:
        places = torch.searchsorted(self.token_ids, token_ids).clamp_(max=len(self.token_ids) - 1)
        return torch.where(self.token_ids[places] == token_ids, places, -1)

    def arrange(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.token_ids)

    def in_full_order(self, scores: Tensor) -> Tensor:
        full = scores.new_full((*scores.shape[:-1], self.full_size), -torch.inf)
        return full.index_copy(-1, self.token_ids, scores)


@dataclass(frozen=True)
class MappedRows:
    """All rows from `start` on, in the order of ids, as the base has them; columns of kept rows are computed anew.

    Nothing is copied, so that the rows may lie in a mapped file; scores of kept rows are computed twice.
    """

    rows: Tensor  # [columns, dim], frozen, of any dtype; those of kept ids are stale
    kept_columns: Tensor  # of the kept rows here, counted from `start`
    kept: slice
    start: int = 0

    @property
    def num_columns(self) -> int:
        return len(self.rows)

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        scores = hidden.new_empty(len(hidden), len(self.rows)) if out is None else out
        _multiply(hidden, self.rows, scores)
        return scores.index_copy_(1, self.kept_columns, hidden @ weight[self.kept].t())

    def backproject(self, gradient: Tensor, hidden: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        of_kept = gradient.index_select(1, self.kept_columns)
        gradient.index_fill_(1, self.kept_columns, 0)
        of_hidden = torch.addmm(_multiply_back(gradient, self.rows), of_kept, weight[self.kept])
        return of_hidden, _rows_gradient(of_kept, hidden)

    def columns_of(self, token_ids: Tensor) -> Tensor:
        columns = token_ids - self.start
        return torch.where((columns >= 0) & (columns < len(self.rows)), columns, -1)

    def arrange(self, values: Tensor) -> Tensor:
        return values[self.start : self.start + len(self.rows)]

    def in_full_order(self, scores: Tensor) -> Tensor:
        return scores


@dataclass(frozen=True)
class CompactRows:
    """Kept rows, then frozen ones in a matrix of their own: no row is held or computed twice."""

    rows: Tensor  # [full_size - len(vocabulary), dim], of any dtype
    order: Tensor  # [full_size]: the id of each column
    places: Tensor  # [full_size]: the column of each id

    @property
    def kept(self) -> slice:
        return slice(0, len(self.order) - len(self.rows))

    @property
    def num_columns(self) -> int:
        return len(self.order)

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        scores = hidden.new_empty(len(hidden), len(self.order)) if out is None else out
        torch.mm(hidden, weight.t(), out=scores[:, : len(weight)])
        _multiply(hidden, self.rows, scores[:, len(weight) :])
        return scores

    def backproject(self, gradient: Tensor, hidden: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        of_kept, of_frozen = gradient[:, : len(weight)], gradient[:, len(weight) :]
        return torch.addmm(_multiply_back(of_frozen, self.rows), of_kept, weight), _rows_gradient(of_kept, hidden)

    def columns_of(self, token_ids: Tensor) -> Tensor:
        return self.places[token_ids]

    def arrange(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.order)

    def in_full_order(self, scores: Tensor) -> Tensor:
        return scores.index_select(-1, self.places)


def _rows_gradient(gradient: Tensor, hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else gradient.t() @ hidden


def _multiply(hidden: Tensor, rows: Tensor, out: Tensor) -> None:
    """hidden [n, dim] @ rows [columns, dim].T into `out`; rows of another dtype are cast a block at a time."""
    for start, block in _blocks_as(rows, hidden.dtype):
        torch.mm(hidden, block.t(), out=out[:, start : start + len(block)])


def _multiply_back(gradient: Tensor, rows: Tensor) -> Tensor:
    """gradient [n, columns] @ rows [columns, dim]."""
    products = (gradient[:, start : start + len(block)] @ block for start, block in _blocks_as(rows, gradient.dtype))
    return functools.reduce(Tensor.add_, products)


def _blocks_as(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) in a dtype: all at once where they have it, or else each block where the last one was."""
    if rows.dtype == dtype:
        yield 0, rows
        return
    step = _rows_in_a_block(rows, dtype)
    room = torch.empty(min(step, len(rows)), rows.shape[1], device=rows.device, dtype=dtype)
    for start in range(0, max(1, len(rows)), step):
        block = rows[start : start + step]
        yield start, room[: len(block)].copy_(block)


def _rows_in_a_block(rows: Tensor, dtype: torch.dtype) -> int:
    return max(1, STREAMED_BYTES // max(1, rows.shape[1] * dtype.itemsize))


class FrozenRows:
    """The rows of a table that do not train, where they are multiplied.

    On a CPU they are a view of the table's store, which may be a mapped file. On another device they are held there, without
    the kept ones, or brought there block by block; in the dtype of the store or that of the product, whichever is narrower,
    so that rows of bf16 that are multiplied in fp32 (QLoRA's) take no more room than they did.
    """

    def __init__(self, table: PartialTable, device: torch.device, dtype: torch.dtype):
        self.table, self.device, self.dtype = table, device, dtype
        self._source = table.frozen_rows()
        self._store = table.store
        self._whole: Projection | None = None

    def fits(self, table: PartialTable, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether these are still the rows of the table, for this device and dtype."""
        return self._store is table.store and self.device == device and self.dtype == dtype

    def whole(self) -> Projection:
        """All columns at once."""
        if self._whole is None:
            self._whole = self._mapped() if self.device.type == "cpu" else self._compact()
        return self._whole

    def blocks(self) -> Iterator[Projection]:
        """All columns, one block after the other."""
        step = _rows_in_a_block(self._source, self.dtype)
        ids = self.table.token_ids
        for start in range(0, len(self._source), step):
            rows = self._source[start : start + step]
            first, last = (int(place) for place in torch.searchsorted(ids, torch.tensor([start, start + len(rows)])))
            here = (ids[first:last] - start).to(self.device)
            yield MappedRows(self._brought(rows).to(self.dtype), here, slice(first, last), start)

    @property
    def held_dtype(self) -> torch.dtype:
        """The dtype of the rows on the device."""
        return self.dtype if self.dtype.itemsize <= self._source.dtype.itemsize else self._source.dtype

    def _brought(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.held_dtype)
        return (
            rows.pin_memory().to(self.device, non_blocking=True) if has_streams(self.device) else rows.to(self.device)
        )

    def _mapped(self) -> Projection:
        return MappedRows(self._source, self.table.token_ids, slice(0, self.table.num_rows))

    def _compact(self) -> Projection:
        kept = torch.zeros(self.table.full_size, dtype=torch.bool)
        kept[self.table.token_ids] = True
        others = (~kept).nonzero()[:, 0]
        order = torch.cat([self.table.token_ids, others])
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        rows = torch.empty(len(others), self._source.shape[1], device=self.device, dtype=self.held_dtype)
        step = _rows_in_a_block(self._source, self._source.dtype)
        for start in range(0, len(others), step):
            rows[start : start + step] = self._source[others[start : start + step]].to(self.device, self.held_dtype)
        return CompactRows(rows, order.to(self.device), places.to(self.device))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenRows":
        return self  # read-only, so copies of a model share it

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # made anew from the table


class _Project(torch.autograd.Function):
    """Scores in the order of the columns, as part of a graph."""

    @staticmethod
    def forward(ctx: Any, projection: Projection, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.projection = projection
        ctx.save_for_backward(hidden, weight)
        return projection.project(hidden, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        of_hidden, of_kept = ctx.projection.backproject(
            gradient.clone(), hidden if ctx.needs_input_grad[2] else None, weight
        )
        if of_kept is None:
            return None, of_hidden, None
        of_weight = torch.zeros_like(weight)
        of_weight[ctx.projection.kept] = of_kept
        return None, of_hidden, of_weight


def project(projection: Projection, hidden: Tensor, weight: Tensor) -> Tensor:
    """Scores [n, columns] of hidden states [n, dim], with gradients for these and for the kept rows."""
    result: Tensor = _Project.apply(projection, hidden, weight)
    return result
