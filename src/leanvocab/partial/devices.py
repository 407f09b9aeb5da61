"""Devices by what they can, not by name: CUDA, XPU and others that torch is told of have streams, events and pinned memory."""

import functools
from typing import Any

import torch


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
