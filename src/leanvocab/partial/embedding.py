"""An nn.Embedding whose lookup remaps: `weight[remap[ids]]`. Ids outside it stay full, so nothing else changes.

The module object is kept. Its weight becomes partial, its class one with `RemapEmbedding` under the original class in
the order of inheritance, so that subclasses that scale or normalise in a forward of their own keep doing so. What it has in
common with bags of rows is `RemapLookup`.
"""

import warnings
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvocab.errors import LeanVocabWarning, MissingTokenError
from leanvocab.partial.devices import brought
from leanvocab.partial.growth import Lookup, looked_up, refuse_where_rows_cannot_come
from leanvocab.partial.missing import describe_missing, running_model
from leanvocab.partial.module import PartialModule


class RemapLookup(PartialModule):
    """A module that holds the rows of a partial vocabulary and is asked for full ids: int32 or int64, of any shape.

    `weight` is [len(vocabulary), dim]; `num_embeddings` and `padding_idx` stay those of the full table. Made by `switch_class`.

    In training mode an id outside the vocabulary raises `MissingTokenError`: on CPU at once; elsewhere before the next
    optimizer step or forward, since looking at a device's values waits for the device (until then its row reads NaN).
    """

    num_embeddings: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    own_attributes: ClassVar[tuple[str, ...]] = (*PartialModule.own_attributes, "_remap", "_partial_padding_idx")
    _remap: Tensor  # int64 [full_size + 2]: partial id of each id + 1, or -1; one more at each end for ids out of range
    _partial_padding_idx: int | None

    def settle_on_device(self) -> None:
        """The map from ids to rows, on the weight's device."""
        super().settle_on_device()
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        if self.table.look_up_frozen is not None:
            self.table.look_up_frozen.follow(device)
        if "_remap" in self.__dict__:
            self._remap = self._remap.to(device)
            return
        remap = torch.full((self.table.full_size + 2,), -1, dtype=torch.int64, device="cpu")
        remap[self.table.token_ids + 1] = torch.arange(self.table.num_rows, device="cpu")
        padding = -1 if self.padding_idx is None else int(remap[self.padding_idx + 1])
        self._remap = brought(remap, device)
        self._partial_padding_idx = None if padding < 0 else padding

    def rows_changed(self) -> None:
        self.__dict__.pop("_remap", None)
        super().rows_changed()

    def rows_at(self, input: Tensor, lookup: Lookup, padding_idx: int | None = None) -> Tensor:
        """The rows [..., dim] of full ids, those outside as the policy says; `lookup` reads rows by partial ids.

        `padding_idx` is the id whose row gets no gradient from this read."""
        partial_ids = self.partial_ids_of(input)
        missing = partial_ids < 0
        policy = self.policy
        if policy == "extend":
            refuse_where_rows_cannot_come(self.table, self.weight)
        if policy == "frozen":
            return self._beside_frozen_rows(input, partial_ids, lookup, padding_idx)
        if self.is_left_to_device(input):
            # Without waiting for the device: a missing id is noted there and its row reads NaN, with no gradient.
            self.missing.add(input, missing)
            rows = self._read(input, partial_ids.clamp(min=0), lookup, padding_idx)
            return rows.masked_fill(missing.unsqueeze(-1), float("nan"))
        if input.is_meta:
            return self._read(input, partial_ids, lookup, padding_idx)
        ids, is_missing = _on_host(input, missing)
        if not is_missing.any():
            return self._read(input, partial_ids, lookup, padding_idx)
        self._refuse(ids, is_missing)
        if policy == "extend":
            self.table.arrivals.extend(self.table, ids[is_missing].unique().tolist())
            return self._read(input, self.partial_ids_of(input), lookup, padding_idx)
        served: Tensor = self._with_base_rows(ids, is_missing, partial_ids, lookup, padding_idx)
        return served

    def _beside_frozen_rows(
        self, input: Tensor, partial_ids: Tensor, lookup: Lookup, padding_idx: int | None
    ) -> Tensor:
        """Kept rows, and frozen ones where an id has none; nothing waits for a device."""
        missing = partial_ids < 0
        wrong = (input < 0) | (input >= self.table.full_size)
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            self.missing.add(input, wrong)
        elif wrong.any():
            raise self._missing_token_error(input, int(wrong.flatten().nonzero()[0]))
        rows = self._read(input, partial_ids.clamp(min=0), lookup, padding_idx)
        if input.is_meta:
            return rows
        others = self.table.look_up_frozen(self.table, input, rows.dtype)
        chosen = torch.where(missing.unsqueeze(-1), others, rows)
        return chosen.masked_fill(wrong.unsqueeze(-1), float("nan")) if input.device.type != "cpu" else chosen

    def drop_caches(self) -> None:
        if self.table.look_up_frozen is not None:
            self.table.look_up_frozen.clear()

    def _read(self, ids: Tensor, partial_ids: Tensor, lookup: Lookup, padding_idx: int | None) -> Tensor:
        """Rows by partial ids; of a table that may grow, by full ones, which stay right when it does."""
        padding = self._partial_padding_idx if padding_idx == self.padding_idx else self.partial_id(padding_idx)
        if self.table.arrivals is None or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return lookup(self.weight, partial_ids, padding)
        known = partial(_known, self._remap, self.table.full_size)
        its_lookup = partial(_with_padding, lookup, padding)
        return looked_up(self.weight, self.table, ids, known, its_lookup)  # type: ignore[arg-type]

    def row_at(self, token_id: int) -> Tensor:
        """The row [dim] of one full id that the host knows, found without asking a device."""
        table = self.table
        known = range(table.num_rows) if table.ids == "partial" else table.vocabulary
        if token_id in known:
            return self.rows[token_id if table.ids == "partial" else table.vocabulary.to_partial(token_id)]
        if self.policy == "error" or not 0 <= token_id < table.full_size:
            raise MissingTokenError(describe_missing(table, token_id, "a read of the weight itself"))
        if self.policy == "extend":
            table.arrivals.extend(table, [token_id])
            return self.row_at(token_id)
        if self.policy == "frozen":
            row: Tensor = table.look_up_frozen(
                table, torch.tensor([token_id], device=self.weight.device), self.weight.dtype
            )
            return row[0]
        ids, missing = torch.tensor([token_id], device="cpu"), torch.ones(1, dtype=torch.bool, device="cpu")
        rows: Tensor = self._with_base_rows(ids, missing, brought(ids, self.weight.device), self.lookup, None)
        return rows[0]

    @property
    def policy(self) -> str:
        """The answer to an id outside the vocabulary, in the mode that the module is in."""
        asked = self.table.on_missing or ("error" if self.training else "base")
        return "base" if asked == "extend" and not self.training else asked

    def partial_ids_of(self, input: Tensor) -> Tensor:
        """The partial id of each id, -1 where it has none."""
        if self.table.ids == "partial":
            return input.where((input >= 0) & (input < self.table.num_rows), -1)
        remap = self._remap
        if remap.device != input.device:
            remap = remap.to(input.device)
            if not input.is_meta:
                self._remap = remap
        return _known(remap, self.table.full_size, input)

    def partial_id(self, token_id: int | None) -> int | None:
        """The partial id of a full one; None where it has none."""
        return self.table.vocabulary.to_partial(token_id) if token_id in self.table.vocabulary else None

    def lookup(self, weight: Tensor, partial_ids: Tensor, padding: int | None) -> Tensor:
        """Rows by partial ids, as torch's own forward reads them."""
        return F.embedding(
            partial_ids,
            weight,
            padding,
            self.max_norm if weight is self.weight else None,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    def error_of(self, position: int, token_id: int) -> MissingTokenError:
        return MissingTokenError(describe_missing(self.table, token_id, f"flat position {position} of the input"))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _with_base_rows(
        self, input: Tensor, missing: Tensor, partial_ids: Tensor, lookup: Lookup, padding_idx: int | None
    ) -> Tensor:
        """Looks up ids of which some are missing; `input` and `missing` are on the CPU, and nothing waits for the device."""
        outside = input[missing]
        device = partial_ids.device
        of_known, of_others = (brought(mask.flatten().nonzero()[:, 0], device) for mask in (~missing, missing))
        of_them = partial_ids.flatten().index_select(0, of_known)
        known = lookup(self.weight, of_them, self.partial_id(padding_idx))
        rows = brought(self.table.base_rows(outside).to(known.dtype), device)
        if self.max_norm is not None:
            rows = F.embedding(torch.arange(len(rows), device=rows.device), rows, None, self.max_norm, self.norm_type)
        output = known.new_empty(input.numel(), known.shape[-1])
        output = output.index_copy_(0, of_known, known).index_copy_(0, of_others, rows).view(*input.shape, -1)
        self._count_served(len(rows), int(outside[0]))
        return output

    def is_left_to_device(self, input: Tensor) -> bool:
        """True where a missing id is noted on the device of `input`, and raised later."""
        is_host = input.device.type == "cpu" and not torch.compiler.is_compiling()
        policy = self.policy
        return not is_host and (policy == "error" or (policy == "extend" and running_model() is not None))

    def refuse_missing(self, input: Tensor, missing: Tensor) -> None:
        """Raises `MissingTokenError` where the policy says so, for the first of `input` where `missing`."""
        self._refuse(*_on_host(input, missing))

    def _refuse(self, input: Tensor, missing: Tensor) -> None:
        """Raises for what is no token id at all, and for the first missing id where that is an error."""
        limit = self.table.full_size if self.table.ids == "full" else 0
        wrong = missing & ((input < 0) | (input >= limit))
        if self.policy == "error":
            wrong = wrong if bool(wrong.any()) else missing
        if bool(wrong.any()):
            raise self._missing_token_error(input, int(wrong.flatten().nonzero()[0]))

    def _count_served(self, num_served: int, first_id: int) -> None:
        if self.table.num_served == 0:
            warnings.warn(
                f"{self.table.name}: ids outside the partial vocabulary, the first of them "
                f"{self.table.vocabulary.describe(first_id)}, are served from the base; status(model) counts them",
                LeanVocabWarning,
                stacklevel=2,
            )
        self.table.num_served += num_served

    def _missing_token_error(self, input: Tensor, flat_position: int) -> MissingTokenError:
        position = tuple(
            int(index) for index in torch.unravel_index(torch.tensor(flat_position, device="cpu"), input.shape)
        )
        where = f"position {position if len(position) != 1 else position[0]} of the input"
        return MissingTokenError(describe_missing(self.table, int(input.flatten()[flat_position]), where))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.table.num_rows}"


class RemapEmbedding(RemapLookup, nn.Embedding):
    """An embedding over a partial vocabulary: full ids [...] → rows [..., dim], bit for bit what the full table gives."""

    def forward(self, input: Tensor) -> Tensor:
        self.begin()
        return self.rows_at(input, self.lookup, self.padding_idx)


def _with_padding(lookup: Lookup, padding: int | None, weight: Tensor, partial_ids: Tensor) -> Tensor:
    return lookup(weight, partial_ids.clamp(min=0), padding)  # what has no row is masked by the caller


def _known(remap: Tensor, full_size: int, ids: Tensor) -> Tensor:
    """The partial id of each id, -1 where it has none."""
    partial_ids: Tensor = remap[(ids + 1).clamp_(0, full_size + 1)]
    return partial_ids


def _on_host(input: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and which of them are missing, on the CPU, in one wait."""
    if input.device.type == "cpu":
        return input, missing
    ids, is_missing = torch.stack([input, missing.to(input.dtype)]).cpu()
    return ids, is_missing.bool()


RemapEmbedding.kind = RemapEmbedding
