"""Peaks are seen, also those that are gone at the end."""

import mmap
import sys
import time

import numpy as np
import pytest

from leanvocab.reports import peak as peak_module
from leanvocab.reports.peak import record_peak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

NUM_BYTES = 200_000_000
SLACK = 30_000_000  # what else the process allocates meanwhile


def hold(num_bytes):
    """Touch fresh memory, long enough to be sampled."""
    held = np.ones(num_bytes, np.uint8)
    time.sleep(0.05)
    return held


def test_memory_that_was_given_back_is_in_the_peak_but_not_at_the_end():
    with record_peak() as peak:
        held = hold(NUM_BYTES)
        del held
    assert NUM_BYTES <= peak.anonymous_growth_bytes < NUM_BYTES + SLACK
    assert NUM_BYTES <= peak.rss_growth_bytes < NUM_BYTES + SLACK
    assert peak.end_anonymous_bytes - peak.start_anonymous_bytes < SLACK


def test_pages_of_a_mapped_file_are_resident_but_not_anonymous(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\1" * NUM_BYTES)
    with path.open("rb") as file, record_peak() as peak:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        assert np.frombuffer(mapped, np.uint8).max() == 1
        time.sleep(0.05)
    assert peak.rss_growth_bytes >= NUM_BYTES
    assert peak.anonymous_growth_bytes < SLACK


def test_an_earlier_peak_of_the_process_is_not_taken_for_one_of_the_block():
    held = hold(NUM_BYTES)
    del held
    with record_peak() as peak:
        time.sleep(0.02)
    assert peak.rss_growth_bytes < SLACK


def test_recorders_nest():
    with record_peak() as outer:
        with record_peak() as inner:
            held = hold(NUM_BYTES)
            del held
        assert inner.anonymous_growth_bytes >= NUM_BYTES
    assert outer.anonymous_growth_bytes >= NUM_BYTES


def test_the_peak_is_filled_in_when_the_block_raises():
    def allocate_and_fail():
        held = hold(NUM_BYTES)
        raise RuntimeError(f"stop at {held.size}")

    recorder = record_peak()
    with pytest.raises(RuntimeError, match="stop"), recorder as peak:
        allocate_and_fail()
    assert peak.anonymous_growth_bytes >= NUM_BYTES
    assert peak.end_rss_bytes > 0


def test_without_a_gpu_nothing_is_reported_of_one():
    with record_peak() as peak:
        pass
    assert peak.peak_cuda_allocated_bytes == peak.peak_cuda_reserved_bytes == 0
    assert peak.to_dict()["anonymous_growth_bytes"] == peak.anonymous_growth_bytes


def test_a_gpu_in_use_is_reset_at_the_start_and_read_at_the_end(monkeypatch):
    calls = []

    class FakeCuda:
        def reset_peak_memory_stats(self):
            calls.append("reset")

        def max_memory_allocated(self):
            calls.append("read")
            return 7

        def max_memory_reserved(self):
            return 9

    monkeypatch.setattr(peak_module, "cuda_in_use", FakeCuda)
    with record_peak() as peak:
        calls.append("block")
    assert calls == ["reset", "block", "read"]
    assert (peak.peak_cuda_allocated_bytes, peak.peak_cuda_reserved_bytes) == (7, 9)
