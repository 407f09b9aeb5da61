"""`torch.emulated`: what code asks a device's module for, as it asks `torch.cuda`."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from accelerator import streams
from accelerator.memory import NAME, device_memory, is_available, set_total_memory
from accelerator.random_numbers import generator
from accelerator.streams import Event, Stream, current_stream, default_stream, stream

_initialized = True  # torch's checkpointing asks for it

__all__ = [
    "Event",
    "Stream",
    "_initialized", "_is_in_bad_fork",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "init",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_current_stream_capturing",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_peak_memory_stats",
    "seed_all",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_total_memory",
    "stream",
    "synchronize",
]  # fmt: skip


def device(index: Any = 0) -> AbstractContextManager[None]:
    return nullcontext()


def device_count() -> int:
    return 1 if is_available() else 0


def current_device() -> int:
    return 0


def set_device(index: Any) -> None:
    """There is one."""


def init() -> None:
    """Nothing needs it."""


def empty_cache() -> None:
    """What is freed is given back at once."""


def is_initialized() -> bool:
    return is_available()


def is_bf16_supported(*_: Any, **__: Any) -> bool:
    return True


def is_current_stream_capturing() -> bool:
    return False


def _is_in_bad_fork() -> bool:
    return False


def synchronize(index: Any = None) -> None:
    streams.wait("synchronize")


def get_device_name(index: Any = None) -> str:
    return NAME


def get_device_capability(index: Any = None) -> tuple[int, int]:
    return 8, 0


def get_device_properties(index: Any = None) -> SimpleNamespace:
    return SimpleNamespace(name=NAME, total_memory=_total_bytes(), major=8, minor=0)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


# --- memory -----------------------------------------------------------------------------------------------------------


def _total_bytes() -> int:
    return device_memory.total_bytes or 1 << 40


def memory_allocated(index: Any = None) -> int:
    return device_memory.now_bytes


def max_memory_allocated(index: Any = None) -> int:
    return device_memory.peak_bytes


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def reset_peak_memory_stats(index: Any = None) -> None:
    device_memory.peak_bytes = device_memory.now_bytes


def memory_stats(index: Any = None) -> dict[str, int]:
    return {"allocated_bytes.all.current": memory_allocated(), "allocated_bytes.all.peak": max_memory_allocated()}


def mem_get_info(index: Any = None) -> tuple[int, int]:
    return _total_bytes() - device_memory.now_bytes, _total_bytes()


# --- random numbers ---------------------------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    generator.manual_seed(seed)


manual_seed_all = manual_seed


def seed_all() -> None:
    generator.seed()


def initial_seed() -> int:
    return generator.initial_seed()


def get_rng_state(index: Any = None) -> torch.Tensor:
    return generator.get_state()


def set_rng_state(state: torch.Tensor, index: Any = None) -> None:
    generator.set_state(state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [generator.get_state()]


def set_rng_state_all(states: list[torch.Tensor]) -> None:
    generator.set_state(states[0])
