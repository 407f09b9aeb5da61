"""Whether an optimizer updates each row of a matrix from that row alone, found out by trying it."""

from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import Optimizer

from leanvocab.partial.decay import accepted
from leanvocab.partial.devices import has_streams

# Each row's update depends on that row's gradient and states alone (elementwise arithmetic in torch 2.11 … 2.13).
_ROW_SEPARABLE = {
    optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad, optim.RMSprop, optim.Adadelta, optim.Adamax, optim.NAdam,
    optim.RAdam, optim.Rprop, optim.SparseAdam,
}  # fmt: skip


def is_row_separable(optimizer: Optimizer, weight: Tensor | None = None) -> bool | None:
    """Whether an optimizer updates each row of `weight` from that row alone; None where that could not be found out.

    A class that is not known is tried: on a matrix as wide as the weight, half of its rows without gradients, and on the other
    half alone. Few rows would not do: states are kept in 8 or 4 bits from 4,096 elements on.
    """
    if type(optimizer) in _ROW_SEPARABLE:
        return True
    width, device = (4, torch.device("cpu")) if weight is None else (weight.shape[1], weight.device)
    if type(optimizer).__module__.startswith("torchao."):  # trying it would compile it
        return width % getattr(optimizer, "block_size", 1) == 0 and not getattr(
            optimizer, "bf16_stochastic_round", False
        )
    try:
        devices = [device] if has_streams(device) else []
        with (
            torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"),
            torch.enable_grad(),
        ):
            return _keeps_rows_apart(optimizer, position_of(optimizer, weight), width, device)
    except Exception:
        return None


def _keeps_rows_apart(optimizer: Optimizer, place: tuple[int, int], width: int, device: torch.device) -> bool:
    num_rows = 64 * max(1, -(-4096 // (64 * width)))  # any block of up to 256 elements divides it
    kept = torch.arange(num_rows) * 2 + (torch.arange(num_rows) % 3 == 0)
    start = torch.randn(2 * num_rows, width, generator=torch.Generator().manual_seed(0)).to(device)
    full, partial = nn.Parameter(start.clone()), nn.Parameter(start[kept].clone())
    both = [_like_it(optimizer, place, each) for each in (full, partial)]
    for step in range(3):
        gradient = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1 + step)).to(device)
        partial.grad, full.grad = gradient, torch.zeros_like(full).index_copy(0, kept.to(device), gradient)
        for each in both:
            each.step()
    untouched = torch.ones(2 * num_rows, dtype=torch.bool).index_fill(0, kept, False)
    return torch.equal(full[kept], partial) and torch.equal(full[untouched], start[untouched])


def position_of(optimizer: Optimizer, weight: Tensor | None) -> tuple[int, int]:
    """Which group holds the weight, and where."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter is weight:
                return number, place
    return 0, 0


def bits_of(optimizer: Optimizer, place: tuple[int, int]) -> dict[str, Any]:
    """What bitsandbytes knows of one parameter, whose bits may be set by its module; empty for other optimizers."""
    if not (hasattr(optimizer, "check_overrides") and hasattr(optimizer, "get_config")):
        return {}
    optimizer.check_overrides()
    config: dict[str, Any] = optimizer.get_config(*place, optimizer.param_groups[place[0]])
    return config


def _like_it(optimizer: Optimizer, place: tuple[int, int], parameter: nn.Parameter) -> Optimizer:
    """An optimizer of one parameter, with the hyperparameters that another has at a place (group, parameter)."""
    group = optimizer.param_groups[place[0]]
    options = {key: value for key, value in group.items() if key != "params"}
    options["weight_decay"] = 0.0  # decay of unused rows is announced by itself
    made = type(optimizer)([{**options, "params": [parameter]}], **accepted(type(optimizer), options))
    config = bits_of(optimizer, place)
    if config:
        made.get_config = lambda g, p, own: {**config, **{k: own[k] for k in ("lr", "weight_decay")}}  # type: ignore[attr-defined]
    if hasattr(made, "train"):  # schedule-free ones step in that mode alone
        made.train()
    return made
