"""The cross-entropy over a vocabulary of which only some rows train, without a matrix of tokens × vocabulary.

loss = logsumexp over all columns − the label's score, so the gradient of the scores is softmax − one-hot. Scores are computed
for a few tokens at a time, turned into their gradient in place, and dropped: two products with the frozen rows where
ordinary training has three, since nothing is computed for the gradient of rows that do not train. Tokens whose label is
ignored are left out from the start (docs/decisions/frozen-rows.md).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanvocab.choices import IGNORE_INDEX
from leanvocab.output.frozen_rows import FrozenSizes
from leanvocab.output.logit_operations import Elementwise
from leanvocab.output.projection import FrozenBlock, KeptRows, Projection
from leanvocab.output.row_filter import Choose, RowFilter
from leanvocab.output.scores import Scores, Statistics, Targets, in_pieces, tokens_in_a_piece, wide_dtype
from leanvocab.partial.devices import OnItsWay, has_streams, memory_bytes, without_autocast

# Scores that are held at once, at most (docs/decisions/chunk-sizes.md). A product reads and rearranges all frozen rows for each
# chunk: at 262,144 × 640 on two CPU cores the two products took 2.58 s for 512 tokens in chunks of 128 MiB, 2.37 s in chunks of
# 256 MiB (limit: 2.14 s).
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
_LEAST_CHUNK_BYTES = 64 << 20
_SHARE_OF_MEMORY = 24  # a chunk takes one of so many parts of a device's memory
_WIDE_BYTES = 4  # scores and sums of gradients are in fp32 at least

Gradients = tuple[Tensor | None, ...]


def chunk_bytes(device_type: str, memory_bytes: int | None = None) -> int:
    """Bytes of the scores that are held at once on a device of some memory (None: as much as one likes).

    A power of two between 64 and 512 MiB. What is free at the moment is not asked: sums over several chunks are rounded by
    their sizes, and the same run is to give the same bits.
    """
    most = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    if memory_bytes is None:
        return most
    share = 1 << max(0, (memory_bytes // _SHARE_OF_MEMORY).bit_length() - 1)
    return min(most, max(_LEAST_CHUNK_BYTES, share))


def tokens_at_once(device: torch.device, value_bytes: int, num_columns: int) -> int:
    """Number of tokens whose scores are held at once."""
    scores_bytes = chunk_bytes(device.type, memory_bytes(device))
    return _tokens_of(scores_bytes, value_bytes, num_columns)


def _tokens_of(scores_bytes: int, value_bytes: int, num_columns: int) -> int:
    return max(1, scores_bytes // (max(_WIDE_BYTES, value_bytes) * num_columns))


def peak_bytes(num_tokens: int, kept_rows: int, dim: int, computed: torch.dtype, frozen: FrozenSizes | None) -> int:
    """Bytes that the loss holds at its peak on a GPU that reports 12 GiB or more, beside the frozen rows: by arithmetic, for an
    estimate.

    Frozen rows that are streamed are one part of it, and kept rows are another, after them: the larger one counts.
    """
    hidden_bytes = num_tokens * dim * computed.itemsize
    if frozen is None or not frozen.on_host:
        num_columns, moving_bytes = (kept_rows, 0) if frozen is None else (frozen.full_rows, frozen.moving_bytes)
        return hidden_bytes + _bytes_of_columns(num_tokens, num_columns, kept_rows, dim, computed, moving_bytes)
    sums_bytes = num_tokens * dim * (_WIDE_BYTES + computed.itemsize)  # of the hidden states, and the labels' rows
    streamed = frozen.moving_bytes + _bytes_of_columns(num_tokens, frozen.block_rows, 0, dim, computed)
    kept = _bytes_of_columns(num_tokens, kept_rows, kept_rows, dim, computed)
    return hidden_bytes + sums_bytes + max(streamed, kept)


def _bytes_of_columns(
    num_tokens: int, num_columns: int, kept_rows: int, dim: int, computed: torch.dtype, moving_bytes: int = 0
) -> int:
    """Scores of a chunk of tokens in the dtype of the product, and then either those of a piece in fp32, where this is narrow, or
    what they are multiplied to and with; sums of that in fp32 where there are several chunks."""
    value_bytes = computed.itemsize
    step = min(_tokens_of(chunk_bytes("cuda"), value_bytes, num_columns), num_tokens)
    piece_bytes = 0
    if value_bytes < _WIDE_BYTES:
        piece_bytes = tokens_in_a_piece(step, num_columns) * num_columns * _WIDE_BYTES
    products_bytes = (step + kept_rows) * dim * value_bytes
    sums_bytes = 0 if step == num_tokens else (num_tokens + kept_rows) * dim * _WIDE_BYTES
    return step * num_columns * value_bytes + max(piece_bytes, products_bytes + moving_bytes) + sums_bytes


@dataclass(frozen=True)
class SoftmaxColumns:
    """The columns that the softmax is over: at once, or in parts where frozen rows are streamed past a device."""

    whole: Callable[[], Projection]
    num_columns: int
    frozen_blocks: Callable[[bool], Iterator[FrozenBlock]] | None = None  # True: the memory of a block is used again
    kept: KeptRows | None = None  # where there are blocks
    row_filter: RowFilter | None = None  # where not all frozen rows count in the gradient of the hidden states

    def parts(self, *, passing: bool) -> Iterator[FrozenBlock | KeptRows]:
        """All columns where frozen rows are streamed, those of kept rows last."""
        assert self.frozen_blocks is not None
        assert self.kept is not None
        yield from self.frozen_blocks(passing)
        yield self.kept

    def in_full_order(self, score: Callable[[Projection], Tensor]) -> Tensor:
        """Scores [..., full_size] in the order of ids, of what `score` gives for each projection."""
        if self.frozen_blocks is None:
            projection = self.whole()
            return projection.in_full_order(score(projection))
        scores, ids = [], []
        for part in self.parts(passing=False):
            scores.append(score(part))
            ids.append(part.token_ids)
            del part  # before the next one comes, not after
        return torch.cat(scores, -1).index_select(-1, torch.cat(ids).argsort())


@dataclass(frozen=True)
class LossOptions:
    """Options of `torch.nn.functional.cross_entropy`."""

    ignore_index: int = IGNORE_INDEX
    reduction: str = "mean"
    label_smoothing: float = 0.0


def cross_entropy(
    columns: SoftmaxColumns,
    elementwise: Elementwise,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
) -> Tensor:
    """The loss of `labels` [n] (full ids) for hidden states [n, dim] and kept rows [len(vocabulary), dim].

    Hidden states, kept rows and the operands of the elementwise operations get gradients. Equal to the full model's loss
    with the other rows' gradients masked, up to the rounding of sums. A label that has no column has an infinite loss.
    """
    counted = _CountedTokens.of(labels, options.ignore_index)
    used, targets = counted.hidden(hidden), labels.index_select(0, counted.positions)
    kept = weight.to(hidden.dtype)  # under autocast
    operands = elementwise.operands()
    # Asked here: within a Function there is no telling whether anybody wants a gradient.
    wanted = _NO_GRADIENTS
    if torch.is_grad_enabled():
        wanted = _GradientsWanted(any(each.requires_grad for each in (used, kept, *operands)), kept.requires_grad)
    work = _LossPass(columns, elementwise, targets, options.label_smoothing, counted)
    losses: Tensor = _CrossEntropy.apply(work, options.reduction != "none", wanted, used, kept, *operands)
    dtype = elementwise.dtype(hidden)
    if options.reduction == "none":
        return hidden.new_zeros(len(hidden), dtype=losses.dtype).index_copy(0, counted.positions, losses).to(dtype)
    return (losses / counted.num if options.reduction == "mean" else losses).to(dtype)


class _CountedTokens:
    """Tokens whose labels count, first, and then the others where the host does not wait to know how many these are."""

    def __init__(self, positions: Tensor, num: int | Tensor, is_ignored: Tensor | None = None):
        self.positions, self.num = positions, num
        self.is_ignored = is_ignored  # [n], in the order of positions
        self._num_ignored: OnItsWay | None = None

    @staticmethod
    def of(labels: Tensor, ignore_index: int) -> "_CountedTokens":
        is_ignored = labels == ignore_index
        if not (labels.is_meta or has_streams(labels.device)):
            positions = (~is_ignored).nonzero()[:, 0]
            return _CountedTokens(positions, len(positions))
        positions = torch.argsort(is_ignored.to(torch.uint8), stable=True)
        return _CountedTokens(positions, (~is_ignored).sum(), is_ignored.index_select(0, positions))

    def hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states in this order; zeros for those that do not count, so that nothing comes of them."""
        used = hidden.index_select(0, self.positions)
        return used if self.is_ignored is None else used.masked_fill_(self.is_ignored.unsqueeze(1), 0)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """As many tokens at once, until none is left that counts: asked after the first, while the device is at work on it."""
        num_positions = len(self.positions)
        if self.is_ignored is not None and num_tokens < num_positions and self._num_ignored is None:
            self._num_ignored = OnItsWay(self.is_ignored.sum())
        for start in range(0, num_positions, num_tokens):
            if start and self._num_ignored is not None:
                num_positions = len(self.positions) - self._num_ignored.number()
            if start < num_positions:
                yield slice(start, min(start + num_tokens, num_positions))

    def scale(self, scale: Tensor | None, operands: Sequence[Tensor]) -> Tensor | None:
        """Factors of the losses [n, 1], with zero for those that do not count: operands get gradients of all tokens."""
        if self.is_ignored is None or not (operands or scale is not None):
            return scale
        counts = (~self.is_ignored).unsqueeze(1)
        return counts.to(torch.float32) if scale is None else scale * counts

    def losses(self, losses: Tensor) -> Tensor:
        """Losses [n], zero where they do not count; overwrites them."""
        return losses if self.is_ignored is None else losses.masked_fill_(self.is_ignored, 0)


@dataclass(frozen=True)
class _GradientsWanted:
    """Gradients that somebody wants: any at all, and that of the kept rows, which costs a product."""

    any: bool
    of_weight: bool


class _Inputs(NamedTuple):
    """Hidden states [n, dim], kept rows and operands: all that may get gradients."""

    hidden: Tensor
    weight: Tensor
    operands: Sequence[Tensor]


_NO_GRADIENTS = _GradientsWanted(False, False)


class _CrossEntropy(torch.autograd.Function):
    """Losses [n], or their sum. The gradient of a sum is computed beside it, that of single losses when it is asked for."""

    @staticmethod
    def forward(ctx: Any, work: "_LossPass", is_sum: bool, wanted: _GradientsWanted, *inputs: Tensor) -> Tensor:
        hidden, weight, *operands = inputs
        # In fp16, what the loss is scaled with keeps gradients from vanishing, and it is known in the backward only.
        ctx.at_once = is_sum and hidden.dtype != torch.float16
        ctx.work, ctx.wanted = work, wanted
        now = wanted if ctx.at_once else _NO_GRADIENTS
        losses, gradients = work.run(_Inputs(hidden, weight, operands), now, None)
        if wanted.any:  # saved so, they are let go of by the backward
            ctx.save_for_backward(*(gradients if ctx.at_once else inputs))
        return losses.sum() if is_sum else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if ctx.at_once:
            gradients: Sequence[Tensor | None] = [_times(each, gradient) for each in ctx.saved_tensors]
        else:
            hidden, weight, *operands = ctx.saved_tensors
            scale = gradient.expand(len(hidden)).unsqueeze(1)
            _, gradients = ctx.work.run(_Inputs(hidden, weight, operands), ctx.wanted, scale)
        needed = [each if needs else None for each, needs in zip(gradients, ctx.needs_input_grad[3:], strict=True)]
        return None, None, None, *needed


def _times(value: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if value is None else (value * factor).to(value.dtype)


@dataclass(frozen=True)
class _LossPass:
    """One pass over the tokens: losses in fp32, and gradients of their sum."""

    columns: SoftmaxColumns
    elementwise: Elementwise
    labels: Tensor
    smoothing: float
    counted: _CountedTokens

    def run(self, inputs: _Inputs, wanted: _GradientsWanted, scale: Tensor | None) -> tuple[Tensor, Gradients]:
        """Losses [n]; gradients of hidden states, kept rows and operands, where they are wanted, of the losses times `scale`
        [n, 1] (None: of all of them)."""
        with without_autocast(inputs.hidden.device):
            sums = _GradientSums(inputs, wanted.of_weight) if wanted.any else None
            run = self._in_chunks if self.columns.frozen_blocks is None else self._in_parts
            losses = self.counted.losses(run(inputs, self.counted.scale(scale, inputs.operands), sums))
            return losses, sums.gradients() if sums else ()

    def _in_chunks(self, inputs: _Inputs, scale: Tensor | None, sums: "_GradientSums | None") -> Tensor:
        projection, hidden = self.columns.whole(), inputs.hidden
        targets = self._targets(projection)
        losses = hidden.new_empty(len(hidden), dtype=wide_dtype(hidden.dtype))
        step = min(tokens_at_once(hidden.device, hidden.element_size(), self.columns.num_columns), len(hidden))
        # One piece of memory for all chunks: the system gives new pages for each otherwise.
        room = hidden.new_empty(step, self.columns.num_columns)
        for tokens in self.counted.chunks(max(1, step)):
            raw = projection.project(hidden[tokens], inputs.weight, room[: tokens.stop - tokens.start])
            for piece, scores in self._pieces(projection, raw, tokens, inputs, sums is not None):
                numbers = scores.statistics(targets.at(piece))
                losses[piece] = numbers.losses(targets.at(piece))
                if sums is not None:
                    of_operands = scores.turn_into_gradient(numbers.lse, targets.at(piece), _at(scale, piece))
                    sums.add_operands(of_operands)
                del scores  # before the next ones are made, not after
            if sums is not None:
                row_filter = self.columns.row_filter
                sums.add(tokens, projection, raw, None if row_filter is None else row_filter.of(_at(scale, tokens)))
        return losses

    def _in_parts(self, inputs: _Inputs, scale: Tensor | None, sums: "_GradientSums | None") -> Tensor:
        """Twice over the columns, the first time for the logsumexp, the second for the gradients, which are in need of it; or
        once, where the hidden states alone are in need of it."""
        if sums is not None and scale is None and self.elementwise.only_casts and not self.smoothing:
            return self._in_one_pass(inputs, sums)
        numbers = _no_numbers(inputs.hidden)
        for projection, tokens, targets, raw in self._scored_parts(inputs):
            for piece, scores in self._pieces(projection, raw, tokens, inputs, False):
                _take_in(numbers, piece, scores.statistics(targets.at(piece)))
                del scores
            del projection, raw
        if sums is not None:
            for projection, tokens, targets, raw in self._scored_parts(inputs):
                for piece, scores in self._pieces(projection, raw, tokens, inputs, True):
                    lse, scale_here = numbers.lse[piece], _at(scale, piece)
                    sums.add_operands(scores.turn_into_gradient(lse, targets.at(piece), scale_here))
                    del scores
                sums.add(tokens, projection, raw)
                del projection, raw
        return numbers.losses(self._targets(None))

    def _in_one_pass(self, inputs: _Inputs, sums: "_GradientSums") -> Tensor:
        """The gradient of the hidden states is the mean of all rows by their softmax, less the label's row. Each part has such a
        mean of its own, and the mean moves to it by its share of the softmax so far."""
        numbers = _no_numbers(inputs.hidden)
        label_rows = torch.zeros_like(inputs.hidden)
        for projection, tokens, targets, raw in self._scored_parts(inputs):
            lse_before = numbers.lse[tokens].clone()
            own_lse = torch.empty_like(lse_before)
            for piece, scores in self._pieces(projection, raw, tokens, inputs, False):
                its = scores.statistics(targets.at(piece))
                _take_in(numbers, piece, its)
                own_lse[piece.start - tokens.start : piece.stop - tokens.start] = its.lse
                if isinstance(projection, KeptRows):  # they are the last: the logsumexp is known
                    scores.turn_into_gradient(numbers.lse[piece], targets.at(piece), None)
                else:
                    scores.turn_into_gradient(its.lse, None, None)
                del scores
            lse = numbers.lse[tokens]
            if isinstance(projection, KeptRows):
                sums.of_hidden[tokens].mul_((lse_before - lse).exp_().unsqueeze(1))
                sums.add(tokens, projection, raw)
            else:
                mean, _ = projection.backproject(raw, None, inputs.weight)
                sums.of_hidden[tokens].lerp_(mean.to(lse.dtype), (own_lse - lse).exp_().unsqueeze(1))
                projection.add_rows_of(targets.columns[tokens], label_rows[tokens])
            del projection, raw
        sums.of_hidden.sub_(label_rows)
        return numbers.losses(self._targets(None))

    def _scored_parts(self, inputs: _Inputs) -> Iterator[tuple[FrozenBlock | KeptRows, slice, Targets, Tensor]]:
        hidden = inputs.hidden
        for projection in self.columns.parts(passing=True):
            targets = self._targets(projection)
            step = tokens_at_once(hidden.device, hidden.element_size(), len(projection.token_ids))
            for tokens in self.counted.chunks(step):
                yield projection, tokens, targets, projection.project(hidden[tokens], inputs.weight)
            del projection, targets

    def _targets(self, projection: Projection | None) -> Targets:
        columns = self.labels if projection is None else projection.columns_of(self.labels)
        return Targets(columns, self.smoothing, self.columns.num_columns)

    def _pieces(
        self, projection: Projection, raw: Tensor, tokens: slice, inputs: _Inputs, with_graph: bool
    ) -> Iterator[tuple[slice, Scores]]:
        elementwise = self.elementwise.with_operands(inputs.operands)
        for piece, scores in in_pieces(raw, elementwise, projection.arrange, with_graph):
            yield slice(tokens.start + piece.start, tokens.start + piece.stop), scores
            del scores


def _at(scale: Tensor | None, tokens: slice) -> Tensor | None:
    return None if scale is None else scale[tokens]


def _no_numbers(hidden: Tensor) -> Statistics:
    lse = hidden.new_full((len(hidden),), -torch.inf, dtype=wide_dtype(hidden.dtype))
    return Statistics(lse, lse.clone(), torch.zeros_like(lse))


def _take_in(numbers: Statistics, tokens: slice, part: Statistics) -> None:
    """Adds the numbers of some columns to those of all columns."""
    numbers.lse[tokens] = torch.logaddexp(numbers.lse[tokens], part.lse)
    numbers.of_label[tokens] = torch.maximum(numbers.of_label[tokens], part.of_label)
    numbers.total[tokens] += part.total


class _GradientSums:
    """Gradients, added up over tokens and columns: in fp32 where there is more than one to add."""

    def __init__(self, inputs: _Inputs, with_weight: bool):
        self._inputs, self._with_weight = inputs, with_weight
        self._of_hidden: Tensor | None = None
        self._of_weight: Tensor | None = None
        self._of_operands: list[Tensor | None] = [None] * len(inputs.operands)

    def add(self, tokens: slice, projection: Projection, gradient: Tensor, choose: Choose | None = None) -> None:
        """Adds what flows back from the gradient of the scores of some tokens; overwrites it."""
        hidden, weight, _ = self._inputs
        its_hidden = hidden[tokens] if self._with_weight else None
        of_hidden, of_weight = projection.backproject(gradient, its_hidden, weight, choose)
        if self._of_hidden is None and len(of_hidden) == len(hidden):
            self._of_hidden = of_hidden
        else:
            self.of_hidden[tokens].add_(of_hidden)
        self._of_weight = _plus(self._of_weight, of_weight)

    @property
    def of_hidden(self) -> Tensor:
        """The gradient of the hidden states so far, to be written to."""
        if self._of_hidden is None:
            self._of_hidden = torch.zeros_like(self._inputs.hidden)
        self._of_hidden = self._of_hidden.to(wide_dtype(self._of_hidden.dtype))
        return self._of_hidden

    def add_operands(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds gradients of the operands, none of which may mean that there are no operands."""
        for number, gradient in enumerate(gradients):
            self._of_operands[number] = _plus(self._of_operands[number], gradient)

    def gradients(self) -> Gradients:
        """Those of the inputs, in order and in their dtypes."""
        hidden, weight, operands = self._inputs
        of_operands = (
            torch.zeros_like(operand) if total is None else total.to(operand.dtype)
            for total, operand in zip(self._of_operands, operands, strict=True)
        )
        of_weight = torch.zeros_like(weight) if self._of_weight is None else self._of_weight.to(weight.dtype)
        of_hidden = torch.zeros_like(hidden) if self._of_hidden is None else self._of_hidden.to(hidden.dtype)
        return of_hidden, of_weight if self._with_weight else None, *of_operands


def _plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return total if part is None else part
    return total.to(wide_dtype(total.dtype)).add_(part)
