"""Ids that are missing from a partial vocabulary: noted on a device without waiting for it, and described."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from leanvocab.errors import RESIZE_FIRST
from leanvocab.partial.devices import device_module, has_streams, is_capturing, wait_for
from leanvocab.partial.partial_table import PartialTable


class _Running(threading.local):
    """The outermost model whose forward runs in this thread."""

    model: "weakref.ref[nn.Module] | None" = None


_running = _Running()


def begin_forward(model: nn.Module) -> bool:
    """Notes that a forward of `model` begins; True where it runs within no other."""
    running = running_model()
    if running not in (None, model):
        return False
    _running.model = weakref.ref(model)  # again, where a forward of it was interrupted
    return True


def end_forward(model: nn.Module) -> None:
    """Notes that a forward of `model` has ended."""
    if running_model() is model:
        _running.model = None


def running_model() -> nn.Module | None:
    """The outermost model whose forward runs in this thread; None where none does."""
    return None if _running.model is None else _running.model()


class MissingNote:
    """The first missing id since the last look: int64 [3] on a device (whether, at which flat position, which id)."""

    def __init__(self, device: torch.device):
        with torch.inference_mode(False):
            self._note = torch.zeros(3, dtype=torch.int64, device=device)
        self._noted = False  # whether anything was left to the device to notice
        self._arrival: Any = None  # (pinned copy of the note, event that says when it has arrived)
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def is_open(self) -> bool:
        """True where something was left to the device to notice, and nobody has looked since."""
        return self._noted

    @property
    def model(self) -> nn.Module | None:
        """The outermost model whose forward ran last around what is noted."""
        return None if self._model is None else self._model()

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def to(self, device: torch.device) -> None:
        """Moves the note with its module."""
        with torch.inference_mode(False):
            self._note = self._note.to(device)
        self._arrival = None

    def add(self, ids: Tensor, missing: Tensor) -> None:
        """Notes the first of `ids` where `missing`, both of one shape; nothing waits."""
        if ids.numel() == 0 or ids.is_meta:
            return
        self._noted = True
        position = missing.flatten().long().argmax(0, keepdim=True)
        # index_select, since indexing with a scalar tensor would wait for its value
        token_id = ids.flatten().index_select(0, position).long()
        note = torch.cat([missing.any().long().view(1), position, token_id])
        if self._note.device != note.device:
            self.to(note.device)
        self._note.copy_(torch.where(self._note[0] > 0, self._note, note))
        if torch.compiler.is_compiling():
            self._arrival = None  # nothing is sent: what was sent before would be out of date
        elif has_streams(note.device):
            self._send()

    def take(self) -> tuple[int, int] | None:
        """(flat position, id) of the first missing id, once; waits for the forward that noted it alone."""
        if not self._noted:
            return None
        if self._arrival is not None:
            note, event = self._arrival
            wait_for(event)
        else:
            note = self._note
        is_missing, position, token_id = note.tolist()
        self._noted = self._arrival is None  # a graph that was recorded notes without coming by `add`
        if not is_missing:
            return None
        self._note.zero_()
        self._arrival = None
        return position, token_id

    def _send(self) -> None:
        device = self._note.device
        if is_capturing(device):
            self._arrival = None
            return
        if self._arrival is None:
            with torch.inference_mode(False):
                room = torch.zeros(3, dtype=torch.int64, device="cpu", pin_memory=True)
            self._arrival = room, device_module(device).Event()
        note, event = self._arrival
        note.copy_(self._note, non_blocking=True)
        event.record(device_module(device).current_stream(device))  # which need not be the current device

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrival": None, "_model": None}


def describe_missing(table: PartialTable, token_id: int, where: str) -> str:
    """A message about an id that was looked up at `where`: what is wrong with it, and what to do."""
    if table.ids == "partial":
        return (
            f"{table.name}: id {token_id} at {where} is not a partial id: expected 0 … {table.num_rows - 1}, since the "
            'model was shrunk with ids="partial"; give it the data set that vocabulary.remap_dataset made'
        )
    if not 0 <= token_id < table.full_size:
        hint = RESIZE_FIRST if token_id > 0 else "see that ignored labels (-100) do not reach the embedding"
        return (
            f"{table.name}: id {token_id} at {where} is no token id: expected 0 … {table.full_size - 1}; check the tokenizer; "
            f"{hint}"
        )
    if table.on_missing == "extend":
        return (
            f"{table.name}: token {table.vocabulary.describe(token_id)} at {where} came without its row: on this device "
            "rows come for the ids in a forward's arguments (input_ids, decoder_input_ids, labels of an encoder-decoder), and "
            "this one the model made itself, or the batch went around the data loader. Keep it from the beginning: "
            "PartialVocabulary.from_counts(…, always_keep=[…])"
        )
    return (
        f"{table.name}: token {table.vocabulary.describe(token_id)} at {where} is outside the partial vocabulary "
        f"({table.num_rows:,} of {table.full_size:,} rows); count the data that it comes from too, keep it with "
        'PartialVocabulary.from_counts(…, always_keep=[…]), or shrink with on_missing="base" to read its row from the base, as '
        "evaluation mode does: model.eval()"
    )
