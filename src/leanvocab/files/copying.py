"""Bytes out of files, into files and from one to another, in blocks and to the last one; digests, syncing.

A system may move fewer bytes than it is asked to. The loops that go on from there stand here and nowhere else.
"""

import errno
import filecmp
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from leanvocab.errors import CheckpointError

BLOCK_BYTES = 8 << 20  # large enough for full disk speed, small enough not to be noticed
_DIGEST_BYTES = 1 << 18  # stays in the processor's cache between being read and being digested
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def read_exactly(source: int, start: int, num_bytes: int) -> bytes:
    """So many bytes at `start` of a descriptor; raises `CheckpointError` where the file ends too early."""
    block = os.pread(source, num_bytes, start)
    while len(block) < num_bytes:
        more = os.pread(source, num_bytes - len(block), start + len(block))
        if not more:
            raise CheckpointError(
                f"a file was cut off while it was read: expected {num_bytes:,} bytes, found {len(block):,}"
            )
        block += more
    return block


def write_at(target: int, data: bytes | memoryview, start: int) -> None:
    """Writes all of `data` at `start` of a descriptor; raises `OSError` where the system takes no more of it."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(target, left, start)
        if written == 0:
            raise OSError(errno.EIO, f"the system wrote nothing of {len(left):,} bytes")
        left, start = left[written:], start + written


def copy_range(
    source: int,
    start: int,
    target: int,
    target_start: int,
    num_bytes: int,
    count: Callable[[int], None] = lambda _: None,
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
                copied = os.copy_file_range(source, target, wanted, start, target_start)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                by_kernel = False
                continue
        else:
            block = os.pread(source, wanted, start)
            write_at(target, block, target_start)
            copied = len(block)
        if copied == 0 and not by_kernel:
            raise _cut_off(end - start)
        by_kernel = by_kernel and copied > 0  # nothing is an end, or a file system that says in this way that it cannot
        start, target_start = start + copied, target_start + copied
        count(copied)


def sha256_of_range(source: int, start: int, end: int) -> str:
    """sha256 of the bytes from `start` to `end` of a descriptor; raises `CheckpointError` where it ends too early."""
    digest, buffer = hashlib.sha256(), bytearray(min(_DIGEST_BYTES, max(1, end - start)))
    while start < end:
        view = memoryview(buffer)[: min(len(buffer), end - start)]
        num_read = os.preadv(source, [view], start)
        if num_read == 0:
            raise _cut_off(end - start)
        digest.update(view[:num_read])
        start += num_read
    return digest.hexdigest()


def _cut_off(num_missing: int) -> CheckpointError:
    return CheckpointError(f"a file was cut off while it was read: expected {num_missing:,} more bytes, found none")


class Digests:
    """sha256 of ranges of files, by threads beside the work that reads the same bytes."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, "leanvocab-digest")
        self._expected: list[tuple[str, str, Future[str]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._threads.shutdown(cancel_futures=kind is not None)

    def start(self, source: int, start: int, end: int) -> "Future[str]":
        """The digest of the bytes from `start` to `end` of a descriptor, once it is there."""
        return self._threads.submit(sha256_of_range, source, start, end)

    def expect(self, what: str, sha256: str, digest: "Future[str]") -> None:
        """Notes what a digest has to be; `what` says whose it is."""
        self._expected.append((what, sha256, digest))

    def check(self) -> None:
        """Waits for all digests; raises `CheckpointError` where one is not what it has to be."""
        for what, expected, digest in self._expected:
            if digest.result() != expected:
                raise CheckpointError(
                    f"{what}: expected sha256 {expected[:16]}…, found {digest.result()[:16]}…: it is not the one that the "
                    "delta was made from, or damaged"
                )


@contextmanager
def new_file(path: Path, like: int) -> Iterator[int]:
    """A descriptor of a file that is made, with the mode of the one open as `like`; at the end of the block it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.fchmod(descriptor, os.fstat(like).st_mode & 0o777)
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path, *, forget: bool = False) -> None:
    """Waits until a file, or a folder's names, are on the disk; with `forget` what is read next comes from there too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def share_bytes(there: Path, here: Path) -> None:
    """Makes two files that hold the same one file on the disk, where the file system can; neither may be written in place."""
    linked = here.with_name(f".{here.name}.linked")
    with suppress(OSError):
        if filecmp.cmp(there, here, shallow=False):
            os.link(there, linked)
            os.replace(linked, here)
