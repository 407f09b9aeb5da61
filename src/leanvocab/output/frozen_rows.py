"""The rows of a table that do not train: where they lie, in which dtype, and their bytes (docs/decisions/frozen-rows.md)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from leanvocab.output.projection import CompactRows, MappedRows, Projection, rows_in_a_block
from leanvocab.partial.devices import brought, device_module, has_streams, wait_for
from leanvocab.partial.partial_table import PartialTable


@dataclass(frozen=True)
class FrozenSizes:
    """Sizes of frozen rows on a GPU, from shapes and dtypes alone."""

    full_rows: int
    kept_rows: int
    dim: int
    stored: torch.dtype
    computed: torch.dtype
    on_host: bool  # they come to the device block by block

    @property
    def held_dtype(self) -> torch.dtype:
        """The narrower one of the dtypes in which rows are stored and multiplied.

        Rows of bf16 that are multiplied in fp32 (QLoRA's) take no more room than they did.
        """
        return self.computed if self.computed.itemsize <= self.stored.itemsize else self.stored

    @property
    def block_rows(self) -> int:
        """Rows that are on their way to the product at once."""
        return min(self.full_rows, rows_in_a_block(self.dim, self.computed))

    @property
    def columns_at_once(self) -> int:
        """Columns of one product."""
        return self.block_rows if self.on_host else self.full_rows

    @property
    def held_bytes(self) -> int:
        """The rows on the device, and two int64 [full_rows]: the id of each column, the column of each id."""
        num_values = (self.full_rows - self.kept_rows) * self.dim
        return 0 if self.on_host else num_values * self.held_dtype.itemsize + 2 * 8 * self.full_rows

    @property
    def moving_bytes(self) -> int:
        """A block of rows that is cast; from the host, that block and the next one, and this as it comes where it is cast."""
        value_bytes, held_bytes = self.computed.itemsize, self.held_dtype.itemsize
        is_cast = held_bytes < value_bytes
        moving_bytes = 2 * value_bytes + is_cast * held_bytes if self.on_host else is_cast * value_bytes
        return self.block_rows * self.dim * moving_bytes


class FrozenRows:
    """The rows of a table that do not train, where they are multiplied.

    On a CPU they are a view of the table's store, which may be a mapped file. On another device they are held there, without
    the kept ones, or brought there block by block.
    """

    mapped_on: ClassVar[frozenset[str]] = frozenset({"cpu"})
    """Types of devices that multiply the rows of the store where they lie; all others hold a compact copy."""

    def __init__(self, table: PartialTable, device: torch.device, dtype: torch.dtype, last: "FrozenRows | None" = None):
        """`last` are rows of the table for another dtype, perhaps: those that hold enough are not brought again."""
        self.table, self.device, self.dtype = table, device, dtype
        with torch.inference_mode(False):  # training goes on with what an evaluation made
            self._source = table.frozen_rows()
        self._store = table.store
        self._rooms: list[tuple[Tensor, Any]] = []  # pinned, each with the event that it is free
        self._whole: MappedRows | CompactRows | None = None
        on_host = table.frozen_rows_on == "host"
        full_rows, dim = self._source.shape
        self.sizes = FrozenSizes(full_rows, table.num_rows, dim, self._source.dtype, dtype, on_host)
        if last is not None and last.serves(table, device, self.sizes.held_dtype):
            self._whole = last._whole

    def fits(self, table: PartialTable, device: torch.device, dtype: torch.dtype) -> bool:
        """True while these are the rows of the table, for this device and dtype."""
        return self._store is table.store and self.device == device and self.dtype == dtype

    def serves(self, table: PartialTable, device: torch.device, held_dtype: torch.dtype) -> bool:
        """True where the rows that are held here are those of the table, in a dtype that loses nothing of another."""
        held = self._whole
        if held is None or self._store is not table.store or self.device != device:
            return False
        return torch.promote_types(held.rows.dtype, held_dtype) == held.rows.dtype

    def whole(self) -> Projection:
        """All columns at once."""
        if self._whole is None:
            mapped = MappedRows(self._source, self.table.token_ids, slice(0, self.table.num_rows))
            with torch.inference_mode(False):
                self._whole = mapped if self.device.type in self.mapped_on else self._compact()
        return self._whole

    def blocks(self) -> Iterator[MappedRows]:
        """All columns, one block after the other."""
        step = self.sizes.block_rows
        ids = self.table.token_ids
        ids_there = brought(ids, self.device)
        for start in range(0, len(self._source), step):
            rows = self._source[start : start + step]
            first, last = (
                int(index) for index in torch.searchsorted(ids, torch.tensor([start, start + len(rows)], device="cpu"))
            )
            here = ids_there[first:last] - start
            number = start // step
            yield MappedRows(self._brought(rows, number).to(self.dtype), here, slice(first, last), start)

    def _brought(self, rows: Tensor, number: int) -> Tensor:
        """A block of rows on the device, by one of two pieces of pinned memory: written to again once the copy was made."""
        if not has_streams(self.device):
            return rows.to(self.sizes.held_dtype).to(self.device)
        module = device_module(self.device)
        if not self._rooms:
            shape, dtype = (self.sizes.block_rows, self.sizes.dim), self.sizes.held_dtype
            with torch.inference_mode(False):
                rooms = [torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True) for _ in range(2)]
            self._rooms = [(room, module.Event()) for room in rooms]
        room, is_free = self._rooms[number % 2]
        wait_for(is_free)
        there = room[: len(rows)].copy_(rows).to(self.device, non_blocking=True)
        is_free.record(module.current_stream(self.device))
        return there

    def _compact(self) -> CompactRows:
        kept = torch.zeros(self.table.full_size, dtype=torch.bool, device="cpu")
        kept[self.table.token_ids] = True
        others = (~kept).nonzero()[:, 0]
        id_of_column = torch.cat([self.table.token_ids, others])
        column_of_id = torch.empty_like(id_of_column)
        column_of_id[id_of_column] = torch.arange(len(id_of_column), device="cpu")
        dtype = self.sizes.held_dtype
        rows = torch.empty(len(others), self.sizes.dim, device=self.device, dtype=dtype)
        step = rows_in_a_block(self.sizes.dim, self._source.dtype)
        for start in range(0, len(others), step):
            rows[start : start + step].copy_(self._source[others[start : start + step]].to(dtype))
        return CompactRows(rows, id_of_column.to(self.device), column_of_id.to(self.device))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenRows":
        return self  # read-only, so copies of a model share it

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # made anew from the table
