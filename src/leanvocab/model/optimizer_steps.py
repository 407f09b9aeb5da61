"""What happens at each optimizer step, in any training loop: one of torch's public hooks, which knows our parameters.

Before a step touches a parameter: ids that were missing are an error; states of full size, which a resumed run has just
loaded, are sliced; optimizers that mix rows or decay them are announced; decay is logged. From the first step on, an
optimizer's `state_dict()` is full too, with zeros for unused rows, which is what ordinary training holds there.
"""

import sys
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from leanvocab.errors import LeanVocabWarning, OptimizerError
from leanvocab.files.row_store import RowStore, put_rows, take_rows, zero_pages
from leanvocab.output.lazy_logits import keep_rows
from leanvocab.partial.decay import THE_ROW, AtRest, has_rows, is_row_shaped, states_at_rest
from leanvocab.partial.low_bits import in_form_of, numbers, without_dust
from leanvocab.partial.module import PartialModule, shrunk_modules
from leanvocab.partial.partial_table import PartialTable
from leanvocab.partial.separability import bits_of, is_row_separable, position_of
from leanvocab.partial.sharded import is_sharded, share_of, whole

_greeted: "weakref.WeakKeyDictionary[Optimizer, set[int]]" = weakref.WeakKeyDictionary()  # → ids of tables announced
_retired: "dict[int, tuple[weakref.ref[Tensor], str]]" = {}  # id → (a parameter that no model holds any more, why)
_checked: "weakref.WeakKeyDictionary[Optimizer, int]" = weakref.WeakKeyDictionary()  # → how many had retired then
_num_retired = 0
_installed = False


def install() -> None:
    """Registers the hook with torch, once a process."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        _installed = True


def retire(parameter: Tensor, reason: str) -> None:
    """Remembers that no model holds `parameter` any more: an optimizer that steps on it would train nothing."""
    global _num_retired
    _num_retired += 1
    key = id(parameter)
    _retired[key] = weakref.ref(parameter, lambda _: _retired.pop(key, None)), reason


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    tables: dict[int, PartialModule] = {}
    for module in shrunk_modules():
        module.raise_if_missing()
        tables.setdefault(id(module.weight), module)
    if _checked.get(optimizer) != _num_retired:
        _refuse_retired(optimizer)
        _checked[optimizer] = _num_retired
    if not tables:
        return
    keep_rows()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            module = tables.get(id(parameter))  # type: ignore[assignment]
            if module is not None:
                _before_step_of(optimizer, group, module.table, parameter)


def _before_step_of(optimizer: Optimizer, group: dict[str, Any], table: PartialTable, weight: nn.Parameter) -> None:
    greeted = _greeted.setdefault(optimizer, set())
    if id(table) not in greeted:
        greeted.add(id(table))
        if len(greeted) == 1:
            optimizer.register_state_dict_post_hook(give_full_states)
        _announce(optimizer, group, table, weight)
    if weight in optimizer.state:
        slice_states(optimizer, table, weight)
    if table.decay is not None:
        table.decay.record(optimizer, group, weight)


def _refuse_retired(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            reference, reason = _retired.get(id(parameter), (None, ""))
            if reference is not None and reference() is parameter and isinstance(parameter, Tensor):
                raise OptimizerError(
                    f"{type(optimizer).__name__} holds a vocabulary matrix {tuple(parameter.shape)} that is no longer in "
                    f"the model, since {reason}; build the optimizer after that, or hand it over: optimizer=…"
                )


# --- announcements ----------------------------------------------------------------------------------------------------


def _announce(optimizer: Optimizer, group: dict[str, Any], table: PartialTable, weight: Tensor) -> None:
    name = type(optimizer).__name__
    _refuse_eight_bits(optimizer, table, weight)
    separable = is_row_separable(optimizer, weight)
    if separable is not True:
        found = "is not row-separable" if separable is False else "could not be shown to be row-separable"
        warnings.warn(
            f"{table.name}: {name} {found}: where a row's update depends on other rows, training with a partial vocabulary "
            "is not the same as ordinary training. SGD, Adam, AdamW, Adagrad and RMSprop are row-separable (docs/exactness.md)",
            LeanVocabWarning,
            stacklevel=2,
        )
        if table.decay is not None:
            raise OptimizerError(
                f"{table.name}: decay_unused_rows=True needs a row-separable optimizer; {name} {found}"
            )
    if group.get("fused") and weight.device.type == "cpu" and _fused_loop_rounds_otherwise(table, weight):
        warnings.warn(
            f"{table.name}: {name}(fused=True) on a CPU rounds the last few elements of a matrix in another way than the others; "
            f"with rows of {weight.shape[1]} elements these are not the same ones with a partial vocabulary (differences "
            "of about 1e-7). fused=False is exact",
            LeanVocabWarning,
            stacklevel=2,
        )
    if is_sharded(weight) and _accelerate_saves_in_full():
        warnings.warn(
            f"{table.name}: accelerate saves full state dicts (FULL_STATE_DICT) of this sharded model, which torch cannot load "
            "back into a partial vocabulary: to resume, set state_dict_type to SHARDED_STATE_DICT (Trainer: in fsdp_config), and "
            "FULL_STATE_DICT again for the model that is saved at the end",
            LeanVocabWarning,
            stacklevel=2,
        )
    if group.get("weight_decay", 0) and table.decay is None and table.output != "frozen":
        warnings.warn(
            f"{table.name}: {name} decays this matrix (weight_decay={group['weight_decay']}): ordinary training would decay "
            "unused rows too, and here they stay as they were. shrink_(…, decay_unused_rows=True) decays them as well, "
            "bit for bit; weight_decay=0 for the embeddings makes both the same",
            LeanVocabWarning,
            stacklevel=2,
        )


def _accelerate_saves_in_full() -> bool:
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    plugin = getattr(state, "_shared_state", {}).get("fsdp_plugin")
    return getattr(getattr(plugin, "state_dict_type", None), "name", "") == "FULL_STATE_DICT"


def _fused_loop_rounds_otherwise(table: PartialTable, weight: Tensor) -> bool:
    """Whether kept rows have elements that fill no last vector, in the partial matrix or in the full one: torch's fused
    CPU loops update those with other instructions. Rows of a multiple of 64 bytes never do."""
    vector, dim = 64 // weight.element_size(), weight.shape[1]
    left_over = -(-(table.full_size * dim % vector) // dim)  # rows at the end of the full matrix
    return bool(weight.numel() % vector) or int(table.token_ids[-1]) >= table.full_size - left_over


def _refuse_eight_bits(optimizer: Optimizer, table: PartialTable, weight: Tensor) -> None:
    """States of bitsandbytes in 8 bits have a scale a block, not a row: they cannot be cut to rows, nor saved in full."""
    config = bits_of(optimizer, position_of(optimizer, weight))
    if config.get("optim_bits") == 8 and weight.numel() >= config["min_8bit_size"]:
        raise OptimizerError(
            f"{table.name}: {type(optimizer).__name__} would keep this matrix's states in 8 bits, with a scale for each block of "
            "them, which cannot be cut to rows and saved in full. Keep them in 32 bits, as the Trainer does: bitsandbytes.optim."
            'GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32}), before the '
            "first step"
        )


# --- states -----------------------------------------------------------------------------------------------------------


def hand_over(optimizer: Optimizer, replaced: nn.Parameter, replacement: nn.Parameter) -> None:
    """Puts `replacement` where the optimizer holds `replaced`; the states come along as they are."""
    for group in optimizer.param_groups:
        group["params"] = [replacement if parameter is replaced else parameter for parameter in group["params"]]
    states = list(optimizer.state.items())
    optimizer.state.clear()
    for parameter, state in states:  # in the order in which they were, which is the order in a saved file
        optimizer.state[replacement if parameter is replaced else parameter] = state


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
        if value.shape[0] == table.full_size and value.ndim > 1 and value.shape[1] > 1 and table.decay is None:
            _check_nothing_lost(
                optimizer, table, key, without_dust(whole(value)), _at_rest(optimizer, parameter).get(key, 0.0)
            )


def _at_rest(optimizer: Optimizer, parameter: Tensor) -> dict[str, AtRest]:
    groups = [group for group in optimizer.param_groups if any(each is parameter for each in group["params"])]
    return states_at_rest(optimizer, groups[0]) if groups else {}


def _check_nothing_lost(optimizer: Optimizer, table: PartialTable, key: str, value: Tensor, at_rest: AtRest) -> None:
    outside = torch.ones(table.full_size, dtype=torch.bool, device=value.device)
    outside[table.token_ids.to(value.device)] = False
    resting = table.frozen_rows().to(value.device, value.dtype) if at_rest == THE_ROW else at_rest
    moving = (value != resting).any(1) & outside
    if bool(moving.any()):
        first = int(moving.nonzero()[0])
        expected = at_rest if at_rest == THE_ROW else f"{at_rest:.6g}" if at_rest else "zero"
        raise OptimizerError(
            f"{table.name}: the state {key!r} of {type(optimizer).__name__} is not {expected} for {int(moving.sum()):,} rows "
            f"outside the partial vocabulary, the first of them {table.vocabulary.describe(first)}: ordinary training would "
            "go on moving those rows. Shrink to a vocabulary that holds them too (the union: vocabulary | other), or start "
            "with a new optimizer"
        )


def slice_states(optimizer: Optimizer, table: PartialTable, parameter: nn.Parameter) -> None:
    """Slices states of full size to the vocabulary's rows, in place; raises `OptimizerError` where that would lose something."""
    state = optimizer.state[parameter]
    full = [key for key, value in state.items() if has_rows(key, value) and value.shape[0] != table.num_rows]
    if not full:
        return
    check_states(optimizer, table, parameter)
    for key in full:
        rows = numbers(whole(state[key]))
        if table.decay is not None and rows.ndim > 1 and bool(rows.any()):
            table.decay.states[key] = RowStore.copy(rows, table.store_dir)
        state[key] = share_of(in_form_of(optimizer, key, take_rows(rows, table.token_ids)), state[key])


def give_full_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """After an optimizer's `state_dict()`: states of all rows, with zeros for unused ones, in place of the partial ones."""
    modules = {id(module.weight): module for module in shrunk_modules() if not module.table.gives_partial_state_dicts}
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for parameter, index in zip(group["params"], saved_group["params"], strict=True):
            module = modules.get(id(parameter))
            if module is not None and index in state_dict["state"]:
                state_dict["state"][index] = full_states(optimizer, module.table, parameter, state_dict["state"][index])


def full_states(optimizer: Optimizer, table: PartialTable, weight: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The states with those of partial size in full, on CPU, in memory that unused rows do not take."""
    table.settle_decay()
    at_rest = _at_rest(optimizer, weight)
    return {
        key: _full_state(table, weight, key, value, at_rest.get(key, 0.0))
        if has_rows(key, value, table.num_rows)
        else value
        for key, value in state.items()
    }


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
