"""Peaks of memory while a block runs: of this process, and of the GPU that it uses. Imports nothing of leanvocab."""

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class PeakMemory:
    """Memory of this process, and of the GPU, while a `record_peak` block ran. Filled in when the block ends.

    Of the resident bytes the anonymous ones are what the process allocated; the others are pages of mapped files, which
    the kernel can drop. Zeros where the system has no /proc, and where no GPU was used.
    """

    start_rss_bytes: int = 0
    peak_rss_bytes: int = 0
    end_rss_bytes: int = 0
    start_anonymous_bytes: int = 0
    peak_anonymous_bytes: int = 0
    end_anonymous_bytes: int = 0
    peak_cuda_allocated_bytes: int = 0
    peak_cuda_reserved_bytes: int = 0

    @property
    def rss_growth_bytes(self) -> int:
        """Rise of the resident bytes above where they were at the start."""
        return self.peak_rss_bytes - self.start_rss_bytes

    @property
    def anonymous_growth_bytes(self) -> int:
        """Rise of the anonymous bytes above where they were at the start."""
        return self.peak_anonymous_bytes - self.start_anonymous_bytes

    def to_dict(self) -> dict[str, int]:
        """Everything above as plain values, ready for JSON."""
        growth = {name: getattr(self, name) for name in ("rss_growth_bytes", "anonymous_growth_bytes")}
        return {**asdict(self), **growth}


@contextlib.contextmanager
def record_peak(interval_seconds: float = 0.002) -> Iterator[PeakMemory]:
    """Records peaks of memory while the block runs, on the current GPU too where one is in use.

    Host memory is sampled by a thread: a peak shorter than the interval, or within one call that holds Python's lock,
    can be missed. The resident peak is the kernel's own where this block raised the process's high-water mark.
    """
    peak = PeakMemory()
    cuda = cuda_in_use()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    start = _process_bytes()
    peak.start_rss_bytes, peak.start_anonymous_bytes = start["VmRSS"], start["RssAnon"]
    done = threading.Event()
    sampler = threading.Thread(target=_sample, args=(peak, done, interval_seconds), daemon=True)
    _note(peak, start)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
        end = _process_bytes()
        _note(peak, end)
        peak.end_rss_bytes, peak.end_anonymous_bytes = end["VmRSS"], end["RssAnon"]
        if end["VmHWM"] > start["VmHWM"]:
            peak.peak_rss_bytes = max(peak.peak_rss_bytes, end["VmHWM"])
        cuda = cuda_in_use()
        if cuda is not None:
            peak.peak_cuda_allocated_bytes = cuda.max_memory_allocated()
            peak.peak_cuda_reserved_bytes = cuda.max_memory_reserved()


def _sample(peak: PeakMemory, done: threading.Event, interval_seconds: float) -> None:
    while not done.wait(interval_seconds):
        _note(peak, _process_bytes())


def _note(peak: PeakMemory, now: Mapping[str, int]) -> None:
    peak.peak_rss_bytes = max(peak.peak_rss_bytes, now["VmRSS"])
    peak.peak_anonymous_bytes = max(peak.peak_anonymous_bytes, now["RssAnon"])


def _process_bytes() -> dict[str, int]:
    """Resident bytes, their high-water mark, and the anonymous part, as the kernel counts them for this process."""
    counted = dict.fromkeys(("VmRSS", "VmHWM", "RssAnon"), 0)
    with contextlib.suppress(FileNotFoundError), open("/proc/self/status") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name in counted:
                counted[name] = int(value.split()[0]) * 1024
    return counted


def cuda_in_use() -> Any:
    """`torch.cuda`, or the like, where this process has a GPU in use; importing torch for it would change what is measured."""
    torch: Any = sys.modules.get("torch")
    device = None if torch is None else torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") and module.is_initialized() else None
