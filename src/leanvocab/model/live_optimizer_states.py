"""States of live optimizers for a partial matrix: cut to its rows, given in full, handed over with the parameter."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from leanvocab.errors import OptimizerError
from leanvocab.files.row_store import RowStore, put_rows, take_rows, zero_pages
from leanvocab.partial.growth import ids_since, with_rows_since
from leanvocab.partial.module import shrunk_modules
from leanvocab.partial.optimizers import (
    THE_ROW,
    AtRest,
    has_rows,
    in_form_of,
    is_row_shaped,
    numbers,
    states_at_rest,
    without_dust,
)
from leanvocab.partial.partial_table import GivenRows, PartialTable
from leanvocab.partial.sharded import is_sharded, share_of, whole


def hand_over(
    optimizer: Optimizer | None, replaced: nn.Parameter, replacement: nn.Parameter, states: dict[str, Any] | None
) -> None:
    """Puts `replacement`, with its states if it has any, where the optimizer, if there is one, holds `replaced`."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [replacement if parameter is replaced else parameter for parameter in group["params"]]
    before = list(optimizer.state.items())
    optimizer.state.clear()
    for parameter, state in before:  # in the order in which they were, which is the order in a saved file
        is_replaced = parameter is replaced and states is not None
        optimizer.state[replacement if parameter is replaced else parameter] = states if is_replaced else state


def check_states(optimizer: Optimizer, table: PartialTable, parameter: nn.Parameter) -> None:
    """Raises `OptimizerError` where full states of `parameter` cannot be sliced to the vocabulary's rows without a loss."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if not has_rows(key, value):
            continue
        if value.ndim > 2 and value.shape[1:] == parameter.shape:
            raise OptimizerError(
                f"{table.name}: {type(optimizer).__name__} keeps {value.shape[0]} matrices in one state ({key!r}), which "
                "cannot be cut to rows and saved in full; use an optimizer with a state for each, such as AdamW or Lion"
            )
        if value.shape[0] not in (table.num_rows, table.full_size):
            raise OptimizerError(
                f"{table.name}: the state {key!r} of {type(optimizer).__name__} has {value.shape[0]:,} rows, expected "
                f"{table.full_size:,} (full) or {table.num_rows:,} (partial); resume from a checkpoint of this model"
            )
    for key, value, at_rest in _full_of(optimizer, table, parameter) if table.decay is None else ():
        _check_nothing_lost(optimizer, table, key, value, at_rest)


def _full_of(optimizer: Optimizer, table: PartialTable, parameter: Tensor) -> Iterator[tuple[str, Tensor, AtRest]]:
    """States of full size, those with one number for each row aside, with what a row at rest has there."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if has_rows(key, value) and value.shape[0] == table.full_size and value.ndim > 1 and value.shape[1] > 1:
            yield key, without_dust(whole(value)), _at_rest(optimizer, parameter).get(key, 0.0)


def _at_rest(optimizer: Optimizer, parameter: Tensor) -> dict[str, AtRest]:
    groups = [group for group in optimizer.param_groups if any(its is parameter for its in group["params"])]
    return states_at_rest(optimizer, groups[0]) if groups else {}


def _moving_rows(table: PartialTable, value: Tensor, at_rest: AtRest) -> list[int]:
    """Rows outside the vocabulary whose full state is not at rest."""
    outside = torch.ones(table.full_size, dtype=torch.bool, device=value.device)
    outside[table.token_ids.to(value.device)] = False
    resting = table.frozen_rows().to(value.device, value.dtype) if at_rest == THE_ROW else at_rest
    moving: list[int] = ((value != resting).any(1) & outside).nonzero()[:, 0].tolist()
    return moving


def _check_nothing_lost(optimizer: Optimizer, table: PartialTable, key: str, value: Tensor, at_rest: AtRest) -> None:
    moving = _moving_rows(table, value, at_rest)
    if moving:
        first = moving[0]
        expected = at_rest if at_rest == THE_ROW else f"{at_rest:.6g}" if at_rest else "zero"
        raise OptimizerError(
            f"{table.name}: the state {key!r} of {type(optimizer).__name__} is not {expected} for {len(moving):,} rows "
            f"outside the partial vocabulary, the first of them {table.vocabulary.describe(first)}: ordinary training would "
            "go on moving those rows. Shrink to a vocabulary that holds them too (the union: vocabulary | other), or start "
            "with a new optimizer"
        )


def partial_states(optimizer: Optimizer | None, table: PartialTable, parameter: nn.Parameter) -> dict[str, Any] | None:
    """The states of a parameter with those of full size cut to rows; None where there are none. Raises as `check_states`."""
    if optimizer is None or parameter not in optimizer.state:
        return None
    check_states(optimizer, table, parameter)
    states = dict(optimizer.state[parameter])
    for key, value in states.items():
        if _is_longer(key, value, table):
            rows = numbers(whole(value))
            if table.decay is not None and rows.ndim > 1 and bool(rows.any()):
                table.decay.states[key] = RowStore.copy(rows, table.store_dir)
            states[key] = share_of(in_form_of(optimizer, key, take_rows(rows, table.token_ids)), value)
    return states


def slice_states(optimizer: Optimizer, table: PartialTable, parameter: nn.Parameter) -> None:
    """Slices states of full size to the vocabulary's rows, in place; raises `OptimizerError` where that would lose something."""
    catch_up(optimizer, table, parameter)
    _take_writes(optimizer, table, parameter)
    state = optimizer.state[parameter]
    if table.arrivals is not None and table.decay is None:
        moving = {
            row
            for key, value, rest in _full_of(optimizer, table, parameter)
            for row in _moving_rows(table, value, rest)
        }
        if moving:
            table.arrivals.extend(table, sorted(moving))
    if any(_is_longer(key, value, table) for key, value in state.items()):
        state.update(partial_states(optimizer, table, parameter))


def _is_longer(key: str, value: Any, table: PartialTable) -> bool:
    return has_rows(key, value) and value.shape[0] != table.num_rows


def give_full_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """After an optimizer's `state_dict()`: states of all rows, with zeros for unused ones, in place of the partial ones."""
    modules = {id(module.weight): module for module in shrunk_modules() if not module.table.gives_partial_state_dicts}
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for parameter, index in zip(group["params"], saved_group["params"], strict=True):
            module = modules.get(id(parameter))
            if module is not None and index in state_dict["state"]:
                catch_up(optimizer, module.table, parameter)
                now = optimizer.state.get(parameter, {})
                partial = {k: now.get(k, v) if has_rows(k, v) else v for k, v in state_dict["state"][index].items()}
                full = state_dict["state"][index] = full_states(optimizer, module.table, parameter, partial)
                _note_given(optimizer, module.table, parameter, full, partial)


def full_states_of(optimizer: Optimizer | None, table: PartialTable, weight: nn.Parameter) -> dict[str, Any] | None:
    """The states of `weight` in full, those of each row on CPU; None where the optimizer has none."""
    if optimizer is None or weight not in optimizer.state:
        return None
    catch_up(optimizer, table, weight)
    return full_states(optimizer, table, weight, optimizer.state[weight])


def state_devices(optimizer: Optimizer | None, weight: Tensor) -> dict[str, torch.device]:
    """The device of each state of `weight`."""
    states = {} if optimizer is None else optimizer.state.get(weight, {})
    return {key: value.device for key, value in states.items() if isinstance(value, Tensor)}


def states_on(devices: dict[str, torch.device], states: dict[str, Any] | None) -> dict[str, Any] | None:
    """States of a parameter, each on its device."""
    if states is None:
        return None
    return {key: value.to(devices[key]) if key in devices else value for key, value in states.items()}


@contextmanager
def out_of_the_way(optimizer: Optimizer | None, weight: nn.Parameter) -> Iterator[None]:
    """Takes a parameter, its gradient and its states of each row to the CPU, so that full ones have room on its device. They come
    back where the block raises."""
    device, cpu = weight.device, torch.device("cpu")
    states = optimizer.state.get(weight, {}) if optimizer is not None else {}
    moved = [key for key, value in states.items() if has_rows(key, value) and value.device == device]
    _move(weight, states, moved, cpu)
    try:
        yield
    except BaseException:
        _move(weight, states, moved, device)
        raise


def _move(weight: nn.Parameter, states: dict[str, Any], keys: list[str], device: torch.device) -> None:
    if weight.device == device:
        return
    gradient, weight.grad = weight.grad, None
    weight.data = weight.data.to(device)
    weight.grad = None if gradient is None else gradient.to(device)
    for key in keys:
        states[key] = states[key].to(device)


def full_states(optimizer: Optimizer, table: PartialTable, weight: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The states with those of partial size in full, on CPU, in memory that unused rows do not take."""
    table.settle()
    _take_writes(optimizer, table, weight)
    at_rest = _at_rest(optimizer, weight)
    return {
        key: _full_state(table, weight, key, value, at_rest.get(key, 0.0))
        if has_rows(key, value, table.num_rows)
        else value
        for key, value in state.items()
    }


def catch_up(optimizer: Optimizer, table: PartialTable, weight: nn.Parameter) -> None:
    """Gives states of the rows that there were once those of the rows that have come since, which never had a gradient."""
    state = optimizer.state.get(weight, {})
    for key, value in list(state.items()):
        num_rows = value.shape[0] if isinstance(value, Tensor) and value.ndim else 0
        then = table.earlier.get(num_rows) if num_rows < table.num_rows else None
        if then is not None and has_rows(key, value, num_rows):
            _take_writes(optimizer, table, weight)
            rows = numbers(value)
            at_rest, new_ids = _at_rest(optimizer, weight).get(key, 0.0), ids_since(table.token_ids, then)
            new = _rows_at_rest(table, weight, key, rows, at_rest, new_ids)
            state[key] = in_form_of(optimizer, key, with_rows_since(table.token_ids, rows, then, new))


def _rows_at_rest(
    table: PartialTable, weight: Tensor, key: str, rows: Tensor, at_rest: AtRest, token_ids: Tensor
) -> Tensor:
    if table.decay is not None and key in table.decay.states and rows.shape[1:] == weight.shape[1:]:
        return table.decay.states[key].rows(token_ids).to(rows.device, rows.dtype)
    if at_rest == THE_ROW:
        return table.base_rows(token_ids).to(rows.device, rows.dtype)
    return rows.new_full((len(token_ids), *rows.shape[1:]), at_rest)


def _full_state(table: PartialTable, weight: Tensor, key: str, value: Tensor, at_rest: AtRest) -> Tensor:
    rows = numbers(whole(value))
    if table.decay is not None and key in table.decay.states and is_row_shaped(rows, weight):
        full = table.decay.states[key].private_view()
    elif at_rest == THE_ROW:
        full = table.frozen_rows().to(rows.dtype)
    else:
        full = zero_pages((table.full_size, *rows.shape[1:]), rows.dtype)
        if at_rest:
            full.fill_(at_rest)
    put_rows(full, table.token_ids, rows)
    return share_of(full, value)


# --- writes to full states --------------------------------------------------------------------------------------------


@dataclass
class _GivenState:
    """A full state that an optimizer's state dict gave out."""

    optimizer: "weakref.ref[Optimizer]"
    parameter: "weakref.ref[Tensor]"
    key: str
    rows: GivenRows

    def is_of(self, optimizer: Optimizer, parameter: Tensor) -> bool:
        return self.optimizer() is optimizer and self.parameter() is parameter


def _note_given(
    optimizer: Optimizer, table: PartialTable, parameter: Tensor, full: dict[str, Any], partial: dict[str, Any]
) -> None:
    """Notes states that are given out in full, where ordinary state dicts give the states themselves."""
    for key, value in partial.items():
        if full[key] is not value and type(value) is Tensor and not is_sharded(value):
            references = weakref.ref(optimizer), weakref.ref(parameter)
            table.given_states.append(_GivenState(*references, key, GivenRows(full[key], value)))


def _take_writes(optimizer: Optimizer, table: PartialTable, parameter: Tensor) -> None:
    """Makes what was written in place to full states the optimizer's own; raises `OptimizerError` where that cannot be."""
    looked_at, table.given_states = table.given_states, []
    for given in looked_at:
        if not given.is_of(optimizer, parameter):
            table.given_states.append(given)
        elif optimizer.state[parameter].get(given.key) is given.rows.partial():  # or else others were loaded since
            if given.rows.is_written:
                _take(optimizer, table, parameter, given)
            if given.rows.let_go():
                table.given_states.append(given)


def _take(optimizer: Optimizer, table: PartialTable, parameter: Tensor, given: _GivenState) -> None:
    partial, rows, key = optimizer.state[parameter][given.key], given.rows.rows, given.key
    if rows is None or not given.rows.fits(partial):
        raise OptimizerError(
            f"{table.name}: the state {key!r} of {type(optimizer).__name__} in a state dict from before the last step was "
            "written to in place. Full states of a shrunk model are copies: take a new state dict, or hand the one that was "
            "written to to optimizer.load_state_dict"
        )
    if table.decay is not None:
        table.decay.states[key] = RowStore.copy(rows, table.store_dir)
    elif rows.ndim > 1:
        _check_nothing_lost(optimizer, table, key, rows, _at_rest(optimizer, parameter).get(key, 0.0))
    with torch.no_grad():
        partial.copy_(take_rows(rows, table.token_ids))
    given.rows.look(partial)
