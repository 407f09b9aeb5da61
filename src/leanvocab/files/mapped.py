"""The region of a file that a tensor maps, found out from /proc and the flags of its pages (docs/decisions/page-flags.md)."""

import mmap
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_File = tuple[str, str]  # device and inode: what tells whether two mappings are of one file


class Region(NamedTuple):
    """Bytes of a file from `offset` on; the file is open as `descriptor`."""

    descriptor: int
    path: str
    offset: int
    file: _File


class _Mapping(NamedTuple):
    """One line of /proc/self/maps."""

    start: int
    end: int
    offset: int
    file: _File
    path: str


def mapped_region(weight: Tensor, kept: Tensor) -> Region | None:
    """The region that `weight` [num_rows, dim] maps, if it maps one and no other row than `kept` was written to since."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or weight.numel() == 0:
        return None
    address, num_bytes = weight.data_ptr(), weight.numel() * weight.element_size()
    try:
        mapping = _mapping_at(address)
        if mapping is None or mapping.end < address + num_bytes or not mapping.path.startswith("/"):
            return None
        if _other_rows_written(weight, kept):
            return None
        descriptor = os.open(mapping.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no /proc, or the file was replaced: then the rows are copied
        return None
    offset = mapping.offset + address - mapping.start
    if offset % weight.element_size() or os.fstat(descriptor).st_size < offset + num_bytes:
        os.close(descriptor)
        return None
    return Region(descriptor, mapping.path, offset, mapping.file)


def maps_file(tensor: Tensor, file: _File) -> bool:
    """True where a tensor maps that very file."""
    mapping = _mapping_at(tensor.data_ptr())
    return mapping is not None and mapping.file == file


def _mapping_at(address: int) -> _Mapping | None:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, device, inode, *path = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end and inode != "0":
            return _Mapping(start, end, int(offset, 16), (device, inode), "".join(path))
    return None


def _other_rows_written(weight: Tensor, kept: Tensor) -> bool:
    """True where another row than `kept` lies on a page that was written to after it was mapped.

    A private page that was written to is no longer a page of the file, and the kernel says so: nothing need be compared.
    """
    address, page = weight.data_ptr(), mmap.PAGESIZE
    row_bytes = weight.shape[1] * weight.element_size()
    starts = _written_pages(address, weight.numel() * weight.element_size()) * page - address
    touched = np.zeros(weight.shape[0] + 1, np.int64)  # a difference array over the rows that written pages touch
    np.add.at(touched, np.clip(starts // row_bytes, 0, weight.shape[0] - 1), 1)
    np.add.at(touched, np.clip((starts + page - 1) // row_bytes, 0, weight.shape[0] - 1) + 1, -1)
    others = np.cumsum(touched[:-1]) > 0
    others[kept.cpu().numpy()] = False
    return bool(others.any())


def _written_pages(address: int, num_bytes: int) -> NDArray[np.int64]:
    """Numbers of the pages of some bytes that are the process's own (Documentation/admin-guide/mm/pagemap.rst)."""
    first, last = address // mmap.PAGESIZE, (address + num_bytes - 1) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        flags = np.frombuffer(file.read(8 * (last - first + 1)), np.uint64)
    present, swapped, of_file = (flags >> np.uint64(bit) & np.uint64(1) for bit in (63, 62, 61))
    return first + np.flatnonzero(swapped | (present & (1 - of_file)))
