"""Shapes that operations give on paper, by those that they were given: nothing else decides them, and torch takes long to say."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from accelerator.memory import is_on_device, new_tensor

known: dict[Any, Any] = {}  # by `key_of`: the result, with a shape in the place of each tensor


class Shape(NamedTuple):
    """A tensor that is not there."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    device: str


def _shape_of(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type)


def _described(value: Any) -> Any:
    """A value that can be compared: 1, 1.0 and True are three."""
    if isinstance(value, Tensor):
        return _shape_of(value)
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def key_of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What decides the shapes; None where they cannot be told apart."""
    key = id(op), _described(args), tuple((name, _described(value)) for name, value in kwargs.items())
    try:
        hash(key)
    except TypeError:
        return None
    return key


def remember(key: Any, result: Any) -> None:
    """Notes a result of tensors that have a storage each, without gaps."""
    shapes = _mapped(_shape_of, result)
    if all(
        tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.nbytes
        for tensor in _tensors(result)
    ):
        known[key] = shapes


def made(result: Any) -> Any:
    """New tensors of the device in the place of the shapes."""
    if isinstance(result, Shape):
        return new_tensor(result.sizes, result.strides, result.dtype)
    return type(result)(map(made, result)) if isinstance(result, list | tuple) else result


def _mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(function, part) for part in value) if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if is_on_device(value) else []
