"""The cross-entropy over a vocabulary of which only some rows train, without a matrix of tokens × vocabulary.

loss = logsumexp over all columns − the label's score, so the gradient of the scores is softmax − one-hot. Scores are computed
for a few tokens at a time, turned into their gradient in place, and dropped: two products with the frozen rows where
ordinary training has three, since nothing is computed for the gradient of rows that do not train. Tokens whose label is
ignored are left out from the start (docs/decisions/frozen-rows.md).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanvocab.choices import IGNORE_INDEX
from leanvocab.output.frozen_rows import FrozenSizes
from leanvocab.output.logit_operations import Elementwise
from leanvocab.output.projection import MappedRows, Projection
from leanvocab.partial.devices import OnItsWay, has_streams, without_autocast

# Scores that are held at once. A product reads and rearranges all frozen rows for each chunk: at 262,144 × 640 on two CPU
# cores the two products took 2.58 s for 512 tokens in chunks of 128 MiB, 2.37 s in chunks of 256 MiB (limit: 2.14 s).
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
_WIDE_BYTES = 4  # scores and sums of gradients are in fp32 at least

Gradients = tuple[Tensor | None, ...]


def tokens_at_once(device: torch.device, value_bytes: int, num_columns: int) -> int:
    """Number of tokens whose scores are held at once."""
    chunk_bytes = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(1, chunk_bytes // (max(_WIDE_BYTES, value_bytes) * num_columns))


def peak_bytes(num_tokens: int, kept_rows: int, dim: int, computed: torch.dtype, frozen: FrozenSizes | None) -> int:
    """Bytes that the loss holds at its peak on a GPU, beside the frozen rows: by arithmetic, for an estimate.

    Scores of one chunk of tokens, in the dtype of the product and in fp32, those of kept rows among frozen ones a second time;
    sums of gradients; frozen rows on their way to the product.
    """
    num_columns = kept_rows if frozen is None else frozen.columns_at_once
    again = 0 if frozen is None else min(kept_rows, num_columns)
    step = min(tokens_at_once(torch.device("cuda"), computed.itemsize, num_columns), num_tokens)
    score_bytes = _WIDE_BYTES + (computed.itemsize if computed.itemsize < _WIDE_BYTES else 0)
    sums_bytes = (num_tokens + kept_rows) * dim * _WIDE_BYTES
    return step * (num_columns + again) * score_bytes + sums_bytes + (0 if frozen is None else frozen.moving_bytes)


@dataclass(frozen=True)
class SoftmaxColumns:
    """The columns that the softmax is over: at once, or block by block where frozen rows are streamed to a device."""

    whole: Callable[[], Projection]
    blocks: Callable[[], Iterable[MappedRows]] | None
    num_columns: int

    def in_order(self) -> Iterable[Projection]:
        """Projections of all columns, one after the other; where blocks are streamed, the whole never comes to the device."""
        return [self.whole()] if self.blocks is None else self.blocks()


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
        self.positions, self.num, self.is_ignored = (
            positions,
            num,
            is_ignored,
        )  # is_ignored [n]: in the order of positions
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
        return used if self.is_ignored is None else used.masked_fill(self.is_ignored.unsqueeze(1), 0)

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
            run = self._in_chunks if self.columns.blocks is None else self._in_blocks
            losses = self.counted.losses(run(inputs, self.counted.scale(scale, inputs.operands), sums))
            return losses, sums.gradients() if sums else ()

    def _in_chunks(self, inputs: _Inputs, scale: Tensor | None, sums: "_GradientSums | None") -> Tensor:
        projection, hidden = self.columns.whole(), inputs.hidden
        label_columns = projection.columns_of(self.labels)
        losses = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        step = min(tokens_at_once(hidden.device, hidden.element_size(), self.columns.num_columns), len(hidden))
        # One piece of memory for all chunks: the system gives new pages for each otherwise.
        room = None
        if step and self.elementwise.only_casts:
            room = hidden.new_empty(step, self.columns.num_columns)
        for tokens in self.counted.chunks(max(1, step)):
            out = None if room is None else room[: tokens.stop - tokens.start]
            scores = _Scores(projection, self.elementwise, inputs, tokens, sums is not None, out)
            losses[tokens] = scores.turn_into_softmax(label_columns[tokens], self.smoothing)
            if sums is not None:
                sums.add(tokens, scores, self._gradient(scores, label_columns[tokens], _at(scale, tokens)))
            del scores  # before the next ones are made, not after
        return losses

    def _in_blocks(self, inputs: _Inputs, scale: Tensor | None, sums: "_GradientSums | None") -> Tensor:
        """Twice over the blocks: the first time for the logsumexp, the second for the gradients."""
        hidden = inputs.hidden
        lse = hidden.new_full((len(hidden),), -torch.inf, dtype=_wide(hidden.dtype))
        of_label, total = torch.full_like(lse, -torch.inf), torch.zeros_like(lse)
        for projection, tokens, label_columns in self._blocks(hidden):
            wide = _Scores(projection, self.elementwise, inputs, tokens, False).wide
            of_label[tokens] = torch.maximum(of_label[tokens], _label_scores(wide, label_columns))
            if self.smoothing:
                total[tokens] += wide.sum(-1)
            lse[tokens] = torch.logaddexp(lse[tokens], _logsumexp(wide))
            del wide, projection, label_columns  # before the next block comes, not after
        if sums is not None:
            for projection, tokens, label_columns in self._blocks(hidden):
                scores = _Scores(projection, self.elementwise, inputs, tokens, True)
                scores.softmax = scores.wide.sub_(lse[tokens].unsqueeze(1)).exp_()
                sums.add(tokens, scores, self._gradient(scores, label_columns, _at(scale, tokens)))
                del scores, projection, label_columns
        return _loss(lse, of_label, total / self.columns.num_columns, self.smoothing)

    def _blocks(self, hidden: Tensor) -> Iterator[tuple[Projection, slice, Tensor]]:
        assert self.columns.blocks is not None
        for projection in self.columns.blocks():
            label_columns = projection.columns_of(self.labels)
            step = tokens_at_once(hidden.device, hidden.element_size(), len(projection.rows))
            for tokens in self.counted.chunks(step):
                yield projection, tokens, label_columns[tokens]
            del projection, label_columns

    def _gradient(self, scores: "_Scores", label_columns: Tensor, scale: Tensor | None) -> Tensor:
        """softmax − one-hot (smoothed), times the scale; overwrites the softmax."""
        gradient = scores.softmax
        here = label_columns >= 0
        step = here.to(gradient.dtype).mul_(self.smoothing - 1)
        gradient.scatter_add_(1, label_columns.clamp(min=0).unsqueeze(1), step.unsqueeze(1))
        if self.smoothing:
            gradient.sub_(self.smoothing / self.columns.num_columns)
        return gradient if scale is None else gradient.mul_(scale)


def _at(scale: Tensor | None, tokens: slice) -> Tensor | None:
    return None if scale is None else scale[tokens]


class _Scores:
    """Scores of a few tokens: as the projection gives them, and as the model's operations leave them."""

    def __init__(
        self,
        projection: Projection,
        elementwise: Elementwise,
        inputs: _Inputs,
        tokens: slice,
        with_graph: bool,
        out: Tensor | None = None,
    ):
        self.projection, self.hidden, self.weight = projection, inputs.hidden[tokens], inputs.weight
        self._has_graph = with_graph and not elementwise.only_casts
        self._raw = projection.project(self.hidden, self.weight, None if self._has_graph else out)
        self._operands = list(inputs.operands)
        if self._has_graph:
            self._raw.requires_grad_()
            self._operands = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs.operands]
        with torch.set_grad_enabled(self._has_graph):
            self._final = elementwise.with_operands(self._operands)(self._raw, projection.arrange)
        wide = self._final.detach().to(_wide(self._final.dtype))
        self.wide = wide.clone() if self._has_graph and wide.data_ptr() == self._final.data_ptr() else wide
        self.softmax = self.wide

    def turn_into_softmax(self, label_columns: Tensor, smoothing: float) -> Tensor:
        """Writes the softmax over the scores, and returns the losses of labels in `label_columns`."""
        top = self.wide.amax(-1)
        of_label = _label_scores(self.wide, label_columns)
        mean = self.wide.mean(-1) if smoothing else torch.zeros_like(of_label)
        self.softmax = torch.softmax(self.wide, -1, out=self.wide)
        lse = top - self.softmax.amax(-1).log()
        return _loss(lse, of_label, mean, smoothing)

    def pull_back(self, gradient: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient of the projection's scores and of the operands, from that of the final scores."""
        if not self._has_graph:
            # Where the scores have a dtype of their own, in their place: nobody needs them any more.
            of_raw = gradient if gradient.dtype == self._raw.dtype else self._raw.copy_(gradient)
            return of_raw, [None] * len(self._operands)
        inputs = [self._raw, *(each for each in self._operands if each.requires_grad)]
        gradients = iter(torch.autograd.grad(self._final, inputs, gradient.to(self._final.dtype), allow_unused=True))
        of_raw = next(gradients)
        return of_raw, [next(gradients) if each.requires_grad else None for each in self._operands]


class _GradientSums:
    """Gradients, added up over tokens and blocks."""

    def __init__(self, inputs: _Inputs, with_weight: bool):
        self._inputs = inputs
        self.of_hidden = _wide_zeros(inputs.hidden)
        self.of_weight = _wide_zeros(inputs.weight) if with_weight else None
        self.of_operands = [_wide_zeros(operand) for operand in inputs.operands]

    def add(self, tokens: slice, scores: _Scores, gradient: Tensor) -> None:
        of_raw, of_operands = scores.pull_back(gradient)
        projection, hidden = scores.projection, None if self.of_weight is None else scores.hidden
        of_hidden, of_weight = projection.backproject(of_raw, hidden, scores.weight)
        self.of_hidden[tokens].add_(of_hidden)
        if self.of_weight is not None and of_weight is not None:
            self.of_weight[projection.kept].add_(of_weight)
        for total, of_operand in zip(self.of_operands, of_operands, strict=True):
            if of_operand is not None:
                total += of_operand

    def gradients(self) -> Gradients:
        hidden, weight, operands = self._inputs
        of_operands = (total.to(operand.dtype) for total, operand in zip(self.of_operands, operands, strict=True))
        of_weight = None if self.of_weight is None else self.of_weight.to(weight.dtype)
        return self.of_hidden.to(hidden.dtype), of_weight, *of_operands


def _wide_zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=_wide(tensor.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def _logsumexp(scores: Tensor) -> Tensor:
    """`scores.logsumexp(-1)`, which would hold the exponentials beside the scores; here they are written over them."""
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top.isinf(), 0)
    return scores.sub_(top).exp_().sum(-1).log_().add_(top.squeeze(-1))


def _label_scores(wide: Tensor, label_columns: Tensor) -> Tensor:
    """Scores of the labels, −inf for those that have no column."""
    scores = wide.gather(1, label_columns.clamp(min=0).unsqueeze(1)).squeeze(1)
    return scores.masked_fill(label_columns < 0, -torch.inf)


def _loss(lse: Tensor, of_label: Tensor, mean: Tensor, smoothing: float) -> Tensor:
    return lse - of_label if not smoothing else lse - (1 - smoothing) * of_label - smoothing * mean
