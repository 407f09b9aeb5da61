"""The device made known to torch at its first use, and there for as long as a block lasts."""

import functools
import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils import _device, backend_registration

from accelerator import attention, autocast, kernels, module, streams
from accelerator.memory import NAME, allocate, device_memory, switches

FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "rand", "randn", "randint", "empty_like", "zeros_like", "ones_like",
    "full_like", "empty_strided", "arange",
)  # fmt: skip


def can_be_emulated() -> bool:
    """True where torch lets Python stand behind a device."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def _hooks() -> Any:
    class Hooks(torch._C._acc.PrivateUse1Hooks):
        """What torch asks about the device."""

        def is_available(self) -> bool:
            return switches.in_use

        def has_primary_context(self, device_index: int) -> bool:
            return switches.in_use

        def is_built(self) -> bool:
            return True

    return Hooks()


@functools.cache
def _make_known() -> list[Any]:
    backend = types.SimpleNamespace(**{name: getattr(module, name) for name in module.__all__})
    hooks = _hooks()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=backend, hook=hooks)
    # Both keep torch's functions by what they are when they are first asked for: here, before any is patched.
    importlib.import_module("torch._dynamo")
    _device._device_constructors()
    torch.UntypedStorage.__new__ = _new_storage
    return [hooks, *kernels.register(), *attention.register(), *autocast.register()]


_plain_new = torch.UntypedStorage.__new__


def _new_storage(cls: type, *args: Any, **kwargs: Any) -> Any:
    """torch asks an allocator, which only C++ can give it."""
    if args and isinstance(args[0], int) and torch.device(kwargs.get("device") or "cpu").type == NAME:
        return allocate(args[0])
    return _plain_new(cls, *args, **kwargs)


def _pinning(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def with_pinned_memory(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = factory(*args, **kwargs)
        return streams.pin(made) if pin_memory else made

    return with_pinned_memory


_plain_data = torch._C.TensorBase.data
_is_compatible = torch._has_compatible_shallow_copy_type


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, which on CUDA may be of another device: the object stays, and its gradient moves along."""
    if (tensor.device.type == NAME) == (value.device.type == NAME):
        _plain_data.__set__(tensor, value)
        return
    gradient, tensor.grad = tensor.grad, None
    torch._C._swap_tensor_impl(tensor, value.detach().requires_grad_(tensor.requires_grad))
    tensor.grad = None if gradient is None else gradient.to(tensor.device, tensor.dtype)


def _patches() -> Iterator[Any]:
    for name in FACTORIES:
        yield mock.patch.object(torch, name, _pinning(getattr(torch, name)))
    yield mock.patch.object(torch.Tensor, "data", property(lambda tensor: _plain_data.__get__(tensor), _set_data))
    yield mock.patch.object(torch, "_has_compatible_shallow_copy_type", _are_compatible)
    # A backward runs where it was called, so that its lines are known and its errors are Python's.
    yield torch.autograd.set_multithreading_enabled(False)


def _are_compatible(first: torch.Tensor, second: torch.Tensor) -> bool:
    kinds = {tensor.device.type for tensor in (first, second)}
    return kinds <= {NAME, "cpu"} or _is_compatible(first, second)


@contextmanager
def in_use(*, computes: bool = True) -> Iterator[None]:
    """The device is there within the block; where it computes nothing, it counts bytes and shapes alone."""
    _make_known()
    before = switches.in_use, switches.computes, device_memory.total_bytes
    switches.in_use, switches.computes = True, computes
    with ExitStack() as stack:
        for patch in _patches() if not before[0] else ():
            stack.enter_context(patch)
        try:
            yield
        finally:
            streams.forget_work()
            switches.in_use, switches.computes, device_memory.total_bytes = before
