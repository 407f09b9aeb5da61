"""One vocabulary matrix while it is shrunk, beside its partial rows: which rows these are, and where the others are."""

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from leanvocab.choices import Ids, OnMissing
from leanvocab.files.row_store import RowStore, put_rows
from leanvocab.partial.decay import DecayReplay
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


class PartialTable:
    """One vocabulary matrix while it is shrunk: what the modules that share it (ties) have in common."""

    def __init__(
        self,
        name: str,
        vocabulary: PartialVocabulary,
        store: RowStore,
        *,
        on_missing: OnMissing | None,
        ids: Ids,
        store_dir: str | None,
        decay: DecayReplay | None,
        output: str | None = None,
        frozen_rows_on: str = "device",
    ):
        self.name, self.vocabulary, self.on_missing, self.ids = name, vocabulary, on_missing, ids
        self.output = output  # "frozen" or "restricted", where an output layer holds the matrix
        self.frozen_rows_on = frozen_rows_on
        self.store_dir, self.decay = store_dir, decay
        self.token_ids = torch.tensor(vocabulary.token_ids, dtype=torch.int64, device="cpu")
        self.num_rows, self.full_size = len(vocabulary), vocabulary.full_size
        self.num_served = 0  # positions whose row came from the base
        self.gives_partial_state_dicts = False
        self.store = store
        self._casts: list[torch.dtype] = []  # casts that the model went through after it was shrunk, not yet applied
        self._last_view: weakref.ref[Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the full rows have, casts included."""
        return self._casts[-1] if self._casts else self.store.dtype

    def cast(self, dtype: torch.dtype) -> None:
        """Notes that the model was cast: ordinary rows would have been rounded then, so the full rows are, when needed."""
        if dtype != self.dtype:
            self._casts.append(dtype)

    def replace_store(self, store: RowStore) -> None:
        """Takes other full rows, as they are now: nothing that happened before applies to them."""
        self.store, self._casts = store, []
        if self.decay is not None:
            self.decay.forget()

    def base_rows(self, token_ids: Tensor) -> Tensor:
        """Rows that ordinary training would hold now for ids outside the vocabulary, on CPU."""
        self.settle_decay()
        return self._cast(self.store.rows(token_ids))

    def frozen_rows(self) -> Tensor:
        """All rows as the base has them, on CPU, mapped; those of kept ids are stale. Not to be written to.

        Of the dtype that they are stored in, where casting them to `dtype` would lose nothing.
        """
        self.settle_decay()
        if not self._casts_lose_nothing():
            self._settle_casts()
        return self.store.private_view()

    def full_rows(self, partial: Tensor) -> Tensor:
        """All rows [full_size, dim] with the partial ones written over them, on CPU, as a copy-on-write mapping."""
        self.settle_decay()
        self.cast(partial.dtype)
        self._settle_casts()
        view = self.store.private_view()
        put_rows(view, self.token_ids, partial.detach())
        return view

    def settle_decay(self) -> None:
        """Replays the weight decay that was logged since the full rows were last needed."""
        if self.decay is not None and self.decay.pending:
            self._settle_casts()
            self.store = self.decay.replay(self.store, self.store_dir)

    def view_for(self, state_dict: dict[str, Any], partial: Tensor) -> Tensor:
        """The full rows for one state dict: tied modules get the same memory, as tied weights have."""
        last = self._last_view() if self._last_view is not None else None
        if last is not None and any(value is last for value in state_dict.values()):
            return last.detach()
        view = self.full_rows(partial)
        self._last_view = weakref.ref(view)
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_view": None}

    def _casts_lose_nothing(self) -> bool:
        """True where each cast was to a wider dtype, as that of bf16 rows to fp32 by `prepare_model_for_kbit_training`."""
        dtypes = [self.store.dtype, *self._casts]
        return all(torch.promote_types(first, then) == then for first, then in itertools.pairwise(dtypes))

    def _settle_casts(self) -> None:
        if self._casts:
            self.store = self.store.mapped(self._cast, self.store_dir)
            self._casts = []

    def _cast(self, rows: Tensor) -> Tensor:
        return functools.reduce(lambda cast, dtype: cast.to(dtype), self._casts, rows)
