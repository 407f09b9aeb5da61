"""Bytes from file to file in blocks: copied by the kernel where it can, and digests."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from leanvocab.errors import CheckpointError

BLOCK_BYTES = 8 << 20
_DIGEST_BYTES = 1 << 18  # stays in the processor's cache between being read and being digested
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def copy_range(
    source: int, start: int, target: int, position: int, num_bytes: int, count: Callable[[int], None] = lambda _: None
) -> None:
    """Copies bytes from one descriptor to another without taking them into this process, where the system can.

    Raises `CheckpointError` where the source ends too early.
    """
    by_kernel = hasattr(os, "copy_file_range")
    end = start + num_bytes
    while start < end:
        wanted = min(BLOCK_BYTES, end - start)
        if by_kernel:
            try:
                copied = os.copy_file_range(source, target, wanted, start, position)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                by_kernel = False
                continue
        else:
            copied = os.pwrite(target, os.pread(source, wanted, start), position)
        if copied == 0:
            raise CheckpointError(
                f"a file was cut off while it was read: expected {end - start:,} more bytes, found none"
            )
        start, position = start + copied, position + copied
        count(copied)


def sha256_of_range(source: int, start: int, end: int) -> str:
    """sha256 of the bytes from `start` to `end` of a descriptor; raises `CheckpointError` where it ends too early."""
    digest, buffer = hashlib.sha256(), bytearray(min(_DIGEST_BYTES, max(1, end - start)))
    while start < end:
        view = memoryview(buffer)[: min(len(buffer), end - start)]
        found = os.preadv(source, [view], start)
        if found == 0:
            raise CheckpointError(
                f"a file was cut off while it was read: expected {end - start:,} more bytes, found none"
            )
        digest.update(view[:found])
        start += found
    return digest.hexdigest()


def sync_and_forget(path: Path) -> None:
    """Syncs a file and asks the system to drop its cached pages, so that what is read next comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
