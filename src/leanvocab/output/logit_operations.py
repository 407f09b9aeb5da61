"""Operations of a model on its logits that need no logits: done to them one by one, or on the hidden states.

Scaling, soft-capping, casts and an added bias commute with cutting logits into chunks, and are recorded, so that a loss can be
computed without ever holding all of them (docs/decisions/lazy-logits.md). Reshaping is done on the hidden states.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from leanvocab.reads.tensor_questions import METHODS

# Methods that cast and take no argument.
CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
QUESTIONS = {getattr(Tensor, name) for name in METHODS}
QUESTIONS |= {torch.is_complex, torch.is_floating_point, torch.is_tensor, torch.numel}
_SCORES = object()  # where the logits themselves stand among the arguments


@dataclass(frozen=True)
class _PerColumn:
    """An operand with one value per token id, [full_size]: a bias."""

    values: Tensor


@dataclass(frozen=True)
class Elementwise:
    """Recorded operations, in order; immutable."""

    full_size: int
    steps: tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...] = ()  # functions and their arguments

    def then(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], logits: Tensor
    ) -> "Elementwise | None":
        """With one operation more, whose arguments hold `logits` once; None where it is none that commutes with chunking."""
        chosen = _FUNCTIONS.get(getattr(function, "__name__", ""))
        if chosen is None or (kwargs and not (chosen is Tensor.to and set(kwargs) == {"dtype"})):
            return None
        operands = [_operand(value, logits, self.full_size) for value in (*args, *kwargs.values())]
        if any(operand is None for operand in operands) or operands.count(_SCORES) != 1:
            return None
        return replace(self, steps=(*self.steps, (chosen, tuple(operands))))

    def cast(self, dtype: torch.dtype) -> "Elementwise":
        """With a cast."""
        return replace(self, steps=(*self.steps, (Tensor.to, (_SCORES, dtype))))

    def plus(self, bias: Tensor) -> "Elementwise":
        """With a bias [full_size] added."""
        return replace(self, steps=(*self.steps, (torch.add, (_SCORES, _PerColumn(bias)))))

    def __call__(self, scores: Tensor, arrange: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies the operations to scores [..., columns]; `arrange` puts [full_size] values into the order of the columns."""
        for function, operands in self.steps:
            scores = function(*(_argument(operand, scores, arrange) for operand in operands))
        return scores

    @property
    def only_casts(self) -> bool:
        """True where gradients pass through unchanged but for their dtype."""
        return all(function is Tensor.to for function, _ in self.steps)

    def only_widens(self, dtype: torch.dtype) -> bool:
        """True where scores of a dtype are cast alone, and none loses anything by it."""
        casts = (operand for _, operands in self.steps for operand in operands if isinstance(operand, torch.dtype))
        dtypes = [dtype, *casts]
        return self.only_casts and all(torch.promote_types(*pair) == pair[1] for pair in itertools.pairwise(dtypes))

    def dtype(self, scores: Tensor) -> torch.dtype:
        """The dtype of the result for scores of the dtype and on the device of a tensor."""
        empty = scores.new_empty(0, 1)
        with torch.no_grad():
            return self(empty, lambda values: values.new_empty(1)).dtype

    def operands(self) -> tuple[Tensor, ...]:
        """Every tensor among the operands, in order."""
        return tuple(
            operand.values if isinstance(operand, _PerColumn) else operand
            for _, operands in self.steps
            for operand in operands
            if isinstance(operand, _PerColumn | Tensor)
        )

    def with_operands(self, tensors: Sequence[Tensor]) -> "Elementwise":
        """The same operations on other tensors, in the order of `operands()`."""
        left = iter(tensors)
        steps = [(function, tuple(_other(operand, left) for operand in operands)) for function, operands in self.steps]
        return replace(self, steps=tuple(steps))


def _operand(value: Any, logits: Tensor, full_size: int) -> Any:
    if value is logits:
        return _SCORES
    if not isinstance(value, Tensor):
        return value if isinstance(value, int | float | torch.dtype) else None
    if value.numel() == 1 and value.ndim <= 1:
        return value
    if value.shape[-1:] == (full_size,) and value.numel() == full_size:
        return _PerColumn(value.reshape(full_size))
    return None


def _argument(operand: Any, scores: Tensor, arrange: Callable[[Tensor], Tensor]) -> Any:
    if operand is _SCORES:
        return scores
    if isinstance(operand, _PerColumn):
        return arrange(operand.values)
    if isinstance(operand, Tensor) and operand.device != scores.device:
        return operand.to(scores.device)
    return operand


def _other(operand: Any, left: Any) -> Any:
    if isinstance(operand, _PerColumn):
        return _PerColumn(next(left))
    return next(left) if isinstance(operand, Tensor) else operand


# By name: torch gives one operation under several objects (a method, a function, an operator's slot). In-place ones are
# recorded as what they compute.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__"), torch.mul),
    **dict.fromkeys(("div", "__truediv__", "true_divide", "divide", "div_", "__itruediv__"), torch.div),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_", "__iadd__"), torch.add),
    **dict.fromkeys(("sub", "__sub__", "subtract", "sub_", "__isub__"), torch.sub),
    "__rsub__": Tensor.__rsub__,
    "__rtruediv__": Tensor.__rtruediv__,
    **dict.fromkeys(("tanh", "tanh_"), torch.tanh),
    **dict.fromkeys(("neg", "__neg__"), torch.neg),
    "to": Tensor.to,
}  # fmt: skip


# --- reshaping of logits [..., full_size], done on the hidden states [..., dim] that they are computed from -----------


def _view(hidden: Tensor, full_size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    shape = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    if kwargs or not all(isinstance(size, int) for size in shape) or not shape:
        return None
    if shape[-1] == -1 and math.prod(hidden.shape[:-1]) == math.prod(shape[:-1]):
        shape = (*shape[:-1], full_size)
    return hidden.reshape(*shape[:-1], hidden.shape[-1]) if shape[-1] == full_size else None


def _index(hidden: Tensor, full_size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Indices of the leading dimensions alone pick hidden states as they pick logits."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    if any(part is None or isinstance(part, list) for part in index):
        return None
    num_used = sum(
        part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in index if part is not ...
    )
    takes_whole_rows = isinstance(index[-1], slice) and index[-1] == slice(None)
    if any(part is ... for part in index):
        is_leading = num_used <= hidden.ndim and (index[-1] is ... or takes_whole_rows)
    else:
        is_leading = num_used < hidden.ndim or takes_whole_rows
    return hidden[args[0]] if is_leading else None


def _flatten(hidden: Tensor, full_size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if kwargs or len(args) != 2 or not 0 <= args[0] <= args[1] < hidden.ndim - 1:
        return None
    return hidden.flatten(*args)


RESHAPING: Mapping[str, Callable[[Tensor, int, tuple[Any, ...], Mapping[str, Any]], Tensor | None]] = {
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "__getitem__": _index,
}
"""By the names of torch's functions: the hidden states of the logits that they give, or None where these are none."""
