"""The rows of a table that do not train: where they lie, in which dtype, and their bytes (docs/decisions/frozen-rows.md)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from leanvocab.output.projection import CompactRows, FrozenBlock, MappedRows, Projection, rows_in_a_block
from leanvocab.output.row_filter import RowFilter
from leanvocab.partial.devices import Passage, brought, has_streams
from leanvocab.partial.partial_table import PartialTable

_BLOCKS = 16  # frozen rows are streamed in as many at least: of two on a device an eighth of the rows is there


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
    def frozen_rows(self) -> int:
        """Rows that do not train."""
        return self.full_rows - self.kept_rows

    @property
    def block_rows(self) -> int:
        """Rows that are on their way to the product at once."""
        rows = rows_in_a_block(self.dim, self.computed)
        return max(1, min(rows, -(-self.frozen_rows // _BLOCKS) if self.on_host else self.frozen_rows))

    @property
    def held_bytes(self) -> int:
        """The rows on the device, and two int64 [full_rows]: the id of each column, the column of each id."""
        num_values = self.frozen_rows * self.dim
        return 0 if self.on_host else num_values * self.held_dtype.itemsize + 2 * 8 * self.full_rows

    @property
    def moving_bytes(self) -> int:
        """From the host two blocks of rows, as they are held; and a block that is cast, where rows are."""
        value_bytes, held_bytes = self.computed.itemsize, self.held_dtype.itemsize
        cast_bytes = value_bytes if held_bytes < value_bytes else 0
        return self.block_rows * self.dim * (cast_bytes + (2 * held_bytes if self.on_host else 0))


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
        self._store, self._kept = table.store, table.token_ids  # a table that grows has others later
        self._passage: Passage | None = None
        self._whole: MappedRows | CompactRows | None = None
        on_host = table.frozen_rows_on == "host"
        full_rows, dim = self._source.shape
        self.sizes = FrozenSizes(full_rows, table.num_rows, dim, self._source.dtype, dtype, on_host)
        self.filter = None if table.filter_eps is None else RowFilter(table.filter_eps, self.sizes.frozen_rows)
        if last is not None:
            self.filter = last.filter  # which goes on counting
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
            mapped = MappedRows(self._source, self._kept)
            with torch.inference_mode(False):
                self._whole = mapped if self.device.type in self.mapped_on else self._compact()
        return self._whole

    def blocks(self, passing: bool) -> Iterator[FrozenBlock]:
        """The frozen columns, block by block; where they are `passing`, a block has the memory of the next but one."""
        step, num_rows = self.sizes.block_rows, self.sizes.frozen_rows
        kept = self._kept
        before, before_there = _frozen_before(kept), _frozen_before(brought(kept, self.device))
        starts = range(0, num_rows, step)

        def gather(number: int, room: Tensor | None = None) -> Tensor:
            ids = _frozen_ids(before, starts[number], min(starts[number] + step, num_rows))
            return self._gathered(ids, None if room is None else room[: len(ids)])

        if has_streams(self.device):
            if self._passage is None:
                self._passage = Passage((step, self.sizes.dim), self.sizes.held_dtype, self.device)
            blocks = self._passage.of(len(starts), gather)
        else:
            blocks = (gather(number).to(self.device) for number in range(len(starts)))
        for start, rows in zip(starts, blocks, strict=True):
            ids, there = _frozen_ids(before_there, start, start + len(rows)), rows.to(self.dtype, copy=not passing)
            yield FrozenBlock(ids, self.table.full_size, there)
            del rows, there  # before the next ones come

    def _gathered(self, ids: Tensor, room: Tensor | None = None) -> Tensor:
        """Rows of ids as they are held, on the CPU, in `room` if given."""
        if room is not None and room.dtype == self._source.dtype:
            return torch.index_select(self._source, 0, ids, out=room)
        rows = self._source.index_select(0, ids)
        return rows.to(self.sizes.held_dtype) if room is None else room.copy_(rows)

    def _compact(self) -> CompactRows:
        others = _frozen_ids(_frozen_before(self._kept), 0, self.sizes.frozen_rows)
        id_of_column = torch.cat([self._kept, others])
        column_of_id = torch.empty_like(id_of_column)
        column_of_id[id_of_column] = torch.arange(len(id_of_column), device="cpu")
        rows = torch.empty(len(others), self.sizes.dim, device=self.device, dtype=self.sizes.held_dtype)
        step = rows_in_a_block(self.sizes.dim, self._source.dtype)
        for start in range(0, len(others), step):
            rows[start : start + step].copy_(self._gathered(others[start : start + step]))
        return CompactRows(rows, id_of_column.to(self.device), column_of_id.to(self.device))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenRows":
        return self  # read-only, so copies of a model share it

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # made anew from the table


class FrozenLookup:
    """Frozen rows by their ids, on the device of a model, without waiting for it: for input tables whose other rows stay.

    An output layer that holds the same matrix multiplies the rows that are held here.
    """

    def __init__(self) -> None:
        self.rows: FrozenRows | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, table: PartialTable, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., dim] of ids, in `dtype`; those of ids that are kept, or are none, are of no meaning."""
        with torch.no_grad():
            if ids.device.type in FrozenRows.mapped_on:
                return F.embedding(ids.clamp(0, table.full_size - 1), table.frozen_rows()).to(dtype)
            if self.rows is None or not self.rows.fits(table, ids.device, dtype):
                self.rows = FrozenRows(table, ids.device, dtype, self.rows)
            whole = self.rows.whole()
            assert isinstance(whole, CompactRows)
            if len(whole.rows) == 0:  # every row is kept
                return whole.rows.new_zeros(*ids.shape, whole.rows.shape[1], dtype=dtype)
            columns = whole.columns_of(ids.flatten()).sub_(table.num_rows).clamp_(min=0)
            return whole.rows.index_select(0, columns).to(dtype).view(*ids.shape, -1)

    def clear(self) -> None:
        """Lets go of the rows, which are brought again when they are needed."""
        self.rows = None

    def follow(self, device: torch.device) -> None:
        """Lets go of rows on another device than the model's."""
        if self.rows is not None and self.rows.device != device:
            self.rows = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenLookup, ()


def _frozen_before(kept_ids: Tensor) -> Tensor:
    """The number of frozen rows before each kept one."""
    return kept_ids - torch.arange(len(kept_ids), device=kept_ids.device)


def _frozen_ids(before: Tensor, start: int, stop: int) -> Tensor:
    """Ids of frozen rows from one number to another, in their order: as many higher as kept rows come before them."""
    numbers = torch.arange(start, stop, device=before.device)
    return numbers + torch.searchsorted(before, numbers, right=True)
