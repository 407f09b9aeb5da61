"""Kernels in Triton, for scores [n, columns] in rows: read once for their numbers, read and written once for their gradient;
and for the rows of labels.

Loads Triton: to be imported where it is installed alone (`softmax_kernel`).
"""

import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 8192  # columns that are computed on at once
_NUM_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_of_rows(scores, columns, lse, of_label, total, num_columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    first = scores + row * num_columns
    top = tl.full((1,), float("-inf"), tl.float32)
    exponentials = tl.zeros((1,), tl.float32)
    whole = tl.zeros((1,), tl.float32)
    for start in range(0, num_columns, block):
        column = start + tl.arange(0, block)
        is_there = column < num_columns
        values = tl.load(first + column, mask=is_there, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(values, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # the difference of two of these would be no number
        exponentials = exponentials * tl.exp(top - shift) + tl.sum(tl.exp(values - shift), 0)
        whole += tl.sum(tl.where(is_there, values, 0.0), 0)
        top = new_top
    here = row + tl.arange(0, 1)
    tl.store(lse + here, top + tl.log(exponentials))
    tl.store(total + here, whole)
    label = tl.load(columns + here)
    its_score = tl.load(first + tl.maximum(label, 0)).to(tl.float32)
    tl.store(of_label + here, tl.where(label >= 0, its_score, float("-inf")))


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_of_rows(  # type: ignore[no-untyped-def]
    scores, lse, columns, scale, at_label, share, num_columns, has_labels: tl.constexpr, has_scale: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = scores + row * num_columns
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_there = column < num_columns
    values = tl.load(first + column, mask=is_there, other=0.0)
    gradient = tl.exp(values.to(tl.float32) - tl.load(lse + row))
    if has_labels:
        gradient -= tl.where(column == tl.load(columns + row), at_label, 0.0) + share
    if has_scale:
        gradient *= tl.load(scale + row)
    tl.store(first + column, gradient.to(values.dtype), mask=is_there)


@triton.jit  # type: ignore[untyped-decorator]
def _add_rows_of_labels(sums, rows, columns, dim, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.load(columns + token)
    step = tl.program_id(1) * block + tl.arange(0, block)
    is_asked = step < tl.where(column >= 0, dim, 0)  # of other tokens nothing is moved
    row = tl.load(rows + tl.maximum(column, 0) * dim + step, mask=is_asked, other=0.0)
    here = sums + token * dim + step
    added = tl.load(here, mask=is_asked, other=0.0).to(tl.float32) + row.to(tl.float32)
    tl.store(here, added.to(row.dtype), mask=is_asked)


KERNELS = (_statistics_of_rows, _gradient_of_rows, _add_rows_of_labels)


def _block(num_columns: int) -> int:
    return min(_LARGEST_BLOCK, int(triton.next_power_of_2(num_columns)))


def write_statistics(scores: Tensor, columns: Tensor, lse: Tensor, of_label: Tensor, total: Tensor) -> None:
    """Of each row: the logsumexp, the score in the label's column (-inf for column -1), and the sum; all fp32 [n]."""
    block = _block(scores.shape[1])
    _statistics_of_rows[(len(scores),)](
        scores, columns, lse, of_label, total, scores.shape[1], block=block, num_warps=_NUM_WARPS
    )


def write_gradient(
    scores: Tensor, lse: Tensor, columns: Tensor | None, at_label: float, share: float, scale: Tensor | None
) -> None:
    """Over the scores: (exp(score - lse) - share - at_label in the label's column) x scale, the middle with labels alone."""
    block = _block(scores.shape[1])
    grid = (len(scores), triton.cdiv(scores.shape[1], block))
    _gradient_of_rows[grid](
        scores, lse, lse if columns is None else columns, lse if scale is None else scale, at_label, share,
        scores.shape[1], has_labels=columns is not None, has_scale=scale is not None, block=block,
        num_warps=_NUM_WARPS,
    )  # fmt: skip


def add_rows(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """To each row of `total` [n, dim]: the row of its column, of `rows` [columns, dim], and nothing for column -1."""
    num_tokens, dim = total.shape
    block = _block(dim)
    grid = (num_tokens, triton.cdiv(dim, block))
    _add_rows_of_labels[grid](total, rows, columns, dim, block=block, num_warps=_NUM_WARPS)
