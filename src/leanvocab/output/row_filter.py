"""Frozen rows that are left out of the gradient of the hidden states, where that was asked for: not exact
(docs/decisions/filtered-rows.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leanvocab.choices import FilterEps

Choose = Callable[[Tensor], Tensor | None]
"""From the gradient of the scores of frozen rows, [n, columns], the columns that count, ascending; None where all do."""
_FEW = (
    0.5  # of the columns: rows that count are copied, and of more of them that takes longer than the product with all
)


@dataclass
class RowFilter:
    """Choice of the frozen rows that count for some tokens: those whose scores have a gradient of `eps` at least for one of them.

    Per token and dimension the gradient of a hidden state differs by less than `eps` times the sum of what the other rows hold
    there (for losses that were scaled: times the largest scale among these tokens).
    """

    eps: FilterEps  # "auto": the 32nd part of the dtype's precision, as in CCE
    frozen_rows: int
    num_chunks: int = 0  # of tokens, so far
    num_multiplied: int = 0  # rows that counted, of all chunks

    @property
    def skipped_share(self) -> float:
        """Share of the frozen rows that was left out so far."""
        return 1 - self.num_multiplied / max(1, self.num_chunks * self.frozen_rows)

    def of(self, scale: Tensor | None) -> Choose:
        """A choice for losses that are multiplied by `scale` [n, 1]; the host waits for the number of rows."""
        return functools.partial(self._choose, scale=scale)

    def _choose(self, gradient: Tensor, scale: Tensor | None) -> Tensor | None:
        eps = torch.finfo(gradient.dtype).eps / 32 if self.eps == "auto" else self.eps
        largest = torch.maximum(gradient.amax(0), gradient.amin(0).neg_())  # quicker on a CPU than a norm, by six
        is_small = largest < (eps if scale is None else eps * scale.abs().amax())
        columns = (~is_small).nonzero()[:, 0]  # what is no number is not small
        are_few = len(columns) <= _FEW * gradient.shape[1]
        self.num_chunks += 1
        self.num_multiplied += len(columns) if are_few else self.frozen_rows
        return columns if are_few else None
