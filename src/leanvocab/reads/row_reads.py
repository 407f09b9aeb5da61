"""Reads of rows by full ids around the lookup, `weight[ids]` and its like, answered from the rows of a partial matrix.

What reads all rows (a product, a comparison) has no such answer (docs/decisions/reads-with-an-answer.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leanvocab.partial.embedding import RemapLookup
from leanvocab.partial.growth import Lookup

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)  # uint8 is a mask to an index


@dataclass(frozen=True)
class RowRead:
    """A read of rows: their ids, what reads rows by other ids in the same way, and what is then taken of them."""

    ids: int | Tensor
    lookup: Lookup
    padding_idx: int | None = None  # whose row gets no gradient
    rest: tuple[Any, ...] = ()  # further indices, behind the one of the rows


def answer(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], module: RemapLookup) -> Tensor | None:
    """The rows that a call on the weight of `module` reads by full ids; None where it is no read of that kind.

    Raises `MissingTokenError` as the lookup does, for rows that are not there.
    """
    read = _row_read(func, args, kwargs, module)
    if read is None or module.max_norm is not None:
        return None
    module.begin()
    if isinstance(read.ids, int):
        row = module.row_at(read.ids)
        return row[read.rest] if read.rest else row
    rows = module.rows_at(read.ids, read.lookup, read.padding_idx)
    if not read.rest:
        return rows
    numbers = torch.arange(read.ids.numel(), device=rows.device).view(read.ids.shape)
    taken: Tensor = rows.reshape(-1, rows.shape[-1])[(numbers, *read.rest)]
    return taken


def _row_read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], module: RemapLookup) -> RowRead | None:
    weight = module.weight
    if func is Tensor.__getitem__ and args[0] is weight:
        return _indexed(args[1], module)
    if func in (Tensor.index_select, torch.index_select):
        return _selected(*args, module=module, **kwargs)
    if func is F.embedding:
        return _looked_up(*args, module=module, **kwargs)
    if func is torch.embedding:
        return _embedded(*args, module=module, **kwargs)
    return None


def _indexed(index: Any, module: RemapLookup) -> RowRead | None:
    head, *rest = index if isinstance(index, tuple) and index else (index,)
    if isinstance(head, list | np.ndarray):
        head = torch.as_tensor(head, device="cpu")
    ids: int | Tensor
    if isinstance(head, Tensor) and head.dtype in _INTEGERS:
        ids = head.where(head >= 0, head + module.num_embeddings).long()
    elif isinstance(head, int | np.integer) and not isinstance(head, bool):
        ids = int(head) + (module.num_embeddings if head < 0 else 0)
    else:
        return None
    return RowRead(ids, lambda weight, partial_ids, _: weight[partial_ids], rest=tuple(rest))


def _selected(input: Tensor, dim: Any, index: Tensor, *, module: RemapLookup) -> RowRead | None:
    if input is not module.weight or dim not in (0, -2):
        return None
    return RowRead(index.reshape(-1), lambda weight, partial_ids, _: weight.index_select(0, partial_ids))


def _looked_up(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *options: Any,
    module: RemapLookup,
    **named: Any,
) -> RowRead | None:
    if weight is not module.weight or max_norm is not None:
        return None

    def lookup(rows: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        return F.embedding(ids, rows, padding, None, norm_type, *options, **named)

    return RowRead(input, lookup, _from_the_front(padding_idx, module))


def _embedded(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, *options: Any, module: RemapLookup, **named: Any
) -> RowRead | None:
    if weight is not module.weight:
        return None

    def lookup(rows: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        return torch.embedding(rows, ids, -1 if padding is None else padding, *options, **named)

    return RowRead(indices, lookup, None if padding_idx < 0 else padding_idx)


def _from_the_front(padding_idx: int | None, module: RemapLookup) -> int | None:
    return padding_idx + module.num_embeddings if padding_idx is not None and padding_idx < 0 else padding_idx
