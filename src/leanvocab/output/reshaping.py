"""Reshaping of logits [..., full_size], done on the hidden states [..., dim] that they are computed from."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def _view(hidden: Tensor, full_size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    shape = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    if kwargs or not all(isinstance(size, int) for size in shape) or not shape:
        return None
    if shape[-1] == -1 and math.prod(hidden.shape[:-1]) == math.prod(shape[:-1]):
        shape = (*shape[:-1], full_size)
    return hidden.reshape(*shape[:-1], hidden.shape[-1]) if shape[-1] == full_size else None


def _index(hidden: Tensor, full_size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Indices of the leading dimensions alone pick hidden states as they pick logits."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    if any(part is None or isinstance(part, list) for part in index):
        return None
    num_used = sum(
        part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in index if part is not ...
    )
    takes_whole_rows = isinstance(index[-1], slice) and index[-1] == slice(None)
    if any(part is ... for part in index):
        is_leading = num_used <= hidden.ndim and (index[-1] is ... or takes_whole_rows)
    else:
        is_leading = num_used < hidden.ndim or takes_whole_rows
    return hidden[args[0]] if is_leading else None


def _flatten(hidden: Tensor, full_size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if kwargs or len(args) != 2 or not 0 <= args[0] <= args[1] < hidden.ndim - 1:
        return None
    return hidden.flatten(*args)


RESHAPING: Mapping[str, Callable[[Tensor, int, tuple[Any, ...], Mapping[str, Any]], Tensor | None]] = {
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "__getitem__": _index,
}
"""By the names of torch's functions: the hidden states of the logits that they give, or None where these are none."""
