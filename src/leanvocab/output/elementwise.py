"""Operations of a model on its logits one by one, recorded: scaling, soft-capping, casts, an added bias.

They commute with cutting logits into chunks, so that a loss can be computed without ever holding all of them
(docs/decisions/lazy-logits.md).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_SCORES = object()  # where the logits themselves stand among the arguments


@dataclass(frozen=True)
class _PerColumn:
    """An operand with one value per token id, [full_size]: a bias."""

    values: Tensor


@dataclass(frozen=True)
class _Step:
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Elementwise:
    """Recorded operations, in order; immutable."""

    full_size: int
    steps: tuple[_Step, ...] = ()

    def then(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], logits: Tensor
    ) -> "Elementwise | None":
        """With one operation more, whose arguments hold `logits` once; None where it is none that commutes with chunking."""
        chosen = _FUNCTIONS.get(getattr(function, "__name__", ""))
        if chosen is None:
            return None
        operands = [_operand(value, logits, self.full_size) for value in args]
        if any(operand is None for operand in operands) or operands.count(_SCORES) != 1:
            return None
        if kwargs and not (chosen is Tensor.to and set(kwargs) == {"dtype"}):
            return None
        return replace(self, steps=(*self.steps, _Step(chosen, tuple(operands), dict(kwargs))))

    def cast(self, dtype: torch.dtype) -> "Elementwise":
        """With a cast."""
        return replace(self, steps=(*self.steps, _Step(Tensor.to, (_SCORES, dtype))))

    def plus(self, bias: Tensor) -> "Elementwise":
        """With a bias [full_size] added."""
        return replace(self, steps=(*self.steps, _Step(torch.add, (_SCORES, _PerColumn(bias)))))

    def __call__(self, scores: Tensor, arrange: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies the operations to scores [..., columns]; `arrange` puts [full_size] values into the order of the columns."""
        for step in self.steps:
            args = [_argument(operand, scores, arrange) for operand in step.args]
            scores = step.function(*args, **step.kwargs)
        return scores

    @property
    def only_casts(self) -> bool:
        """True where gradients pass through unchanged but for their dtype."""
        return all(step.function is Tensor.to for step in self.steps)

    def dtype(self, scores: Tensor) -> torch.dtype:
        """The dtype of the result for scores of the dtype and on the device of a tensor."""
        empty = scores.new_empty(0, 1)
        with torch.no_grad():
            return self(empty, lambda values: values.new_empty(1)).dtype

    def operands(self) -> tuple[Tensor, ...]:
        """Every tensor among the operands, in order."""
        return tuple(
            operand.values if isinstance(operand, _PerColumn) else operand
            for step in self.steps
            for operand in step.args
            if isinstance(operand, _PerColumn | Tensor)
        )

    def with_operands(self, tensors: Sequence[Tensor]) -> "Elementwise":
        """The same operations on other tensors, in the order of `operands()`."""
        left = iter(tensors)
        steps = [replace(step, args=tuple(_other(operand, left) for operand in step.args)) for step in self.steps]
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


def _reversed(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda first, second: function(second, first)


# By name: torch gives one operation under several objects (a method, a function, an operator's slot). In-place ones are
# recorded as what they compute.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__"), torch.mul),
    **dict.fromkeys(("div", "__truediv__", "true_divide", "divide", "div_", "__itruediv__"), torch.div),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_", "__iadd__"), torch.add),
    **dict.fromkeys(("sub", "__sub__", "subtract", "sub_", "__isub__"), torch.sub),
    "__rsub__": _reversed(operator.sub),
    "__rtruediv__": _reversed(operator.truediv),
    **dict.fromkeys(("tanh", "tanh_"), torch.tanh),
    **dict.fromkeys(("neg", "__neg__"), torch.neg),
    "to": Tensor.to,
}  # fmt: skip


def casting(name: str) -> torch.dtype | None:
    """The dtype of a method that casts and takes no argument, such as `float`."""
    return {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}.get(
        name
    )
