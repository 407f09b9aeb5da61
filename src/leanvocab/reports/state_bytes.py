"""Bytes of optimizer states, as the optimizer itself allocates them: it takes a step on tensors without memory.

An optimizer is one of `OPTIMIZERS`, the name of a class of torch.optim, or what makes an optimizer of parameters. bitsandbytes'
kernels take no tensors without memory: its states are counted by the rules of its version 0.50.

Nothing here imports torch before it is needed.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from leanvocab.errors import SettingsError
from leanvocab.reports.footprint import FP32_BYTES, Parameter, tensor_bytes

if TYPE_CHECKING:
    from torch.optim import Optimizer

AnyOptimizer: TypeAlias = "str | Callable[[list[Any]], Optimizer]"

# Names of other things than classes of torch.optim: the class and its arguments.
_MADE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "sgd": ("SGD", {}),
    "sgd_momentum": ("SGD", {"momentum": 0.9}),
    "adafactor": ("Adafactor", {}),
    "torch_adafactor": ("Adafactor", {}),
}
# transformers' Adafactor, which the Trainer uses without a first moment, has the states of torch's in fp32 whatever the weights
# are, and a norm for the count of steps. Importing it takes seconds.
_IN_FP32 = "adafactor"
_EIGHT_BITS = "adamw_8bit"  # bitsandbytes under the Trainer
OPTIMIZERS = (*_MADE, _EIGHT_BITS)

_INT8_BLOCK = 256  # values that share one fp32 scale in bitsandbytes' block-wise states
_INT8_MIN_VALUES = 4096  # smaller parameters keep fp32 states
_INT8_MAPS_BYTES = 2 * 256 * FP32_BYTES  # the two code books, shared by all parameters


def optimizer_name(optimizer: AnyOptimizer) -> str:
    """The name under which an estimate shows an optimizer."""
    if isinstance(optimizer, str):
        return optimizer
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    return getattr(optimizer, "__name__", type(optimizer).__name__)


def check_optimizer(optimizer: AnyOptimizer) -> None:
    """Raises `SettingsError` for a name that is not known."""
    if isinstance(optimizer, str) and optimizer != _EIGHT_BITS:
        _maker(optimizer)


def state_bytes(optimizer: AnyOptimizer, parameters: Iterable[Parameter]) -> dict[Parameter, int]:
    """Bytes of the states of each parameter, as it would be trained.

    Raises:
        SettingsError: an unknown optimizer, or one that takes no ordinary step on such parameters.
    """
    distinct = list(dict.fromkeys(parameters))
    if optimizer == _EIGHT_BITS:
        return {parameter: _eight_bit_bytes(parameter) for parameter in distinct}
    make = _maker(optimizer) if isinstance(optimizer, str) else optimizer
    stepped = [replace(each, value_bytes=FP32_BYTES) for each in distinct] if optimizer == _IN_FP32 else distinct
    try:
        return dict(zip(distinct, _bytes_after_a_step(make, stepped), strict=True))
    except Exception as error:  # whatever an optimizer raises that wants something else
        raise SettingsError(
            f"{optimizer_name(optimizer)}: its states are not known, since it takes no ordinary step on these parameters: {error}"
        ) from error


def shared_bytes(optimizer: AnyOptimizer, parameters: Iterable[Parameter]) -> int:
    """Bytes of states that all parameters share: the code books of 8-bit states, where any parameter has such."""
    has_books = optimizer == _EIGHT_BITS and not all(_keeps_32_bit_states(each) for each in parameters if each.trains)
    return _INT8_MAPS_BYTES if has_books else 0


def _maker(name: str) -> "Callable[[list[Any]], Optimizer]":
    import torch

    class_name, arguments = _MADE.get(name, (name, {}))
    made = getattr(torch.optim, class_name, None)
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
        raise SettingsError(
            f"unknown optimizer {name!r}: expected one of {', '.join(OPTIMIZERS)}, or a class of torch.optim such as 'NAdam'"
        )
    return functools.partial(made, **arguments)


def _bytes_after_a_step(make: "Callable[[list[Any]], Optimizer]", parameters: list[Parameter]) -> list[int]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class AnyValue(TorchDispatchMode):
        """Answers who asks for the value of a tensor that has none."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            is_asked = func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta
            return 0.5 if is_asked else func(*args, **(kwargs or {}))

    dtypes = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    tensors = []
    for parameter in parameters:
        values = torch.empty(parameter.shape, dtype=dtypes[parameter.value_bytes], device="meta")
        tensors.append(torch.nn.Parameter(values))
        tensors[-1].grad = torch.empty_like(values)
    if not tensors:  # which no optimizer takes
        return []
    optimizer = make(tensors)
    with torch.no_grad(), AnyValue():
        inspect.unwrap(type(optimizer).step)(
            optimizer
        )  # without the hooks that others, and shrunk models, have on steps
    return [tensor_bytes(optimizer.state[tensor]) for tensor in tensors]


def _eight_bit_bytes(parameter: Parameter) -> int:
    """bitsandbytes under the Trainer, which has every nn.Embedding keep 32-bit states."""
    if _keeps_32_bit_states(parameter):
        return 2 * parameter.num_values * FP32_BYTES
    return 2 * (parameter.num_values + math.ceil(parameter.num_values / _INT8_BLOCK) * FP32_BYTES)


def _keeps_32_bit_states(parameter: Parameter) -> bool:
    return parameter.in_embedding or parameter.num_values < _INT8_MIN_VALUES
