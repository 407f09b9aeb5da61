"""Bytes on the device, storage by storage: each lies over a storage of the CPU, or of meta where nothing is computed."""

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelerator.watching import current_line, watches

NAME = "emulated"
_CPU_KEY = torch._C.DispatchKey.CPU
_set = torch.ops.aten.set_.source_Storage_storage_offset


@dataclass
class Held:
    """A storage that is alive."""

    alive: Any  # a weak reference to it, which says when it is gone
    raw: torch.UntypedStorage | None  # where its bytes are; None of pinned memory, which is memory of the host
    num_bytes: int
    line: str  # that made it; known within a `watch` block alone
    is_number: bool = False  # what torch made of a number of Python's, to hand it to a kernel
    last_write: tuple[int, int, str] | None = None  # (stream, number, line), where there are several streams


class Memory:
    """Storages that are alive by address, and their bytes: now, at the peak, and at most."""

    def __init__(self) -> None:
        self.held: dict[int, Held] = {}
        self.now_bytes = self.peak_bytes = 0
        self.total_bytes: int | None = None

    def hold(self, storage: torch.UntypedStorage, raw: torch.UntypedStorage | None = None) -> None:
        """Counts a storage until it is gone."""
        key, num_bytes = storage._cdata, storage.nbytes()
        line = current_line() if watches() else ""
        self.held[key] = Held(weakref.ref(storage, lambda _: self._drop(key)), raw, num_bytes, line)
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _drop(self, key: int) -> None:
        self.now_bytes -= self.held.pop(key).num_bytes


device_memory, pinned_memory = Memory(), Memory()


class _Switches:
    """Whether the device is there at the moment, and whether it computes."""

    in_use = False
    computes = True


switches = _Switches()


def is_available() -> bool:
    """True while the device is in use."""
    return switches.in_use


def host() -> str:
    """The device that the values are on in truth."""
    return "cpu" if switches.computes else "meta"


def set_total_memory(num_bytes: int | None) -> None:
    """Makes the device one of so many bytes; None: of as many as one likes."""
    device_memory.total_bytes = num_bytes


def device() -> torch.device:
    """The device, whose name is known from the first use on."""
    return torch.device(NAME, 0)


# --- storages ---------------------------------------------------------------------------------------------------------


_addresses = itertools.count(1 << 40, 1 << 36)


def _next_address(num_bytes: int) -> int:
    """Where nothing is, and where no other storage is: code tells tensors that share memory by their addresses."""
    return next(_addresses) if num_bytes else 0


def adopt(raw: torch.UntypedStorage) -> torch.UntypedStorage:
    """A new storage of the device over the bytes of `raw`; raises `torch.OutOfMemoryError` where the device is full."""
    num_bytes = raw.nbytes()
    total = device_memory.total_bytes
    if total is not None and device_memory.now_bytes + num_bytes > total:
        raise torch.OutOfMemoryError(
            f"{NAME} out of memory. Tried to allocate {num_bytes:,} bytes; {device_memory.now_bytes:,} of {total:,} are in use"
        )
    pointer = raw.data_ptr() if switches.computes else _next_address(num_bytes)
    storage = torch._C._construct_storage_from_data_pointer(pointer, device(), num_bytes)
    device_memory.hold(storage, raw)
    for seen in watches():
        if device_memory.now_bytes > seen.peak_bytes:
            seen.peak_bytes = device_memory.now_bytes
            seen.held_at_peak = [(held.line or "before", held.num_bytes) for held in device_memory.held.values()]
    return storage


def allocate(num_bytes: int) -> torch.UntypedStorage:
    """A new storage of the device."""
    return adopt(torch.UntypedStorage(num_bytes, device=host()))


# --- tensors ----------------------------------------------------------------------------------------------------------


def is_on_device(value: object) -> bool:
    """True of tensors of the device."""
    return isinstance(value, Tensor) and value.device.type == NAME


def held_by(tensor: Tensor) -> Held:
    """What a tensor of the device lies over."""
    storage = tensor.untyped_storage()
    held = device_memory.held.get(storage._cdata)
    if held is None:  # torch writes a storage to a file through another one of its own making
        pointer = storage.data_ptr()
        held = next(held for held in device_memory.held.values() if held.alive().data_ptr() == pointer)
    return held


def inside(tensor: Tensor) -> Tensor:
    """The tensor of the CPU, or of meta, over the same bytes."""
    raw = held_by(tensor).raw
    made = torch.empty(0, dtype=tensor.dtype, device=raw.device)
    return _set(made, raw, tensor.storage_offset(), tensor.size(), tensor.stride())


def set_(tensor: Tensor, storage: torch.UntypedStorage, offset: int, sizes: Any, strides: Any) -> Tensor:
    """Lays a tensor of the device over a storage."""
    return _set._op_dk(_CPU_KEY, tensor, storage, offset, sizes, strides)


def outside(raw: Tensor) -> Tensor:
    """A new tensor of the device with the bytes of a tensor of the CPU, or of meta, that nobody else has."""
    made = torch._C._acc.create_empty_tensor([0], raw.dtype)
    return set_(made, adopt(raw.untyped_storage()), raw.storage_offset(), raw.size(), raw.stride())


def new_tensor(sizes: Iterable[int], strides: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A new tensor of the device, with whatever bytes."""
    sizes, strides = tuple(sizes), tuple(strides)
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    num_bytes = 0 if 0 in sizes else (last + 1) * dtype.itemsize
    return set_(torch._C._acc.create_empty_tensor([0], dtype), allocate(num_bytes), 0, sizes, strides)


# --- what is held -----------------------------------------------------------------------------------------------------


def parts(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes on the device now by purpose; shared memory counts for the first purpose that has it."""
    states = [value for state in optimizer.state.values() for value in state.values()] if optimizer else []
    parameters = list(model.parameters())
    groups = {
        "weights": parameters,
        "gradients": [parameter.grad for parameter in parameters],
        "states": states,
        "buffers": list(model.buffers()),
    }
    found, taken = {}, set()
    for name, tensors in groups.items():
        keys = {tensor.untyped_storage()._cdata for tensor in tensors if is_on_device(tensor)} - taken
        found[name] = sum(device_memory.held[key].num_bytes for key in keys)
        taken |= keys
    return {**found, "others": device_memory.now_bytes - sum(found.values())}
