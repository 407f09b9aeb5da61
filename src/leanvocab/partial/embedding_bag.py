"""An nn.EmbeddingBag whose lookup remaps: sums, means and maxima of rows that are read by full ids."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvocab.partial.embedding import RemapLookup


class RemapEmbeddingBag(RemapLookup, nn.EmbeddingBag):
    """Bags of rows of a partial vocabulary: takes what the full one takes, and gives the same bits.

    Where rows come from elsewhere (a base, or as they are needed), bags are made of rows that were gathered, so that gradients
    are added as the full bag adds them: each id's once where they are dense, each occurrence's where they are sparse. On devices
    whose values nobody waits for, a missing id makes all bags NaN until it is raised.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        self.begin()
        ends = self.include_last_offset
        if input.is_nested:  # as F.embedding_bag takes it apart
            offsets, input, ends = input.offsets(), input.values().reshape(-1), True  # type: ignore[attr-defined]
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.values().reshape(-1)
        partial_ids = self.partial_ids_of(input)
        missing = partial_ids < 0
        padding = self.partial_id(self.padding_idx)
        if self.table.arrivals is not None:
            return self._of_gathered(input, missing, offsets, per_sample_weights, ends)  # type: ignore[no-any-return]
        if self.is_left_to_device(input):
            self.missing.add(input, missing)
            bags = self._bags(self.weight, partial_ids.clamp(min=0), padding, offsets, per_sample_weights, ends)
            return bags.masked_fill(missing.any(), float("nan"))
        if input.is_meta or not missing.any():
            return self._bags(self.weight, partial_ids, padding, offsets, per_sample_weights, ends)
        return self._of_gathered(input, missing, offsets, per_sample_weights, ends)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _of_gathered(
        self, input: Tensor, missing: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, ends: bool
    ) -> Tensor:
        """Bags of rows [ids of the batch, dim], those outside the vocabulary as the policy says."""
        self.refuse_missing(input, missing)
        ids, positions = input.flatten(), torch.arange(input.numel(), device=input.device).view(input.shape)
        if not self.sparse:
            ids, positions = input.unique(return_inverse=True)
        rows, padding = self.rows_at(ids, self.lookup, self.padding_idx), None
        if self.padding_idx is not None and bool((input == self.padding_idx).any()):
            padding = int((ids == self.padding_idx).nonzero()[0])
            positions = positions.masked_fill(input == self.padding_idx, padding)
        return self._bags(rows, positions, padding, offsets, per_sample_weights, ends)

    def _bags(
        self,
        rows: Tensor,
        ids: Tensor,
        padding: int | None,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        ends: bool,
    ) -> Tensor:
        is_weight = rows is self.weight  # or else rows that the lookup has bounded already, and whose gradient is dense
        return F.embedding_bag(
            ids,
            rows,
            offsets,
            self.max_norm if is_weight else None,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse and is_weight,
            per_sample_weights,
            ends,
            padding,
        )


RemapEmbeddingBag.kind = RemapEmbeddingBag
