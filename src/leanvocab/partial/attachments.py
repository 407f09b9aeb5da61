"""Hooks and attributes that stand on a model's modules while it is shrunk: noted on each module itself, taken off in one way.

A note travels with its module: a deep copy and a pickle have their own. What stands on a module refers to it weakly, so that a
model is freed as soon as nobody holds it (docs/decisions/nothing-outlives-a-model.md).
"""

import copy
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from leanvocab.errors import ModelError

T = TypeVar("T")
_NOTE = "_leanvocab_attachments"


class Weakly(Generic[T]):
    """A reference that keeps nothing alive; in a deep copy or a pickle it leads to the copy."""

    def __init__(self, target: T | None):
        self._reference = None if target is None else weakref.ref(target)

    def __call__(self) -> T | None:
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weakly[T]":
        return Weakly(copy.deepcopy(self(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Weakly, (self(),)


@dataclass
class _Note:
    handles: list[RemovableHandle] = field(default_factory=list)
    attributes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # (what was put there[, what stood there])


def keep_hooks(module: nn.Module, *handles: RemovableHandle) -> None:
    """Notes hooks that were registered on a module."""
    _note(module).handles.extend(handles)


def put_attributes(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Puts each value before the class's attribute of its name, or before what the instance has."""
    for name, value in values.items():
        before = [module.__dict__[name]] if name in module.__dict__ else []
        _note(module).attributes[name] = (value, *before)
        module.__dict__[name] = value


def _method_before(module: nn.Module, name: str) -> Any:
    """The method that would be there if none had been put on."""
    _, *before = _note(module).attributes[name]
    return before[0] if before else types.MethodType(getattr(type(module), name), module)


def stood_before(held: Weakly[nn.Module], name: str) -> tuple[nn.Module, Callable[..., Any]]:
    """The module that a stand-in stands on, and the method that it stands before."""
    module = held()
    if module is None:
        raise ModelError(f"{name} was called of a shrunk model that nobody holds: keep the model in a variable")
    return module, _method_before(module, name)


def take_off(model: nn.Module) -> None:
    """Takes everything off a model's modules that was put on them."""
    for module in model.modules():
        note: _Note | None = module.__dict__.pop(_NOTE, None)
        if note is not None:
            for handle in note.handles:
                handle.remove()
            for name, (value, *before) in note.attributes.items():
                if module.__dict__.get(name) is value:  # or else somebody has put another there since
                    del module.__dict__[name]
                    if before:
                        module.__dict__[name] = before[0]


def _note(module: nn.Module) -> _Note:
    note: _Note = module.__dict__.setdefault(_NOTE, _Note())
    return note
