"""Scores of a few tokens, turned in their place into their softmax and into the gradient of a loss.

All scores of a chunk are there once, in the dtype of the product. What the model does to them, the softmax and the gradient
are computed in fp32: in place where that is the dtype and nothing is done, by one kernel on CUDA, and otherwise for a piece
of the tokens at a time (docs/decisions/frozen-rows.md).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from leanvocab.output import softmax_kernel
from leanvocab.output.logit_operations import Elementwise

PIECES = 8  # of the scores of a chunk, where they are computed on in another dtype
SMALLEST_PIECE_BYTES = 1 << 20


class Targets(NamedTuple):
    """What a softmax is compared with."""

    columns: Tensor  # [n], of the labels; -1 where the label has none here
    smoothing: float
    num_columns: int  # of the whole softmax, over all of which the smoothing is spread

    def at(self, tokens: slice) -> "Targets":
        """Those of some tokens."""
        return self._replace(columns=self.columns[tokens])


class Statistics(NamedTuple):
    """Numbers of each token, [n], over some columns: together they make its loss."""

    lse: Tensor
    of_label: Tensor  # its score; -inf where the label has no column here
    total: Tensor  # the sum of the scores, or zero where nothing is smoothed

    def losses(self, targets: Targets) -> Tensor:
        """Losses, where these are the numbers over all columns."""
        smoothing = targets.smoothing
        if not smoothing:
            return self.lse - self.of_label
        return self.lse - (1 - smoothing) * self.of_label - smoothing * (self.total / targets.num_columns)


class Scores(Protocol):
    """Scores [n, columns] of some tokens."""

    raw: Tensor  # as the projection gave them, and then their gradient

    def statistics(self, targets: Targets) -> Statistics:
        """Their numbers; asked for once, and before the gradient."""

    def turn_into_gradient(self, lse: Tensor, targets: Targets | None, scale: Tensor | None) -> list[Tensor | None]:
        """Writes exp(score - lse) over the scores, less the (smoothed) one-hot where `targets` are given, times `scale`
        [n, 1]: the gradient of what the projection gave. Returns those of the operands."""


class WideScores:
    """Scores of which torch's operations make a softmax, in fp32 at least."""

    def __init__(self, raw: Tensor, elementwise: Elementwise, arrange: Callable[[Tensor], Tensor], with_graph: bool):
        self.raw, self._only_casts = raw, elementwise.only_widens(raw.dtype)
        self._has_graph = with_graph and not elementwise.only_casts
        self._operands = elementwise.operands()
        self._source = raw
        if self._has_graph:
            self._source = raw.detach().requires_grad_()
            self._operands = tuple(each.detach().requires_grad_(each.is_floating_point()) for each in self._operands)
        with torch.set_grad_enabled(self._has_graph):
            self._final = elementwise.with_operands(self._operands)(self._source, arrange)
        wide = self._final.detach().to(wide_dtype(self._final.dtype))
        self._wide = wide.clone() if self._has_graph and wide.data_ptr() == self._final.data_ptr() else wide
        self._own_lse: Tensor | None = None  # once the softmax was written over the scores

    def statistics(self, targets: Targets) -> Statistics:
        of_label = label_scores(self._wide, targets.columns)
        total = self._wide.sum(-1) if targets.smoothing else torch.zeros_like(of_label)
        self._own_lse = softmax_in_place(self._wide, self.raw if self._only_casts else self._wide)
        return Statistics(self._own_lse, of_label, total)

    def turn_into_gradient(self, lse: Tensor, targets: Targets | None, scale: Tensor | None) -> list[Tensor | None]:
        gradient = self._wide
        if self._own_lse is None:
            gradient.sub_(lse.unsqueeze(1)).exp_()
        elif self._own_lse is not lse:
            gradient.mul_((self._own_lse - lse).exp_().unsqueeze(1))
        if targets is not None:
            step = (targets.columns >= 0).to(gradient.dtype).mul_(targets.smoothing - 1)
            gradient.scatter_add_(1, targets.columns.clamp(min=0).unsqueeze(1), step.unsqueeze(1))
            if targets.smoothing:
                gradient.sub_(targets.smoothing / targets.num_columns)
        return self._pull_back(gradient if scale is None else gradient.mul_(scale))

    def _pull_back(self, gradient: Tensor) -> list[Tensor | None]:
        if not self._has_graph:
            if gradient.data_ptr() != self.raw.data_ptr():
                self.raw.copy_(gradient)
            return [None] * len(self._operands)
        inputs = [self._source, *(each for each in self._operands if each.requires_grad)]
        gradients = iter(torch.autograd.grad(self._final, inputs, gradient.to(self._final.dtype), allow_unused=True))
        self.raw.copy_(next(gradients))
        return [next(gradients) if each.requires_grad else None for each in self._operands]


class KernelScores:
    """Scores that stay in the dtype of the product: a kernel computes on each in fp32 while it has it."""

    def __init__(self, raw: Tensor):
        self.raw = raw

    def statistics(self, targets: Targets) -> Statistics:
        return Statistics(*softmax_kernel.statistics(self.raw, targets.columns))

    def turn_into_gradient(self, lse: Tensor, targets: Targets | None, scale: Tensor | None) -> list[Tensor | None]:
        columns, share = (None, 0.0) if targets is None else (targets.columns, targets.smoothing / targets.num_columns)
        at_label = 0.0 if targets is None else 1 - targets.smoothing
        softmax_kernel.turn_into_gradient(self.raw, lse, columns, at_label, share, scale)
        return []


def in_pieces(
    raw: Tensor, elementwise: Elementwise, arrange: Callable[[Tensor], Tensor], with_graph: bool
) -> Iterator[tuple[slice, Scores]]:
    """The scores that a projection gave, [n, columns], which `arrange` puts values of all ids in the order of: some tokens
    after the other, each piece being done with before the next."""
    only_widens = elementwise.only_widens(raw.dtype)
    if only_widens and softmax_kernel.serves(raw):
        yield slice(0, len(raw)), KernelScores(raw)
        return
    step = len(raw)
    if not (only_widens and elementwise.dtype(raw) == raw.dtype == wide_dtype(raw.dtype)):
        step = tokens_in_a_piece(*raw.shape)
    for start in range(0, len(raw), max(1, step)):
        tokens = slice(start, min(start + step, len(raw)))
        yield tokens, WideScores(raw[tokens], elementwise, arrange, with_graph)


def tokens_in_a_piece(num_tokens: int, num_columns: int) -> int:
    """Tokens of a chunk whose scores are computed on at once, where that takes memory beside them."""
    smallest = SMALLEST_PIECE_BYTES // (4 * max(1, num_columns))
    return max(1, min(num_tokens, max(smallest, -(-num_tokens // PIECES))))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores and sums of gradients are computed: fp32 at least."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def softmax_in_place(scores: Tensor, raw: Tensor) -> Tensor:
    """Writes the softmax over scores [n, columns], and returns their logsumexp [n].

    That follows from what the highest score has become, which is looked for in `raw`: the same scores, narrow perhaps. To look
    for it again costs a CPU less than to note where it was.
    """
    if scores.device.type == "cpu":
        top = raw.amax(-1).to(scores.dtype)
        torch.softmax(scores, -1, out=scores)
        return top - scores.amax(-1).log_()
    top, where = raw.max(-1, keepdim=True)
    torch.softmax(scores, -1, out=scores)
    return (top.to(scores.dtype) - scores.gather(1, where).log_()).squeeze(1)


def label_scores(scores: Tensor, columns: Tensor) -> Tensor:
    """Scores of the labels, −inf for those that have no column."""
    of_label = scores.gather(1, columns.clamp(min=0).unsqueeze(1)).squeeze(1)
    return of_label.masked_fill(columns < 0, -torch.inf)
