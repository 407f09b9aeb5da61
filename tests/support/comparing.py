"""A training loop, and models and tensors compared bit for bit."""

from typing import Any

import torch
from models import batch
from torch import Tensor, nn


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, steps: int = 4, seed: int = 1, **inputs: Tensor
) -> tuple[list[float], torch.optim.Optimizer]:
    """Losses of a plain loop with clipping, and the optimizer (AdamW without decay unless given)."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = model(**(inputs or batch())).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor: NaN equals NaN, -0.0 differs from 0.0."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """True where shapes, dtypes and bytes are equal."""
    return first.shape == second.shape and first.dtype == second.dtype and bits(first) == bits(second)


def differing(first: nn.Module | dict[str, Any], second: nn.Module | dict[str, Any]) -> list[str]:
    """Names whose tensors differ in any bit, in shape, or are in one state dict alone."""
    left, right = (each.state_dict() if isinstance(each, nn.Module) else each for each in (first, second))
    names = [*left, *(name for name in right if name not in left)]
    return [name for name in names if name not in left or name not in right or not same_bits(left[name], right[name])]
