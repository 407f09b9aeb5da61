"""Devices by what they can, not by name: CUDA, XPU and others that torch is told of have streams, events and pinned memory."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def device_module(device: torch.device | str) -> Any:
    """The module of a device: `torch.cuda` of CUDA's, `torch.xpu` of XPU's."""
    return torch.get_device_module(device)


@functools.cache
def _has_streams(device_type: str) -> bool:
    if device_type in ("cpu", "meta"):
        return False
    module = getattr(torch, device_type, None)
    return all(
        hasattr(module, name) for name in ("Event", "current_stream", "get_rng_state_all")
    )  # MPS has events alone


def has_streams(device: torch.device) -> bool:
    """True where copies between the device and pinned memory go on while the host works, and an event tells of their end."""
    return _has_streams(device.type)


def memory_bytes(device: torch.device) -> int | None:
    """All memory of a device, free or not; None of the host, and where the device does not tell."""
    properties = getattr(device_module(device), "get_device_properties", None) if has_streams(device) else None
    return None if properties is None else int(properties(device).total_memory)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast multiplies on a device; None where it does not, as on meta."""
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block within which autocast does nothing on a device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on a device; the host goes on meanwhile where the device can do without it."""
    if tensor.device.type == "cpu" and has_streams(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Passage:
    """Two rooms on a device that blocks of the host's go through: one is used while the next arrives, on a stream of its own.

    Each comes out of pinned memory, which stays, and is written to again once the copy out of it was made.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        module = device_module(device)
        self._device, self._stream = device, module.Stream(device)
        with torch.inference_mode(False):
            self._pinned = [torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True) for _ in range(2)]
        self._copied = [module.Event() for _ in self._pinned]

    def of(self, num_blocks: int, fill: Callable[[int, Tensor], Tensor]) -> Iterator[Tensor]:
        """The blocks on the device, each until the next one is asked for. `fill` writes one into a room, and returns it."""
        module = device_module(self._device)
        using = module.current_stream(self._device)
        rooms = [torch.empty_like(room, device=self._device) for room in self._pinned[:num_blocks]]
        used = [module.Event() for _ in rooms]
        for event in used:
            event.record(using)
        try:
            arriving = self._send(0, fill, rooms, used) if rooms else None
            for number in range(num_blocks):
                block, arriving = arriving, None
                using.wait_event(self._copied[number % 2])
                if number + 1 < num_blocks:
                    arriving = self._send(number + 1, fill, rooms, used)
                assert block is not None
                yield block
                used[number % 2].record(using)
        finally:
            using.wait_stream(self._stream)  # the rooms are let go of

    def _send(self, number: int, fill: Callable[[int, Tensor], Tensor], rooms: list[Tensor], used: list[Any]) -> Tensor:
        room_number = number % 2
        wait_for(self._copied[room_number])
        block = fill(number, self._pinned[room_number])
        self._stream.wait_event(used[room_number])
        with device_module(self._device).stream(self._stream):
            there = rooms[room_number][: len(block)].copy_(block, non_blocking=True)
            self._copied[room_number].record(self._stream)
        return there


class OnItsWay:
    """A number on its way from a device to the host, which needs it later."""

    def __init__(self, number: Tensor):
        self._number, self._event = number, None
        if has_streams(number.device):
            module = device_module(number.device)
            self._number = torch.zeros(number.shape, dtype=number.dtype, device="cpu", pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._event = module.Event()
            self._event.record(module.current_stream(number.device))

    def number(self) -> int:
        """The number; waits where it has not arrived."""
        if self._event is not None:
            wait_for(self._event)
        return int(self._number)


def wait_for(event: Any) -> None:
    """Waits for an event that has not come yet."""
    if not event.query():
        event.synchronize()


def accelerator_at_hand() -> torch.device | None:
    """The device with streams that this process trains on if it is not told otherwise; None where there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device if device is not None and has_streams(device) else None


def is_capturing(device: torch.device) -> bool:
    """True while the device's current stream records a graph, in which nothing of the host takes part."""
    module = device_module(device)
    return hasattr(module, "is_current_stream_capturing") and bool(module.is_current_stream_capturing())
