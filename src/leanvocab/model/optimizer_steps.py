"""Work before each optimizer step, in any training loop: one of torch's public hooks, which knows our parameters.

Before a step touches a parameter: ids that were missing are an error; states of full size, which a resumed run has just
loaded, are sliced; optimizers that mix rows or decay them are announced; decay is logged. From the first step on, an
optimizer's `state_dict()` is full too, with zeros for unused rows, which is what ordinary training holds there.
"""

import sys
import warnings
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from leanvocab.errors import LeanVocabWarning, OptimizerError
from leanvocab.model.live_optimizer_states import give_full_states, slice_states
from leanvocab.output.lazy_logits import keep_rows
from leanvocab.partial.attachments import Weakly
from leanvocab.partial.module import PartialModule, raise_missing, shrunk_modules
from leanvocab.partial.optimizers import bits_of, is_row_separable, position_of
from leanvocab.partial.partial_table import PartialTable
from leanvocab.partial.sharded import is_sharded
from leanvocab.reads.caches import empty_caches

_Met: TypeAlias = "weakref.WeakKeyDictionary[Optimizer, tuple[RemovableHandle, weakref.WeakSet[PartialTable]]]"
_RETIRED = "leanvocab_retired"  # on a parameter that has left its model: (the hook, why)
_current: "Weakly[StepHook]" = Weakly(None)  # that of this process, while somebody holds it


class StepHook:
    """The hook in torch and what it remembers, for as long as somebody holds this: then nothing of it is left.

    Shrunk modules hold it (a copy holds the same one, an unpickled one that of its process), and so does each parameter that
    has left its model, since an optimizer that steps on it would train nothing.
    """

    def __init__(self) -> None:
        # Optimizer → its hook on state dicts, and the tables of which something was announced.
        self._met: _Met = weakref.WeakKeyDictionary()
        # Not __del__: where the collector takes this, it has cleared the references by which handles know their hooks.
        self._end = weakref.finalize(self, _unregister, register_optimizer_step_pre_hook(_before_step), self._met)
        self._end.atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepHook":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return step_hook, ()

    def retire(self, parameter: Tensor, reason: str) -> None:
        """Notes on `parameter` that no model holds it any more; as long as it lives, this is held too."""
        parameter.__dict__[_RETIRED] = self, reason

    def before(self, optimizer: Optimizer) -> None:
        """Everything that has to happen before `optimizer` takes a step."""
        own: list[tuple[dict[str, Any], nn.Parameter]]
        own = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
        own_ids = {id(parameter) for _, parameter in own}
        modules = list(shrunk_modules())
        raise_missing(module for module in modules if module.missing.is_open and module.is_trained_with(own_ids))
        tables: dict[int, PartialModule] = {}
        for module in modules:
            tables.setdefault(id(module.weight), module)
        for _, parameter in own:
            if _RETIRED in parameter.__dict__:
                reason = parameter.__dict__[_RETIRED][1]
                raise OptimizerError(
                    f"{type(optimizer).__name__} holds a vocabulary matrix {tuple(parameter.shape)} that is no longer in "
                    f"the model, since {reason}; build the optimizer after that, or hand it over: optimizer=…"
                )
        if tables:
            keep_rows()
        for group, parameter in own:
            if id(parameter) in tables:
                self._before_step_on(optimizer, group, tables[id(parameter)].table, parameter)

    def _before_step_on(
        self, optimizer: Optimizer, group: dict[str, Any], table: PartialTable, weight: nn.Parameter
    ) -> None:
        if optimizer not in self._met:
            self._met[optimizer] = optimizer.register_state_dict_post_hook(give_full_states), weakref.WeakSet()
        _, announced = self._met[optimizer]
        if table not in announced:
            announced.add(table)
            _announce(optimizer, group, table, weight)
        _check_gradient_fits(table, weight)
        table.take_writes()
        if weight in optimizer.state:
            slice_states(optimizer, table, weight)
        if table.decay is not None:
            table.decay.record(optimizer, group, weight)
        if table.arrivals is not None:
            table.arrivals.forget()


def _check_gradient_fits(table: PartialTable, weight: nn.Parameter) -> None:
    """Raises `OptimizerError` for a gradient of the rows that there were before; sharded ones are of other shapes anyway."""
    gradient = weight.grad
    if gradient is None or gradient.shape == weight.shape or is_sharded(weight) or hasattr(weight, "ds_id"):
        return
    raise OptimizerError(
        f"{table.name}: its gradient is {tuple(gradient.shape)} and the matrix {tuple(weight.shape)}: extend_ came between a "
        "forward and its backward. Extend between two steps, zero_grad(), and compute that gradient again"
    )


def step_hook() -> StepHook:
    """The hook of this process; whoever holds it keeps it registered."""
    global _current
    hook = _current()
    if hook is None:
        hook = StepHook()
        _current = Weakly(hook)
    return hook


def _unregister(handle: RemovableHandle, met: _Met) -> None:
    """The end of the last shrunk model of a process."""
    for hook in (handle, *(hook for hook, _ in met.values())):
        hook.remove()
    empty_caches()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    hook = _current()
    if hook is not None:  # or else it is being let go of at this moment
        hook.before(optimizer)


# --- announcements ----------------------------------------------------------------------------------------------------


def _announce(optimizer: Optimizer, group: dict[str, Any], table: PartialTable, weight: Tensor) -> None:
    _refuse_eight_bits(optimizer, table, weight)
    for remark in chain(_on_separability(optimizer, table, weight), _on_the_rest(optimizer, group, table, weight)):
        warnings.warn(f"{table.name}: {remark}", LeanVocabWarning, stacklevel=2)


def _on_separability(optimizer: Optimizer, table: PartialTable, weight: Tensor) -> Iterator[str]:
    separable = is_row_separable(optimizer, weight)
    if separable is True:
        return
    finding = "is not row-separable" if separable is False else "could not be shown to be row-separable"
    yield (
        f"{type(optimizer).__name__} {finding}: where a row's update depends on other rows, training with a partial vocabulary "
        "is not the same as ordinary training. SGD, Adam, AdamW, Adagrad and RMSprop are row-separable (docs/exactness.md)"
    )
    if table.decay is not None:
        raise OptimizerError(
            f"{table.name}: decay_unused_rows=True needs a row-separable optimizer; {type(optimizer).__name__} {finding}"
        )


def _on_the_rest(optimizer: Optimizer, group: dict[str, Any], table: PartialTable, weight: Tensor) -> Iterator[str]:
    name = type(optimizer).__name__
    if group.get("fused") and weight.device.type == "cpu" and _fused_loop_rounds_otherwise(table, weight):
        yield (
            f"{name}(fused=True) on a CPU rounds the last few elements of a matrix in another way than the others; "
            f"with rows of {weight.shape[1]} elements these are not the same ones with a partial vocabulary (differences "
            "of about 1e-7). fused=False is exact"
        )
    if is_sharded(weight) and _accelerate_saves_in_full():
        yield (
            "accelerate saves full state dicts (FULL_STATE_DICT) of this sharded model, which torch cannot load "
            "back into a partial vocabulary: to resume, set state_dict_type to SHARDED_STATE_DICT (Trainer: in fsdp_config), and "
            "FULL_STATE_DICT again for the model that is saved at the end"
        )
    if group.get("weight_decay", 0) and table.decay is None and table.output != "frozen":
        stay = "they stay as they were" if table.arrivals is None else "a row does from when it comes"
        yield (
            f"{name} decays this matrix (weight_decay={group['weight_decay']}): ordinary training would decay "
            f"unused rows too, and here {stay}. shrink_(…, decay_unused_rows=True) decays them as well, "
            "bit for bit; weight_decay=0 for the embeddings makes both the same"
        )


def _accelerate_saves_in_full() -> bool:
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    plugin = getattr(state, "_shared_state", {}).get("fsdp_plugin")
    return getattr(getattr(plugin, "state_dict_type", None), "name", "") == "FULL_STATE_DICT"


def _fused_loop_rounds_otherwise(table: PartialTable, weight: Tensor) -> bool:
    """True where kept rows have elements that fill no last vector, in the partial matrix or in the full one.

    torch's fused CPU loops update those with other instructions. Rows of a multiple of 64 bytes never do.
    """
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
