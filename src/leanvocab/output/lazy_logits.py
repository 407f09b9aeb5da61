"""Logits over the full vocabulary that are not there until somebody looks at them.

A language model's logits are mostly made for a loss. `LazyLogits` looks like their tensor [..., full_size], remembers the
hidden states that they come from and what the model does to them one by one, and computes the cross-entropy in chunks of
tokens. Whatever else touches it gets the logits themselves, with their gradients, as the full model has them
(docs/decisions/lazy-logits.md).
"""

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from leanvocab.choices import IGNORE_INDEX
from leanvocab.errors import BypassError, ModelError
from leanvocab.output.logit_operations import CASTS, QUESTIONS, RESHAPING, Elementwise
from leanvocab.output.loss import LossOptions, SoftmaxColumns, cross_entropy
from leanvocab.output.projection import project
from leanvocab.partial.devices import autocast_dtype, without_autocast
from leanvocab.reads.tensor_questions import ATTRIBUTES

_ViewStep: TypeAlias = tuple[Callable[..., Tensor], tuple[Any, ...], Mapping[str, Any]]
_alive: "weakref.WeakValueDictionary[int, LazyLogits]" = weakref.WeakValueDictionary()


@dataclass
class LayerSnapshot:
    """An output layer as it was in one forward: what its logits are computed from, whenever somebody looks at them."""

    name: str
    weight: Tensor
    columns: SoftmaxColumns
    check_labels: Callable[[Tensor, int], None]  # of labels and the one that is ignored
    has_graph: bool
    _version_then: int = field(init=False)
    _rows_then: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._version_then = self.weight._version

    def keep_rows(self) -> None:
        """Copies the rows, which are about to change."""
        if self._rows_then is None and self.weight._version == self._version_then:
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
        if self.weight._version != self._version_then:
            raise BypassError(
                f"{self.name}: its rows were changed after the forward, and only then the logits were looked at; read "
                "outputs.logits before that, or change the rows by a torch.optim.Optimizer"
            )
        return self.weight


@dataclass
class _SharedMemory:
    """Logits and their views: in a full model they would be one memory, so that writing to one shows in all."""

    first: tuple[Tensor, LayerSnapshot, Elementwise]  # of which the logits that are viewed are made
    views: "weakref.WeakValueDictionary[int, LazyLogits]" = field(default_factory=weakref.WeakValueDictionary)

    def settle(self, written: "LazyLogits") -> bool:
        """Makes all that are alive real views of one tensor, since `written` is about to be; False where nobody holds another."""
        alive = list(self.views.values())
        if all(logits is written for logits in alive):
            return False
        whole = LazyLogits(*self.first).compute()
        for logits in alive:
            logits._value, logits._is_changed = whole, True
            logits.outdate_node()
            for function, args, kwargs in logits._taken:
                logits._value = function(logits._value, *args, **kwargs)
        return True


class LazyLogits(torch.Tensor):
    """Logits [..., full_size] of hidden states [..., dim], computed when somebody looks at them."""

    _hidden: Tensor
    _snapshot: LayerSnapshot
    _elementwise: Elementwise
    _value: Tensor | None  # the logits, once somebody has looked at them
    _is_changed: bool  # the logits that are there were written to, so that nothing else says what they are
    _memory: _SharedMemory
    _taken: tuple[_ViewStep, ...]  # how this is taken from the first logits of its memory
    _node: "_NodeState | None"  # in autograd's graph
    # Hooks on the gradient of logits that are not there yet.
    _waiting: "OrderedDict[int, Callable[[Tensor], Tensor | None]]"

    @staticmethod
    def __new__(cls, hidden: Tensor, snapshot: LayerSnapshot, elementwise: Elementwise) -> "LazyLogits":
        made: LazyLogits
        if snapshot.has_graph:
            state = _NodeState(snapshot, elementwise)
            made = _LogitsNode.apply(state, hidden, snapshot.weight, *elementwise.operands())
            made._node = state
        else:
            made = cls.bare(hidden, snapshot, elementwise)
        made._share(_SharedMemory((hidden, snapshot, elementwise)), ())
        _alive[id(made)] = made
        return made

    @classmethod
    def bare(cls, hidden: Tensor, snapshot: LayerSnapshot, elementwise: Elementwise) -> "LazyLogits":
        """Logits that have no node in autograd's graph."""
        shape = (*hidden.shape[:-1], elementwise.full_size)
        made: LazyLogits = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=elementwise.dtype(hidden), device=hidden.device, requires_grad=False
        )
        made._hidden, made._snapshot, made._elementwise = hidden, snapshot, elementwise
        made._value, made._is_changed, made._waiting, made._node = None, False, OrderedDict(), None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in QUESTIONS or _property(func) in _PROPERTIES:
                return func(*args, **kwargs)
            logits = next((value for value in tree_leaves(args) if isinstance(value, LazyLogits)), None)
            if func is Tensor.register_hook and logits is not None and logits._value is None:
                return logits.wait(*args[1:], **kwargs)
            if logits is not None and not logits._is_changed and not logits._waiting:
                done = _lazily(logits, func, args, kwargs)
                if done is not None:
                    return done
            return _at_once(logits, func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Native code that was given the logits: their values are there for it; `_LogitsNode` takes their gradient."""

        def computed(value: Any) -> Any:
            return value.compute().detach() if isinstance(value, LazyLogits) else value

        return func(*tree_map(computed, args), **tree_map(computed, kwargs or {}))

    @property
    def is_computed(self) -> bool:
        """True once somebody has looked at the logits."""
        return self._value is not None

    def keep_rows(self) -> None:
        """Holds on to what the logits are computed from, which is about to change."""
        if not self._is_changed:
            self._snapshot.keep_rows()
            operands = [each.detach().clone() if each.requires_grad else each for each in self._elementwise.operands()]
            self._elementwise = self._elementwise.with_operands(operands)

    def compute(self) -> Tensor:
        """The logits themselves, as a tensor, part of the graph where the forward was."""
        if self._value is not None and (self._is_changed or self._value.requires_grad == self._would_have_graph()):
            return self._value
        with torch.set_grad_enabled(self._would_have_graph()):
            flat = self._hidden.reshape(-1, self._hidden.shape[-1])
            rows = self._snapshot.rows.to(flat.dtype)
            with without_autocast(flat.device):
                value = self._snapshot.columns.in_full_order(
                    lambda part: self._elementwise(project(part, flat, rows), part.arrange)
                )
            self._value = value.view(self.shape)
        for hook in self._waiting.values() if self._value.requires_grad else ():
            self._value.register_hook(hook)
        return self._value

    def wait(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """Takes a hook on the gradient, which is put on the logits once somebody looks at them. FSDP hangs one on each output."""
        handle = RemovableHandle(self._waiting)
        self._waiting[handle.id] = hook
        self.outdate_node()
        return handle

    def loss(self, labels: Tensor, options: LossOptions) -> Tensor:
        """The cross-entropy of labels (full ids)."""
        if options.label_smoothing and self.is_restricted:
            self.refuse_smoothing()
        flat = self._hidden.reshape(-1, self._hidden.shape[-1])
        labels = labels.reshape(-1)
        self._snapshot.check_labels(labels, options.ignore_index)
        elementwise = self._elementwise
        if autocast_dtype(flat.device) is not None:
            elementwise = elementwise.cast(torch.float32)  # as autocast does for a loss
        with torch.set_grad_enabled(self._would_have_graph()):
            return cross_entropy(self._snapshot.columns, elementwise, flat, self._snapshot.rows, labels, options)

    @property
    def is_restricted(self) -> bool:
        """True where some of the ids have no column in the softmax."""
        return self._snapshot.columns.num_columns < self._elementwise.full_size

    def refuse_smoothing(self) -> NoReturn:
        """Raises `ModelError`: the smoothed loss of a restricted softmax would be infinite."""
        raise ModelError(
            f"{self._snapshot.name}: label smoothing spreads probability over all tokens, and with "
            'output="restricted" those outside the vocabulary have none: the loss would be infinite. Leave label smoothing out, '
            'or use output="frozen"'
        )

    def of(self, elementwise: Elementwise | None = None) -> "LazyLogits":
        """Logits of the same hidden states, with other operations."""
        return LazyLogits(self._hidden, self._snapshot, elementwise or self._elementwise)

    def view_of(self, hidden: Tensor, step: _ViewStep) -> "LazyLogits":
        """The same logits in another shape, or some of them: `hidden` are their hidden states."""
        made = LazyLogits(hidden, self._snapshot, self._elementwise)
        made._share(self._memory, (*self._taken, step))
        return made

    def write(self, elementwise: Elementwise) -> None:
        """Records an operation that writes over the logits, which nobody else sees."""
        if elementwise.dtype(self._hidden) != self.dtype:  # what is written over keeps its dtype
            elementwise = elementwise.cast(self.dtype)
        self._elementwise, self._value = elementwise, None
        self.outdate_node()
        self._share(_SharedMemory((self._hidden, self._snapshot, elementwise)), ())

    def outdate_node(self) -> None:
        """Marks the node in autograd's graph as out of date: the logits are written to."""
        if self._node is not None:
            self._node.is_current = False

    def _share(self, memory: _SharedMemory, taken: tuple[_ViewStep, ...]) -> None:
        self._memory, self._taken = memory, taken
        memory.views[id(self)] = self

    def _needs_gradient(self) -> bool:
        sources = (self._hidden, self._snapshot.weight, *self._elementwise.operands())
        return self._snapshot.has_graph and any(each.requires_grad for each in sources)

    def _would_have_graph(self) -> bool:
        return torch.is_grad_enabled() and self._needs_gradient()


@dataclass
class _NodeState:
    """Layer and operations of some logits that have a node in autograd's graph."""

    snapshot: LayerSnapshot
    elementwise: Elementwise
    is_current: bool = True


class _LogitsNode(torch.autograd.Function):
    """The node of lazy logits in autograd's graph, for what works underneath torch's functions: custom Functions, fused
    losses, DDP's search for unused parameters. What goes through torch's functions never comes here."""

    @staticmethod
    def forward(ctx: Any, state: _NodeState, hidden: Tensor, weight: Tensor, *operands: Tensor) -> LazyLogits:
        ctx.state = state
        ctx.save_for_backward(hidden, weight, *operands)
        return LazyLogits.bare(hidden, state.snapshot, state.elementwise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        state = ctx.state
        if not state.is_current:
            raise BypassError(
                f"{state.snapshot.name}: code that works underneath torch's functions (a custom Function, a fused loss) was "
                "given logits that were written to or have hooks, and their gradient would be another one; give it "
                "logits.clone()"
            )
        inputs = [each.detach().requires_grad_(each.is_floating_point()) for each in ctx.saved_tensors]
        hidden, weight, *operands = inputs
        with torch.enable_grad():
            snapshot, elementwise = replace(state.snapshot, weight=weight), state.elementwise.with_operands(operands)
            logits = LazyLogits.bare(hidden, snapshot, elementwise).compute()
        wanted = [each for each, needs in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needs]
        gradients = iter(torch.autograd.grad(logits, wanted, gradient, allow_unused=True))
        return None, *(next(gradients) if needs else None for needs in ctx.needs_input_grad[1:])


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
        snapshot = replace(logits._snapshot, weight=logits._snapshot.rows.detach(), has_graph=False)
        operands = [operand.detach() for operand in logits._elementwise.operands()]
        return LazyLogits(logits._hidden.detach(), snapshot, logits._elementwise.with_operands(operands))
    if args and args[0] is logits and name in RESHAPING:
        hidden = RESHAPING[name](logits._hidden, logits._elementwise.full_size, args[1:], kwargs)
        return None if hidden is None else logits.view_of(hidden, (func, args[1:], kwargs))
    if name == "to" and _is_here(logits, args[1:], kwargs):
        return logits
    if name in CASTS and len(args) == 1 and not kwargs:
        func, args, name = Tensor.to, (logits, CASTS[name]), "to"
    elementwise = logits._elementwise.then(func, args, kwargs, logits)
    if elementwise is None:
        return None
    if _is_in_place(name):  # what was recorded computes the same, and the tensor is the same object
        if logits._memory.settle(logits):
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
    loss: Tensor = input.loss(target, LossOptions(ignore_index, reduction, label_smoothing))
    return loss.reshape(()) if input.ndim == 1 else loss


def _is_here(logits: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True where `to` is asked for the device that the logits are on."""
    if len(args) + len(kwargs) != 1:
        return False
    value = args[0] if args else kwargs.get("device")
    is_device = isinstance(value, torch.device | str | int) and not isinstance(value, bool)
    return is_device and torch.empty(0, device=value).device == logits._hidden.device


_PROPERTIES = ATTRIBUTES | {"_base"}  # none: nobody sees of what they are a view


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
        _refuse_smoother(logits)
    writes = args and args[0] is logits and (_is_in_place(name) or name in _WRITING)
    if writes and logits is not None and not logits._is_changed:
        logits._memory.settle(logits)
    result = func(*tree_map(computed, args), **tree_map(computed, dict(kwargs)))
    if writes and logits is not None:
        logits._is_changed = True
        logits.outdate_node()
        return logits if result is logits._value else result
    return result


def _refuse_smoother(logits: LazyLogits) -> None:
    """The Trainer's label smoother sums log-probabilities over all tokens."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and logits.is_restricted:
        if type(frame.f_locals.get("self")).__name__ == "LabelSmoother":
            logits.refuse_smoothing()
        frame = frame.f_back


def _is_in_place(name: str) -> bool:
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__init__", "__invert__", "__int__", "__index__")
    return name.endswith("_") and not name.endswith("__")


# What writes, and what makes the object itself part of a graph.
_WRITING = {"__setitem__", "__set__", "retain_grad", "register_hook"}


def keep_rows() -> None:
    """Before an optimizer changes rows: logits that are looked at later are of the rows as they are now."""
    for logits in list(_alive.values()):
        logits.keep_rows()
