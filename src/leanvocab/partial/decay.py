"""Weight decay of the rows that are not there: logged at each step, replayed by the optimizer itself when rows are needed.

Ordinary training decays unused rows too, step by step, in their own precision. A product of factors is not the same
bits, and coupled decay (Adam, SGD with momentum) is no factor at all; so the optimizer's own class takes the same steps
on blocks of the unused rows with gradients of zero, which is just what ordinary training does to them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanvocab.errors import OptimizerError
from leanvocab.files.row_store import RowStore, RowWriter
from leanvocab.partial.optimizers import accepted, is_row_shaped, plain, values_at_rest

_NO_REPLAY = (
    "decay_unused_rows=True cannot replay {name}, which keeps a copy of each row ({key}) and changes rows between steps; "
    "leave unused rows as they are (decay_unused_rows=False), or use AdamW"
)


class DecayReplay:
    """The steps since the full rows were last right, and the optimizer states of rows outside the vocabulary."""

    def __init__(self) -> None:
        self.states: dict[str, RowStore] = {}  # states of all rows that are not zero outside the vocabulary
        self._log: list[dict[str, Any]] = []  # hyperparameters of each step
        self._optimizer_class: type[Optimizer] | None = None
        self._first_state: dict[str, Any] = {}  # the parameter's state before the first logged step, without its rows
        self._row_keys: list[str] = []
        self._at_rest: dict[str, float] = {}
        self._device = torch.device("cpu")

    @property
    def pending(self) -> bool:
        return bool(self._log)

    def forget(self) -> None:
        """Drops the log: the full rows were replaced."""
        self._log = []

    def record(self, optimizer: Optimizer, group: dict[str, Any], weight: Tensor) -> None:
        """Logs a step that `optimizer` is about to take on `weight` [len(vocabulary), dim], which is in `group`."""
        decays = bool(group.get("weight_decay", 0))
        if weight.grad is None or not (decays or self.states or self._log):
            return
        if not self._log:
            state = optimizer.state.get(weight, {})
            self._row_keys = [key for key, value in state.items() if is_row_shaped(value, weight)]
            self._first_state = {key: _copied(value) for key, value in state.items() if key not in self._row_keys}
            self._optimizer_class, self._device = type(optimizer), weight.device
            self._at_rest = values_at_rest(optimizer, group, _NO_REPLAY)
        elif type(optimizer) is not self._optimizer_class:
            raise OptimizerError(
                f"decay_unused_rows=True replays one optimizer, and {type(optimizer).__name__} steps after "
                f"{getattr(self._optimizer_class, '__name__', None)}; save or merge_(model) between the two"
            )
        self._log.append({key: plain(value) for key, value in group.items() if key != "params"})

    def replay(self, store: RowStore, directory: str | None) -> RowStore:
        """The full rows after the logged steps, in a new temporary store; `states` are brought along, the log is cleared."""
        rows_writer = RowWriter(store.shape, store.dtype, directory)
        state_writers: dict[str, RowWriter] = {}
        for start, rows in store.blocks():
            weight, state = self._stepped(start, rows)
            rows_writer.put(start, weight.detach())
            for key, value in state.items():
                rest = self._at_rest.get(key, 0.0)
                if is_row_shaped(value, weight) and (rest or key in state_writers or bool(value.any())):
                    if key not in state_writers:
                        state_writers[key] = RowWriter(store.shape, value.dtype, directory)
                    state_writers[key].put(start, value)
        self.states = {key: writer.finish() for key, writer in state_writers.items()}
        self._log = []
        return rows_writer.finish()

    def _stepped(self, start: int, rows: Tensor) -> tuple[nn.Parameter, dict[str, Any]]:
        weight = nn.Parameter(rows.to(self._device, copy=True))
        weight.grad = torch.zeros_like(weight)
        assert self._optimizer_class is not None
        optimizer = self._optimizer_class([weight], **accepted(self._optimizer_class, self._log[0]))
        if self._first_state or self._row_keys:
            state = {key: _copied(value) for key, value in self._first_state.items()}
            optimizer.state[weight] = state | {key: self._state_rows(key, start, weight) for key in self._row_keys}
        for hyperparameters in self._log:
            optimizer.param_groups[0].update(hyperparameters)
            weight.grad.zero_()  # some optimizers work in it
            optimizer.step()
        return weight, optimizer.state[weight]

    def _state_rows(self, key: str, start: int, weight: Tensor) -> Tensor:
        if key not in self.states:
            return torch.full_like(weight, self._at_rest.get(key, 0.0), requires_grad=False)
        return self.states[key].rows(torch.arange(start, start + len(weight), device="cpu")).to(weight.device)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
