"""Rows of a vocabulary matrix: two pure functions, and the store of full rows, which stays on disk.

A store is a read-only region of a file: the checkpoint that the model was loaded from, where the model's tensor is a
mapping of it, or else a temporary file that is written once. A full matrix is a private (copy-on-write) mapping of that
region with the partial rows written over it, so that saving and merging cost memory for the kept rows alone.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanvocab.errors import CheckpointError
from leanvocab.files.copying import BLOCK_BYTES, write_at
from leanvocab.files.mapped import mapped_region, maps_file


def take_rows(full: Tensor, token_ids: Tensor) -> Tensor:
    """Rows `token_ids` of `full` [full_size, dim], as a new tensor [len(token_ids), dim]: E'[f(i)] = E[i] (paper, Section 4)."""
    return full.index_select(0, token_ids.to(full.device))


def put_rows(full: Tensor, token_ids: Tensor, partial: Tensor) -> None:
    """Writes `partial` [len(token_ids), dim] over rows `token_ids` of `full`, in place: E[f⁻¹(i)] = E'[i] (paper, Section 4)."""
    full.index_copy_(0, token_ids.to(full.device), partial.to(full.device, full.dtype))


def zero_pages(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros [*shape] in pages that cost no memory until they are written.

    `torch.zeros` writes every page, and numpy asks for huge pages, which scattered rows would all touch.
    """
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    if num_bytes == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # kernels without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


class RowStore:
    """The full rows [num_rows, dim] of one vocabulary matrix in a file, read-only; copies share it.

    Raises `CheckpointError` where the file does not hold what it should.
    """

    def __init__(
        self, descriptor: int, path: str, offset: int, shape: tuple[int, int], dtype: torch.dtype, temporary: bool
    ):
        self.path, self.offset, self.shape, self.dtype, self.temporary = path, offset, shape, dtype, temporary
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._rows = self._map()

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def rows(self, token_ids: Tensor) -> Tensor:
        """Copies of the rows `token_ids`, on CPU."""
        return take_rows(self._rows, token_ids.cpu())

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) one block after another; the rows must not be written to."""
        return _blocks(self._rows)

    def private_view(self) -> Tensor:
        """All rows as a copy-on-write mapping: reading costs no anonymous memory, writing costs a page."""
        return self._map()

    def mapped(self, function: Callable[[Tensor], Tensor], directory: str | None) -> "RowStore":
        """A new temporary store that holds `function(rows)` of each block of rows."""
        return RowStore.write(((start, function(rows)) for start, rows in self.blocks()), self.shape, directory)

    def differs(self, other: Tensor, kept: Tensor) -> bool:
        """True where `other` [num_rows, dim] differs in any bit from the stored rows, the rows `kept` aside."""
        return next(self._differing(other, kept), None) is not None

    def differing(self, other: Tensor, kept: Tensor) -> list[int]:
        """Rows, other than those `kept`, where `other` [num_rows, dim] differs in any bit from what is stored."""
        return [row for rows in self._differing(other, kept) for row in rows]

    def _differing(self, other: Tensor, kept: Tensor) -> Iterator[list[int]]:
        skip = torch.zeros(self.shape[0], dtype=torch.bool, device="cpu")
        skip[kept.cpu()] = True
        for start, rows in self.blocks():
            candidate = other[start : start + len(rows)].cpu()
            if not same_bits(rows, candidate):
                unequal = (as_bits(rows) != as_bits(candidate.to(rows.dtype))).any(1)
                differing = (unequal & ~skip[start : start + len(rows)]).nonzero()[:, 0]
                if len(differing):
                    yield (differing + start).tolist()

    def is_region_of(self, descriptor: int, offset: int) -> bool:
        """True where the rows are those at `offset` of an open file: the same file, whatever path names it."""
        same_file = os.path.sameopenfile(self._descriptor, descriptor)
        return not self.temporary and same_file and self.offset == offset

    def fingerprint(self) -> str:
        """A digest over sizes and sampled rows; enough to tell that a path now names another file."""
        sample = self.rows(torch.linspace(0, self.shape[0] - 1, 64, device="cpu").long())
        return hashlib.sha256(repr((self.shape, self.dtype)).encode() + as_bits(sample).numpy().tobytes()).hexdigest()

    def _map(self) -> Tensor:
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        skip = self.offset - start
        # Private and writable although this mapping is never written: torch warns about buffers it may not write to.
        pages = mmap.mmap(self._descriptor, skip + self.num_bytes, flags=mmap.MAP_PRIVATE, offset=start)
        return torch.frombuffer(pages, dtype=self.dtype, count=self.shape[0] * self.shape[1], offset=skip).view(
            self.shape
        )

    @staticmethod
    def of(weight: Tensor, kept: Tensor, directory: str | None = None) -> "RowStore":
        """The store of `weight` [num_rows, dim]: the file that it maps, unchanged but for the rows `kept`, or a temporary one."""
        region = mapped_region(weight, kept)
        if region is not None:
            form = (weight.shape[0], weight.shape[1]), weight.dtype
            store = RowStore(region.descriptor, region.path, region.offset, *form, temporary=False)
            if maps_file(store._rows, region.file):  # and not another one that has taken its path
                return store
        return RowStore.copy(weight, directory)

    @staticmethod
    def copy(weight: Tensor, directory: str | None = None) -> "RowStore":
        """A temporary store of `weight` [num_rows, dim] (any device), copied block by block."""
        return RowStore.write(_blocks(weight.detach()), (weight.shape[0], weight.shape[1]), directory)

    @staticmethod
    def write(blocks: Iterable[tuple[int, Tensor]], shape: tuple[int, int], directory: str | None) -> "RowStore":
        """A temporary store of blocks (first row, rows)."""
        writer = None
        for start, block in blocks:
            writer = writer or RowWriter(shape, block.dtype, directory)
            writer.put(start, block)
        return (writer or RowWriter(shape, torch.float32, directory)).finish()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowStore":
        return self  # read-only, so copies of a model share it

    def __reduce__(self) -> tuple[Any, ...]:
        if self.temporary:  # nobody else has these rows: they travel along
            return RowStore.copy, (self._rows.clone(),)
        path = os.path.abspath(self.path)
        return _unpickle_reference, (path, self.offset, self.shape, self.dtype, self.fingerprint())


class RowWriter:
    """Writes a temporary store, rows in any order; rows that are never written are zeros and take no room.

    The file has no name once it is open, so that no crash leaves it behind.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, directory: str | None):
        self.shape, self.dtype = shape, dtype
        self._descriptor, self._path = tempfile.mkstemp(
            prefix="leanvocab-", suffix=".rows", dir=directory or folder_on_disk()
        )
        self._close = weakref.finalize(self, os.close, self._descriptor)
        os.unlink(self._path)
        os.ftruncate(self._descriptor, shape[0] * shape[1] * dtype.itemsize)

    def put(self, start: int, rows: Tensor) -> None:
        """Writes `rows` [n, dim] (any device) at row `start`."""
        data = as_bits(rows.cpu().contiguous()).numpy().data
        try:
            write_at(self._descriptor, data, start * self.shape[1] * self.dtype.itemsize)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"no room in {os.path.dirname(self._path)} for the full rows of the vocabulary matrix "
                f"({self.shape[0]:,} × {self.shape[1]:,}); name a folder with room: shrink_(…, store_dir=…)",
            ) from error

    def finish(self) -> RowStore:
        """The store; nothing can be written after."""
        self._close.detach()
        return RowStore(self._descriptor, self._path, 0, self.shape, self.dtype, temporary=True)


def folder_on_disk() -> str | None:
    """A folder for temporary files that is kept on disk where the usual one is memory (many systems mount /tmp so)."""
    usual, kept = file_system(tempfile.gettempdir()), file_system("/var/tmp")
    return "/var/tmp" if usual == "tmpfs" and kept not in ("tmpfs", None) else None


def file_system(folder: str) -> str | None:
    """The type of the file system that holds `folder`, by the system's list of mounts; None where that cannot be told."""
    try:
        lines = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    real = os.path.realpath(folder)
    above = [(point, kind) for point, kind in lines if os.path.commonpath([real, point]) == point]
    return max(above, key=lambda mount: len(mount[0]))[1] if above and os.access(folder, os.W_OK) else None


def _blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, BLOCK_BYTES // max(1, rows.shape[1] * rows.element_size()))
    return ((start, rows[start : start + step]) for start in range(0, rows.shape[0], step))


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[tensor.element_size()])


def same_bits(first: Tensor, second: Tensor) -> bool:
    """True for two tensors of one dtype and one shape with the same bits."""
    same_form = first.dtype == second.dtype and first.shape == second.shape
    return same_form and torch.equal(as_bits(first.cpu()), as_bits(second.cpu()))


def _unpickle_reference(
    path: str, offset: int, shape: tuple[int, int], dtype: torch.dtype, fingerprint: str
) -> RowStore:
    def refusal(why: str) -> CheckpointError:
        return CheckpointError(
            f"the pickled model refers to the full rows in {path}, which {why}; "
            "put the base checkpoint back there, or save the model with save_pretrained or save_full instead of pickling it"
        )

    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise refusal(f"cannot be opened ({error})") from error
    if os.fstat(descriptor).st_size < offset + shape[0] * shape[1] * dtype.itemsize:
        os.close(descriptor)
        raise refusal("is shorter than expected")
    store = RowStore(descriptor, path, offset, shape, dtype, temporary=False)
    if store.fingerprint() != fingerprint:
        raise refusal("holds other rows now")
    return store
