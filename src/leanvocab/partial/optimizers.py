"""Optimizers, found out by trying them: which update each row from that row alone, and what they hold for a row at rest.

States that torchao keeps in 8 or 4 bits are read as numbers, and put in few bits again before the next step.
"""

import inspect
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import Optimizer

from leanvocab.errors import OptimizerError
from leanvocab.partial.devices import has_streams

OptimizerT = TypeVar("OptimizerT", bound=Optimizer | None)
THE_ROW: Final = "the row"
AtRest = float | Literal["the row"]  # of a row that never had a gradient: a value, or the row itself

# Each row's update depends on that row's gradient and states alone (elementwise arithmetic in torch 2.11 … 2.13).
_ROW_SEPARABLE = {
    optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad, optim.RMSprop, optim.Adadelta, optim.Adamax, optim.NAdam,
    optim.RAdam, optim.Rprop, optim.SparseAdam,
}  # fmt: skip
_SMALLEST_SCALE = 1e-12  # torchao's


def unwrapped_optimizer(optimizer: OptimizerT) -> OptimizerT:
    """The optimizer itself, which accelerate wraps."""
    inner: OptimizerT = getattr(optimizer, "optimizer", optimizer)
    return inner


def accepted(optimizer_class: type[Optimizer], hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a group that the constructor takes; some classes put others there too."""
    names = inspect.signature(optimizer_class).parameters
    return {key: value for key, value in hyperparameters.items() if key in names and key != "params"}


def plain(hyperparameter: Any) -> Any:
    """A number in the place of a tensor of one element."""
    return hyperparameter.item() if isinstance(hyperparameter, Tensor) else hyperparameter


def position_of(optimizer: Optimizer, weight: Tensor | None) -> tuple[int, int]:
    """Numbers of the group that holds the weight, and of the parameter in it."""
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            if parameter is weight:
                return group_number, number
    return 0, 0


# --- separability -----------------------------------------------------------------------------------------------------


def is_row_separable(optimizer: Optimizer, weight: Tensor | None = None) -> bool | None:
    """True where an optimizer updates each row of `weight` from that row alone; None where that could not be found out.

    A class that is not known is tried: on a matrix as wide as the weight, half of its rows without gradients, and on the other
    half alone. Few rows would not do: states are kept in 8 or 4 bits from 4,096 elements on.
    """
    if type(optimizer) in _ROW_SEPARABLE:
        return True
    width, device = (4, torch.device("cpu")) if weight is None else (weight.shape[1], weight.device)
    if type(optimizer).__module__.startswith("torchao."):  # trying it would compile it
        rounds_at_random = getattr(optimizer, "bf16_stochastic_round", False)
        return width % getattr(optimizer, "block_size", 1) == 0 and not rounds_at_random
    try:
        devices = [device] if has_streams(device) else []
        device_type = device.type if devices else "cuda"
        with torch.random.fork_rng(devices=devices, device_type=device_type), torch.enable_grad():
            return _keeps_rows_apart(optimizer, position_of(optimizer, weight), width, device)
    except Exception:
        return None


def _keeps_rows_apart(optimizer: Optimizer, position: tuple[int, int], width: int, device: torch.device) -> bool:
    num_rows = 64 * max(1, -(-4096 // (64 * width)))  # any block of up to 256 elements divides it
    kept = torch.arange(num_rows, device="cpu") * 2 + (torch.arange(num_rows, device="cpu") % 3 == 0)
    start = torch.randn(2 * num_rows, width, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    full, partial = nn.Parameter(start.clone()), nn.Parameter(start[kept].clone())
    both = [_optimizer_of_one(optimizer, position, weight) for weight in (full, partial)]
    for step in range(3):
        gradient = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1 + step), device="cpu").to(
            device
        )
        partial.grad, full.grad = gradient, torch.zeros_like(full).index_copy(0, kept.to(device), gradient)
        for trial in both:
            trial.step()
    untouched = torch.ones(2 * num_rows, dtype=torch.bool, device="cpu").index_fill(0, kept, False)
    return torch.equal(full[kept], partial) and torch.equal(full[untouched], start[untouched])


def _optimizer_of_one(optimizer: Optimizer, position: tuple[int, int], parameter: nn.Parameter) -> Optimizer:
    """An optimizer of `parameter` alone, with the hyperparameters that another has at a position (group, parameter)."""
    options = {key: value for key, value in optimizer.param_groups[position[0]].items() if key != "params"}
    options["weight_decay"] = 0.0  # decay of unused rows is announced by itself
    made = type(optimizer)([{**options, "params": [parameter]}], **accepted(type(optimizer), options))
    config = bits_of(optimizer, position)
    if config:
        made.get_config = lambda g, p, own: {**config, **{k: own[k] for k in ("lr", "weight_decay")}}  # type: ignore[attr-defined]
    _in_training_mode(made)
    return made


def _in_training_mode(optimizer: Any) -> None:
    """Schedule-free optimizers step in that mode alone."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()


# --- states at rest ---------------------------------------------------------------------------------------------------


def is_row_shaped(value: Any, weight: Tensor) -> bool:
    """True for an optimizer's state with one entry per element of `weight`."""
    return isinstance(value, Tensor) and value.shape == weight.shape and value.ndim > 0


def has_rows(key: str, value: Any, num_rows: int | None = None) -> bool:
    """True for an optimizer's state with one entry, or one line, per row of a table; of any table without `num_rows`.

    Adafactor's column statistics have none, whatever their length. A single number is a count, not a row.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 1 or "col" in key:
        return False
    return value.shape[0] > 1 if num_rows is None else value.shape[0] == num_rows


def states_at_rest(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, AtRest]:
    """States per row of a row that never had a gradient: mostly zero; found out on two such rows.

    Optimizers with slow weights (schedule-free, Lookahead) hold the row itself there.
    """
    weight = nn.Parameter(torch.tensor([[0.0], [0.5]], device="cpu"))
    rows = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    try:
        options = {key: plain(value) for key, value in group.items()} | {"weight_decay": 0.0}
        witness = type(optimizer)([weight], **accepted(type(optimizer), options))
        _in_training_mode(witness)
        witness.step()
    except Exception:  # a class that cannot be tried; it has been announced as such
        return {}
    states = {key: value for key, value in witness.state[weight].items() if is_row_shaped(value, weight)}
    return {key: THE_ROW if torch.equal(value, rows) else float(value[0]) for key, value in states.items()}


def values_at_rest(optimizer: Optimizer, group: dict[str, Any], refusal: str) -> dict[str, float]:
    """`states_at_rest`, where they are values alone; raises `OptimizerError` with `refusal`, given {name} and {key}."""
    values: dict[str, float] = {}
    for key, value in states_at_rest(optimizer, group).items():
        if value == THE_ROW:
            raise OptimizerError(refusal.format(name=type(optimizer).__name__, key=repr(key)))
        values[key] = value
    return values


# --- states in few bits -----------------------------------------------------------------------------------------------


def bits_of(optimizer: Optimizer, position: tuple[int, int]) -> dict[str, Any]:
    """Settings of bitsandbytes for one parameter, whose bits may be set by its module; empty for other optimizers."""
    if not (hasattr(optimizer, "check_overrides") and hasattr(optimizer, "get_config")):
        return {}
    optimizer.check_overrides()
    config: dict[str, Any] = optimizer.get_config(*position, optimizer.param_groups[position[0]])
    return config


def numbers(state: Tensor) -> Tensor:
    """The numbers that a state stands for; a plain tensor as it is."""
    return state.dequantize() if hasattr(state, "__tensor_flatten__") else state


def without_dust(state: Tensor) -> Tensor:
    """`numbers`, with zero for what is as small as can be: 4 bits without a sign have no code for zero."""
    values = numbers(state)
    return values if values is state else values.masked_fill(values.abs() <= _SMALLEST_SCALE, 0)


def in_form_of(optimizer: Optimizer, key: str, state: Tensor) -> Tensor:
    """`state` as `optimizer` would hold it: in few bits where it is one of torchao's, and no two rows share a scale.

    Where they do, a row at rest beside others would be rounded with their scale, to what is not zero.
    """
    is_torchaos = any(base.__module__.startswith("torchao.") for base in type(optimizer).__mro__)
    if not is_torchaos or state.shape[-1] % optimizer.block_size:  # type: ignore[attr-defined]
        return state
    held: Tensor = optimizer._new_buffer(state, key == "exp_avg")  # type: ignore[attr-defined] # the first moment has signs
    return held.copy_(state)
