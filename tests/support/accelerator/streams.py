"""Streams, events, waits, and copies between the host and the device that are under way until somebody waits for them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accelerator.memory import NAME, Held, device, pinned_memory, switches
from accelerator.watching import Wait, current_line, watches

LAG = 16  # operations that the device is behind the host at most: what was asked for before them is done
Clock = dict[int, int]  # by stream: the number of its last work that is known to be done


class _Copy(NamedTuple):
    """Between pinned memory and the device, on a stream."""

    stream: int
    host: Tensor
    value: Tensor  # what arrives
    to_host: bool
    line: str


@dataclass
class _Work:
    """Everything that the device was asked for and nobody has waited for, and what went wrong meanwhile."""

    started: int = 0
    launched: int = 0  # operations
    copies: dict[int, _Copy] = field(default_factory=dict)
    hazards: list[str] = field(default_factory=list)


_work = _Work()


def launched() -> None:
    """The host asked for an operation."""
    _work.launched += 1


def forget_work() -> None:
    """Everything arrives, and nothing is remembered: the device goes out of use."""
    with_hazards = list(_work.hazards)
    for copy in _work.copies.values():
        _arrive(copy)
    _work.copies.clear()
    _work.hazards[:] = with_hazards


def hazards() -> list[str]:
    """What goes well here and would not on a device: host memory that was written to while it was being copied, tensors
    that one stream read before it had waited for the stream that writes them."""
    return _work.hazards


class Stream:
    """A queue of work. Work of another stream is done for this one once it has waited for that stream or its event."""

    num_streams = 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any):
        self.stream_id = Stream.num_streams
        Stream.num_streams += 1
        self.device_index, self.device_type = 0, 0
        self.known: Clock = {}

    @property
    def device(self) -> torch.device:
        return device()

    def clock(self) -> Clock:
        """What is done once the work is that the stream has by now."""
        return {**self.known, self.stream_id: _work.started}

    def synchronize(self) -> None:
        wait("stream", self.clock())

    def query(self) -> bool:
        return not any(_is_done(number, copy, self.clock()) for number, copy in _work.copies.items())

    def wait_stream(self, other: "Stream") -> None:
        self.known = _later(self.known, other.clock())

    def wait_event(self, event: "Event") -> None:
        self.known = _later(self.known, event.known)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> "Stream":
        _streams.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _streams.remove(self)


class Event:
    """What a stream had to do when the event was recorded; it comes when somebody waits, or `LAG` operations later."""

    def __init__(self, *_: Any, **__: Any):
        self.known: Clock = {}
        self.launched = 0

    def record(self, stream: Stream | None = None) -> None:
        self.known, self.launched = (stream or current_stream()).clock(), _work.launched

    def synchronize(self) -> None:
        wait("event", self.known)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        if _work.launched >= self.launched + LAG:
            _arrive_all(self.known)
        return not any(_is_done(number, copy, self.known) for number, copy in _work.copies.items())

    def elapsed_time(self, other: "Event") -> float:
        return 0.0


_default_stream = Stream()
_streams = [_default_stream]


def current_stream(device: Any = None) -> Stream:
    return _streams[-1]


def default_stream(device: Any = None) -> Stream:
    return _default_stream


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Work within the block goes to the stream."""
    with current_stream() if chosen is None else chosen:
        yield


def _later(first: Clock, second: Clock) -> Clock:
    return {key: max(first.get(key, 0), second.get(key, 0)) for key in {*first, *second}}


def _is_done(number: int, copy: _Copy, known: Clock) -> bool:
    return number <= known.get(copy.stream, 0)


# --- waiting, and copies ----------------------------------------------------------------------------------------------


def wait(kind: str, known: Clock | None = None) -> None:
    """The host waits for the device: for what `known` says, or for all of it."""
    for seen in watches():
        seen.waits.append(Wait(kind, current_line()))
    _arrive_all(known)


def _arrive_all(known: Clock | None) -> None:
    for number, copy in list(_work.copies.items()):
        if known is None or _is_done(number, copy, known):
            del _work.copies[number]
            _arrive(copy)


def _arrive(copy: _Copy) -> None:
    if not _same_bits(copy.host, _garbage(copy.host) if copy.to_host else copy.value):
        _work.hazards.append(f"memory of the host was written to while it was being copied: {copy.line}")
    if copy.to_host:
        copy.host.copy_(copy.value)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (first, second)))


def _garbage(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan if like.is_floating_point() else 1 if like.dtype == torch.bool else -1)


def copied(host: Tensor, to_host: bool, non_blocking: bool) -> None:
    """A copy was made between the device and `host`, which holds the values: arrived, if the host waits for it."""
    if not non_blocking or (to_host and not is_pinned(host)):
        wait("to host" if to_host else "to device")
    elif is_pinned(host) and switches.computes:  # what is not pinned has left its memory by now
        _work.started += 1
        _work.copies[_work.started] = _Copy(current_stream().stream_id, host, host.clone(), to_host, current_line())
        if to_host:
            host.copy_(_garbage(host))


# --- order between streams --------------------------------------------------------------------------------------------


def used(name: str, storages: Iterable[Held], written: Iterable[Held]) -> None:
    """An operation of the current stream used some storages, and wrote some: after what other streams wrote, or it is a race."""
    if Stream.num_streams == 1:
        return
    now = current_stream()
    for held in storages:
        if held.last_write is not None:
            stream_id, number, line = held.last_write
            if stream_id != now.stream_id and number > now.known.get(stream_id, 0):
                _work.hazards.append(f"{name} at {current_line()} did not wait for the stream of {line}")
    _work.started += 1
    for held in written:
        held.last_write = now.stream_id, _work.started, current_line()


# --- pinned memory ----------------------------------------------------------------------------------------------------


def pin(tensor: Tensor) -> Tensor:
    """A tensor of the CPU whose memory is pinned from now on."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{NAME}' memory: only dense CPU tensors can be pinned")
    pinned_memory.hold(tensor.untyped_storage())
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in pinned_memory.held
