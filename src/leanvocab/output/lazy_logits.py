"""Logits over the full vocabulary that are not there until somebody looks at them.

A language model's logits are mostly made for a loss. `LazyLogits` looks like their tensor [..., full_size], remembers the
hidden states that they come from and what the model does to them one by one, and computes the cross-entropy in chunks of
tokens. Whatever else touches it gets the logits themselves, with their gradients, as the full model has them.
"""

import dataclasses
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import BypassError, ModelError
from leanvocab.output.elementwise import Elementwise, casting
from leanvocab.output.loss import Columns, Reduction, cross_entropy
from leanvocab.output.projection import project
from leanvocab.partial import tensor_questions


@dataclass
class Origin:
    """What logits are computed from: the kept rows as they were in the forward, and the columns of the softmax."""

    name: str
    weight: Tensor
    columns: Columns
    check_labels: Callable[[Tensor, int], None]  # of labels and the one that is ignored
    has_graph: bool
    _version: int = -1
    _rows_then: Tensor | None = None

    def __post_init__(self) -> None:
        self._version = self.weight._version

    def keep_rows(self) -> None:
        """Copies the rows, which are about to change."""
        if self._rows_then is None and self.weight._version == self._version:
            self._rows_then = self.weight.detach().clone()

    @property
    def rows(self) -> Tensor:
        """The kept rows, as they were in the forward."""
        if self._rows_then is not None:
            return self._rows_then
        if self.weight.untyped_storage().size() == 0:
            raise BypassError(
                f"{self.name}: its rows were taken away after its forward, as ZeRO-3 and a shard of its own under FSDP2 do; "
                'keep the output layer in the root\'s shard, or leave it whole: output="full"'
            )
        if self.weight._version != self._version:
            raise BypassError(
                f"{self.name}: its rows were changed after the forward, and only then the logits were looked at; read "
                "outputs.logits before that, or change the rows by a torch.optim.Optimizer"
            )
        return self.weight


_SMOOTHING = (
    '{name}: label smoothing spreads probability over all tokens, and with output="restricted" those outside the vocabulary '
    'have none: the loss would be infinite. Leave label smoothing out, or use output="frozen"'
)
_View: TypeAlias = tuple[Callable[..., Tensor], tuple[Any, ...], Mapping[str, Any]]
_alive: "weakref.WeakValueDictionary[int, LazyLogits]" = weakref.WeakValueDictionary()


@dataclass
class _Memory:
    """What logits and their views share: where in a full model they would be one memory, so that writing shows in all."""

    first: tuple[Tensor, Origin, Elementwise]  # what the logits that are viewed are made of
    views: "list[tuple[weakref.ref[LazyLogits], tuple[_View, ...]]]"  # each with how it is taken from the first

    def settle(self, written: "LazyLogits") -> bool:
        """Makes all that are alive real views of one tensor; False where nobody holds another than `written`."""
        alive = [(logits, steps) for reference, steps in self.views if (logits := reference()) is not None]
        if all(logits is written for logits, _ in alive):
            return False
        whole = LazyLogits(*self.first).compute()
        for logits, steps in alive:
            logits._value, logits._is_changed = whole, True
            logits.leave_place()
            for function, args, kwargs in steps:
                logits._value = function(logits._value, *args, **kwargs)
        return True


class LazyLogits(torch.Tensor):
    """Logits [..., full_size] of hidden states [..., dim], computed when somebody looks at them."""

    _hidden: Tensor
    _origin: Origin
    _elementwise: Elementwise
    _value: Tensor | None  # the logits, once somebody has looked at them
    _is_changed: bool  # whether the logits that are there were written to, so that nothing else says what they are
    _memory: _Memory
    _taken: tuple[_View, ...]  # how this is taken from the first logits of its memory
    _place: "_Place | None"  # in autograd's graph
    _waiting: (
        "OrderedDict[int, Callable[[Tensor], Tensor | None]]"  # hooks on the gradient of logits that are not there yet
    )

    @staticmethod
    def __new__(cls, hidden: Tensor, origin: Origin, elementwise: Elementwise) -> "LazyLogits":
        made: LazyLogits
        if origin.has_graph:
            place = _Place(origin, elementwise)
            made = _Native.apply(place, hidden, origin.weight, *elementwise.operands())
            made._place = place
        else:
            made = cls.bare(hidden, origin, elementwise)
        made._share(_Memory((hidden, origin, elementwise), []), ())
        _alive[id(made)] = made
        return made

    @classmethod
    def bare(cls, hidden: Tensor, origin: Origin, elementwise: Elementwise) -> "LazyLogits":
        """Without a place in autograd's graph."""
        shape = (*hidden.shape[:-1], elementwise.full_size)
        made: LazyLogits = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=elementwise.dtype(hidden), device=hidden.device, requires_grad=False
        )
        made._hidden, made._origin, made._elementwise = hidden, origin, elementwise
        made._value, made._is_changed, made._waiting, made._place = None, False, OrderedDict(), None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in tensor_questions.FUNCTIONS or _property(func) in _PROPERTIES:
                return func(*args, **kwargs)
            logits = args[0] if args and isinstance(args[0], LazyLogits) else _first(args)
            if func is Tensor.register_hook and logits is not None and logits._value is None:
                return logits.wait(*args[1:], **kwargs)
            if logits is not None and not logits._is_changed and not logits._waiting:
                done = _lazily(logits, func, args, kwargs)
                if done is not None:
                    return done
            return _at_once(logits, func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Native code that was given the logits: their values are there for it; `_Native` takes their gradient."""

        def computed(value: Any) -> Any:
            return value.compute().detach() if isinstance(value, LazyLogits) else value

        return func(*tree_map(computed, args), **tree_map(computed, kwargs or {}))

    def keep_rows(self) -> None:
        """Holds on to what the logits are computed from, which is about to change."""
        if not self._is_changed:
            self._origin.keep_rows()
            operands = [each.detach().clone() if each.requires_grad else each for each in self._elementwise.operands()]
            self._elementwise = self._elementwise.with_operands(operands)

    def compute(self) -> Tensor:
        """The logits themselves, as a tensor, part of the graph where the forward was."""
        if self._value is not None and (self._is_changed or self._value.requires_grad == self._would_have_graph()):
            return self._value
        with torch.set_grad_enabled(self._would_have_graph()):
            flat = self._hidden.reshape(-1, self._hidden.shape[-1])
            rows = self._origin.rows.to(flat.dtype)
            with torch.autocast(flat.device.type, enabled=False):
                blocks = [
                    projection.in_full_order(self._elementwise(project(projection, flat, rows), projection.arrange))
                    for projection in self._origin.columns.in_order()
                ]
            self._value = (blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)).view(self._shape())
        for hook in self._waiting.values() if self._value.requires_grad else ():
            self._value.register_hook(hook)
        return self._value

    def wait(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """Takes a hook on the gradient, which is put on the logits once somebody looks at them. FSDP hangs one on each output."""
        handle = RemovableHandle(self._waiting)
        self._waiting[handle.id] = hook
        self.leave_place()
        return handle

    def loss(self, labels: Tensor, asked: Reduction) -> Tensor:
        """The cross-entropy of labels (full ids)."""
        if asked.label_smoothing and self._origin.columns.num_columns < self._elementwise.full_size:
            raise ModelError(_SMOOTHING.format(name=self._origin.name))
        flat = self._hidden.reshape(-1, self._hidden.shape[-1])
        labels = labels.reshape(-1)
        self._origin.check_labels(labels, asked.ignore_index)
        elementwise = self._elementwise
        if torch.is_autocast_enabled(flat.device.type):
            elementwise = elementwise.cast(torch.float32)  # as autocast does for a loss
        with torch.set_grad_enabled(self._would_have_graph()):
            return cross_entropy(self._origin.columns, elementwise, flat, self._origin.rows, labels, asked)

    def of(self, elementwise: Elementwise | None = None) -> "LazyLogits":
        """Logits of the same hidden states, with other operations."""
        return LazyLogits(self._hidden, self._origin, elementwise or self._elementwise)

    def view_of(self, hidden: Tensor, view: _View) -> "LazyLogits":
        """The same logits in another shape, or some of them: `hidden` are their hidden states."""
        made = LazyLogits(hidden, self._origin, self._elementwise)
        made._share(self._memory, (*self._taken, view))
        return made

    def write(self, elementwise: Elementwise) -> None:
        """Records an operation that writes over the logits, which nobody else sees."""
        if elementwise.dtype(self._hidden) != self.dtype:  # what is written over keeps its dtype
            elementwise = elementwise.cast(self.dtype)
        self._elementwise, self._value = elementwise, None
        self.leave_place()
        self._share(_Memory((self._hidden, self._origin, elementwise), []), ())

    def leave_place(self) -> None:
        """What autograd knows the logits by is out of date: they are written to."""
        if self._place is not None:
            self._place.is_current = False

    def settle(self) -> bool:
        """Computes the logits and their views where some are about to be written to; whether others are held."""
        return self._memory.settle(self)

    def _share(self, memory: _Memory, taken: tuple[_View, ...]) -> None:
        self._memory, self._taken = memory, taken
        memory.views.append((weakref.ref(self), taken))

    def _shape(self) -> tuple[int, ...]:
        return (*self._hidden.shape[:-1], self._elementwise.full_size)

    def _needs_gradient(self) -> bool:
        sources = (self._hidden, self._origin.weight, *self._elementwise.operands())
        return self._origin.has_graph and any(each.requires_grad for each in sources)

    def _would_have_graph(self) -> bool:
        return torch.is_grad_enabled() and self._needs_gradient()


@dataclass
class _Place:
    """What autograd knows some logits by."""

    origin: Origin
    elementwise: Elementwise
    is_current: bool = True


class _Native(torch.autograd.Function):
    """The place of lazy logits in autograd's graph, for what works underneath torch's functions: custom Functions, fused
    losses, DDP's search for unused parameters. What goes through torch's functions never comes here."""

    @staticmethod
    def forward(ctx: Any, place: _Place, hidden: Tensor, weight: Tensor, *operands: Tensor) -> LazyLogits:
        ctx.place = place
        ctx.save_for_backward(hidden, weight, *operands)
        return LazyLogits.bare(hidden, place.origin, place.elementwise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        origin = ctx.place.origin
        if not ctx.place.is_current:
            raise BypassError(
                f"{origin.name}: code that works underneath torch's functions (a custom Function, a fused loss) was given logits "
                "that were written to or have hooks, and their gradient would be another one; give it logits.clone()"
            )
        inputs = [each.detach().requires_grad_(each.is_floating_point()) for each in ctx.saved_tensors]
        origin = dataclasses.replace(origin, weight=inputs[1], _version=-1, _rows_then=None)
        with torch.enable_grad():
            logits = LazyLogits.bare(inputs[0], origin, ctx.place.elementwise.with_operands(inputs[2:])).compute()
        wanted = [each for each, needs in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needs]
        found = iter(torch.autograd.grad(logits, wanted, gradient, allow_unused=True))
        return None, *(next(found) if needs else None for needs in ctx.needs_input_grad[1:])


# --- what is done without computing logits ----------------------------------------------------------------------------


def _lazily(logits: LazyLogits, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result, or None where the logits have to be computed for it."""
    if func is F.cross_entropy:
        return _cross_entropy(*args, **kwargs)
    name = getattr(func, "__name__", "")
    if _property(func) == "requires_grad":
        return logits._needs_gradient()
    if name in ("contiguous", "requires_grad_") and not kwargs:
        return logits
    if name == "detach":
        origin = logits._origin
        return LazyLogits(
            logits._hidden.detach(),
            Origin(origin.name, origin.rows.detach(), origin.columns, origin.check_labels, False),
            logits._elementwise.with_operands([each.detach() for each in logits._elementwise.operands()]),
        )
    if args and args[0] is logits and name in _RESHAPING:
        hidden = _RESHAPING[name](logits, args[1:], kwargs)
        return None if hidden is None else logits.view_of(hidden, (func, args[1:], kwargs))
    if name == "to" and _is_here(logits, args[1:], kwargs):
        return logits
    if casting(name) is not None and len(args) == 1 and not kwargs:
        func, args, name = Tensor.to, (logits, casting(name)), "to"
    elementwise = logits._elementwise.then(func, args, kwargs, logits)
    if elementwise is None:
        return None
    if _is_in_place(name):  # what was recorded computes the same, and the tensor is the same object
        if logits.settle():
            return None
        logits.write(elementwise)
        return logits
    return logits.of(elementwise=elementwise)


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = IGNORE_INDEX,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    is_plain = isinstance(input, LazyLogits) and weight is None and size_average is None and reduce is None
    if not is_plain or target.dtype != torch.int64 or target.shape != input.shape[:-1] or input.ndim not in (1, 2):
        return None
    loss: Tensor = input.loss(target, Reduction(ignore_index, reduction, label_smoothing))
    return loss.reshape(()) if input.ndim == 1 else loss


def _is_here(logits: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `to` is asked for the device that the logits are on."""
    if len(args) + len(kwargs) != 1:
        return False
    value = args[0] if args else kwargs.get("device")
    is_device = isinstance(value, torch.device | str | int) and not isinstance(value, bool)
    return is_device and torch.empty(0, device=value).device == logits._hidden.device


def _viewed(logits: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    shape = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    if kwargs or not all(isinstance(size, int) for size in shape) or not shape:
        return None
    width = logits._elementwise.full_size
    if shape[-1] == -1 and logits.numel() == width * _product(shape[:-1]):
        shape = (*shape[:-1], width)
    return logits._hidden.reshape(*shape[:-1], logits._hidden.shape[-1]) if shape[-1] == width else None


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _indexed(logits: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Indices of the leading dimensions alone pick hidden states as they pick logits."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    whole = slice(None)
    if any(each is None or isinstance(each, list | LazyLogits) for each in index):
        return None
    used = sum(
        each.ndim if isinstance(each, Tensor) and each.dtype == torch.bool else 1 for each in index if each is not ...
    )
    if ... in [each for each in index if not isinstance(each, Tensor)]:
        if index[-1] is not ... and index[-1] != whole:
            return None
        if used > logits.ndim:
            return None
    elif used >= logits.ndim and not (isinstance(index[-1], slice) and index[-1] == whole):
        return None
    return logits._hidden[args[0]]


def _flattened(logits: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if kwargs or len(args) != 2 or not 0 <= args[0] <= args[1] < logits.ndim - 1:
        return None
    return logits._hidden.flatten(*args)


_RESHAPING: dict[str, Callable[[LazyLogits, tuple[Any, ...], Mapping[str, Any]], Tensor | None]] = {
    "view": _viewed,
    "reshape": _viewed,
    "flatten": _flattened,
    "__getitem__": _indexed,
}

_PROPERTIES = tensor_questions.ATTRIBUTES | {"_base"}  # none: nobody sees of what they are a view


def _property(func: Any) -> str:
    """The name of the attribute that is read, where that is what is done."""
    return getattr(func.__self__, "__name__", "") if getattr(func, "__name__", "") == "__get__" else ""


# --- everything else --------------------------------------------------------------------------------------------------


def _at_once(logits: LazyLogits | None, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """On the logits themselves. What writes to them makes them what the object holds from then on."""

    def computed(value: Any) -> Any:
        return value.compute() if isinstance(value, LazyLogits) else value

    name = getattr(func, "__name__", "")
    if name == "log_softmax" and logits is not None:
        _refuse_smoothing(logits)
    writes = args and args[0] is logits and (_is_in_place(name) or name in _WRITING)
    if writes and logits is not None and not logits._is_changed:
        logits.settle()
    result = func(*tree_map(computed, args), **tree_map(computed, dict(kwargs)))
    if writes and logits is not None:
        logits._is_changed = True
        logits.leave_place()
        return logits if result is logits._value else result
    return result


def _refuse_smoothing(logits: LazyLogits) -> None:
    """The Trainer's label smoother sums log-probabilities over all tokens."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and logits._origin.columns.num_columns < logits._elementwise.full_size:
        if type(frame.f_locals.get("self")).__name__ == "LabelSmoother":
            raise ModelError(_SMOOTHING.format(name=logits._origin.name))
        frame = frame.f_back


def _is_in_place(name: str) -> bool:
    is_method = name.endswith("_") and not name.endswith("__")
    return is_method or (
        name.startswith("__i")
        and name.endswith("__")
        and name not in ("__init__", "__invert__", "__int__", "__index__")
    )


_WRITING = {
    "__setitem__",
    "__set__",
    "retain_grad",
    "register_hook",
}  # and what makes the object itself part of a graph


def _first(args: Any) -> LazyLogits | None:
    found: list[LazyLogits] = []
    tree_map(lambda value: found.append(value) if isinstance(value, LazyLogits) else None, args)
    return found[0] if found else None


def keep_rows() -> None:
    """Before an optimizer changes rows: logits that are looked at later are of the rows as they are now."""
    for logits in list(_alive.values()):
        logits.keep_rows()
