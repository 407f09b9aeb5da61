"""One vocabulary matrix while it is shrunk, beside its partial rows: which rows these are, and where the others are."""

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from leanvocab.choices import FilterEps, Ids, OnMissing
from leanvocab.errors import BypassError
from leanvocab.files.row_store import RowStore, put_rows, take_rows
from leanvocab.partial.decay import DecayReplay
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


class GivenRows:
    """Full rows that a state dict gave out for partial ones, as a copy where ordinary state dicts give the memory itself.

    What is written to them in place is meant for the model (docs/decisions/written-state-dicts.md). Until the first look they are
    held here too, since the loop that writes lets go of them at once; after it, whoever asked for them holds them alone.
    """

    def __init__(self, rows: Tensor, partial: Tensor):
        self.partial = weakref.ref(partial)
        self._held: Tensor | None = rows.detach()
        self._given: list[weakref.ref[Tensor]] = []
        self._counter = rows.detach()  # counts writes to the rows, without their memory
        self._counter.data = rows.new_empty(0)
        self.add(rows)
        self.look(partial)

    def add(self, rows: Tensor) -> None:
        """Notes another tensor of the same memory, as a tied module gets one."""
        self._given.append(weakref.ref(rows))

    @property
    def is_written(self) -> bool:
        """True where somebody wrote to the rows since the last look."""
        return self._counter._version != self._num_writes

    @property
    def rows(self) -> Tensor | None:
        """The rows, where anybody holds them."""
        given = (reference() for reference in self._given)
        return self._held if self._held is not None else next((rows for rows in given if rows is not None), None)

    def fits(self, partial: Tensor) -> bool:
        """True where `partial` is what the rows were made of, and has not changed since the last look."""
        return self.partial() is partial and partial._version == self._partial_version

    def look(self, partial: Tensor | None) -> None:
        """Takes note of all writes until now; with None, of a partial tensor that is not what these rows say."""
        self._num_writes = self._counter._version
        self._partial_version = -1 if partial is None else partial._version

    def let_go(self) -> bool:
        """Holds the rows no longer; True where somebody else does, who may write to them."""
        self._held = None
        return self.rows is not None


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
        filter_eps: FilterEps | None = None,
    ):
        self.name, self.vocabulary, self.on_missing, self.ids = name, vocabulary, on_missing, ids
        self.output = output  # "frozen" or "restricted", where an output layer holds the matrix
        self.frozen_rows_on = frozen_rows_on
        self.filter_eps = filter_eps  # of frozen rows that are left out of the gradient of hidden states
        self.store_dir, self.decay = store_dir, decay
        self.token_ids = torch.tensor(vocabulary.token_ids, dtype=torch.int64, device="cpu")
        self.num_rows, self.full_size = len(vocabulary), vocabulary.full_size
        self.num_served = 0  # positions whose row came from the base
        self.gives_partial_state_dicts = False
        self.store = store
        self._casts: list[torch.dtype] = []  # casts that the model went through after it was shrunk, not yet applied
        self._last_view: weakref.ref[Tensor] | None = None
        self._given: list[GivenRows] = []
        self.given_states: list[Any] = []  # full states that optimizers gave out
        self.earlier: dict[int, Tensor] = {}  # token ids of the rows that there were once, by their number
        self.arrivals: Any = (
            None  # where further rows may come at any time: what gives them, and what living graphs need
        )
        self.look_up_frozen: Any = None  # (table, ids, dtype) → rows that are not kept, on the ids' device
        self.followers: list[PartialTable] = []  # of output layers, which get the rows that come here

    def keep(self, vocabulary: PartialVocabulary) -> None:
        """Takes another vocabulary over the same rows; the partial rows are the caller's to change."""
        self.settle()
        self.pass_over_writes(forget=True)
        self.earlier[self.num_rows] = self.token_ids
        self.vocabulary, self.num_rows = vocabulary, len(vocabulary)
        self.token_ids = torch.tensor(vocabulary.token_ids, dtype=torch.int64, device="cpu")
        self._last_view = None

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

    def adopt(self, full: Tensor, dtype: torch.dtype) -> None:
        """Rows outside the vocabulary that differ from the store's are the table's from now on, as ordinary loading has it.

        A table that may grow gets them as rows of its own; where all rows were decayed, they are no sign of training.
        """
        self.settle()
        if self.arrivals is not None and self.decay is None and full.dtype == self.dtype == self.store.dtype:
            differing = self.store.differing(full, self.token_ids)
            if differing:
                self.arrivals.extend(self, differing)
            return
        if self.dtype != self.store.dtype or self.store.differs(full, self.token_ids):
            is_cast = full.dtype != dtype
            self.replace_store(
                RowStore.copy(full.to(dtype), self.store_dir)
                if is_cast
                else RowStore.of(full, self.token_ids, self.store_dir)
            )

    def base_rows(self, token_ids: Tensor) -> Tensor:
        """Rows that ordinary training would hold now for ids outside the vocabulary, on CPU."""
        self.settle()
        return self._cast(self.store.rows(token_ids))

    def frozen_rows(self) -> Tensor:
        """All rows as the base has them, on CPU, mapped; those of kept ids are stale. Not to be written to.

        Of the dtype that they are stored in, where casting them to `dtype` would lose nothing.
        """
        self.settle()
        if not self._casts_lose_nothing():
            self._settle_casts()
        return self.store.private_view()

    def full_rows(self, partial: Tensor) -> Tensor:
        """All rows [full_size, dim] with the partial ones written over them, on CPU, as a copy-on-write mapping."""
        self.settle()
        self.cast(partial.dtype)
        self._settle_casts()
        view = self.store.private_view()
        put_rows(view, self.token_ids, partial.detach())
        return view

    def settle(self) -> None:
        """Brings the full rows up to date: what was written to a state dict, and decay since they were last needed."""
        self.take_writes()
        if self.decay is not None and self.decay.pending:
            self._settle_casts()
            self.store = self.decay.replay(self.store, self.store_dir)

    def view_for(self, state_dict: dict[str, Any], partial: Tensor) -> Tensor:
        """The full rows for one state dict: tied modules get the same memory, as tied weights have."""
        last = self._last_view() if self._last_view is not None else None
        if last is not None and any(value is last for value in state_dict.values()):
            return last.detach()
        with torch.inference_mode(False):  # where writes would not be counted
            view = self.full_rows(partial)
        self._last_view = weakref.ref(view)
        return view

    def gave(self, full: Tensor, partial: Tensor) -> None:
        """Notes rows that a state dict gives out in place of `partial`: what is written to them is the table's."""
        self._last_view = weakref.ref(full)
        last = self._given[-1] if self._given else None
        if last is not None and last.rows is not None and last.rows.data_ptr() == full.data_ptr():
            last.add(full)
        else:
            with torch.inference_mode(False):
                self._given.append(GivenRows(full, partial))

    def take_writes(self) -> None:
        """Makes what was written in place to rows that state dicts gave out the table's own, and lets go of those rows.

        Raises `BypassError`, once, where the table itself has changed in the meantime.
        """
        looked_at, self._given = self._given, []
        for given in looked_at:
            if given.is_written:
                self._take(given)
            if given.let_go():
                self._given.append(given)

    def pass_over_writes(self, *, forget: bool = False) -> None:
        """Lets writes until now count for nothing, since the table is loaded; with `forget`, later ones too."""
        for given in self._given:
            given.look(None)
        self._given = [] if forget else [given for given in self._given if given.let_go()]

    def _take(self, given: GivenRows) -> None:
        partial, rows = given.partial(), given.rows
        if partial is None or rows is None or not given.fits(partial):
            raise BypassError(
                f"{self.name}: a state dict that was taken before the table changed was written to in place. Full rows in state "
                "dicts of a shrunk model are copies: a write reaches the model until it trains on. Take a new state dict each "
                "time, hand the one that was written to load_state_dict, write to named_parameters() (as averages by parameters "
                "do), or call merge_(model) first"
            )
        with torch.no_grad():
            partial.copy_(take_rows(rows.detach(), self.token_ids))
        self.adopt(rows.detach(), partial.dtype)
        given.look(partial)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_view": None, "_given": [], "given_states": []}

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
