"""What happens on the device while a block runs: waits, operations, bytes moved, and the peak of memory with its lines."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

_OUTSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__, "<")
_watches: "list[Watch]" = []


class Wait(NamedTuple):
    """The host waited for the device."""

    kind: str  # "item", "nonzero", "to host", "to device", "event", "stream", "synchronize", …
    line: str  # "file.py:12 function"


@dataclass
class Watch:
    """What a `watch` block saw. `operations` counts calls by name; traffic is in bytes, by (operation, line)."""

    waits: list[Wait] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    traffic: Counter[tuple[str, str]] = field(default_factory=Counter)
    start_bytes: int = 0
    peak_bytes: int = 0
    held_at_peak: list[tuple[str, int]] = field(default_factory=list)  # (line, bytes) of each storage

    def at_peak(self) -> dict[str, int]:
        """Bytes that were held at the peak, by the line that made them; "before" are those from before the block."""
        total: Counter[str] = Counter()
        for line, num_bytes in self.held_at_peak:
            total[line] += num_bytes
        return dict(total.most_common())

    def traffic_by_operation(self) -> dict[str, int]:
        """Bytes read and written by each operation."""
        return self._traffic_by(0)

    def traffic_by_line(self) -> dict[str, int]:
        """Bytes read and written by each line of code."""
        return self._traffic_by(1)

    def _traffic_by(self, part: int) -> dict[str, int]:
        total: Counter[str] = Counter()
        for key, num_bytes in self.traffic.items():
            total[key[part]] += num_bytes
        return dict(total.most_common())


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Notes what happens on the device within the block."""
    from accelerator.memory import device_memory

    seen = Watch(start_bytes=device_memory.now_bytes, peak_bytes=device_memory.now_bytes)
    seen.held_at_peak = [("before", seen.start_bytes)]
    _watches.append(seen)
    try:
        yield seen
    finally:
        _watches.remove(seen)


def watches() -> "list[Watch]":
    """The blocks that are open now."""
    return _watches


def current_line() -> str:
    """The line outside of torch and of this package that runs now."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OUTSIDE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "autograd"
