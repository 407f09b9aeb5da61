"""Hidden states → scores of tokens, over rows of which only some train, and back.

A projection covers a set of columns (token ids) in an order of its own. Kept rows are those that train; frozen rows are all
others. None of them ever makes one matrix of the two (docs/decisions/frozen-rows.md).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from leanvocab.output import softmax_kernel
from leanvocab.output.row_filter import Choose

STREAMED_BYTES = 64 << 20  # one block of frozen rows on its way to a device, or to another dtype


class Projection(Protocol):
    """Scores of some columns, and what flows back from them."""

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Scores [n, columns] of hidden states [n, dim], in `out` if given; `weight` [len(vocabulary), dim] are all kept rows."""

    def backproject(
        self, gradient: Tensor, hidden: Tensor | None, weight: Tensor, choose: Choose | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of hidden states [n, dim] and of the kept rows, of these where hidden states are given and they have
        columns here. Overwrites `gradient` [n, columns]. Frozen rows that `choose` does not choose are left out."""

    def columns_of(self, token_ids: Tensor) -> Tensor:
        """The column of each token id; -1 where there is none."""

    def arrange(self, values: Tensor) -> Tensor:
        """Values of all ids [full_size] in the order of the columns."""

    def in_full_order(self, scores: Tensor) -> Tensor:
        """Scores [..., columns] as [..., full_size] in the order of ids, -inf where there is no column."""


@dataclass(frozen=True)
class _SomeIds:
    """Columns of some ids, in their order."""

    token_ids: Tensor  # ascending
    full_size: int

    def columns_of(self, token_ids: Tensor) -> Tensor:
        columns = torch.searchsorted(self.token_ids, token_ids).clamp_(max=len(self.token_ids) - 1)
        return torch.where(self.token_ids[columns] == token_ids, columns, -1)

    def arrange(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.token_ids)

    def in_full_order(self, scores: Tensor) -> Tensor:
        full = scores.new_full((*scores.shape[:-1], self.full_size), -torch.inf)
        return full.index_copy_(-1, self.token_ids, scores)


@dataclass(frozen=True)
class KeptRows(_SomeIds):
    """The kept rows alone: the softmax of the restricted objective, and the last part of one whose frozen rows are streamed."""

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(hidden, weight.t(), out=out)

    def backproject(
        self, gradient: Tensor, hidden: Tensor | None, weight: Tensor, choose: Choose | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return gradient @ weight, _rows_gradient(gradient, hidden)


@dataclass(frozen=True)
class FrozenBlock(_SomeIds):
    """Some of the frozen rows, on their way past a device."""

    rows: Tensor  # [columns, dim], in the dtype of the product

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(hidden, self.rows.t(), out=out)

    def backproject(
        self, gradient: Tensor, hidden: Tensor | None, weight: Tensor, choose: Choose | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return gradient @ self.rows, None

    def add_rows_of(self, columns: Tensor, total: Tensor) -> None:
        """Adds the rows of columns [n] to `total` [n, dim], where there are such columns."""
        if softmax_kernel.serves(self.rows) and total.is_contiguous():
            softmax_kernel.add_rows(total, self.rows, columns)
            return
        is_here = (columns >= 0).to(total.dtype).unsqueeze(1)
        total.addcmul_(self.rows.index_select(0, columns.clamp(min=0)), is_here)


@dataclass(frozen=True)
class MappedRows:
    """All rows in the order of ids, as the base has them; columns of kept rows are computed anew.

    Nothing is copied, so that the rows may lie in a mapped file; scores of kept rows are computed twice.
    """

    rows: Tensor  # [full_size, dim], frozen, of any dtype; those of kept ids are stale
    kept_columns: Tensor

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        scores = hidden.new_empty(len(hidden), len(self.rows)) if out is None else out
        _multiply(hidden, self.rows, scores)
        return scores.index_copy_(1, self.kept_columns, hidden @ weight.t())

    def backproject(
        self, gradient: Tensor, hidden: Tensor | None, weight: Tensor, choose: Choose | None = None
    ) -> tuple[Tensor, Tensor | None]:
        of_kept = gradient.index_select(1, self.kept_columns)
        gradient.index_fill_(1, self.kept_columns, 0)
        of_hidden = torch.addmm(_multiply_back(gradient, self.rows, choose), of_kept, weight)
        return of_hidden, _rows_gradient(of_kept, hidden)

    def columns_of(self, token_ids: Tensor) -> Tensor:
        return torch.where((token_ids >= 0) & (token_ids < len(self.rows)), token_ids, -1)

    def arrange(self, values: Tensor) -> Tensor:
        return values

    def in_full_order(self, scores: Tensor) -> Tensor:
        return scores


@dataclass(frozen=True)
class CompactRows:
    """Kept rows, then frozen ones in a matrix of their own: no row is held or computed twice."""

    rows: Tensor  # [full_size - len(vocabulary), dim], of any dtype
    id_of_column: Tensor  # [full_size]
    column_of_id: Tensor  # [full_size]

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        scores = hidden.new_empty(len(hidden), len(self.id_of_column)) if out is None else out
        torch.mm(hidden, weight.t(), out=scores[:, : len(weight)])
        _multiply(hidden, self.rows, scores[:, len(weight) :])
        return scores

    def backproject(
        self, gradient: Tensor, hidden: Tensor | None, weight: Tensor, choose: Choose | None = None
    ) -> tuple[Tensor, Tensor | None]:
        of_kept, of_frozen = gradient[:, : len(weight)], gradient[:, len(weight) :]
        of_hidden = torch.addmm(_multiply_back(of_frozen, self.rows, choose), of_kept, weight)
        return of_hidden, _rows_gradient(of_kept, hidden)

    def columns_of(self, token_ids: Tensor) -> Tensor:
        last_id = len(self.column_of_id) - 1
        columns = self.column_of_id[token_ids.clamp(0, last_id)]
        return columns.masked_fill_((token_ids < 0) | (token_ids > last_id), -1)

    def arrange(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.id_of_column)

    def in_full_order(self, scores: Tensor) -> Tensor:
        return scores.index_select(-1, self.column_of_id)


def _rows_gradient(gradient: Tensor, hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else gradient.t() @ hidden


def _multiply(hidden: Tensor, rows: Tensor, out: Tensor) -> None:
    """hidden [n, dim] @ rows [columns, dim].T into `out`; rows of another dtype are cast a block at a time."""
    for start, block in _blocks_as(rows, hidden.dtype):
        torch.mm(hidden, block.t(), out=out[:, start : start + len(block)])


def _multiply_back(gradient: Tensor, rows: Tensor, choose: Choose | None) -> Tensor:
    """gradient [n, columns] @ rows [columns, dim], of all columns or of those that are chosen."""
    columns = choose(gradient) if choose is not None else None
    if columns is not None:
        return _multiply_some_back(gradient, rows, columns)
    products = (gradient[:, start : start + len(block)] @ block for start, block in _blocks_as(rows, gradient.dtype))
    return functools.reduce(Tensor.add_, products)


def _multiply_some_back(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """gradient[:, columns] @ rows[columns]; of both a block is copied at a time."""
    product = gradient.new_zeros(len(gradient), rows.shape[1])
    for some in columns.split(rows_in_a_block(rows.shape[1] + len(gradient), gradient.dtype)):
        product.addmm_(gradient.index_select(1, some), rows.index_select(0, some).to(gradient.dtype))
    return product


def _blocks_as(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) in a dtype: all at once where they have it, or else each block where the last one was."""
    if rows.dtype == dtype:
        yield 0, rows
        return
    step = rows_in_a_block(rows.shape[1], dtype)
    room = torch.empty(min(step, len(rows)), rows.shape[1], device=rows.device, dtype=dtype)
    for start in range(0, max(1, len(rows)), step):
        block = rows[start : start + step]
        yield start, room[: len(block)].copy_(block)


def rows_in_a_block(dim: int, dtype: torch.dtype) -> int:
    """Rows of a width and dtype that are on their way to a device, or to another dtype, at once."""
    return max(1, STREAMED_BYTES // max(1, dim * dtype.itemsize))


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
        return None, of_hidden, of_kept


def project(projection: Projection, hidden: Tensor, weight: Tensor) -> Tensor:
    """Scores [n, columns] of hidden states [n, dim], with gradients for these and for the kept rows."""
    result: Tensor = _Project.apply(projection, hidden, weight)
    return result
