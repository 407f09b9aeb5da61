"""Running a model and its shrunk copy side by side: one seed, the same inputs, everything compared by its bits."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def seed_everything(seed: int) -> None:
    """torch, numpy and random: some models draw from the latter two."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def floating_tensors(output: Any) -> Iterator[Tensor]:
    """Every floating tensor in a model's output, however nested."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.detach()
    elif isinstance(output, dict):
        yield from floating_tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for each in output:
            yield from floating_tensors(each)


def outputs(model: nn.Module, inputs: dict[str, Any], seed: int) -> list[Tensor]:
    """Loss, logits and whatever else a forward gives, in the mode that the model is in."""
    seed_everything(seed)
    return list(floating_tensors(model(**inputs)))


def train(
    model: nn.Module, inputs: dict[str, Any], num_steps: int, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """Steps with dropout; the losses and the gradient norms that clipping would have seen, one a step."""
    losses, norms = [], []
    for step in range(num_steps):
        seed_everything(step)
        loss = model(**inputs).loss
        loss.backward()
        norms.append(gradient_norm(model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def gradient_norm(model: nn.Module) -> float:
    """The total norm, as `clip_grad_norm_` computes it."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal shape, dtype and bytes: zeros of either sign differ, and NaN equals itself."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(as_bytes(first), as_bytes(second))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names that only one of two dictionaries has, or under which the bits differ."""
    names = first.keys() | second.keys()
    return sorted(n for n in names if n not in first or n not in second or not same_bits(first[n], second[n]))
