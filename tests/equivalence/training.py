"""Running a model and its shrunk copy side by side: one seed, the same inputs, everything compared by its bits."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import differing, same_bits
from tiny_models import Tiny, vocabularies
from torch import Tensor, nn

from leanvocab.errors import LeanVocabError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.partial.embedding import RemapEmbedding


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


def train_unclipped(
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


def check_same(full: nn.Module, merged: nn.Module) -> None:
    """Classes, sizes and ties of every module, parameters and buffers."""
    assert layout_of(merged) == layout_of(full)
    assert differing(dict(full.named_parameters()), dict(merged.named_parameters())) == []
    assert differing(dict(full.named_buffers()), dict(merged.named_buffers())) == []


def layout_of(model: nn.Module) -> list[Any]:
    modules = [
        (path, type(each), *(getattr(each, name, None) for name in ("num_embeddings", "padding_idx", "out_features")))
        for path, each in model.named_modules()
    ]
    return [modules, ties_of(model), [p.requires_grad for p in model.parameters()]]


def ties_of(model: nn.Module) -> list[tuple[str, str]]:
    """Each name of a parameter, with the first name that it has."""
    names: dict[int, str] = {}
    return [(name, names.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)]


def far_apart(expected: dict[str, Tensor], found: dict[str, Tensor], relative: float, floor: float = 1e-2) -> list[str]:
    """The names under which tensors differ by more than `relative` of their norm, or that only one of the two has.

    Tensors whose norm is below `floor` of the largest one are measured by that: some are zero but for rounding, which is
    about 1e-7 of what was added up.
    """
    if expected.keys() != found.keys():
        return sorted(expected.keys() ^ found.keys())
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items() if tensor.numel()}
    least = floor * max(norms.values(), default=0.0)
    return [
        f"{name}: {difference:.1e} of {norm:.1e}"
        for name, norm in norms.items()
        if not (difference := (found[name].double() - expected[name].double()).norm().item())
        <= relative * max(norm, least)
    ]


# --- a model beside its shrunk copy ------------------------------------------------------------------------------------


def check_outputs(full: nn.Module, lean: nn.Module, inputs: dict[str, Any]) -> None:
    expected, found = outputs(full, inputs, seed=7), outputs(lean, inputs, seed=7)
    assert len(expected) > 1, "a loss and logits"
    assert len(expected) == len(found)
    assert all(map(same_bits, expected, found))


def check_training(full: nn.Module, lean: nn.Module, inputs: dict[str, Any]) -> list[bool]:
    """Three steps of each; whether the norms of their gradients, which clipping sees, are equal to the last bit."""
    paths = [path for path, each in lean.named_modules() if isinstance(each, RemapEmbedding)]
    before = {path: full.get_submodule(path).weight.detach().clone() for path in paths}
    (losses, norms), (lean_losses, lean_norms) = (
        train_unclipped(model, inputs, 3, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0))
        for model in (full, lean)
    )
    assert np.isfinite(losses).all()
    assert losses == lean_losses
    assert norms == pytest.approx(lean_norms, rel=1e-5)
    assert any((full.get_submodule(path).weight != before[path]).any() for path in paths), (
        "no table took part in training"
    )
    return [first == second for first, second in zip(norms, lean_norms, strict=True)]


def check_files(full: Any, lean: Any, folder: Path) -> None:
    full.save_pretrained(folder / "full")
    lean.save_pretrained(folder / "lean")
    files = sorted(path.name for path in (folder / "full").iterdir())
    assert files == sorted(path.name for path in (folder / "lean").iterdir())
    assert "model.safetensors" in files
    for name in files:
        assert (folder / "full" / name).read_bytes() == (folder / "lean" / name).read_bytes(), name


def check_refusal(tiny: Tiny, lean: Any, error: type[LeanVocabError], message: str) -> None:
    """Refused when shrunk, or at the first forward; either way the model is whole (again)."""

    def shrink_and_run() -> None:
        shrink_(lean, vocabularies(tiny))
        lean(**tiny.inputs)

    with pytest.raises(error, match=message):
        shrink_and_run()
    if any(isinstance(each, RemapEmbedding) for each in lean.modules()):
        merge_(lean)
    check_same(tiny.model, lean)
